import os
from pathlib import Path

import pytest

from mlxflow.data.sources import PYTHON_STDLIB, builtin_files, builtin_identity, read_documents, source_files
from mlxflow.errors import SourceError
from mlxflow.identity import DigestCache


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_a_folder_is_walked_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    _write(tmp_path, "notes/b.txt", "notes/a/z.md", "notes/.hidden", "notes/.git/x", "other.txt")
    assert [p.as_posix() for p in source_files("notes", tmp_path)] == ["notes/a/z.md", "notes/b.txt"]


def test_a_glob_and_a_file_name_what_they_match(tmp_path: Path) -> None:
    _write(tmp_path, "b.txt", "a.txt", "a.md", "deep/c.txt")
    assert [p.as_posix() for p in source_files("*.txt", tmp_path)] == ["a.txt", "b.txt"]
    assert [p.as_posix() for p in source_files("**/*.txt", tmp_path)] == ["a.txt", "b.txt", "deep/c.txt"]
    assert [p.as_posix() for p in source_files("a.md", tmp_path)] == ["a.md"]
    assert source_files("none", tmp_path) == []


def test_a_folder_with_brackets_in_its_name_is_only_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "a[1]"
    _write(root, "b.txt")
    assert [p.as_posix() for p in source_files("*.txt", root)] == ["b.txt"]


@pytest.mark.parametrize("source", [".", "**/*.txt"])
def test_what_the_workflow_writes_is_no_source_of_its_own(tmp_path: Path, source: str) -> None:
    _write(tmp_path, "a.txt", "artifacts/logs/train.txt", "deep/artifacts/b.txt")
    assert [p.as_posix() for p in source_files(source, tmp_path)] == ["a.txt", "deep/artifacts/b.txt"]
    assert [p.as_posix() for p in source_files("artifacts/logs", tmp_path)] == ["artifacts/logs/train.txt"]


def test_the_standard_library_is_sorted_large_and_without_tests_or_packages() -> None:
    files = builtin_files(PYTHON_STDLIB)
    relative = [path.relative_to(Path(os.__file__).parent) for path in files]
    assert relative == sorted(relative, key=lambda path: path.as_posix())
    assert not {"test", "tests", "site-packages", "idle_test"} & {part for path in relative for part in path.parts}
    assert sum(path.stat().st_size for path in files) > 8_000_000


def test_an_unknown_corpus_is_told() -> None:
    with pytest.raises(SourceError) as caught:
        builtin_files("builtin:novels")
    assert str(caught.value) == "builtin:novels: no such built-in corpus. Known: builtin:python-stdlib."


def test_a_corpus_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "lib/a.py", "lib/b.py", "lib/os.py")
    monkeypatch.setattr(os, "__file__", str(tmp_path / "lib" / "os.py"))
    cache = DigestCache(tmp_path / "digests.json")
    before = builtin_identity(PYTHON_STDLIB, cache)
    os.utime(tmp_path / "lib/a.py", (1, 1))
    assert builtin_identity(PYTHON_STDLIB, cache) == before
    (tmp_path / "lib/a.py").write_text("another")
    assert builtin_identity(PYTHON_STDLIB, cache) != before


def test_a_file_is_a_document_and_a_byte_order_mark_is_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext\r\nmore")
    assert list(read_documents(tmp_path / "a.txt")) == ["text\r\nmore"]


def test_each_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\u2028", "id": 2}\n')
    assert list(read_documents(tmp_path / "a.jsonl")) == ["one", "two\u2028"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "two"', "not valid JSON (Expecting ',' delimiter: line 1 column 15 (char 14)). Fix the line."),
        ('{"txt": "two"}', 'expected an object with a "text". Fix the line.'),
        ('{"text": null}', 'expected an object with a "text". Fix the line.'),
        ('["text"]', 'expected an object with a "text". Fix the line.'),
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line)
    with pytest.raises(SourceError) as caught:
        list(read_documents(path))
    assert str(caught.value) == f"{path}:2: {said}"


def test_a_file_that_is_not_utf_8_is_told_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(SourceError) as caught:
        list(read_documents(path))
    assert str(caught.value) == (
        f"{path}: byte 3 is not UTF-8. Save the file as UTF-8 or leave it out of pretokenize.sources."
    )
