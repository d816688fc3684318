from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxflow.ops.patching import layer_method
from mlxflow.quantization import scale_groups
from tests.quantization.test_awq import TOKENS, _model

#: Of the last block: what is scaled, and the layers that are scaled with it.
GROUPS: dict[str, dict[str, str]] = {
    "llama": {
        "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "post_attention_layernorm": "mlp.gate_proj mlp.up_proj",
        "mlp.up_proj": "mlp.down_proj",
    },
    "gemma2": {  # norms that add one, and others behind attention and MLP, which nothing linear reads
        "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "pre_feedforward_layernorm": "mlp.gate_proj mlp.up_proj",
        "mlp.up_proj": "mlp.down_proj",
    },
    "phi": {  # one norm for attention and MLP, biases, as many heads of keys as of queries, a GELU
        "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1",
        "self_attn.v_proj": "self_attn.dense",
    },
    "phi3": {  # projections in one matrix
        "input_layernorm": "self_attn.qkv_proj",
        "post_attention_layernorm": "mlp.gate_up_proj",
        "mlp.gate_up_proj": "mlp.down_proj",
    },
    "olmo2": {"mlp.up_proj": "mlp.down_proj"},  # its norms stand behind
    "mixtral": {  # experts read rows in another order, twice
        "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "post_attention_layernorm": (
            "block_sparse_moe.gate block_sparse_moe.switch_mlp.up_proj block_sparse_moe.switch_mlp.gate_proj"
        ),
        "block_sparse_moe.switch_mlp.up_proj": "block_sparse_moe.switch_mlp.down_proj",
    },
    "gpt_oss": {  # what up returns is clipped, so it is not to be scaled
        "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "post_attention_layernorm": "mlp.router mlp.experts.up_proj mlp.experts.gate_proj",
    },
    "jamba": {
        "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "pre_ff_layernorm": ("feed_forward.router feed_forward.switch_mlp.up_proj feed_forward.switch_mlp.gate_proj"),
        "feed_forward.switch_mlp.up_proj": "feed_forward.switch_mlp.down_proj",
    },
}


def _on_last_block(model: nn.Module, work: Any) -> Any:
    """Run a model, and some work on its last block with the inputs that come to it; return what the work returns."""
    results: list[Any] = []

    def make(call: Any) -> Any:
        def worked_on(self: Any, *inputs: Any, **named: Any) -> Any:
            results.append(work(self, lambda: [one for _, one in tree_flatten(call(self, *inputs, **named))]))
            return call(self, *inputs, **named)

        return worked_on

    with layer_method(model.layers[-1], "__call__", make, by=__name__):
        mx.eval(model(TOKENS))
    return results[0]


def _groups(block: nn.Module, run: scale_groups.Run) -> list[scale_groups.Group]:
    return scale_groups.find_groups(block, run, scale_groups.noted(block, run))


@pytest.mark.parametrize("architecture", GROUPS)
def test_layers_that_share_a_scale_are_found_from_what_the_block_computes(architecture: str) -> None:
    found = _on_last_block(_model(architecture), _groups)
    assert {group.source: " ".join(group.layers) for group in found} == GROUPS[architecture]


@pytest.mark.parametrize("architecture", GROUPS)
def test_scales_that_cancel_leave_the_logits_unchanged(architecture: str) -> None:
    model = _model(architecture)
    wanted = model(TOKENS)

    def scale(block: nn.Module, run: scale_groups.Run) -> int:
        groups = _groups(block, run)
        layers = dict(block.named_modules())
        for number, group in enumerate(groups):
            width = layers[group.layers[0]].weight.shape[-1]
            scale_groups.apply_scales(block, group, mx.exp(mx.random.normal((width,), key=mx.random.key(number))))
        return len(groups)

    before = {name: mx.array(value) for name, value in tree_flatten(model.parameters())}
    assert _on_last_block(model, scale) == len(GROUPS[architecture])
    assert any(not mx.array_equal(value, before[name]) for name, value in tree_flatten(model.parameters()))
    assert float(mx.abs(model(TOKENS) - wanted).max()) < 1e-4 * float(mx.abs(wanted).max())
