from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.data.token_file import Rows
from mlxflow.evaluation import positions
from mlxflow.evaluation.dense_reference import Reference
from mlxflow.evaluation.kl_divergence import measure_divergence
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.models import model_folder
from mlxflow.quantization.apply import quantize_model_for_inference
from tests.small_models import save_model

TOKENS = np.random.default_rng(0).integers(0, 128, (12, 33)).astype(np.uint16)
ROWS = Rows(TOKENS, np.full(TOKENS.shape, 3, np.uint8))


class _Loads:
    """Loads a model again and again, and keeps the arrays of the blocks' first weights."""

    def __init__(self, architecture: str, folder: Path) -> None:
        config = config_of(architecture)
        model = model_folder.build(config, seed=0)
        save_model(model, config, folder)
        self.folder, self.count = folder, 0

    def __call__(self) -> nn.Module:
        self.count += 1
        return model_folder.load(self.folder, lazy=True)[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral", "gpt_neox", "phi3"])
def test_a_streamed_model_gives_the_same_to_the_bit(architecture: str, tmp_path: Path) -> None:
    load = _Loads(architecture, tmp_path)
    ids = mx.array(TOKENS[:2].astype(np.int32))
    assert mx.array_equal(StreamedModel(load).logits(ids), load()(ids))
    rounded = quantize_model_for_inference(load(), bits=4, group_size=32)
    whole = measure_divergence(load(), rounded, ROWS, batch_size=4, masks_documents=True)
    streamed = Reference.of(StreamedModel(load))
    assert measure_divergence(streamed, rounded, ROWS, batch_size=4, masks_documents=True) == whole


def test_blocks_are_read_once_for_all_batches_that_fit_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = _Loads("llama", tmp_path)
    rounded = quantize_model_for_inference(load(), bits=4, group_size=32)
    counts = []
    for held in (1 << 20, 1):  # all batches at once, and one after the other
        monkeypatch.setattr(positions, "HELD_BYTES", held)
        streamed = StreamedModel(load)
        reference = Reference.of(streamed)
        load.count = 0
        measure_divergence(reference, rounded, ROWS, batch_size=4, masks_documents=False)
        counts.append(load.count)
    assert counts == [1, 3]
    before = mx.get_active_memory()
    mx.eval(streamed.model.parameters())
    assert mx.get_active_memory() - before > 0  # nothing of the blocks was in memory
