import copy
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import psutil
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma

from mlxflow.models import fp32_on_cpu
from tests.small_models import llama

TOKENS = mx.arange(16)[None]

on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU computes in the stored dtype")


def _model(dtype: mx.Dtype = mx.float16) -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, tie_word_embeddings=False)
    model.eval()
    model.set_dtype(dtype)
    return model


def _dtypes(model: nn.Module) -> set[mx.Dtype]:
    return {value.dtype for _, value in tree_flatten(model.parameters())}


def _set_memory(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total))


@on_cpu
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_widened_model_computes_as_one_with_the_same_weights_in_fp32(dtype: mx.Dtype) -> None:
    model, exact = _model(dtype), _model(dtype)
    exact.set_dtype(mx.float32)
    fp32_on_cpu.widen(model)
    assert _dtypes(model) == {mx.float32}
    assert mx.array_equal(model(TOKENS), exact(TOKENS))


@on_cpu
def test_blocks_that_would_take_most_of_the_memory_are_widened_product_by_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, exact = _model(), _model()
    size = 4 * sum(value.size for _, value in tree_flatten(model.parameters()))
    _set_memory(monkeypatch, 2 * size - 1)
    fp32_on_cpu.widen(model)
    narrow = {path for path, value in tree_flatten(model.parameters()) if value.dtype == mx.float16}
    matrices = [path for path, value in tree_flatten(model.parameters()) if value.ndim > 1]
    assert narrow == {path for path in matrices if ".layers." in path}
    exact.set_dtype(mx.float32)
    assert model(TOKENS).dtype == mx.float32
    assert mx.allclose(model(TOKENS), exact(TOKENS), rtol=1e-5, atol=1e-5)
    _set_memory(monkeypatch, 2 * size)
    fp32_on_cpu.widen(model)
    assert _dtypes(model) == {mx.float32}


@on_cpu
def test_a_model_that_is_read_block_by_block_is_widened_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    _set_memory(monkeypatch, 1)
    model = _model()
    loaded = fp32_on_cpu.loading_in_fp32_on_cpu(lambda: copy.deepcopy(model))()
    assert _dtypes(loaded) == {mx.float32}
    assert _dtypes(model) == {mx.float16}


@on_cpu
def test_modules_that_are_kept_keep_their_dtype() -> None:
    model = _model()
    fp32_on_cpu.widen(model, keeps={"lm_head"})
    assert [path for path, value in tree_flatten(model.parameters()) if value.dtype == mx.float16] == ["lm_head.weight"]


@on_cpu
def test_what_a_model_computes_of_embeddings_with_float_codes_is_not_rounded_to_bf16() -> None:
    model, exact = _gemma(), _gemma()
    embedding = exact.model.embed_tokens
    exact.model.embed_tokens = _Dense(embedding)
    assert not mx.array_equal(model(TOKENS), exact(TOKENS)), "MLX alone would do: the test can no longer fail"
    fp32_on_cpu.widen(model, keeps={"model.embed_tokens"})
    assert model.model.embed_tokens(TOKENS).dtype == mx.bfloat16
    fp32_on_cpu.widen(model)
    assert model.model.embed_tokens(TOKENS).dtype == mx.float32
    assert mx.array_equal(model(TOKENS), exact(TOKENS))


def _gemma() -> nn.Module:
    """Return a Gemma of fp32 weights but for its embedding; the root of its width is no power of two."""
    mx.random.seed(0)
    shape = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 64, "vocab_size": 60, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "rms_norm_eps": 1e-6}
    model = gemma.Model(gemma.ModelArgs.from_dict({"model_type": "gemma", **shape, **heads}))
    nn.quantize(model, 32, 4, mode="mxfp4", class_predicate=lambda path, _: path == "model.embed_tokens")
    return model


class _Dense(nn.Module):  # type: ignore[misc]
    """An embedding with its rows in fp32 and the products of the packed one."""

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.as_linear = packed.as_linear
        self.rows = packed(mx.arange(60)).astype(mx.float32)

    def __call__(self, ids: mx.array) -> mx.array:
        rows: mx.array = self.rows[ids]
        return rows


@on_cpu
def test_a_model_is_trained_in_fp32_and_gets_its_dtypes_back() -> None:
    model = _model(mx.bfloat16)
    model.lm_head.weight = model.lm_head.weight.astype(mx.float32)
    before = {path: value.dtype for path, value in tree_flatten(model.parameters())}
    with fp32_on_cpu.training_in_fp32(model, keeps={"model.norm.weight"}):
        narrow = [path for path, value in tree_flatten(model.parameters()) if value.dtype != mx.float32]
        assert narrow == ["model.norm.weight"]
        model.model.norm.added = mx.zeros(1)
    after = {path: value.dtype for path, value in tree_flatten(model.parameters())}
    assert after == before | {"model.norm.added": mx.float32}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.uint32])
def test_products_of_16_bits_are_computed_in_fp32_on_a_cpu(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert fp32_on_cpu.dtype_in_products(dtype) == (mx.uint32 if dtype == mx.uint32 else mx.float32)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert fp32_on_cpu.dtype_in_products(dtype) == dtype


def test_trees_keep_their_integers_and_what_is_no_array() -> None:
    wide = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    rows, (ids, text) = fp32_on_cpu.widened((mx.ones((2,), mx.bfloat16), [mx.array([1]), "causal"]))
    assert (rows.dtype, ids.dtype, text) == (wide, mx.int32, "causal")


def test_a_gpu_keeps_the_stored_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    model = _model()
    fp32_on_cpu.widen(model)
    assert _dtypes(fp32_on_cpu.loading_in_fp32_on_cpu(lambda: model)()) == {mx.float16}
    assert fp32_on_cpu.widened(mx.ones((1,), mx.float16)).dtype == mx.float16
    assert fp32_on_cpu.computed_dtype() == "stored"
