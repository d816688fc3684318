import json
import re
from pathlib import Path

import pytest

from mlxflow.storage.tensor_header import encode_header, read_safetensors_header, tensor_offsets


def _write(path: Path, entries: dict[str, object], data: bytes) -> Path:
    header = encode_header(entries, {"b": "2", "a": "1"})
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_an_encoded_header_is_read_unchanged(tmp_path: Path) -> None:
    entries: dict[str, object] = {"x": _entry("U8", [3], 0, 3), "y": _entry("BF16", [2, 1], 3, 7)}
    path = _write(tmp_path / "a.safetensors", entries, bytes(7))
    header, begin = read_safetensors_header(path)
    assert header == {"__metadata__": {"a": "1", "b": "2"}, **entries}
    assert begin == path.stat().st_size - 7
    assert list(tensor_offsets(header)) == [("x", (0, 3)), ("y", (3, 7))]


def test_metadata_is_encoded_in_sorted_order() -> None:
    assert encode_header({}, {"b": "2", "a": "1"}) == b'{"__metadata__":{"a":"1","b":"2"}}'


@pytest.mark.parametrize(
    ("entries", "size", "expected"),
    [
        ({"x": _entry("U8", [3], 1, 4)}, 4, "tensor 'x' does not begin where the one before it ends"),
        (
            {"x": _entry("U8", [3], 0, 3), "y": _entry("U8", [3], 2, 5)},
            5,
            "tensor 'y' does not begin where the one before it ends",
        ),
        ({"x": _entry("F32", [3], 0, 3)}, 3, "tensor 'x' of type F32 and shape [3] has 3 bytes"),
        ({"x": _entry("F33", [3], 0, 12)}, 12, "tensor 'x' is of the unknown type 'F33'"),
        ({"x": _entry("U8", [-3], 0, 3)}, 3, "tensor 'x' has no valid shape ([-3])"),
        ({"x": _entry("U8", [3], 0, 3)}, 4, "bytes, its header says"),
    ],
)
def test_a_header_that_does_not_fit_its_data_is_an_error(
    tmp_path: Path, entries: dict[str, object], size: int, expected: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_safetensors_header(_write(tmp_path / "a.safetensors", entries, bytes(size)))


def test_a_tensor_listed_twice_is_an_error(tmp_path: Path) -> None:
    entry = json.dumps(_entry("U8", [1], 0, 1))
    header = f'{{"x":{entry},"x":{entry}}}'.encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    with pytest.raises(ValueError, match="its header lists 'x' twice"):
        read_safetensors_header(tmp_path / "a")
