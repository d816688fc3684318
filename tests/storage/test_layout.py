"""One module names the files and folders below a workflow's folder."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxflow.storage import layout
from tests.conftest import REPOSITORY

NAMES = {
    *(layout.ARTIFACTS, layout.STATE, layout.LOCKFILE, layout.WORKFLOW),
    *(layout.REPORT, layout.METRICS, layout.PAGE, layout.COMPARISON_PAGE),
    *(layout.TIMELINE, layout.TIMELINE_JOURNAL, layout.JOURNAL, layout.GRAPH, layout.DIGESTS),
}


def _typed_names(text: str) -> Iterator[str]:
    """Yield every string of a module that is one of the names or a path with one of them; prose is left out."""
    constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    names = [value for value in constants if isinstance(value, str) and " " not in value]
    yield from (name for name in names if NAMES.intersection(Path(name).parts))


@pytest.mark.parametrize("package", ["mlxflow", "tasks"])
def test_no_other_module_types_a_name_of_the_layout(package: str) -> None:
    modules = [path for path in sorted((REPOSITORY / package).rglob("*.py")) if path != Path(layout.__file__)]
    typed = {path.relative_to(REPOSITORY).as_posix(): list(_typed_names(path.read_text())) for path in modules}
    assert {name: found for name, found in typed.items() if found} == {}


def test_a_typed_name_is_found() -> None:
    assert list(_typed_names('x = root / "artifacts" / f"{name}/report.toml"')) == ["artifacts", "/report.toml"]


def test_folders_of_a_variant() -> None:
    assert layout.stage_folder("quantize:q4") == Path("artifacts/quantize/q4")
    assert layout.log_file(Path("job"), "quantize:q4") == Path("job/artifacts/logs/quantize-q4.log")
    assert layout.state_folder(Path("job")) == Path("job/artifacts/.mlxflow")


def test_report_files_are_those_of_stages_and_variants(tmp_path: Path) -> None:
    for folder in ("train", "quantize/q4", "train/deep/deeper"):
        place = tmp_path / "artifacts" / folder
        place.mkdir(parents=True)
        (place / "report.toml").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in layout.report_files(tmp_path)]
    assert found == ["artifacts/quantize/q4/report.toml", "artifacts/train/report.toml"]
