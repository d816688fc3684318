import copy
import math
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import CallError
from mlxflow.models import model_folder
from mlxflow.quantization import gptq, mlx_lm_patches
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.learned_codes import BlockStore
from mlxflow.quantization.settings import Setting

TOKENS = mx.random.randint(0, 60, (8, 8), key=mx.random.key(5))


def _learn(model: nn.Module, plan: dict[str, Setting]) -> dict[str, Packed]:
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(Path(folder), "1")
        packed = gptq.compensated_layers(
            lambda: copy.deepcopy(model), plan, TOKENS, batch_size=4, store=store, name="quantize.method"
        )
        mx.eval(packed)
    return packed


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


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_hessians_of_16_bits_are_computed_in_fp32(dtype: mx.Dtype) -> None:
    from mlx_lm.quant import gptq as theirs

    rows = (mx.random.normal((2, 8, 4), key=mx.random.key(0)) * 300).astype(dtype)  # squares add up to over 65,504
    with mlx_lm_patches.precise_hessians():
        catcher = theirs.Catcher(nn.Linear(4, 4))
        for _ in range(3):
            catcher(rows)
    exact = np.array(rows.astype(mx.float32), np.float64).reshape(-1, 4)
    expected = 3 * exact.T @ exact
    # 16 products and three sums in fp32, errors relative to the sums of absolute values
    bound = 19 * 2.0**-24 * (3 * np.abs(exact).T @ np.abs(exact))
    assert (np.abs(np.array(catcher.H) - expected) <= bound).all()


def test_fp16_models_with_large_inputs_are_learned() -> None:
    model = model_folder.build(config_of("llama"), seed=0)
    model.eval()
    for layer in model.layers:
        layer.post_attention_layernorm.weight = layer.post_attention_layernorm.weight * 300
    model.set_dtype(mx.float16)
    (codes,) = _learn(model, {"model.layers.0.mlp.up_proj": Setting("affine", 4, 32)}).values()
    assert codes.scales.dtype == mx.float16
    assert mx.isfinite(codes.scales).all()


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
