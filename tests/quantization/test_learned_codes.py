from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.quantization.codec import Packed
from mlxflow.quantization.learned_codes import LearnedCodes, learned_once
from mlxflow.storage.observed_inputs import ObservedInputs
from mlxflow.storage.run_context import Context


def _context(folder: Path, **provenance: str) -> Context:
    given: dict[str, Any] = dict.fromkeys(("state", "folder", "unfinished", "root"), folder)
    given |= {"task": "quantize", "seed": 0, "device": "cpu", "memory_limit_bytes": 10**9, "name": "tiny"}
    return Context(
        **given, provenance=provenance, tasks=(), members=(), digests=ObservedInputs(folder / "digests.json")
    )


def _learn() -> LearnedCodes:
    codes = Packed(mx.arange(4, dtype=mx.uint32), mx.array([0.5], mx.bfloat16), mx.array([0.25]))
    return LearnedCodes({"a.b": codes, "c": codes._replace(biases=None)}, (0.1, 1 / 3))


def _refuse() -> LearnedCodes:
    raise AssertionError("it is learned again")


def test_what_was_learned_is_read_by_the_next_run_to_the_bit(tmp_path: Path) -> None:
    learned_once(tmp_path, _context(tmp_path, mlx="1"), _learn)
    again = learned_once(tmp_path, _context(tmp_path, mlx="1"), _refuse)
    expected = _learn()
    assert again.figures == expected.figures
    assert again.packed.keys() == expected.packed.keys()
    for path, codes in expected.packed.items():
        for own, other in zip(codes, again.packed[path], strict=True):
            if own is None or other is None:
                assert own is other
            else:
                assert own.dtype == other.dtype
                assert mx.array_equal(own, other)


def test_codes_of_another_origin_are_not_used(tmp_path: Path) -> None:
    learned_once(tmp_path, _context(tmp_path, mlx="1"), _learn)
    with pytest.raises(AssertionError, match="learned again"):
        learned_once(tmp_path, _context(tmp_path, mlx="2"), _refuse)


@pytest.mark.parametrize("name", ["codes.safetensors", "facts.json"])
def test_damaged_codes_are_reported_and_learned_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    context = _context(tmp_path, mlx="1")
    learned_once(tmp_path, context, _learn)
    file = tmp_path / "learned" / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    learned_once(tmp_path, context, _learn)
    reason = "codes.safetensors is not what was written" if name[0] == "c" else "its bytes do not fit its checksum"
    facts = tmp_path / "learned/facts.json"
    assert capsys.readouterr().err == f"{facts}: not valid state ({reason}). The layers are learned again.\n"
    learned_once(tmp_path, context, _refuse)
