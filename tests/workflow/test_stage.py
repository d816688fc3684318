import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import cast

import msgspec
import pytest

from mlxflow.workflow.loader import STAGES, load_workflow
from mlxflow.workflow.stage import StageModule, paths_of, rooted, stage_name, summary

MODULES = {name: cast("StageModule", importlib.import_module(f"mlxflow.stages.{name}")) for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_module_keeps_the_contract(name: str) -> None:
    module = MODULES[name]
    assert stage_name(module) == name
    assert isinstance(module.VERSION, int)
    assert callable(module.run)
    for struct in (module.Config, module.Inputs, module.Outputs):
        assert issubclass(struct, msgspec.Struct)
        assert struct.__struct_config__.frozen
    assert module.Config.__struct_config__.forbid_unknown_fields


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_writes_a_report_and_only_into_its_own_folder(name: str) -> None:
    outputs = list(paths_of(MODULES[name].Outputs()))
    assert Path("report.toml") in outputs
    assert not any(path.is_absolute() or ".." in path.parts for path in outputs)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_a_one_line_description(name: str) -> None:
    line = summary(MODULES[name])
    assert 10 < len(line) < 90
    assert not line.endswith(".")


@pytest.mark.parametrize("name", STAGES)
def test_every_key_has_a_default_and_help(name: str) -> None:
    def check(struct: type[msgspec.Struct]) -> None:
        for field in msgspec.inspect.type_info(struct).fields:  # type: ignore[attr-defined]
            assert not field.required, field.name
            schema = field.type.extra_json_schema if isinstance(field.type, msgspec.inspect.Metadata) else None
            assert schema, field.name
            assert schema["description"], field.name
        for nested in (f.type for f in msgspec.structs.fields(struct)):
            if isinstance(nested, type) and issubclass(nested, msgspec.Struct):
                check(nested)

    check(MODULES[name].Config)


@pytest.mark.parametrize("name", STAGES)
def test_inputs_are_relative_to_the_workflow(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a note")
    path = tmp_path / "workflow.toml"
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "answer": "b"}')
    tables = "[quantize]\n[export]\n[profile]\n[benchmark]\n[report]\n[evaluate]\ntasks = ['q.jsonl']"
    path.write_text(f'[pretokenize]\nsources = ["notes.txt"]\n{tables}')
    one = load_workflow(path).find(name)
    assert one.input_files
    assert not any(file.is_absolute() for file in one.input_files)


def test_importing_every_stage_imports_nothing_heavy() -> None:
    script = (
        "import sys, json, mlxflow.workflow.loader, importlib\n"
        f"for name in {STAGES!r}: importlib.import_module('mlxflow.stages.' + name)\n"
        "print(json.dumps([m for m in ('mlx', 'mlx_lm', 'numpy', 'safetensors', 'tokenizers', 'transformers', "
        "'rich', 'psutil') if m in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []


class _Paths(msgspec.Struct, frozen=True):
    one: Path = Path("a")
    several: tuple[Path, ...] = (Path("b"), Path("c"))
    named: dict[str, Path] = msgspec.field(default_factory=lambda: {"d": Path("d")})
    text: str = "untouched"


def test_rooted_changes_paths_only(tmp_path: Path) -> None:
    moved = rooted(_Paths(), tmp_path)
    assert list(paths_of(moved)) == [tmp_path / name for name in "abcd"]
    assert moved.text == "untouched"
