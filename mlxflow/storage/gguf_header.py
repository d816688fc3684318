"""The head of a GGUF file: architecture and sizes, read without any package, at every `doit`.

Format: `docs/gguf.md` of ggml. Fields of the tokenizer come after those of the model, and are not read.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

#: The suffix of the files.
SUFFIX = ".gguf"

#: llama.cpp's names of the architectures that can be read; see `mlxflow.models.gguf_architectures`.
READABLE = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "olmo2")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_FIELDS, _MOST_BYTES = 4096, 1 << 24


class GgufHeader(NamedTuple):
    """What a GGUF file says first.

    Attributes:
        architecture: llama.cpp's name.
        num_positions: that the model is made for; 0 if it does not say.
        problem: why the file cannot be read as a model; empty if it can.
    """

    architecture: str
    num_positions: int
    problem: str


def is_named(name: str) -> bool:
    """Return whether a text names a GGUF file."""
    return name.lower().endswith(SUFFIX)


def read(path: Path) -> GgufHeader:
    """Return what a GGUF file says first.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        try:
            fields = _read_fields(file)
        except (struct.error, ValueError):
            return GgufHeader("", 0, "is no GGUF file, or is damaged")
    architecture = str(fields.get("general.architecture", ""))
    positions = fields.get(f"{architecture}.context_length", 0)
    problem = "" if architecture in READABLE else f'is of the architecture "{architecture}", which cannot be read'
    return GgufHeader(architecture, positions if isinstance(positions, int) else 0, problem)


def _read_fields(file: BinaryIO) -> dict[str, Any]:
    """Return the fields with one value before those of the tokenizer.

    Raises:
        ValueError: the file is of another format.
        struct.error: it ends too early.
    """
    magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version not in (2, 3) or count > _MOST_FIELDS:
        raise ValueError("no GGUF file of version 2 or 3")
    fields: dict[str, Any] = {}
    for _ in range(count):
        name = _read_text(file)
        if name.startswith("tokenizer."):
            break
        fields[name] = _read_value(file, *struct.unpack("<I", file.read(4)))
    return fields


def _read_text(file: BinaryIO) -> str:
    (size,) = struct.unpack("<Q", file.read(8))
    if size > _MOST_BYTES:
        raise ValueError("a text of a damaged length")
    return file.read(size).decode()


def _read_value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _read_text(file)
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise ValueError("a field of an unknown type")
        form = f"<{_SCALARS[kind]}"
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]
    inner, count = struct.unpack("<IQ", file.read(12))
    if count > _MOST_BYTES:
        raise ValueError("an array of a damaged length")
    return [_read_value(file, inner) for _ in range(count)]
