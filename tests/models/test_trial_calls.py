from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.architecture_configs import VOCAB_SIZE, config_of
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import model_folder, trial_calls
from tests.conftest import mlxflow

#: What mlx-lm's class of each is built from; it fails when it is called or derived.
CONTRADICTION = config_of("llama") | {"model_type": "qwen", "kv_channels": 128, "layer_norm_epsilon": 1e-6}
UNDERIVED_ARGS = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 32,
    "qk_rope_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
DBRX = {
    "model_type": "dbrx", "vocab_size": 128, "d_model": 64, "n_heads": 4, "n_layers": 2,
    "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
}  # fmt: skip
UNDERIVED = {**UNDERIVED_ARGS, "model_type": "deepseek_v41", "vocab_size": 128}


def test_a_config_whose_model_cannot_be_called_is_named() -> None:
    model = model_folder.build(CONTRADICTION, seed=0)
    with pytest.raises(ArtifactError) as caught:
        trial_calls.require_call(model, CONTRADICTION, "m/config.json")
    assert str(caught.value).startswith(
        'm/config.json: model_type = "qwen": mlx-lm cannot run that here (ValueError: [matmul] Last dimension of '
    )
    assert str(caught.value).endswith("). Name another model.")


def test_a_model_without_a_gradient_is_named() -> None:
    model = model_folder.build(UNDERIVED, seed=0)
    trial_calls.require_call(model, UNDERIVED, "train.model")
    with pytest.raises(ArtifactError) as caught:
        trial_calls.require_gradient(model, UNDERIVED, "train.model")
    assert str(caught.value) == (
        'train.model: model_type = "deepseek_v41": MLX cannot train that (ValueError: [gather_axis] Cannot calculate '
        "VJP with respect to indices. Use stop_gradient on indices to stop gradients from being computed.). "
        "Name another model."
    )


def test_a_model_that_reads_values_within_its_call_is_named() -> None:
    """The step is compiled, and DBRX looks up the expert of each token on the host."""
    model = model_folder.build(DBRX, seed=0)
    trial_calls.require_call(model, DBRX, "train.model")
    before = dict(tree_flatten(model.parameters()))
    trial_calls.require_gradient(model, DBRX, "train.model", compiles=False)
    with pytest.raises(ArtifactError) as caught:
        trial_calls.require_gradient(model, DBRX, "train.model")
    assert str(caught.value) == (
        'train.model: model_type = "dbrx": MLX cannot train that (ValueError: [eval] Attempting to eval an array '
        "during function transformations like compile or vmap is not allowed.). Name another model."
    )
    assert all(value is before[name] for name, value in tree_flatten(model.parameters()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_an_id_without_a_row_is_refused(architecture: str) -> None:
    config = config_of(architecture)
    model = model_folder.build(config, seed=0)
    trial_calls.require_gradient(model, config, "m/config.json", vocab_size=VOCAB_SIZE)
    if architecture == "llama":
        nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(ArtifactError) as caught:
        trial_calls.require_call(model, config, "m/config.json", vocab_size=VOCAB_SIZE + 1)
    assert str(caught.value) == (
        "m/config.json: the embedding of the model has 128 rows, the tokens have 129 ids. "
        "Name another model, or tokens of its own tokenizer."
    )


class _Dropping(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, tokens: mx.array) -> mx.array:
        result: mx.array = self.dropout(self.embedding(tokens))
        return result


def test_a_trial_draws_no_random_number_and_keeps_the_weights() -> None:
    model = _Dropping()
    before = model.embedding.weight
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(3)
    trial_calls.require_gradient(model, {}, "train.model")
    assert model.embedding.weight is before
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_a_model_that_cannot_be_trained_is_one_line_before_the_first_step(job: Path) -> None:
    args = ", ".join(f"{key} = {value}" for key, value in UNDERIVED_ARGS.items())
    text = (job / "workflow.toml").read_text()
    head = text[: text.index("[train]")]
    model = f'{{ architecture = "deepseek_v41", args = {{ {args} }} }}'
    (job / "workflow.toml").write_text(f"{head}[train]\nnum_steps = 2\nbatch_size = 2\nmodel = {model}\n")
    assert mlxflow(job, "run", "pretokenize").returncode == 0
    done = mlxflow(job, "run", "train")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("train: about")]
    assert line.startswith(
        'train.model: model_type = "deepseek_v41": MLX cannot train that (ValueError: [gather_axis] '
    )
    assert not list((job / "artifacts").glob("train*"))
