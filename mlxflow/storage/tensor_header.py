"""Read and validate the header of a safetensors file, which MLX does not validate.

Imported by every `doit`: nothing heavy here.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxflow.messages.os_errors import naming

#: The longest header, for about 100,000 tensors. Each byte of it may take twenty of memory.
MAX_BYTES = 16 * 2**20

_MAX_DIMENSION, _MAX_SHOWN = 2**63 - 1, 100

# Bits per number, by the format's type names
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the offset of its tensors.

    Every tensor has a known type, a shape and the matching number of bytes, directly after the previous tensor.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is truncated, longer than its header says, or no safetensors file; or an entry of the
            header is invalid, and the message names the tensor.
    """
    with naming(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("its header is cut off, or it is no safetensors file")
        if length > MAX_BYTES:
            raise ValueError(f"its header has {length:,} bytes, more than {MAX_BYTES:,}")
        header = _parsed(file.read(length))
    metadata = header.get("__metadata__") or {}  # MLX writes null for no metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is no table of texts")
    end = 0
    for name, (begin, after) in tensor_offsets(header):
        if begin != end or after < begin:
            raise ValueError(f"tensor {shown(name)} does not begin where the one before it ends")
        _require_size(name, header[name], after - begin)
        end = after
    if 8 + length + end != size:
        raise ValueError(f"it has {size:,} bytes, its header says {8 + length + end:,}")
    return header, 8 + length


def encode_header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    """Return a header as JSON, without its length: type, shape and offsets by tensor, and metadata in sorted order."""
    # The safetensors library writes metadata in hash order, which differs between processes.
    header = {"__metadata__": dict(sorted(metadata.items())), **entries}
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data, object_pairs_hook=_each_once)
    except _TwiceError as error:
        raise ValueError(f"its header lists {shown(str(error))} twice") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    return header


class _TwiceError(Exception):
    """A key appears twice in a table."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return table


def tensor_offsets(header: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (begin, end)) of every tensor in the order of the file.

    Raises:
        ValueError: an entry has no offsets; names its tensor.
    """
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
            raise ValueError(f"tensor {shown(name)} has no valid data_offsets")
        spans.append((name, (offsets[0], offsets[1])))
    yield from sorted(spans, key=lambda span: (span[1], span[0]))


def _require_size(name: str, entry: Mapping[str, Any], num_bytes: int) -> None:
    """Check that a tensor's number of bytes matches its type and shape.

    Raises:
        ValueError: it does not, or type or shape are invalid.
    """
    kind, shape = entry.get("dtype"), entry.get("shape")
    bits = _BITS.get(kind) if isinstance(kind, str) else None
    if bits is None:
        raise ValueError(f"tensor {shown(name)} is of the unknown type {shown(kind)}")
    if not (isinstance(shape, list) and all(type(one) is int and 0 <= one <= _MAX_DIMENSION for one in shape)):
        raise ValueError(f"tensor {shown(name)} has no valid shape ({shown(shape)})")
    count = 1
    for one in sorted(shape):  # check for a zero first, to avoid a product of many large numbers
        count *= one
        if count * bits > num_bytes * 8:
            break
    if count * bits != num_bytes * 8:
        raise ValueError(f"tensor {shown(name)} of type {kind} and shape {shown(shape)} has {num_bytes:,} bytes")


def shown(value: object) -> str:
    """Return a value of a header on one line, shortened."""
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
