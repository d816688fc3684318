import glob
from pathlib import Path

import pytest

from mlxflow.storage.paths import escape_existing, expand, locate, printable, record_name, spelling, unset_variables


def test_home_and_variables_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of one")
    monkeypatch.setenv("MODELS", "/disk/models")
    assert expand("~/base") == "/home/of one/base"
    assert expand("$MODELS/base") == "/disk/models/base"
    assert expand("${MODELS}2/$MODELS") == "/disk/models2//disk/models"
    assert expand("plain ~ name") == "plain ~ name"


def test_a_variable_that_is_not_set_stays_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    monkeypatch.setenv("MODELS", "/disk/models")
    assert expand("$NO_SUCH/x") == "$NO_SUCH/x"
    assert unset_variables("$NO_SUCH/${NO_SUCH}/$MODELS/$") == ["$NO_SUCH"]


def test_paths_begin_at_the_workflow_unless_they_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/disk/models")
    assert locate("base", tmp_path) == tmp_path / "base"
    assert locate("../base", tmp_path) == tmp_path / "../base"
    assert locate("$MODELS/base", tmp_path) == Path("/disk/models/base")


@pytest.mark.parametrize("folder", ["project [v2]", "a*b", "what?", "[!x]", "**", "[", "notes"])
@pytest.mark.parametrize("is_absolute", [False, True])
def test_folders_that_exist_are_taken_literally(tmp_path: Path, folder: str, is_absolute: bool) -> None:
    for name in (folder, "project v", "axb", "whatt", "y"):  # what the patterns match
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").touch()
    pattern = f"{folder}/*.txt"
    if is_absolute:
        pattern = f"{tmp_path}/{pattern}"
    found = glob.glob(escape_existing(pattern, tmp_path), root_dir=tmp_path, recursive=True)  # noqa: PTH207
    assert [tmp_path / one for one in found] == [tmp_path / folder / "a.txt"]


def test_folders_that_do_not_exist_stay_patterns(tmp_path: Path) -> None:
    (tmp_path / "notes [1]").mkdir()
    assert escape_existing("notes*/*.txt", tmp_path) == "notes*/*.txt"
    assert escape_existing("notes [1]/**/*.txt", tmp_path) == "notes [[]1]/**/*.txt"
    assert escape_existing("*.txt", tmp_path) == "*.txt"


def test_a_printed_name_is_one_line() -> None:
    assert printable("a\nb\tc\udcffé 字") == "a\\nb\\tc\\xffé 字"


@pytest.mark.parametrize(
    ("name", "leading"),
    [
        ("~/base", ("/home/one", "~")),
        ("$DATA/texts/*.txt", ("/data", "$DATA")),
        ("$DATA", ("/data", "$DATA")),
        ("sub/${X}y/z", ("sub/xy", "sub/${X}y")),
        ("$DATA/a/$X", ("/data/a/x", "$DATA/a/$X")),
        ("plain/name", None),
        ("$NO_SUCH/x", None),
        ("$EMPTY/x", None),
    ],
)
def test_spelling_returns_the_expanded_leading_part(
    name: str, leading: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {"HOME": "/home/one", "DATA": "/data/", "X": "x", "EMPTY": ""}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("NO_SUCH", raising=False)
    assert spelling(name) == leading


def test_an_input_is_recorded_as_written_in_the_workflow() -> None:
    spellings = {"/data": "$DATA", "/data/deep": "$DEEP", "/home/one": "~"}
    assert record_name("/data/a.txt", spellings) == "$DATA/a.txt"
    assert record_name("/data/deep/a.txt", spellings) == "$DEEP/a.txt"
    assert record_name("/data", spellings) == "$DATA"
    assert record_name("/database/a.txt", spellings) == "/database/a.txt"
    assert record_name("notes/a.txt", spellings) == "notes/a.txt"
    assert record_name("/a.txt", {"/": "$ROOT"}) == "$ROOT/a.txt"


def test_recorded_names_are_utf_8_and_differ_where_the_files_do() -> None:
    names = ["a\udcff", "a\\xff", "a\\\\xff", "aÿ", "a\n", "a\\n", "字"]
    recorded = [record_name(name, {}) for name in names]
    assert recorded == ["a\\xff", "a\\\\xff", "a\\\\\\\\xff", "aÿ", "a\n", "a\\\\n", "字"]
    assert len({name.encode() for name in recorded}) == len(names)
