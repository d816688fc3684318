import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import ArtifactError
from mlxflow.models import model_folder, quantized_layers


def test_dequantized_unpacks_latent_attention_and_experts() -> None:
    from mlx_lm.utils import quantize_model

    config = config_of("deepseek_v3")
    model = model_folder.build(config, seed=0)
    model.eval()
    quantized, told = quantize_model(model, config, 32, 8)
    tokens = mx.arange(8)[None]
    wanted = quantized(tokens)
    made, dense_config = quantized_layers.dequantized(quantized, told)
    assert not quantized_layers.is_quantized(made)
    assert "quantization" not in dense_config
    names = {name for name, _ in tree_flatten(model_folder.build(config, seed=1).parameters())}
    assert {name for name, _ in tree_flatten(made.parameters())} == names
    assert mx.allclose(made(tokens), wanted, atol=1e-4)


def test_dequantizing_names_a_layer_that_cannot_be_unpacked() -> None:
    class BitLinear(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = mx.zeros((2, 8), mx.uint8)

    model = nn.Sequential(BitLinear())
    with pytest.raises(ArtifactError) as caught:
        quantized_layers.dequantized(model, {})
    assert str(caught.value) == "layers.0: mlx-lm cannot unpack a BitLinear. Name a dense model."


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="on a GPU the model stays packed")
def test_for_evaluation_keeps_the_linear_layers_of_the_blocks_packed() -> None:
    from mlx_lm.utils import quantize_model

    config = config_of("llama")
    model = model_folder.build(config, seed=0)
    model.eval()
    quantized, _ = quantize_model(model, config, 32, 4)
    tokens = mx.arange(32)[None]
    wanted = quantized(tokens)
    made = quantized_layers.for_evaluation(quantized)
    packed = {path for path, layer in made.named_modules() if quantized_layers.holds_codes(layer)}
    assert packed
    assert all(path.startswith("model.layers.") for path in packed)
    assert mx.allclose(made(tokens), wanted, atol=1e-4)
