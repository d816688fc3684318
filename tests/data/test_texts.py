from pathlib import Path

import pytest

from mlxflow.data.decompression import FileProblem
from mlxflow.data.records import Binary, PlainText, Record
from tests.data.test_records import _pieces, _problem, _read, _write


@pytest.mark.parametrize("size", [8, 13, 64, 4096])
@pytest.mark.parametrize(
    "text",
    [
        "one line\nand another\n" * 20,
        "no line at all " * 20,
        "é🙂" * 50,
        "x" * 64,
        "x" * 63 + "\n",
        "first\r\nsecond\r\n" * 8,
    ],
)
def test_a_text_is_read_in_pieces_that_add_up_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, size: int
) -> None:
    _pieces(monkeypatch, size)
    found = [item for item in _read(_write(tmp_path, "a.txt", text.encode())) if isinstance(item, PlainText)]
    assert "".join(item.text for item in found) == text
    assert [item.begins for item in found] == [True] + [False] * (len(found) - 1)
    assert [item.ends for item in found] == [False] * (len(found) - 1) + [True]
    if "\n" in text and size == 64:
        assert all(item.text.endswith("\n") for item in found[:-1])


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert _read(_write(tmp_path, "a.txt", mark + b"text")) == [PlainText("text", True, True)]
    assert _read(_write(tmp_path, "a.jsonl", mark + b'{"text": "a"}')) == [Record(1, {"text": "a"})]
    assert _read(_write(tmp_path, "a.json", mark + b'{"text": "a"}')) == [Record(1, {"text": "a"})]
    assert _read(_write(tmp_path, "a.csv", mark + b"text\na\n")) == [Record(2, {"text": "a"})]


@pytest.mark.parametrize("size", [64, 4096])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("at", [0, 5, 63, 64, 150])
def test_a_byte_that_is_not_utf_8_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, mark: bytes, size: int
) -> None:
    _pieces(monkeypatch, size)
    data = mark + b"abcdefg\n" * 30
    path = _write(tmp_path, "a.txt", data[: len(mark) + at] + b"\xff" + data[len(mark) + at + 1 :])
    assert _problem(path) == f"byte {len(mark) + at:,} is not UTF-8. Save the file as UTF-8"


def test_a_nul_near_the_beginning_means_that_a_file_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Binary, match=r"^byte 3 is NUL: no text\. Leave the file out$"):
        _read(_write(tmp_path, "a.txt", b"abc\0def"))
    _pieces(monkeypatch, 1 << 14)
    with pytest.raises(FileProblem, match=r"^byte 40,000 is NUL\. Remove it$") as caught:
        _read(_write(tmp_path, "a.txt", b"a" * 40_000 + b"\0"))
    assert not isinstance(caught.value, Binary)


def test_utf_16_is_named_and_never_guessed(tmp_path: Path) -> None:
    for name, text in (("a.txt", "a text"), ("a.jsonl", '{"text": "NaN"}\n'), ("a.json", "[1]"), ("a.csv", "text\na")):
        for codec in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            said = _problem(_write(tmp_path, name, text.encode(codec)))
            assert said == f"is {codec[:6].upper()}, not UTF-8. Save the file as UTF-8", (name, codec)


def test_arrays_of_small_integers_are_binary_and_not_utf_16(tmp_path: Path) -> None:
    with pytest.raises(Binary):
        _read(_write(tmp_path, "a.txt", bytes([1, 0, 2, 0, 3, 0, 4, 0])))
