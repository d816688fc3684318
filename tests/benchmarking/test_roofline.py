import mlx.core as mx
import pytest

from mlxflow.benchmarking import roofline
from mlxflow.models.model_folder import num_parameters
from tests.small_models import llama


def test_flops_per_token_are_six_per_weight_plus_attention() -> None:
    model, _ = llama(hidden_size=16, num_layers=2)
    matrices = num_parameters(model) - 5 * 16  # norms
    found = roofline.flops_per_token(model.parameters(), hidden_size=16, num_layers=2, context_length=8)
    assert found == 6 * matrices + 12 * 2 * 16 * 8
    untied, _ = llama(hidden_size=16, num_layers=2, tie_word_embeddings=False)
    again = roofline.flops_per_token(untied.parameters(), hidden_size=16, num_layers=2, context_length=8)
    assert again == found  # an embedding that is only looked up computes nothing


def test_ceilings_divide_the_work_by_the_fastest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_PRODUCT", {"cpu": 64, "gpu": 64})
    monkeypatch.setattr(roofline, "_READ", {"cpu": 64, "gpu": 64})
    monkeypatch.setattr(roofline, "_fastest", lambda compute: 2.0 if mx.isfinite(compute()).all() else 0.0)
    assert roofline.flops_ceiling(mx.float32) == 64**3
    assert roofline.bytes_ceiling(mx.bfloat16) == 64 * 64 * 2 / 2
