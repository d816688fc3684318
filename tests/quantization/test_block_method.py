import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.architecture_configs import config_of
from mlxflow.messages.errors import CallError
from mlxflow.models import model_folder
from mlxflow.quantization.apply import apply_plan
from mlxflow.quantization.block_calls import record_blocks
from mlxflow.quantization.block_method import BlockRequest, LearnedBlocks, learn_blocks
from mlxflow.quantization.block_training import relative_error
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.settings import Setting
from tests.conftest import REPOSITORY, rest_in_matrix

TOKENS = np.random.default_rng(0).integers(0, 128, (24, 32))


def _request(folder: Path, *, num_steps: int = 12, name: str = "quantize.method") -> BlockRequest:
    return BlockRequest(num_steps=num_steps, seed=0, folder=folder, identity="job", name=name)


def _model(architecture: str = "llama") -> nn.Module:
    model = model_folder.build(config_of(architecture), seed=0)
    model.eval()
    return model


def _plan(model: nn.Module, bits: int = 2, mode: str = "affine") -> dict[str, Setting]:
    return {path: Setting(mode, bits, 32) for path, one in model.named_modules() if hasattr(one, "to_quantized")}


_FLOAT_GROUPS = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


@pytest.mark.parametrize("mode", rest_in_matrix(_FLOAT_GROUPS, "nvfp4"))
def test_floating_point_modes_are_learned_and_lose_less_than_rounding(mode: str, tmp_path: Path) -> None:
    bits, group_size = _FLOAT_GROUPS[mode]
    plan = {path: Setting(mode, bits, group_size) for path in _plan(_model())}
    made = learn_blocks(_model, plan, TOKENS, _request(tmp_path, num_steps=24), watch=lambda _: None)
    assert made.packed.keys() == plan.keys()
    assert all(one.scales.dtype == mx.uint8 and one.biases is None for one in made.packed.values())
    assert all(one.after < one.before for one in made.errors)
    assert _kl("llama", plan, made.packed) < 0.9 * _kl("llama", plan, None)


def _learned(folder: Path, architecture: str = "llama", **request: Any) -> tuple[LearnedBlocks, dict[str, Setting]]:
    plan = _plan(_model(architecture))
    request_made = _request(folder, **request)
    return learn_blocks(lambda: _model(architecture), plan, TOKENS, request_made, watch=lambda _: None), plan


def _kl(architecture: str, plan: dict[str, Setting], packed: dict[str, Packed] | None) -> float:
    """Return the mean divergence of a quantized model on rows that were not learned."""
    tokens = mx.array(np.random.default_rng(1).integers(0, 128, (16, 32)))
    dense, quantized = _model(architecture), _model(architecture)
    apply_plan(quantized, plan, packed)
    logs = [one(tokens) for one in (dense, quantized)]
    logs = [one - mx.logsumexp(one, axis=-1, keepdims=True) for one in logs]
    return float((mx.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.parametrize("architecture", rest_in_matrix(["llama", "gemma3_text", "mixtral"], "llama"))
def test_learned_blocks_are_nearer_to_the_dense_model_than_rounded_ones(architecture: str, tmp_path: Path) -> None:
    made, plan = _learned(tmp_path, architecture, num_steps=24)
    assert made.packed.keys() == plan.keys()
    assert [one.path for one in made.errors] == ["model.layers.0", "model.layers.1"]
    assert all(one.after < one.before for one in made.errors)
    assert _kl(architecture, plan, made.packed) < 0.9 * _kl(architecture, plan, None)


def test_the_reported_error_is_that_of_the_stored_weights(tmp_path: Path) -> None:
    made, plan = _learned(tmp_path)
    dense, quantized = _model(), _model()
    apply_plan(quantized, plan, made.packed)
    outputs = []
    for model in (dense, quantized):
        recorded = record_blocks(model, context_length=32, name="")
        hidden = recorded.embed(mx.array(TOKENS))
        for call, block in zip(recorded.calls, model.layers, strict=True):
            hidden = call(block, hidden)
        outputs.append(hidden)
    error = relative_error(outputs[1], outputs[0])
    assert made.errors[-1].output == pytest.approx(float(error), rel=1e-4)


_RUN = """
import os, signal, sys
from pathlib import Path
from tests.quantization.test_block_method import TOKENS, _model, _plan, _request
from mlxflow.quantization.block_method import learn_blocks

def watch(errors):
    print(errors.path, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)

learn_blocks(_model, _plan(_model()), TOKENS, _request(Path(sys.argv[1])), watch=watch)
"""


def test_a_killed_run_goes_on_after_the_last_finished_block_to_the_same_bytes(tmp_path: Path) -> None:
    def run(folder: Path, how: str) -> tuple[int, float]:
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(folder), how], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=False
        )
        return done.returncode, (folder / "block-0.safetensors").stat().st_mtime_ns

    assert run(tmp_path / "whole", "whole")[0] == 0
    code, written = run(tmp_path / "killed", "killed")
    assert code == -signal.SIGKILL
    assert not (tmp_path / "killed" / "block-1.safetensors").exists()
    assert run(tmp_path / "killed", "resumed") == (0, written)
    for number in (0, 1):
        name = f"block-{number}.safetensors"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_weights_of_finished_blocks_are_freed(tmp_path: Path) -> None:
    opened: list[nn.Module] = []

    def load() -> nn.Module:
        opened.append(_model())
        return opened[-1]

    learn_blocks(load, _plan(_model()), TOKENS, _request(tmp_path, num_steps=0), watch=lambda _: None)
    modules = [module for model in opened for block in model.layers for module in block.modules()]
    assert modules
    assert not [value for module in modules for value in module.values() if isinstance(value, mx.array)]


class _Stack(nn.Module):  # type: ignore[misc]
    """A model of two blocks whose calls are unusual in one way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.embed = nn.Embedding(8, 32)
        self.blocks = [nn.Linear(32, 32) for _ in range(2)]

    @property
    def layers(self) -> list[nn.Module]:
        return [] if self.way == "none" else self.blocks

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden: mx.array = self.embed(tokens)
        for block in self.blocks:
            if self.way == "twice":
                hidden = block(hidden)
            hidden = block(hidden * 2 if self.way == "between" else hidden)
        return hidden


@pytest.mark.parametrize(
    ("way", "what"),
    [
        ("none", "no list of blocks"),
        ("twice", "blocks that are called more than once, or not at all"),
        ("between", "blocks.1, whose input is not the output of blocks.0"),
    ],
)
def test_unusual_blocks_are_refused_by_name(way: str, what: str) -> None:
    with pytest.raises(CallError) as caught:
        record_blocks(_Stack(way), context_length=4, name='quantize.method = "block"')
    assert str(caught.value) == (
        f'quantize.method = "block": needs blocks that each take only the output of the one before, and '
        f'test_block_method has {what}. Use "gptq".'
    )
