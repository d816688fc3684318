from mlxflow.quantization.model_shape import ModelShape
from tests.small_models import llama


def test_the_sizes_are_those_of_the_model() -> None:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=128)
    shape = ModelShape.of(model, 60)
    assert shape.num_blocks == 2
    assert shape.parameters - shape.blocks == 60 * 64  # the embedding, which is the head
    assert shape.largest == 64 * 128
    assert shape.hidden_size == 64
    assert shape.num_bytes == 4 * (shape.parameters + 5 * 64)
