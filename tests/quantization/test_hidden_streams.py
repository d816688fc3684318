from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.quantization.codec import pack
from mlxflow.quantization.hidden_streams import HiddenStreams
from mlxflow.quantization.settings import Setting

HIDDEN = mx.random.normal((5, 4, 8), key=mx.random.key(0))


def _streams(folder: Path, key: str = "one") -> HiddenStreams:
    return HiddenStreams(folder, key=key, num_rows=5, context_length=4, at_once=2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rows_are_read_as_they_were_written(tmp_path: Path, dtype: mx.Dtype) -> None:
    streams, hidden = _streams(tmp_path), HIDDEN.astype(dtype)
    assert list(streams.spans()) == [(0, 2), (2, 4), (4, 5)]
    streams.write("dense", 0, lambda begin, end: hidden[begin:end])
    assert mx.array_equal(streams.read("dense", 0, [4, 0, 2]), hidden[mx.array([4, 0, 2])])
    streams.write("dense", 0, lambda begin, end: -hidden[begin:end])
    assert mx.array_equal(streams.read("dense", 0, range(5)), -hidden)


def test_a_finished_block_removes_its_inputs_and_is_read_back(tmp_path: Path) -> None:
    streams, setting = _streams(tmp_path), Setting("affine", 3, 32)
    packed = {"model.layers.0.q": pack(mx.random.normal((4, 32), key=mx.random.key(1)), setting)}
    for kind in ("dense", "quantized"):
        for number in (0, 1):
            streams.write(kind, number, lambda begin, end: HIDDEN[begin:end])
    assert streams.next_block == 0
    streams.finish(0, packed, (0.5, 0.25, 0.125))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "block-0.safetensors",
        "dense-1.safetensors",
        "quantized-1.safetensors",
    ]
    again = _streams(tmp_path)
    assert again.next_block == 1
    finished = again.finished(0)
    assert finished.errors == (0.5, 0.25, 0.125)
    assert finished.packed.keys() == packed.keys()
    for one, other in zip(finished.packed["model.layers.0.q"], packed["model.layers.0.q"], strict=True):
        assert one is not None
        assert other is not None
        assert mx.array_equal(one, other)


def test_files_of_another_job_and_damaged_ones_are_removed(tmp_path: Path) -> None:
    streams = _streams(tmp_path)
    streams.write("dense", 0, lambda begin, end: HIDDEN[begin:end])
    (tmp_path / "block-0.safetensors").write_bytes(b"damaged")
    assert _streams(tmp_path).next_block == 0
    assert [file.name for file in tmp_path.iterdir()] == ["dense-0.safetensors"]
    _streams(tmp_path, key="other")
    assert not list(tmp_path.iterdir())
