import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.device import phase_peaks
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.training.device_lag import Ahead
from mlxflow.training.validation_memory import validation_peak_bytes
from tests.small_models import llama

VOCAB, LENGTH = 2048, 64


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("masks_documents", [False, True])
def test_the_peak_of_a_validation_is_predicted_within_10_percent(bits: int, masks_documents: bool) -> None:
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_heads": 6, "num_kv_heads": 2, "num_layers": 3}
    model, _ = llama(vocab_size=VOCAB, context_length=LENGTH, **shape, seed=0)
    if bits:
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    model.train()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (4, LENGTH + 1)).astype(np.int32)
    rows = Rows(tokens, np.full(tokens.shape, 3, np.uint8))
    gc.collect()  # models of other tests
    held = mx.get_active_memory()
    expected, waiting = validation_peak_bytes(
        model, rows, held, batch_size=2, masks_documents=masks_documents, lags=[Ahead(100, 10), Ahead(10, 10)]
    )
    assert held < waiting <= expected
    assert model.training
    with phase_peaks.followed() as peak:
        measure_perplexity(model, rows, batch_size=2, masks_documents=masks_documents)
    assert 0.9 * peak.bytes <= expected <= 1.1 * peak.bytes
    assert peak.bytes > 1.1 * held
