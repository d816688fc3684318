import copy
import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.messages.errors import CallError
from mlxflow.quantization import dwq
from mlxflow.quantization.codec import pack, unpack
from mlxflow.quantization.settings import Setting
from tests.small_models import llama

TOKENS = mx.random.randint(0, 60, (8, 9), key=mx.random.key(5))


def _llama() -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=64)
    model.eval()
    return model


def _plan(model: nn.Module, setting: Setting) -> dict[str, Setting]:
    return {path: setting for path, layer in model.named_modules() if hasattr(layer, "to_quantized")}


def test_dwq_comes_nearer_to_the_dense_logits_and_leaves_numpys_random_state() -> None:
    model = _llama()
    plan = _plan(model, Setting("affine", 2, 32))
    wanted = mx.array(model(TOKENS))
    np.random.seed(7)
    state = repr(np.random.get_state())
    packed = dwq.train_scales(
        lambda: copy.deepcopy(model),
        plan,
        mx.tile(TOKENS, (8, 1)),
        batch_size=4,
        learning_rate=1e-3,
        seed=0,
        name='quantize.method = "dwq"',
    )
    assert repr(np.random.get_state()) == state
    dense = {path: dict(model.named_modules())[path].weight for path in plan}
    lost = []
    for parts in (packed, {path: pack(weight, plan[path]) for path, weight in dense.items()}):
        weights = [(f"{path}.weight", unpack(parts[path], plan[path], mx.float32)) for path in plan]
        model.load_weights(weights, strict=False)
        lost.append(float((model(TOKENS) - wanted).square().mean()))
    assert lost[0] < lost[1]


@pytest.mark.parametrize(("stored", "trained"), [(mx.float16, mx.float32), (mx.bfloat16, mx.bfloat16)])
def test_dwq_trains_fp16_models_in_fp32_and_returns_scales_of_their_dtype(
    stored: mx.Dtype, trained: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.quant import dwq as theirs

    plain, seen = theirs.dwq_quantize, []

    def recording(student: nn.Module, target: Any, *arguments: Any, **settings: Any) -> None:
        scales = {value.dtype for name, value in tree_flatten(student.parameters()) if name.endswith("scales")}
        seen.append((scales, settings["dtype"]))
        plain(student, target, *arguments, **settings)

    monkeypatch.setattr(theirs, "dwq_quantize", recording)
    model = _llama()
    model.set_dtype(stored)
    packed = dwq.train_scales(
        lambda: copy.deepcopy(model),
        _plan(model, Setting("affine", 2, 32)),
        mx.tile(TOKENS, (2, 1)),
        batch_size=2,
        learning_rate=1e-4,
        seed=0,
        name="dwq",
    )
    assert seen == [({trained}, trained)]
    assert {part.dtype for codes in packed.values() for part in (codes.scales, codes.biases) if part is not None} == {
        stored
    }


def test_dwq_that_diverges_more_than_rounding_is_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    model = _llama()
    plan = _plan(model, Setting("affine", 4, 32))
    packed = dwq.train_scales(
        lambda: copy.deepcopy(model),
        plan,
        TOKENS,
        batch_size=2,
        learning_rate=1.0,
        seed=0,
        name='quantize.method = "dwq"',
    )
    for path, setting in plan.items():
        rounded = pack(dict(model.named_modules())[path].weight, setting)
        assert mx.array_equal(packed[path].scales, rounded.scales), path
    said = capsys.readouterr().err
    assert re.search(
        r'^quantize\.method = "dwq": diverges by [\d.e+]+ nats from the dense model on the rows for validation, '
        r"rounding to nearest by [\d.e-]+; rounding is taken\. Calibrate on more rows \(calibration_rows\)\.$",
        said,
        re.MULTILINE,
    ), said


def test_too_few_rows_are_refused() -> None:
    model = _llama()
    with pytest.raises(CallError) as caught:
        dwq.train_scales(
            lambda: model,
            _plan(model, Setting("affine", 4, 32)),
            TOKENS,
            batch_size=5,
            learning_rate=1e-4,
            seed=0,
            name='quantize.method = "dwq"',
        )
    assert str(caught.value) == (
        'quantize.method = "dwq": needs 10 calibration rows, two batches, and has 8. Raise calibration_rows.'
    )
