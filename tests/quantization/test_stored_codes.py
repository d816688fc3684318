from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.quantization import stored_codes
from mlxflow.quantization.codec import Packed, pack
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.stored_codes import CodesOnDisk, StoredCodes, emptied

SETTINGS = [Setting("affine", 3, 32), Setting("mxfp4", 4, 32)]


def test_codes_are_read_by_layer_and_setting_and_removed_at_the_end(tmp_path: Path) -> None:
    weight = mx.random.normal((8, 64), key=mx.random.key(0))
    packed = {setting: pack(weight, setting) for setting in SETTINGS}
    with StoredCodes.in_folder(tmp_path / "codes") as stored:
        for setting, codes in packed.items():
            stored.put(setting, {"a.b": codes, "a.c": codes}.items())
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


def test_codes_are_written_as_they_are_made_and_read_anew_in_each_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pack(mx.random.normal((512, 512)), SETTINGS[0]).nbytes
    monkeypatch.setattr(stored_codes, "_FILE_BYTES", 2 * one)
    before, held = mx.get_active_memory(), []

    def made() -> Iterator[tuple[str, Packed]]:
        for number in range(7):
            held.append(mx.get_active_memory() - before)
            yield f"a.{number}", pack(mx.full((512, 512), number + 1.0), SETTINGS[0])

    store = CodesOnDisk(tmp_path / "codes")
    store.gather(made())
    assert max(held) <= 3 * one
    assert len(list((tmp_path / "codes").iterdir())) == 4
    used = store.unread()
    mx.eval(used)
    assert mx.get_active_memory() - before >= 7 * one
    again = store.unread()  # not those that were evaluated
    used.clear()
    assert mx.get_active_memory() - before < one
    for number in range(7):
        exact = pack(mx.full((512, 512), number + 1.0), SETTINGS[0])
        assert mx.array_equal(again[f"a.{number}"].weight, exact.weight)
        assert mx.array_equal(again[f"a.{number}"].scales, exact.scales)
    store.remove()
    assert not (tmp_path / "codes").exists()
    assert store.unread() == {}


def test_a_dictionary_of_codes_is_emptied_as_it_is_used() -> None:
    packed = {path: pack(mx.ones((32, 64)), SETTINGS[0]) for path in ("a", "b")}
    assert [(path, len(packed)) for path, _ in emptied(packed)] == [("a", 1), ("b", 0)]
