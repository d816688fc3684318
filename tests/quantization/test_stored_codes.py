from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.quantization.codec import pack
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.stored_codes import CodesOnDisk, StoredCodes

SETTINGS = [Setting("affine", 3, 32), Setting("mxfp4", 4, 32)]


def test_codes_are_read_by_layer_and_setting_and_removed_at_the_end(tmp_path: Path) -> None:
    weight = mx.random.normal((8, 64), key=mx.random.key(0))
    packed = {setting: pack(weight, setting) for setting in SETTINGS}
    with StoredCodes.in_folder(tmp_path / "codes") as stored:
        for setting, codes in packed.items():
            stored.put(setting, {"a.b": codes, "a.c": codes})
        for setting, codes in packed.items():
            found = stored.read("a.b", setting)
            assert (found.biases is None) == (codes.biases is None)
            assert mx.array_equal(found.weight, codes.weight)
            assert mx.array_equal(found.scales, codes.scales)
    assert not (tmp_path / "codes").exists()


def test_codes_are_removed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), StoredCodes.in_folder(tmp_path / "codes"):
        raise ValueError("stop")
    assert not (tmp_path / "codes").exists()


def test_codes_on_disk_are_the_same_and_not_held(tmp_path: Path) -> None:
    packed = {path: pack(mx.random.normal((512, 512)), SETTINGS[0]) for path in ("a.b", "a.c")}
    store = CodesOnDisk(tmp_path / "codes")
    before = mx.get_active_memory()
    kept = store.kept(packed) | store.kept({"a.d": packed["a.b"]}) | store.kept({})
    mx.eval(packed)
    held = mx.get_active_memory() - before
    for path, codes in kept.items():
        assert mx.array_equal(codes.weight, packed["a.b" if path == "a.d" else path].weight)
    assert held <= sum(codes.nbytes for codes in packed.values())
