import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.models import model_folder
from mlxflow.quantization.block_calls import record_blocks

#: Architectures whose blocks take more than the output of the block before them.
UNUSUAL: set[str] = set()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3", "mixtral", "cohere"])
def test_blocks_called_one_by_one_give_the_hidden_states_of_the_model(architecture: str) -> None:
    model = model_folder.build(config_of(architecture), seed=0)
    model.eval()
    recorded = record_blocks(model, context_length=12, name="quantize.method")
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])
    hidden = recorded.embed(tokens)
    for call, block in zip(recorded.calls, model.layers, strict=True):
        hidden = call(block, hidden)
    wanted: list[mx.array] = []

    class Noting(nn.Module):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            wanted.append(x)
            return x

    model.model.norm = Noting()
    model(tokens)
    assert mx.allclose(hidden, wanted[0], atol=1e-5)
