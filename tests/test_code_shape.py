"""Limits on the size of modules, classes and functions, and tests at the mirrored path of what they test.

The tables of exceptions may only shrink: an entry that is no longer needed fails, and so does one that has grown.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxflow.workflow.loader import STAGES
from tests.conftest import REPOSITORY

LIMITS = {"module lines": 350, "function lines": 60, "class lines": 250, "complexity": 15, "parameters": 8}

#: What still exceeds a limit: its largest allowed value.
EXCEPTIONS: dict[str, int] = {
    "tasks/run.py:StageRun._execute parameters": 12,
}

#: Modules without tests/<package>/test_<module>.py: tested through the module's users, in the test named here.
TESTED_ELSEWHERE: dict[str, str] = {
    "mlxflow/data/chat_compiler.py": "tests/data/test_chat.py",
    "mlxflow/data/chat_tracing.py": "tests/data/test_chat_turns.py",
    "mlxflow/data/chatml.py": "tests/data/test_chat.py",
    "mlxflow/data/control_tokens.py": "tests/stages/test_chats.py",
    "mlxflow/data/conversations.py": "tests/data/test_chat.py",
    "mlxflow/data/corpus_report.py": "tests/stages/test_pretokenize.py",
    "mlxflow/data/corpus_tables.py": "tests/stages/test_pretokenize.py",
    "mlxflow/data/data_sets.py": "tests/stages/test_pretokenize.py",
    "mlxflow/data/document_encoder.py": "tests/stages/test_chats.py",
    "mlxflow/data/documents.py": "tests/data/test_chat.py",
    "mlxflow/data/end_tokens.py": "tests/stages/test_chats.py",
    "mlxflow/data/guarded_tokenizer.py": "tests/report/test_samples.py",
    "mlxflow/data/held_out_questions.py": "tests/report/test_samples.py",
    "mlxflow/data/input_files.py": "tests/stages/test_pretokenize.py",
    "mlxflow/data/items.py": "tests/data/test_records.py",
    "mlxflow/data/job.py": "tests/stages/test_pretokenize.py",
    "mlxflow/data/messages.py": "tests/data/test_hostile_data.py",
    "mlxflow/data/shard_builder.py": "tests/stages/test_pretokenize.py",
    "mlxflow/data/shortage.py": "tests/stages/test_pretokenize.py",
    "mlxflow/data/tokenizer_choice.py": "tests/stages/test_pretokenize.py",
    "mlxflow/data/tokenizer_sample.py": "tests/stages/test_pretokenize.py",
    "mlxflow/distributed/rank_start.py": "tests/distributed/test_launcher.py",
    "mlxflow/distributed/running_rank.py": "tests/distributed/test_launcher.py",
    "mlxflow/distributed/ssh_link.py": "tests/distributed/test_remote_rank.py",
    "mlxflow/evaluation/job.py": "tests/stages/test_evaluate.py",
    "mlxflow/evaluation/model_server.py": "tests/cli/test_serve.py",
    "mlxflow/evaluation/task_inputs.py": "tests/stages/test_evaluate.py",
    "mlxflow/evaluation/task_table.py": "tests/stages/test_evaluate.py",
    "mlxflow/kernels/attention_source.py": "tests/kernels/test_nvrtc.py",
    "mlxflow/kernels/attention_tiles.py": "tests/kernels/test_nvrtc.py",
    "mlxflow/kernels/language_definitions.py": "tests/kernels/test_nvrtc.py",
    "mlxflow/kernels/layer_patterns.py": "tests/kernels/test_layer_patching.py",
    "mlxflow/kernels/model_kernels.py": "tests/stages/test_kernels.py",
    "mlxflow/kernels/rms_norm_source.py": "tests/kernels/test_nvrtc.py",
    "mlxflow/kernels/verification_inputs.py": "tests/kernels/test_verification_cases.py",
    "mlxflow/models/gguf_token_rules.py": "tests/models/test_gguf_tokenizer.py",
    "mlxflow/models/gguf_vocabulary.py": "tests/models/test_gguf_tokenizer.py",
    "mlxflow/quantization/bit_allocation.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/budget_choice.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/dense_model.py": "tests/stages/test_model_folders.py",
    "mlxflow/quantization/job.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/learning.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/mlx_lm_patches.py": "tests/quantization/test_calibrated.py",
    "mlxflow/quantization/plan_choice.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/quantization_request.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/rotation_choice.py": "tests/quantization/test_rotations.py",
    "mlxflow/quantization/quality.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/size_report.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/start_grid.py": "tests/stages/test_quantize.py",
    "mlxflow/quantization/table_checks.py": "tests/test_number_bounds.py",
    "mlxflow/quantization/table_requests.py": "tests/stages/test_quantize.py",
    "mlxflow/report/evaluation_figures.py": "tests/stages/test_evaluate.py",
    "mlxflow/report/stage_reports/evaluate.py": "tests/stages/test_evaluate.py",
    "mlxflow/report/stage_reports/export.py": "tests/stages/test_export.py",
    "mlxflow/workflow/artifact_card.py": "tests/stages/test_export.py",
    "mlxflow/training/job.py": "tests/stages/test_train.py",
    "mlxflow/training/lora_config.py": "tests/stages/test_fuse.py",
    "mlxflow/training/setting_checks.py": "tests/test_number_bounds.py",
    "mlxflow/training/starting_model.py": "tests/stages/test_finetune.py",
    "mlxflow/training/table_job.py": "tests/stages/test_train.py",
    "mlxflow/tracking/follower.py": "tests/tracking/test_live.py",
    "mlxflow/tracking/request.py": "tests/tracking/test_reporting.py",
    "mlxflow/tracking/trackers.py": "tests/tracking/test_reporting.py",
    "mlxflow/tracking/worker.py": "tests/tracking/test_reporting.py",
    "mlxflow/workflow/remote_files.py": "tests/distributed/test_remote_rank.py",
}

_DECISIONS = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert, ast.comprehension)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def _complexity(function: ast.AST) -> int:
    """Return the cyclomatic complexity: one and the decisions, those of inner functions included."""
    total = 1
    for node in ast.walk(function):
        total += isinstance(node, (*_DECISIONS, ast.match_case))
        if isinstance(node, ast.comprehension):
            total += len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
    return total


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    bound = bool(positional) and positional[0].arg in ("self", "cls")
    return len(positional) + len(arguments.kwonlyargs) - bound


def measured(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield a name, what is measured and its value, for a module and all functions and classes in it."""
    yield "", "module lines", len(text.splitlines())

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, int]]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
                name = f"{prefix}.{child.name}" if prefix else child.name
                lines = (child.end_lineno or 0) - child.lineno + 1
                if isinstance(child, ast.ClassDef):
                    yield name, "class lines", lines
                else:
                    yield name, "function lines", lines
                    yield name, "complexity", _complexity(child)
                    yield name, "parameters", _parameters(child)
            yield from visit(child, name)

    yield from visit(ast.parse(text), "")


@functools.cache
def _excesses() -> dict[str, int]:
    found: dict[str, int] = {}
    for path in _modules("mlxflow", "tasks", "benchmarks"):
        file = path.relative_to(REPOSITORY).as_posix()
        for name, measure, value in measured(path.read_text(encoding="utf-8")):
            if value > LIMITS[measure]:
                key = f"{file}{':' * bool(name)}{name} {measure}"
                found[key] = max(value, found.get(key, 0))
    return found


def test_modules_classes_and_functions_stay_within_the_limits() -> None:
    grown = {key: value for key, value in _excesses().items() if value > EXCEPTIONS.get(key, 0)}
    assert not grown, "split these by meaning"


def test_exceptions_from_the_limits_are_still_needed() -> None:
    assert not EXCEPTIONS.keys() - _excesses().keys(), "remove these from EXCEPTIONS"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(self, a, *, b):\n    return a if b else 0\n", {"function lines": 2, "complexity": 2, "parameters": 2}),
        ("def f():\n    return [x for x in y if x and z]\n", {"complexity": 4, "parameters": 0}),
        ("class A:\n    def f(self): ...\n", {"class lines": 2, "function lines": 1, "module lines": 2}),
        ("def f():\n    def g():\n        while 1: ...\n", {"complexity": 2}),
    ],
)
def test_code_measures_count_lines_parameters_and_branches(text: str, expected: dict[str, int]) -> None:
    found: dict[str, int] = {}
    for _, measure, value in measured(text):
        found[measure] = max(value, found.get(measure, 0))
    assert {measure: found[measure] for measure in expected} == expected


def _mirrored(module: Path) -> Path:
    inner = module.relative_to(REPOSITORY / "mlxflow")
    return REPOSITORY / "tests" / inner.parent / f"test_{inner.name}"


def test_every_module_has_a_test_at_the_mirrored_path_or_is_listed() -> None:
    modules = [path for path in _modules("mlxflow") if not path.name.startswith("__")]
    lacking = {path.relative_to(REPOSITORY).as_posix() for path in modules if not _mirrored(path).exists()}
    listed = set(TESTED_ELSEWHERE)
    assert not lacking - listed, "add tests/<package>/test_<module>.py"
    assert not listed - lacking, "remove these from TESTED_ELSEWHERE"


def test_every_module_of_stages_is_a_stage() -> None:
    assert {path.stem for path in _modules("mlxflow/stages")} == {"__init__", *STAGES}


def test_modules_that_are_tested_elsewhere_name_a_test_that_exists() -> None:
    assert not [test for test in TESTED_ELSEWHERE.values() if not (REPOSITORY / test).exists()]


#: The names that every stage module has.
STAGE_CLASSES = {"Config", "Inputs", "Outputs"}


def repeated_class_names(texts: dict[str, str]) -> dict[str, list[str]]:
    """Return the class names that modules share, and where each is; a leading underscore makes no other name."""
    places: dict[str, list[str]] = {}
    for file, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and not (node.name in STAGE_CLASSES and "/stages/" in file):
                places.setdefault(node.name.lstrip("_"), []).append(file)
    return {name: files for name, files in places.items() if len(files) > 1}


def test_every_class_has_a_name_of_its_own() -> None:
    texts = {path.as_posix(): path.read_text(encoding="utf-8") for path in _modules("mlxflow", "tasks")}
    assert not repeated_class_names(texts)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"a.py": "class A: ...", "b.py": "class _A: ..."}, {"A": ["a.py", "b.py"]}),
        ({"a.py": "def f():\n    class A: ...\nclass A: ..."}, {"A": ["a.py", "a.py"]}),
        ({"m/stages/a.py": "class Config: ...", "m/stages/b.py": "class Config: ..."}, {}),
        ({"a.py": "class Config: ...", "b.py": "class Config: ..."}, {"Config": ["a.py", "b.py"]}),
    ],
)
def test_repeated_class_names(texts: dict[str, str], expected: dict[str, list[str]]) -> None:
    assert repeated_class_names(texts) == expected


#: The most packages of mlxflow, and the most pairs of them where the first imports the second.
MAX_PACKAGES, MAX_PACKAGE_IMPORTS = 22, 107


def package_imports(texts: dict[str, str]) -> dict[str, set[str]]:
    """Return for each package the other packages that its modules import, also inside functions.

    Args:
        texts: of modules, by their paths below mlxflow; a module that lies in no package counts as one.
    """
    imports: dict[str, set[str]] = {}
    for file, text in texts.items():
        package = file.removesuffix(".py").partition("/")[0]
        imported = {name.split(".")[1] for name in _imported(text) if name.startswith("mlxflow.")}
        imports.setdefault(package, set()).update(imported - {package})
    return imports


def _imported(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Return the packages that import each other, directly or through others."""
    reached = {package: set(others) for package, others in imports.items()}
    for package in reached:
        while further := {one for other in reached[package] for one in reached.get(other, ())} - reached[package]:
            reached[package] |= further
    return {package for package, others in reached.items() if package in others}


@functools.cache
def _packages() -> dict[str, set[str]]:
    texts = {
        path.relative_to(REPOSITORY / "mlxflow").as_posix(): path.read_text("utf-8") for path in _modules("mlxflow")
    }
    tasks = {path.relative_to(REPOSITORY).as_posix(): path.read_text("utf-8") for path in _modules("tasks")}
    return package_imports(texts | tasks)


def test_packages_and_their_imports_of_each_other_stay_few() -> None:
    imports = _packages()
    assert len(imports) <= MAX_PACKAGES, sorted(imports)
    assert sum(map(len, imports.values())) <= MAX_PACKAGE_IMPORTS, imports


def test_no_packages_import_each_other() -> None:
    assert not circles(_packages())


def test_package_imports_and_circles() -> None:
    texts = {
        "a/x.py": "import mlxflow.b.y\nfrom mlxflow.a import z",
        "b/y.py": "def f():\n    from mlxflow.c import w",
        "c/w.py": "from mlxflow import a, d",
        "d.py": "from mlxflow.messages.errors import MlxflowError",
    }
    imports = package_imports(texts)
    assert imports == {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"messages"}}
    assert circles(imports) == {"a", "b", "c"}
    assert circles({"a": {"b"}, "b": {"c"}}) == set()
