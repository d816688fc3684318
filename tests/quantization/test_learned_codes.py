from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.quantization.codec import Packed
from mlxflow.quantization.learned_codes import BlockStore, LearnedCodes, blocks_kept, has_learned, learned_once


def _learn() -> LearnedCodes:
    codes = Packed(mx.arange(4, dtype=mx.uint32), mx.array([0.5], mx.bfloat16), mx.array([0.25]))
    return LearnedCodes({"a.b": codes, "c": codes._replace(biases=None)}, (0.1, 1 / 3))


def _refuse() -> LearnedCodes:
    raise AssertionError("it is learned again")


def test_what_was_learned_is_read_by_the_next_run_to_the_bit(tmp_path: Path) -> None:
    learned_once(tmp_path, "1", _learn, task="quantize")
    again = learned_once(tmp_path, "1", _refuse, task="quantize")
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
    learned_once(tmp_path, "1", _learn, task="quantize")
    with pytest.raises(AssertionError, match="learned again"):
        learned_once(tmp_path, "2", _refuse, task="quantize")


@pytest.mark.parametrize("name", ["codes-*.safetensors", "codes.json"])
def test_damaged_codes_are_reported_and_learned_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    learned_once(tmp_path, "1", _learn, task="quantize")
    (file,) = (tmp_path / "learned").glob(name)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    learned_once(tmp_path, "1", _learn, task="quantize")
    changed = f"{file.name} is not what was written"
    reason = "its bytes do not fit its checksum" if file.suffix == ".json" else changed
    facts = tmp_path / "learned/codes.json"
    assert capsys.readouterr().err == f"{facts}: not valid state ({reason}). The layers are learned again.\n"
    learned_once(tmp_path, "1", _refuse, task="quantize")


def test_blocks_are_kept_by_their_identity_and_read_when_they_are_used(tmp_path: Path) -> None:
    codes = _learn().packed
    store = BlockStore(tmp_path, "1")
    assert store.codes("model.layers.0") is None
    unread = store.keep_codes("model.layers.0", codes)
    store.keep("outside", {"norm.weight": mx.ones(2)})
    assert blocks_kept(tmp_path) == ["model.layers.0"]
    again = BlockStore(tmp_path, "1").codes("model.layers.0")
    assert again is not None
    for found in (unread, again):
        assert found.keys() == codes.keys()
        assert mx.array_equal(found["a.b"].weight, codes["a.b"].weight)
        assert found["c"].biases is None
    assert BlockStore(tmp_path, "2").codes("model.layers.0") is None
    assert not has_learned(tmp_path)
