import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxflow import models
from mlxflow.kernels import fitting
from mlxflow.kernels.choice import recorded
from mlxflow.quantization.fake import fake_quantized
from tests.small_models import llama

_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
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
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
}

#: Architecture, norms and gated layers that kernels could serve in two blocks.
ARCHITECTURES = [
    ("llama", 5, 2),
    ("qwen2", 5, 2),
    ("qwen3", 9, 2),
    ("gemma", 5, 2),
    ("gemma2", 9, 2),
    ("gemma3_text", 13, 2),
    ("phi3", 5, 2),
    ("granite", 5, 2),
    ("smollm3", 5, 2),
    ("olmo2", 9, 2),
    ("stablelm", 0, 2),
    ("gpt2", 0, 0),
]


@pytest.mark.parametrize(("architecture", "norms", "gated"), ARCHITECTURES)
def test_layers_are_found_by_what_they_compute_and_come_back_as_they_were(
    architecture: str, norms: int, gated: int
) -> None:
    model = models.build({**_SHAPE, "model_type": architecture}, seed=0)
    names = [path for path, _ in tree_flatten(model.parameters())]
    kinds = [type(module) for _, module in model.named_modules()]
    tokens = mx.arange(1, 13)[None]

    def loss(weights: object) -> mx.array:
        model.update(weights)
        total: mx.array = (model(tokens).astype(mx.float32) ** 2).mean()
        return total

    before = mx.value_and_grad(loss)(model.trainable_parameters())
    fits = fitting.find_fits(model)
    found = [isinstance(fit, fitting.Norm) for _, fit in fits]
    assert (sum(found), len(found) - sum(found)) == (norms, gated)
    every = [fit.name(module, mx.float32) for module, fit in fits]
    with fitting.fitted(fits, recorded(every, every), mx.float16):  # no kernel in that type: references serve
        after = mx.value_and_grad(loss)(model.trainable_parameters())
        assert [path for path, _ in tree_flatten(model.parameters())] == names
    assert [type(module) for _, module in model.named_modules()] == kinds
    assert float(after[0]) == pytest.approx(float(before[0]), rel=1e-5)
    wanted = dict(tree_flatten(before[1]))
    for path, gradient in tree_flatten(after[1]):
        assert mx.allclose(gradient, wanted[path], rtol=1e-3, atol=1e-5), path


def test_quantization_aware_training_goes_on_within_a_fitted_layer() -> None:
    from mlxflow.quantization.settings import Setting

    model, _ = llama(hidden_size=64, intermediate_size=64)
    fits = fitting.find_fits(model)
    every = [fit.name(module, mx.float32) for module, fit in fits]
    setting = Setting(bits=4, group_size=32, mode="affine")
    tokens = mx.arange(1, 7)[None]
    plain = model(tokens)
    with fake_quantized(model, {"model.layers.0.mlp.down_proj": setting}):
        expected = model(tokens)
        with fitting.fitted(fits, recorded(every, every), mx.float16):
            assert mx.allclose(model(tokens), expected, rtol=1e-4, atol=1e-5)
    assert not mx.allclose(plain, expected, rtol=1e-4, atol=1e-5)
