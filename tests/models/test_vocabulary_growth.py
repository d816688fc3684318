"""A model with rows for added tokens: old logits stay, new ones are those of an average token."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.models import model_folder
from mlxflow.models.new_model import ModelConfig, llama_config
from mlxflow.models.vocabulary_growth import grow_vocabulary
from mlxflow.storage import config_json

V, GROWN = 50, 53


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_old_logits_stay(tied: bool) -> None:
    shape = ModelConfig(hidden_size=16, intermediate_size=16, tie_word_embeddings=tied)
    config = llama_config(shape, vocab_size=V, context_length=8)
    model = model_folder.build(config, seed=0)
    tokens = mx.array([[1, 2, 3]])
    before = np.array(model(tokens))
    grown = grow_vocabulary(model, config, GROWN)
    after = np.array(model(tokens))
    assert after.shape[-1] == config_json.vocab_size(grown) == GROWN
    # the sum over the hidden size may be in another order: 16 additions in fp32
    np.testing.assert_allclose(after[..., :V], before, atol=16 * 2**-23 * np.abs(before).max())
    np.testing.assert_allclose(after[..., V:], before.mean(-1, keepdims=True).repeat(3, -1), atol=1e-4)
    assert grown.keys() == config.keys()


def test_a_new_token_that_ends_an_answer_begins_as_the_models_end_token() -> None:
    config = llama_config(ModelConfig(hidden_size=16, intermediate_size=16), vocab_size=V, context_length=8)
    model = model_folder.build(config, seed=0)
    grow_vocabulary(model, config | {"eos_token_id": [7, 3]}, GROWN, ends=[5, V + 1])
    rows = model.model.embed_tokens.weight
    assert mx.array_equal(rows[V + 1], rows[3])
    assert mx.array_equal(rows[V], rows[V + 2])
    assert not mx.array_equal(rows[V], rows[V + 1])


def test_a_vocabulary_size_below_text_config_changes_there() -> None:
    changed = config_json.with_vocab_size({"text_config": {"vocab_size": 5, "x": 1}}, 7)
    assert changed == {"text_config": {"vocab_size": 7, "x": 1}}


def test_a_model_without_an_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^no layer has 50 rows$"):
        grow_vocabulary(nn.Sequential(nn.Linear(4, 4)), {"vocab_size": V}, GROWN)
