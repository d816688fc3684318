"""Any workflow file ends in a second or two and a few hundred megabytes: a workflow, or lines about what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.storage.toml_text import MAX_WORKFLOW_BYTES
from mlxflow.workflow import loader
from mlxflow.workflow.loader import load_workflow, resolved_toml

MATRIX = "[quantize.matrix]\nbits = [{0}]\ngroup_size = [{0}]\n".format(", ".join(["1"] * 3200))

BOMBS = {
    "a." * 2000 + "b = 1": "workflow.toml:1:1: not valid TOML (a key of more than 16 parts). Fix the line.",
    "# a\n[" + "'a' . " * 20 + "b]": "workflow.toml:2:2: not valid TOML (a key of more than 16 parts). Fix the line.",
    "a = { b.c.d.e.f.g = { " * 6 + "h = 1" + " } }" * 6: "workflow.toml: not valid TOML "
    "(nested deeper than 32 levels). Fix the file.",
    "a = " + "[" * 100 + "]" * 100: "workflow.toml: not valid TOML (nested deeper than 32 levels). Fix the file.",
    "a = " + "[" * 9999 + "]" * 9999: "workflow.toml: not valid TOML (nested too deeply). Fix the file.",
    "a = " + "9" * 5000: "workflow.toml: not valid TOML (a whole number of too many digits). Fix the file.",
    "[train]\nnum_steps = 0x" + "f" * 2000: f"workflow.toml: train.num_steps = 0x{'f' * 498} ... {'f' * 250}: "
    'expected "auto" or a whole number from 1 to 1_000_000_000. '
    'Use train.num_steps = "auto" (the default) or remove the key.',
    "[train]\nlearning_rate = 1e999": "workflow.toml: train.learning_rate = inf: "
    'expected "auto" or a number from 1e-12 to 1e+06. '
    'Use train.learning_rate = "auto" (the default) or remove the key.',
    f"[profile]\nnum_steps = 1{'0' * 30}": f"workflow.toml: profile.num_steps = 1{'0' * 30}: "
    "expected a whole number from 1 to 1_000_000_000. Use profile.num_steps = 20 (the default) or remove the key.",
    "[train.model]\nnum_layers = 10000000": "workflow.toml: train.model.num_layers = 10000000: "
    "expected a whole number from 1 to 1000. Use train.model.num_layers = 2 (the default) or remove the key.",
    "[[quantize]]\n" * 20_000: "workflow.toml: quantize: makes 20,000 variants: expected at most 1,000 of all stages. "
    "Shorten the lists of its matrix, or split the file.",
    MATRIX: "workflow.toml: quantize: makes 10,240,000 variants: expected at most 1,000 of all stages. "
    "Shorten the lists of its matrix, or split the file.",
    "[train]\noptimizer_options = { eps = [" + "1, " * 500 + "] }\nmatrix = { num_steps = [" + "1, " * 500 + "] }": (
        "workflow.toml: train: has 502,500 values in all its variants: expected at most 100,000 of all stages. "
        "Shorten its lists or its matrix, or split the file."
    ),
    "#" * (MAX_WORKFLOW_BYTES + 1): "workflow.toml: has more than 262,144 bytes. "
    "Name folders or globs instead of single files, or split it.",
}


@pytest.mark.parametrize("text", BOMBS, ids=[str(number) for number in range(len(BOMBS))])
def test_a_file_out_of_bounds_is_refused_in_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("workflow.toml").write_text(text)
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value) == BOMBS[text]


def test_every_file_ends_within_bounds_of_time_and_memory(tmp_path: Path) -> None:
    size = MAX_WORKFLOW_BYTES
    texts = [
        *BOMBS,
        "\n".join(f"{number:x} = 1" for number in range(size // 10)),
        "[train]\n" + "\n".join(f"num_steps{number:x} = 1" for number in range(size // 19)),
        "[pretokenize]\nsources = [" + '"a", ' * (size // 6) + "]",
        "[pretokenize]\nsources = [" + "[], " * (size // 5) + "]",
        'a = """' + "\\n" * (size // 3),
        "a." * (size // 3) + "b = 1",
        "\n".join(f"{'a.' * 14}b{number} = 1" for number in range(size // 40)),
        '[[quantize]]\nname = "q"\nbits = 99\n' * 1000,
        "[train]\nexclude = [" + "{ a = 1 }, " * 5000 + "]\nmatrix = { num_steps = [" + "1, " * 900 + "] }",
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.toml").write_text(text)
    script = (
        "import resource, sys, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"  # a key of 130,000 parts alone takes longer by tomllib
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from mlxflow.messages.errors import WorkflowError\n"
        "from mlxflow.workflow.loader import load_workflow\n"
        "for path in sorted(pathlib.Path('.').glob('*.toml')):\n"
        "    try: load_workflow(path)\n"
        "    except WorkflowError as error: assert 0 < len(error.problems) <= 101, path\n"
        "    else: raise AssertionError(path)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_of_many_errors_only_the_first_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("workflow.toml").write_text("".join(f"[x{number}]\n" for number in range(1500)))
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert len(caught.value.problems) == 101
    assert caught.value.problems[-1] == "workflow.toml: 1,400 more mistakes. Fix these first."


def test_a_pipe_is_no_workflow_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("workflow.toml")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value) == "workflow.toml: is no regular file. Name a TOML file."


def _calls(folder: Path, num_variants: int) -> int:
    """Return how many functions are called to read a workflow of so many variants, and to write it out resolved."""
    path = folder / f"{num_variants}.toml"
    third = range(num_variants // 3)
    path.write_text(
        '[pretokenize]\nsources = ["notes.txt"]\n'
        + "".join(
            f'[[train]]\nname = "t{one}"\n[[quantize]]\nname = "q{one}"\ninput = "train:t{one}"\n' for one in third
        )
        + "".join(f'[[profile]]\nname = "p{one}"\ninput = "train:t{one}"\n' for one in third)
        + '[benchmark]\ninput = "train:t0"\nmodels = ["quantize:*"]\n'
    )
    count = 0

    def counted(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        resolved = load_workflow(path)
        for one in resolved.stages:
            resolved.trusts_code(resolved.find(one.task))
        resolved_toml(resolved)
    finally:
        sys.setprofile(before)
    return count


def test_the_work_for_a_file_is_proportionate_to_its_variants(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some text")
    _calls(tmp_path, 30)  # what is imported and remembered once
    few, many = _calls(tmp_path, 60), _calls(tmp_path, 240)
    assert many < 4.4 * few


def test_very_many_files_read_by_many_variants_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loader, "_MAX_FILES", 100)
    Path("notes.txt").write_text("some text")
    Path("workflow.toml").write_text(
        '[pretokenize]\nsources = ["notes.txt"]\n' + "".join(f'[[profile]]\nname = "p{one}"\n' for one in range(99))
    )
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value) == (
        "workflow.toml: profile[31]: the stages up to here read 101 files: expected at most 100. "
        "Let fewer variants read many files, or split the workflow."
    )
