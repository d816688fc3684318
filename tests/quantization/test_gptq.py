import copy
import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import CallError
from mlxflow.models import model_folder
from mlxflow.quantization import gptq, mlx_lm_patches
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.settings import Setting

TOKENS = mx.random.randint(0, 60, (8, 8), key=mx.random.key(5))


def _learn(model: nn.Module, plan: dict[str, Setting]) -> dict[str, Packed]:
    return gptq.compensated_layers(
        lambda: copy.deepcopy(model), plan, TOKENS, batch_size=4, keep=lambda codes: codes, name="quantize.method"
    )


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mixtral"])
def test_gptq_by_blocks_gives_the_codes_of_the_whole_model_at_once(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {} if architecture == "gemma3_text" else {"tie_word_embeddings": False}
    model = model_folder.build(config_of(architecture) | changes, seed=0)
    model.eval()
    layers = [path for path, layer in model.named_modules() if hasattr(layer, "to_quantized")]
    plan = {path: Setting("affine", 8 if path.endswith("down_proj") else 4, 32) for path in layers}
    by_blocks = _learn(model, plan)
    monkeypatch.setattr(gptq, "find_blocks", lambda *_, **__: "no list of blocks")
    whole = _learn(model, plan)
    assert by_blocks.keys() == whole.keys()
    for path, codes in whole.items():
        for own, part in codes._asdict().items():
            assert mx.array_equal(getattr(by_blocks[path], own), part), f"{path}.{own}"


def test_rows_that_do_not_determine_a_hessian_are_named() -> None:
    model = model_folder.build(config_of("llama"), seed=0)
    model.model.embed_tokens.weight = mx.zeros_like(model.model.embed_tokens.weight)
    with pytest.raises(CallError) as caught:
        _learn(model, {"model.layers.0.mlp.up_proj": Setting("affine", 4, 32)})
    assert str(caught.value) == (
        "quantize.method: the Hessian of a layer is not positive definite. Calibrate on more rows (calibration_rows)."
    )


def test_no_evaluation_fails_for_a_hessian_without_an_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one that fails, MLX may wait in an endless loop whenever the memory is above its limit."""
    monkeypatch.setattr(mx.linalg, "cholesky_inv", lambda *_, **__: pytest.fail("it is inverted"))
    model = model_folder.build(config_of("llama"), seed=0)
    model.model.embed_tokens.weight = mx.zeros_like(model.model.embed_tokens.weight)
    with pytest.raises(CallError):
        _learn(model, {"model.layers.0.mlp.up_proj": Setting("affine", 4, 32)})


@pytest.mark.parametrize("matrix", [[[0.0, 0.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, math.nan]]])
@pytest.mark.parametrize("upper", [True, False])
def test_matrices_that_are_not_positive_definite_have_no_factor(matrix: list[list[float]], upper: bool) -> None:
    plain, definite = mx.linalg.cholesky, mx.array([[2.0, 1.0], [1.0, 2.0]])
    expected = plain(definite, upper, stream=mx.cpu)
    with mlx_lm_patches.checked_factors():
        assert mx.array_equal(mx.linalg.cholesky(definite, upper, stream=mx.cpu), expected)
        with pytest.raises(ValueError, match="not positive definite"):
            mx.linalg.cholesky(mx.array(matrix), upper, stream=mx.cpu)
    assert mx.linalg.cholesky is plain


def test_a_layer_that_is_not_computed_is_an_error() -> None:
    model = model_folder.build(config_of("llama"), seed=0)
    model.layers[0].mlp.unused = nn.Linear(64, 64)
    with pytest.raises(CallError) as caught:
        _learn(model, {"model.layers.0.mlp.unused": Setting("affine", 4, 32)})
    assert str(caught.value) == (
        "quantize.method: a layer is not computed on the calibration rows. Calibrate on longer rows, or set another "
        "method."
    )
