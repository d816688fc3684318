"""What trials found is kept, under a key that changes with all that it follows from."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.device import compute_device
from mlxflow.kernels import cache, fingerprint, layer_patching, pattern_detection
from mlxflow.kernels.layer_patterns import Embedding, GatedMLP, LayerPattern, Norm
from mlxflow.kernels.pattern_detection import Detection
from mlxflow.quantization.fake_quant import fake_quantized
from mlxflow.quantization.settings import Setting
from tests.conftest import REPOSITORY
from tests.kernels.test_registry import read_only_cache
from tests.small_models import llama

_HELPER = """
import mlx.core as mx

def scaled(x, eps):
    return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + eps)
"""
_LAYERS = """
import mlx.core as mx
import mlx.nn as nn
from helper_of_layers import scaled

class Base(nn.Module):
    def __init__(self, eps=1e-5, inner=None):
        super().__init__()
        self.weight, self.eps = mx.ones(8), eps

class Norm(Base):
    def __call__(self, x):
        return scaled(x, self.eps) * self.weight
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the layers that are tried, as they are."""
    names: list[str] = []
    usual = pattern_detection.detect_pattern

    def detect_pattern(layer: nn.Module) -> Detection:
        names.append(type(layer).__name__)
        return usual(layer)

    monkeypatch.setattr(layer_patching, "detect_pattern", detect_pattern)
    return names


def _write(path: Path, text: str, hours_ago: float = 1.0) -> None:
    path.write_text(text)
    seconds = path.stat().st_mtime - hours_ago * 3600
    os.utime(path, (seconds, seconds))


@pytest.fixture
def layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Write a module with a norm, and the one that it takes a function from, and import them anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text: str = _LAYERS, helper: str = _HELPER, hours_ago: float = 1.0) -> ModuleType:
        _write(tmp_path / "helper_of_layers.py", helper, hours_ago)
        _write(tmp_path / "some_layers.py", text, hours_ago)
        importlib.invalidate_caches()
        for name in ("helper_of_layers", "some_layers"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module("some_layers")

    return write


def _fits(model: nn.Module) -> list[LayerPattern]:
    return [fit for _, fit in layer_patching.find_layers(model)]


def test_detection_runs_once_per_model_and_its_result_is_reused(tried: list[str]) -> None:
    first = _fits(llama()[0])
    assert sorted({*tried}) == ["Embedding", "Linear", "MLP", "RMSNorm", "RoPE", "TransformerBlock"]
    tried.clear()
    assert _fits(llama()[0]) == first
    assert tried == []


def test_a_later_process_computes_nothing_for_a_cached_model() -> None:
    program = (
        "import mlx.core as mx\nfrom mlxflow.kernels import layer_patching\nfrom tests.small_models import llama\n"
        "model, _ = llama()\nmx.eval(model.parameters())\nmx.synchronize()\n"
        "mx.reset_peak_memory()\nbefore = mx.get_active_memory()\n"
        "print(len(layer_patching.find_layers(model)), mx.get_peak_memory() > before)"
    )
    command = [sys.executable, "-c", program]
    for computes in (True, False):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
        assert done.stdout == f"10 {computes}\n", done.stderr


_EDITS = {
    "the class": (_LAYERS.replace("* self.weight\n", "* self.weight * 2\n"), _HELPER),
    "its base class": (_LAYERS.replace("mx.ones(8), eps", "mx.ones(8), eps * 2"), _HELPER),
    "a function that it calls": (_LAYERS, _HELPER.replace("+ eps)", "+ eps) + 1")),
}


@pytest.mark.parametrize("edited", _EDITS)
def test_a_layer_whose_source_was_edited_is_detected_again(
    layers: Callable[..., ModuleType], tried: list[str], edited: str
) -> None:
    assert _fits(layers().Norm()) == [Norm(1e-5, 0.0)]
    assert _fits(layers().Norm()) == [Norm(1e-5, 0.0)]
    assert tried == ["Norm"]
    assert _fits(layers(*_EDITS[edited]).Norm()) == ([Norm(2e-5, 0.0)] if edited == "its base class" else [])
    assert tried == ["Norm", "Norm"]
    assert _fits(layers().Norm()) == [Norm(1e-5, 0.0)], "as it was, it is known"
    assert tried == ["Norm", "Norm"]


def test_layers_with_a_source_newer_than_the_process_are_not_cached(
    layers: Callable[..., ModuleType], tried: list[str]
) -> None:
    for _ in range(2):
        assert _fits(layers(hours_ago=0.0).Norm()) == [Norm(1e-5, 0.0)]
    assert tried == ["Norm", "Norm"]


def test_other_settings_shapes_and_types_are_detected_separately(
    layers: Callable[..., ModuleType], tried: list[str]
) -> None:
    kind = layers().Norm
    wide, half = kind(), kind()
    wide.weight, half.weight = mx.ones(16), mx.ones(8, mx.bfloat16)
    for number, layer in enumerate([kind(), kind(1e-6), wide, half], 1):
        for _ in range(2):
            assert _fits(layer) == [Norm(layer.eps, 0.0)]
        assert len(tried) == number


def test_fake_quantized_layers_are_not_cached_but_layers_around_them_are(tried: list[str]) -> None:
    model, _ = llama(hidden_size=64, intermediate_size=64)
    names = [name for name, module in model.named_modules() if name.endswith("_proj")]
    with fake_quantized(model, dict.fromkeys(names, Setting(bits=4, group_size=32, mode="affine"))):
        first = _fits(model)
        tried.clear()
        assert _fits(model) == first
        assert {*tried} == {"FakeQuantizedLinear", "MLP", "TransformerBlock"}
    tried.clear()
    assert any(isinstance(fit, GatedMLP) and fit.is_plain for fit in _fits(model))
    assert {*tried} >= {"MLP", "TransformerBlock"}, "dense, it is another layer"


class _Activated(nn.Module):  # type: ignore[misc]
    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        found: mx.array = self.b(self.activation(self.c(x)) * self.a(x))
        return found


def test_layers_with_ambiguous_weights_are_not_recognized(tried: list[str]) -> None:
    layer = _Activated(nn.silu)
    weight = layer.a.weight
    layer.a.weight, layer.a.bias = layer.c.weight, layer.c.bias
    assert _fits(layer) == []
    layer.a.weight = weight
    assert _fits(layer) == [GatedMLP("silu", "c", "a", "b", False)]


class _Scaled(nn.Embedding):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        doubled: mx.array = self.weight[x] * 2
        return doubled


@pytest.mark.parametrize(("kind", "expected"), [(nn.Embedding, [Embedding()]), (_Scaled, [])])
def test_an_embedding_is_detected_with_random_weights(kind: type[nn.Module], expected: list[LayerPattern]) -> None:
    layer = kind(20, 8)
    layer.weight = mx.zeros((20, 8))
    assert _fits(layer) == expected
    assert layer.weight.shape == (20, 8)


# --- the file


@pytest.mark.parametrize(
    "spoil", [lambda data: b"", lambda data: data[:-9], lambda data: data.replace(b"1e-0", b"2e-0")]
)
def test_a_damaged_cache_file_counts_as_empty_and_is_rewritten(
    layers: Callable[..., ModuleType], tried: list[str], spoil: Callable[[bytes], bytes]
) -> None:
    _fits(layers().Norm())
    whole = cache.layers_file().read_bytes()
    assert spoil(whole) != whole
    cache.layers_file().write_bytes(spoil(whole))
    assert cache.read_layers() == {}
    assert _fits(layers().Norm()) == [Norm(1e-5, 0.0)]
    assert tried == ["Norm", "Norm"]
    assert cache.layers_file().read_bytes() == whole


@pytest.mark.parametrize(
    "value",
    [3, [], {"type": "Norm"}, {"type": "Norm", "eps": "1", "offset": 0.0}, {"type": "Other"}, {"type": "Block"}],
)
def test_a_malformed_cache_entry_is_ignored(layers: Callable[..., ModuleType], tried: list[str], value: object) -> None:
    _fits(layers().Norm())
    cache.add_layers(dict.fromkeys(cache.read_layers(), value))
    assert _fits(layers().Norm()) == [Norm(1e-5, 0.0)]
    assert tried == ["Norm", "Norm"]


def test_cache_entries_of_another_mlx_version_are_not_used(
    layers: Callable[..., ModuleType], tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fits(layers().Norm())
    with monkeypatch.context() as patch:
        patch.setattr(compute_device, "environment", lambda _: {"mlx": "another version"})
        _fits(layers().Norm())
    assert tried == ["Norm", "Norm"]
    _fits(layers().Norm())
    assert tried == ["Norm", "Norm"], "both are kept"


def test_cache_entries_of_other_kernel_sources_are_not_used(
    layers: Callable[..., ModuleType], tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fits(layers().Norm())
    monkeypatch.setattr(fingerprint, "sources_digest", lambda: "others")
    _fits(layers().Norm())
    assert tried == ["Norm", "Norm"]


def test_with_a_read_only_cache_folder_nothing_is_cached(
    layers: Callable[..., ModuleType], tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layers()
    with read_only_cache() as room:
        monkeypatch.setenv("XDG_CACHE_HOME", str(room))
        for _ in range(2):
            assert _fits(module.Norm()) == [Norm(1e-5, 0.0)]
        assert not cache.layers_file().exists()
    assert tried == ["Norm", "Norm"]


def test_the_cache_keeps_the_newest_entries_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MAX_LAYERS", 2)
    for key in ("a", "b", "a", "c"):
        cache.add_layers({key: True})
    assert list(cache.read_layers()) == ["a", "c"]


def test_concurrent_writers_leave_an_intact_cache_file() -> None:
    program = (
        "import sys\nfrom mlxflow.kernels import cache\n"
        "for number in range(40):\n"
        "    cache.add_layers({f'{sys.argv[1]} {number}': True})\n    assert cache.read_layers()"
    )
    commands = [[sys.executable, "-c", program, name] for name in ("a", "b")]
    both = [subprocess.Popen(command, cwd=REPOSITORY) for command in commands]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert {key[0] for key in cache.read_layers()} >= {"a"} or {key[0] for key in cache.read_layers()} >= {"b"}
    assert [path.name for path in cache.layers_file().parent.iterdir()] == ["findings.json"]
