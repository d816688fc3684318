from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.rope_utils import initialize_rope

from mlxflow.kernels import layer_patching
from mlxflow.kernels.layer_patterns import Block, Embedding, GatedMLP, GatedProduct, JoinedMLP, Norm, Rotary
from mlxflow.kernels.registry import recorded
from mlxflow.models import model_folder
from mlxflow.ops.gradient_checkpointing import recomputed
from mlxflow.quantization.fake_quant import fake_quantized
from mlxflow.quantization.settings import Setting
from mlxflow.training import adapters
from mlxflow.training.settings import AdapterShape
from tests.kernels.stand_ins import uncompiled, use_references  # noqa: F401
from tests.small_models import llama

_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
    "use_qkv_bias": False,
    "logits_scaling": 1.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "no_rope_layer_interval": 4,
    "hidden_act": "silu",
    "logit_scale": 1.0,
    "n_ctx": 64,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
}

Loss = tuple[mx.array, dict[str, mx.array]]


def _loss_and_gradients(model: nn.Module) -> Loss:
    """Return a loss and its gradients by name."""
    tokens = mx.arange(1, 13)[None]

    def loss(weights: Any) -> mx.array:
        model.update(weights)
        total: mx.array = (model(tokens).astype(mx.float32) ** 2).mean()
        return total

    weights = model.trainable_parameters()
    value, gradients = mx.value_and_grad(loss)(weights)
    mx.eval(value, gradients)
    model.update(weights)
    return value, dict(tree_flatten(gradients))


def _same(found: Loss, wanted: Loss) -> None:
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in found[1].items():
        assert mx.allclose(gradient, wanted[1][name], rtol=1e-3, atol=1e-5), name


@contextmanager
def _fitted(model: nn.Module) -> Iterator[None]:
    """Fit all layers that can be, as if all kernels served, in a type in which none does: references compute."""
    layers = layer_patching.find_layers(model)
    every = [pattern.kernel_name(module, mx.float16) for module, pattern in layers]
    with layer_patching.patched(layers, recorded(every, every), mx.float16):
        yield


def _names(model: nn.Module) -> list[str]:
    return [path for path, _ in tree_flatten(model.parameters())]


def _saved(model: nn.Module, config: dict[str, Any], folder: Path) -> list[bytes]:
    """Return the files of a model folder."""
    files = [folder / "config.json", folder / "model.safetensors"]
    model_folder.save(model=model, config=config, config_file=files[0], model_file=files[1], provenance={})
    return [file.read_bytes() for file in files]


#: Architecture, and what kernels could serve in two blocks: norms, gated, embeddings, blocks, rotary and how wide.
ARCHITECTURES = [
    ("llama", (5, 2, 1, 2, 2), 32),
    ("qwen2", (5, 2, 1, 2, 2), 32),
    ("qwen3", (9, 2, 1, 2, 2), 32),
    ("gemma", (5, 2, 1, 2, 2), 32),
    ("gemma2", (9, 2, 1, 0, 2), 32),
    ("gemma3_text", (13, 2, 1, 0, 2), 32),
    ("phi3", (5, 2, 1, 2, 2), 16),
    ("granite", (5, 2, 1, 2, 2), 32),
    ("smollm3", (5, 2, 1, 2, 2), 32),
    ("olmo2", (9, 2, 1, 0, 2), 32),
    ("stablelm", (0, 2, 1, 0, 2), 16),
    ("gpt2", (0, 0, 2, 0, 0), 0),
]

_GATED = (GatedMLP, JoinedMLP, GatedProduct)


@pytest.mark.parametrize(("architecture", "counts", "turned"), ARCHITECTURES)
def test_layers_are_recognized_by_their_computation_and_restored(
    architecture: str, counts: tuple[int, ...], turned: int, tmp_path: Path
) -> None:
    config = {**_SHAPE, "model_type": architecture}
    model = model_folder.build(config, seed=0)
    names = _names(model)
    kinds = [type(module) for _, module in model.named_modules()]
    saved = _saved(model, config, tmp_path)
    before = _loss_and_gradients(model)
    layers = layer_patching.find_layers(model)
    sought = (Norm, _GATED, Embedding, Block)
    kinds_found = [sum(isinstance(fit, kind) for _, fit in layers) for kind in sought]
    widths = [fit.width for _, fit in layers if isinstance(fit, Rotary)]
    assert (*kinds_found, len(widths)) == counts
    assert widths == [turned] * len(widths)
    with _fitted(model):
        assert sum(type(module).__name__.startswith("Patched") for module in model.modules()) == sum(counts)
        after = _loss_and_gradients(model)
        assert _names(model) == names
        assert _saved(model, config, tmp_path) == saved
    assert [type(module) for _, module in model.named_modules()] == kinds
    assert _names(model) == names
    assert _saved(model, config, tmp_path) == saved
    _same(after, before)


def test_layers_are_restored_after_an_exception() -> None:
    model, _ = llama()
    kinds = [type(module) for _, module in model.named_modules()]
    with pytest.raises(RuntimeError, match="out of memory"), _fitted(model):
        raise RuntimeError("out of memory")
    assert [type(module) for _, module in model.named_modules()] == kinds


def test_a_layer_called_with_other_arguments_uses_its_own_implementation() -> None:
    class Scaled(nn.RMSNorm):  # type: ignore[misc]
        def __call__(self, x: mx.array, scale: float = 1.0) -> mx.array:
            return mx.fast.rms_norm(x, self.weight, self.eps) * scale

    model = Scaled(8)
    x = mx.random.normal((2, 8), key=mx.random.key(0))
    with _fitted(model):
        assert type(model).__name__ == "PatchedScaled"
        assert mx.allclose(model(x, scale=2.0), 2 * model(x), rtol=1e-5)


_SCALED = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7},
    "linear": {"rope_type": "linear", "factor": 2.0},
}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("scaling", [None, *_SCALED])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_positions_match_the_layer(
    scaling: str | None, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = initialize_rope(32, 1e4, interleaved, _SCALED.get(scaling or ""), max_position_embeddings=64)
    x = mx.random.normal((2, 3, 50, 40), key=mx.random.key(0))
    wanted, later = layer(x), layer(x, offset=7)
    calls = use_references(monkeypatch)
    layers = layer_patching.find_layers(layer)
    assert [pattern for _, pattern in layers] == [Rotary(32, interleaved)]
    names = [pattern.kernel_name(module, mx.float32) for module, pattern in layers]
    with layer_patching.patched(layers, recorded(names, names), mx.float32):
        for found in (layer(x), layer(x, offset=0), layer(x, 0)):
            assert mx.allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert calls["rotary.kernel"] == 3
        assert mx.array_equal(layer(x, offset=7), later), "further on, in a text that is written, the layer turns"
        assert calls["rotary.kernel"] == 3


# --- what else changes layers for training goes on within fitted ones


def _lora(model: nn.Module, method: Literal["lora", "dora"], dropout: float = 0.0) -> None:
    adapters.add_adapters(model, AdapterShape(method, 4, 20.0, dropout, 0, ("*",)), seed=1, key="lora.keys")
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):  # zero at first, with which the other factor has no gradient
            model.update(tree_unflatten([(name, mx.random.normal(value.shape, key=mx.random.key(2)) * 0.01)]))


@contextmanager
def _quantization_aware(model: nn.Module, mode: str = "affine") -> Iterator[None]:
    setting = Setting(bits=4, group_size=32, mode=mode)
    layers = [name for name, module in model.named_modules() if name.endswith("_proj") and "weight" in module]
    layers = layers or [name for name, module in model.named_modules() if hasattr(module, "fuse")]
    with fake_quantized(model, dict.fromkeys(layers, setting)):
        yield


@contextmanager
def _change(model: nn.Module, kind: str) -> Iterator[None]:
    if kind in ("lora", "dora"):
        _lora(model, "lora" if kind == "lora" else "dora")
    elif kind == "lora beside quantized weights":
        nn.quantize(model, group_size=32, bits=4)
        _lora(model, "lora")
    elif kind.startswith("quantization-aware"):
        if "lora" in kind:
            adapters.add_adapters(model, AdapterShape("lora", 4, 20.0, 0.0, 0, ("mlp.*",)), seed=1, key="lora.keys")
        with _quantization_aware(model, "symmetric" if "symmetric" in kind else "affine"):
            yield
        return
    yield


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "lora",
        "dora",
        "lora beside quantized weights",
        "quantization-aware",
        "quantization-aware, symmetric",
        "quantization-aware, lora",
    ],
)
def test_gradients_match_the_unpatched_layers(kind: str, every: int) -> None:
    model, _ = llama(hidden_size=64, intermediate_size=64)
    plain = _loss_and_gradients(model)
    with _change(model, kind):
        before = _loss_and_gradients(model)
        assert (float(before[0]) == float(plain[0])) == (kind == "plain"), "the change does something"
        with _fitted(model), recomputed(model, every=every):
            layers = 11 if "quantized weights" in kind else 12  # MLX's quantized embedding has no gradient
            layers -= {0: 0, 1: 2, 2: 1}[every]  # blocks that are computed anew have the class that does it
            assert sum(type(module).__name__.startswith("Patched") for module in model.modules()) == layers
            after = _loss_and_gradients(model)
    assert len(after[1]) == len(before[1]) > 0
    _same(after, before)
