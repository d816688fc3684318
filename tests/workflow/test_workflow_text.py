import os
from pathlib import Path

import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.storage.toml_text import MAX_WORKFLOW_BYTES
from mlxflow.workflow import workflow_text


def _problem(path: Path, data: bytes | None = None) -> str:
    with pytest.raises(WorkflowError) as caught:
        workflow_text.read(path, "w.toml", data)
    return str(caught.value)


def test_read_returns_the_tables_of_the_file_or_of_the_given_bytes(tmp_path: Path) -> None:
    path = tmp_path / "workflow.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nnum_steps = 3\r\n")
    assert workflow_text.read(path, "w.toml").tables == {"train": {"num_steps": 3}}
    assert workflow_text.read(path, "w.toml", b"a = 1") == ("a = 1", {"a": 1})


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"a = 1\n b = ]\n", "w.toml:2:6: not valid TOML (Invalid value). Fix the line."),
        (b"a = 1\nb = ", "w.toml:2: not valid TOML (Invalid value). Fix the line or one before it."),
        (b"a = \xff", "w.toml: byte 4 is not UTF-8. Save the file as UTF-8."),
        (b"a = " + b"[" * 40 + b"]" * 40, "w.toml: not valid TOML (nested deeper than 32 levels). Fix the file."),
    ],
)
def test_invalid_toml_is_reported_with_its_position(tmp_path: Path, data: bytes, line: str) -> None:
    assert _problem(tmp_path / "w.toml", data) == line


def test_a_missing_file_a_pipe_and_a_long_file_are_refused(tmp_path: Path) -> None:
    assert _problem(tmp_path / "none") == "w.toml: missing. Write one (an empty file works), or name another."
    os.mkfifo(tmp_path / "pipe")
    assert _problem(tmp_path / "pipe") == "w.toml: is no regular file. Name a TOML file."
    (tmp_path / "long").write_bytes(b"#" * (MAX_WORKFLOW_BYTES + 1))
    assert _problem(tmp_path / "long").startswith(f"w.toml: has more than {MAX_WORKFLOW_BYTES:,} bytes. ")


def test_too_many_variants_or_values_are_refused(tmp_path: Path) -> None:
    numbers = ", ".join(map(str, range(40)))
    many = f"[quantize]\nmatrix = {{ a = [{numbers}], b = [{numbers}] }}\n".encode()
    assert _problem(tmp_path, many).startswith("w.toml: quantize: makes 1,600 variants: expected at most 1,000 ")
    values = ", ".join("1" for _ in range(400))
    large = f"[quantize]\nmatrix = {{ a = [{numbers}], b = [1, 2, 3, 4, 5, 6, 7, 8] }}\nc = [{values}]\n".encode()
    assert "values in all its variants: expected at most 100,000 of all stages." in _problem(tmp_path, large)
