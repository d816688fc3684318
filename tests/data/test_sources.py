import os
from pathlib import Path

import pytest

from mlxflow.data.sources import PYTHON_STDLIB, SourceFiles, builtin_files, corpus_identity, find, source_files
from mlxflow.messages.errors import SourceError
from mlxflow.storage.digests import DigestCache


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def _names(found: SourceFiles) -> list[str]:
    return [path.as_posix() for path in found.files]


def test_a_folder_is_walked_in_sorted_order_and_skipped_files_are_counted(tmp_path: Path) -> None:
    _write(tmp_path, "notes/b.txt", "notes/a/z.md", "notes/.hidden", "notes/.git/x", "notes/photo.JPG", "other.txt")
    found = find("notes", tmp_path)
    assert _names(found) == ["notes/a/z.md", "notes/b.txt"]
    assert found[1:] == (2, 1, 0, 0)


def test_a_glob_and_a_path_match_files(tmp_path: Path) -> None:
    _write(tmp_path, "b.txt", "a.txt", "a.md", "deep/c.txt")
    assert _names(find("*.txt", tmp_path)) == ["a.txt", "b.txt"]
    assert _names(find("**/*.txt", tmp_path)) == ["a.txt", "b.txt", "deep/c.txt"]
    assert _names(find("a.md", tmp_path)) == ["a.md"]
    assert source_files("none", tmp_path) == []


def test_brackets_in_a_folder_name_are_no_pattern(tmp_path: Path) -> None:
    root = tmp_path / "a[1]"
    _write(root, "b.txt")
    assert _names(find("*.txt", root)) == ["b.txt"]


def test_home_and_variables_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, other = tmp_path / "project", tmp_path / "other [v2]"
    _write(other, "a.txt", "set/data-0.arrow")
    root.mkdir()
    monkeypatch.setenv("HOME", str(other))
    monkeypatch.setenv("OTHER", str(other))
    for source in ("~", "~/a.txt", "$OTHER/*.txt", "${OTHER}/**/a.*"):
        assert str(other / "a.txt") in _names(find(source, root)), source
    assert _names(find("hf:$OTHER/set", root)) == [str(other / "set/data-0.arrow")]
    assert _names(find("$OTHER/none", root)) == []


def test_a_name_found_on_the_disk_is_not_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER", "elsewhere")
    _write(tmp_path, "notes/$OTHER.txt", "notes/~")
    assert _names(find("notes", tmp_path)) == ["notes/$OTHER.txt", "notes/~"]


def test_links_are_followed_each_folder_once_and_circles_end(tmp_path: Path) -> None:
    _write(tmp_path, "notes/a.txt", "elsewhere/b.txt")
    for name, target in (
        ("notes/more", "../elsewhere"),
        ("notes/again", "../elsewhere"),
        ("notes/up", ".."),
        ("notes/self", "self"),
        ("notes/nowhere", "gone"),
        ("elsewhere/back", "../notes"),
    ):
        (tmp_path / name).symlink_to(target)
    found = find("notes", tmp_path)
    assert sorted(path.name for path in found.files) == ["a.txt", "b.txt"]
    assert found.broken_links == 2


def test_a_source_that_is_a_circular_link_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        find("loop", tmp_path)


def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    _write(tmp_path, "notes/a.txt", "notes/locked/b.txt")
    (tmp_path / "notes/locked").chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        for folder in (tmp_path, *tmp_path.parents[:-1]):
            folder.chmod(folder.stat().st_mode | 0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as caught:
            find("notes", tmp_path)
    finally:
        os.seteuid(user)
        (tmp_path / "notes/locked").chmod(0o755)
    assert caught.value.filename == str(tmp_path / "notes/locked")


@pytest.mark.parametrize("source", [".", "**/*.txt"])
def test_files_written_by_the_workflow_are_not_sources(tmp_path: Path, source: str) -> None:
    _write(tmp_path, "a.txt", "artifacts/logs/train.txt", "deep/artifacts/b.txt")
    assert _names(find(source, tmp_path)) == ["a.txt", "deep/artifacts/b.txt"]
    assert _names(find("artifacts/logs", tmp_path)) == ["artifacts/logs/train.txt"]


@pytest.mark.parametrize("spelling", ["{root}", "{root}/**/*.txt", "../project", "../project/**/*.txt", "notes/.."])
def test_files_written_by_the_workflow_are_not_sources_in_any_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    root = tmp_path / "project"
    _write(root, "notes/a.txt", "artifacts/logs/train.txt", "mlxflow.lock")
    monkeypatch.chdir(root)
    source = spelling.format(root=root)
    for place in (root, Path()):
        assert [path.name for path in find(source, place).files] == ["a.txt"]
    assert [path.name for path in find(f"{root}/artifacts/logs", Path()).files] == ["train.txt"]


def test_from_a_data_set_with_splits_only_record_files_are_read(tmp_path: Path) -> None:
    _write(tmp_path, "data/train.jsonl", "data/valid.jsonl", "data/more.csv", "data/readme.md", "data/LICENSE")
    _write(tmp_path, "other/train.jsonl", "other/readme.md")
    found = find("data", tmp_path)
    assert _names(found) == ["data/more.csv", "data/train.jsonl", "data/valid.jsonl"]
    assert found.beside_records == 2
    assert _names(find("other", tmp_path)) == ["other/readme.md", "other/train.jsonl"]


def test_a_data_set_is_every_file_of_its_folder(tmp_path: Path) -> None:
    _write(tmp_path, "set/data-0.arrow", "set/state.json", "set/part.bin")
    assert _names(find("hf:set", tmp_path)) == ["set/data-0.arrow", "set/part.bin", "set/state.json"]
    assert _names(find("hf:owner/name", tmp_path)) == []


def test_the_standard_library_corpus_is_sorted_large_and_without_tests() -> None:
    files = builtin_files(PYTHON_STDLIB)
    relative = [path.relative_to(Path(os.__file__).parent) for path in files]
    assert relative == sorted(relative, key=lambda path: path.as_posix())
    assert not {"test", "tests", "site-packages", "idle_test"} & {part for path in relative for part in path.parts}
    assert sum(path.stat().st_size for path in files) > 8_000_000


def test_an_unknown_corpus_is_an_error() -> None:
    with pytest.raises(SourceError) as caught:
        builtin_files("builtin:novels")
    assert str(caught.value) == "builtin:novels: no such built-in corpus. Known: builtin:python-stdlib."


def test_a_corpus_is_identified_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "lib/a.py", "lib/b.py", "lib/os.py")
    monkeypatch.setattr(os, "__file__", str(tmp_path / "lib" / "os.py"))
    cache = DigestCache(tmp_path / "digests.json")
    before = corpus_identity(PYTHON_STDLIB, cache)
    os.utime(tmp_path / "lib/a.py", (1, 1))
    assert corpus_identity(PYTHON_STDLIB, cache) == before
    (tmp_path / "lib/a.py").write_text("another")
    assert corpus_identity(PYTHON_STDLIB, cache) != before


def test_a_hub_data_set_is_identified_by_its_revision(tmp_path: Path) -> None:
    cache = DigestCache(tmp_path / "digests.json")
    assert corpus_identity("hf:owner/name@1", cache) == corpus_identity("hf:owner/name@1", cache)
    assert corpus_identity("hf:owner/name@1", cache) != corpus_identity("hf:owner/name@2", cache)
