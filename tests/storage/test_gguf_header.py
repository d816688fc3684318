"""The head of GGUF files, whole and damaged."""

import struct
from pathlib import Path

import pytest
from gguf import GGUFWriter

from mlxflow.models.gguf_architectures import ARCHITECTURES
from mlxflow.storage import gguf_header
from mlxflow.storage.gguf_header import GgufHeader

DAMAGED = GgufHeader("", 0, "is no GGUF file, or is damaged")


def _write(path: Path, architecture: str) -> bytes:
    writer = GGUFWriter(path, architecture)
    writer.add_string("general.name", "a model")
    writer.add_array("general.tags", ["a", "b"])
    writer.add_context_length(512)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path.read_bytes()


def test_the_head_names_architecture_and_positions(tmp_path: Path) -> None:
    _write(tmp_path / "a.gguf", "qwen3")
    assert gguf_header.read(tmp_path / "a.gguf") == GgufHeader("qwen3", 512, "")
    _write(tmp_path / "b.gguf", "bert")
    expected = 'is of the architecture "bert", which cannot be read'
    assert gguf_header.read(tmp_path / "b.gguf") == GgufHeader("bert", 512, expected)


def test_a_file_that_is_cut_or_of_another_format_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    data = _write(path, "llama")
    for changed in (b"", data[:20], data[:60], b"GGML" + data[4:], data[:4] + struct.pack("<I", 1) + data[8:]):
        path.write_bytes(changed)
        assert gguf_header.read(path) == DAMAGED
    path.write_bytes(data[:24] + struct.pack("<Q", 1 << 40) + data[32:])  # the length of the first field's name
    assert gguf_header.read(path) == DAMAGED
    with pytest.raises(OSError, match="No such file"):
        gguf_header.read(tmp_path / "none.gguf")


def test_the_readable_architectures_are_those_of_the_table() -> None:
    assert tuple(one.name for one in ARCHITECTURES) == gguf_header.READABLE
    assert gguf_header.is_named("model.Q4_K_M.GGUF")
    assert not gguf_header.is_named("model.gguf/config.json")
