import pytest
from mlx.utils import tree_flatten

from mlxflow.models import model_folder
from mlxflow.models.new_model import ModelConfig, llama_config

SHAPE = ModelConfig(hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=40)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_the_built_model_has_them(tied: bool) -> None:
    shape = ModelConfig(
        hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=40, tie_word_embeddings=tied
    )
    model = model_folder.build(llama_config(shape, vocab_size=50, context_length=8), seed=0)
    matrices = [value for name, value in tree_flatten(model.parameters()) if "norm" not in name]
    assert shape.num_weights(50) == sum(value.size for value in matrices)


def test_the_config_holds_the_shape_by_the_keys_of_hugging_face() -> None:
    config = llama_config(SHAPE, vocab_size=50, context_length=8, end_of_text=3)
    assert config["num_hidden_layers"] == 3
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["max_position_embeddings"], config["vocab_size"], config["eos_token_id"]) == (8, 50, 3)
