"""Scales of frozen 4-bit weights stay in 16 bits: memory while a folder is opened, and equal numbers in every step."""

import gc
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.device import phase_peaks
from mlxflow.kernels import model_kernels
from mlxflow.models import model_folder, quantized_layers
from mlxflow.training import adapters, build, weight_dtypes
from mlxflow.training.memory_forecast import forecast_memory
from mlxflow.training.settings import AdapterShape, TrainingSettings
from tests.small_models import llama

VOCAB, LENGTH = 128, 24


def _settings(method: Literal["lora", "dora"], precision: Any, **others: Any) -> TrainingSettings:
    shape = AdapterShape(method=method, rank=2, scale=4.0, dropout=0.0, num_layers=0, keys=("self_attn.*", "mlp.*"))
    return TrainingSettings(adapters=shape, batch_size=2, warmup_steps=0, precision=precision, **others)


def _write(folder: Path, **shape: int) -> int:
    """Write a 4-bit folder in bf16; return the size of its weights."""
    model, config = llama(vocab_size=VOCAB, context_length=LENGTH, num_heads=4, seed=0, **shape)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=4)
    quantization = {"group_size": 64, "bits": 4}
    file = folder / "model.safetensors"
    config |= {"quantization": quantization, "torch_dtype": "bfloat16"}
    model_folder.save(model=model, config=config, config_file=folder / "config.json", model_file=file, provenance={})
    return file.stat().st_size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_opening_a_quantized_folder_takes_little_more_than_its_file(
    method: Literal["lora", "dora"], precision: str, tmp_path: Path
) -> None:
    stored = _write(tmp_path, hidden_size=1024, intermediate_size=2048, num_layers=4)
    settings = _settings(method, precision)
    gc.collect()
    mx.clear_cache()  # else a larger buffer of an earlier test may be used again
    before = mx.get_active_memory()
    with phase_peaks.followed() as peak:
        model, _ = model_folder.load(tmp_path)
        build.prepare_model(model, settings, adapter_seed=0)
        adapters = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    gc.collect()  # what opening left in cycles
    assert mx.get_active_memory() - before < 1.02 * stored + adapters
    assert adapters < 0.1 * stored  # they do not hide what is widened: 0.11 of the file
    matrix = 4 * 1024 * 2048 if method == "dora" else 0  # DoRA dequantizes one matrix after another, to know its norms
    assert peak.bytes - before < 1.1 * stored + adapters + 6 * matrix


def _subject(
    folder: Path, *, is_widened: bool, method: Literal["lora", "dora"] = "lora", **others: Any
) -> build.Subject:
    settings = _settings(method, "fp32", **others)
    model, _ = model_folder.load(folder)
    build.prepare_model(model, settings, adapter_seed=0)
    for layer in model.modules():  # the second factor begins with zeros, and passes on no gradient
        if "lora_b" in layer:
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1)) * 0.01
    if is_widened:
        weight_dtypes.widen_scales(model, settings)
    return build.Subject(model, settings, VOCAB, LENGTH)


@pytest.mark.parametrize("rows", [1, 4], ids=["few rows", "many rows"])
@pytest.mark.parametrize(
    ("method", "fused_loss", "checkpoint_every"),
    [
        ("lora", True, 0),
        ("lora", True, 1),
        ("lora", False, 0),
        ("lora", False, 1),
        ("dora", True, 0),
        ("dora", False, 1),
    ],
)
def test_losses_gradients_and_updates_are_those_of_widened_scales(
    rows: int, method: Literal["lora", "dora"], fused_loss: bool, checkpoint_every: int, tmp_path: Path
) -> None:
    _write(tmp_path, hidden_size=64, intermediate_size=128, num_layers=2, num_kv_heads=2)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, LENGTH // (4 // rows) + 1)).astype(np.int32)
    taken = []
    for is_widened in (False, True):
        subject = _subject(
            tmp_path, is_widened=is_widened, method=method, fused_loss=fused_loss, checkpoint_every=checkpoint_every
        )
        dtypes = {layer.scales.dtype for layer in subject.model.modules() if "scales" in layer}
        assert dtypes == {mx.float32 if is_widened else mx.bfloat16}
        marks = np.full(tokens.shape, 3, np.uint8)
        with build.ready_step(subject, model_kernels.no_kernels()) as step:
            gradients = step.compute(mx.array(tokens), mx.array(marks))
            outcome = step.update(gradients)
            arrays = [gradients.total, *(one for _, one in tree_flatten(gradients.tree)), outcome.norm]
            taken.append([np.array(one) for one in (*arrays, *_trained(subject.model))])
        assert forecast_memory(subject, model_kernels.no_kernels(), Rows(tokens, marks)).peak_bytes > 0
    kept, widened = taken
    assert all(np.array_equal(one, other) for one, other in zip(kept, widened, strict=True))
    assert any(np.abs(one).max() > 0 for one in kept[1:-1])


def _trained(model: nn.Module) -> list[mx.array]:
    return [value for _, value in tree_flatten(model.trainable_parameters())]


def test_magnitudes_of_new_dora_layers_are_those_of_widened_scales(tmp_path: Path) -> None:
    _write(tmp_path, hidden_size=64, intermediate_size=128, num_layers=1)
    settings, magnitudes = _settings("dora", "fp32"), []
    for is_widened in (False, True):
        model, _ = model_folder.load(tmp_path)
        weight_dtypes.cast_weights(model, settings)  # before the adapters, as a training does it
        if is_widened:
            weight_dtypes.widen_scales(model, settings)
        shape = settings.adapter_shape
        assert shape is not None
        adapters.add_adapters(model, shape, seed=0, key="lora.keys")
        magnitudes.append([layer.m for layer in model.modules() if "m" in layer])
        assert quantized_layers.is_quantized(model)
    assert len(magnitudes[0]) == 7
    assert all(mx.array_equal(one, other) for one, other in zip(*magnitudes, strict=True))
