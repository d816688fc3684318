import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.quant.gptq import Catcher
from mlx_lm.utils import load_model

from mlxflow.messages.errors import CallError
from mlxflow.quantization import codec, dwq, mlx_lm_patches
from mlxflow.quantization.calibrated import awq, gptq
from mlxflow.quantization.codec import Packed, pack, unpack
from mlxflow.quantization.settings import Setting

FOUR, EIGHT, SYMMETRIC = Setting("affine", 4, 32), Setting("affine", 8, 64), Setting("symmetric", 4, 32)
TOKENS = mx.random.randint(0, 60, (8, 9), key=mx.random.key(5))


def _llama(**shape: Any) -> tuple[nn.Module, dict[str, Any]]:
    from tests.small_models import llama

    model, config = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=64, **shape)
    for number, (path, layer) in enumerate(model.named_modules()):
        if path.endswith("layernorm"):  # channels of unlike sizes, as training makes them: else AWQ has nothing to gain
            layer.weight = mx.exp(mx.random.normal((64,), key=mx.random.key(number)))
    model.eval()
    return model, config


def _plan(model: nn.Module, setting: Setting, **others: Setting | None) -> dict[str, Setting]:
    """Return one setting for all layers, another for those whose name is given, none where it is None."""
    paths = [path for path, layer in model.named_modules() if hasattr(layer, "to_quantized")]
    told = {path: others.get(path.rpartition(".")[2], setting) for path in sorted(paths)}
    return {path: setting for path, setting in told.items() if setting is not None}


def _learn(method: str, model: nn.Module, plan: dict[str, Setting]) -> dict[str, Packed]:
    if method in ("gptq", "awq"):
        with tempfile.TemporaryDirectory() as name:
            rows, folder = TOKENS[:, :-1], Path(name)
            if method == "gptq":
                packed = gptq(lambda: copy.deepcopy(model), plan, rows, batch_size=4, folder=folder, key="quantize")
            else:
                packed = awq(model, plan, rows, search_steps=4, folder=folder, key="quantize")
            mx.eval(packed, model.parameters())
            return packed
    rows = mx.tile(TOKENS, (2, 1))  # those for validation are trained on, too: so few rows teach nothing of others
    name = 'quantize.method = "dwq"'
    return dwq.train_scales(
        lambda: copy.deepcopy(model), plan, rows, batch_size=2, learning_rate=1e-4, seed=0, name=name
    )


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU computes in the stored dtype")
@pytest.mark.parametrize("method", ["gptq", "awq", "dwq"])
def test_a_cpu_computes_16_bit_models_in_fp32_and_the_codes_keep_their_dtype(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = _llama(tie_word_embeddings=False)
    model.set_dtype(mx.bfloat16)
    seen: list[mx.Dtype] = []
    # GPTQ records the calls of the blocks in a pass in 16 bits that is never evaluated
    for kind in [Catcher] if method == "gptq" else [nn.Linear, mlx_lm_patches._DenseProductLinear]:
        monkeypatch.setattr(kind, "__call__", _noting(kind.__call__, seen))
    packed = _learn(method, model, _plan(model, FOUR))
    assert set(seen) == {mx.float32}
    assert {part.dtype for codes in packed.values() for part in codes[1:] if part is not None} == {mx.bfloat16}


def _noting(call: Any, seen: list[mx.Dtype]) -> Any:
    """Return a layer's call that notes the dtype of its rows."""

    def noting_call(self: Any, x: mx.array) -> Any:
        seen.append(x.dtype)
        return call(self, x)

    return noting_call


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU computes in the stored dtype")
@pytest.mark.parametrize("method", ["gptq", "awq", "dwq"])
def test_a_16_bit_model_is_learned_on_a_cpu_nearly_as_its_fp32_copy(method: str) -> None:
    narrow, _ = _llama(tie_word_embeddings=False)
    narrow.set_dtype(mx.bfloat16)
    exact = copy.deepcopy(narrow)
    exact.set_dtype(mx.float32)
    plan = _plan(narrow, FOUR)
    codes = [_learn(method, model, plan) for model in (narrow, exact)]
    for path in plan:
        one, other = (unpack(some[path], plan[path], mx.float32) for some in codes)
        # codes near the middle of a step may differ, as scales do in bf16; the weights are as near as the step is wide
        assert float(mx.abs(one - other).mean()) < 0.1 * float(mx.abs(codes[1][path].scales).mean()), path


@pytest.mark.parametrize("method", ["gptq", "awq", "dwq"])
def test_calibrated_models_follow_the_plan_differ_from_rounding_and_open_in_mlx_lm(method: str, tmp_path: Path) -> None:
    model, config = _llama(tie_word_embeddings=False)
    plan = _plan(model, FOUR, embed_tokens=EIGHT, lm_head=EIGHT)
    rounded = {path: pack(dict(model.named_modules())[path].weight, setting) for path, setting in plan.items()}
    kinds = {path: type(layer) for path, layer in model.named_modules()}
    packed = _learn(method, model, plan)
    assert {path: type(layer) for path, layer in model.named_modules()} == kinds
    assert packed.keys() == plan.keys()
    inside = [path for path in plan if ".layers." in path]
    assert sum(not mx.array_equal(packed[path].scales, rounded[path].scales) for path in inside) > len(inside) / 2 or (
        method == "gptq" and any(not mx.array_equal(packed[path].weight, rounded[path].weight) for path in inside)
    )
    only_rounded = {"gptq": ["model.embed_tokens"], "awq": ["model.embed_tokens", "lm_head"], "dwq": []}
    for path in only_rounded[method]:
        assert mx.array_equal(packed[path].weight, rounded[path].weight), path
    _open_in_mlx_lm(model, config, plan, packed, tmp_path)


def _open_in_mlx_lm(
    model: nn.Module, config: dict[str, Any], plan: dict[str, Setting], packed: dict[str, Packed], folder: Path
) -> None:
    tensors = {name: value for name, value in tree_flatten(model.parameters()) if name.rpartition(".")[0] not in plan}
    for path, parts in packed.items():
        tensors |= {f"{path}.weight": parts.weight, f"{path}.scales": parts.scales, f"{path}.biases": parts.biases}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    told = {path: {"bits": one.bits, "group_size": one.group_size} for path, one in plan.items()}
    config = {**config, "quantization": {"bits": 4, "group_size": 32, **told}}
    (folder / "config.json").write_text(json.dumps(config))
    opened, _ = load_model(folder, strict=True)
    logits = opened(TOKENS)
    weights = [(f"{path}.weight", unpack(parts, plan[path], mx.float32)) for path, parts in packed.items()]
    model.load_weights(weights, strict=False)
    assert np.allclose(np.array(logits), np.array(model(TOKENS)), atol=1e-4)


def test_gptq_loses_less_of_the_outputs_than_rounding() -> None:
    model, _ = _llama()
    path = "model.layers.0.self_attn.q_proj"
    plan = {path: Setting("affine", 2, 32)}
    layer = dict(model.named_modules())[path]
    packed = _learn("gptq", model, plan)[path]
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS[:, :-1]))
    rounded = unpack(pack(layer.weight, plan[path]), plan[path])
    lost = [float((x @ (layer.weight - weight).T).square().sum()) for weight in (unpack(packed, plan[path]), rounded)]
    assert lost[0] < 0.9 * lost[1]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_that_the_plan_leaves_dense_stay_dense(method: str) -> None:
    model, _ = _llama()
    plan = _plan(model, FOUR, embed_tokens=None, down_proj=None)
    before = {path: mx.array(layer.weight) for path, layer in model.named_modules() if "weight" in layer}
    packed = _learn(method, model, plan)
    assert packed.keys() == plan.keys()
    embedding = "model.embed_tokens"
    assert mx.array_equal(dict(model.named_modules())[embedding].weight, before[embedding])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_layer_is_calibrated_by_its_own_setting(method: str) -> None:
    model, _ = _llama()
    plan = _plan(model, Setting("affine", 2, 32), down_proj=Setting("affine", 4, 64), embed_tokens=EIGHT)
    weights = {path: mx.array(dict(model.named_modules())[path].weight) for path in plan}
    packed = _learn(method, model, plan)
    for path, setting in plan.items():
        assert packed[path].scales.shape[-1] == 64 // setting.group_size
        assert packed[path].weight.shape[-1] == 64 * setting.bits // 32
    rounded = {path: pack(weight, plan[path]) for path, weight in weights.items()}
    same = {path for path, parts in rounded.items() if mx.array_equal(parts.weight, packed[path].weight)}
    assert "model.embed_tokens" in same
    if method == "gptq":
        assert same == {"model.embed_tokens"}
    for setting in (Setting("affine", 2, 32), Setting("affine", 4, 64)):
        own = {path for path in plan if plan[path] == setting}
        assert len(own - same) > len(own) / 2  # a search may find that nothing is better than rounding


def test_awq_searches_each_layer_by_its_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxflow.quantization import awq as searching
    from tests.small_models import llama

    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=128)
    model.eval()
    two, four = Setting("affine", 2, 32), Setting("affine", 4, 64)
    plan = _plan(model, two, down_proj=four, embed_tokens=EIGHT)
    tried: list[tuple[int, Setting]] = []

    def round_trip(weight: mx.array, setting: Setting) -> mx.array:
        tried.append((weight.shape[-1], setting))
        return codec.round_trip(weight, setting)

    monkeypatch.setattr(searching, "round_trip", round_trip)
    _learn("awq", model, plan)
    assert set(tried) == {(64, two), (128, four)}  # the only layers that read 128 channels are the two down_proj
    # in both blocks: four scales, two limits (mlx-lm tries the upper half), and the block's error before and after
    assert tried.count((128, four)) == 2 * (4 + 2 + 2)


@pytest.mark.parametrize("spoilt_part", ["scales", "biases"])
def test_codes_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch, spoilt_part: str) -> None:
    from mlx_lm.quant import gptq as theirs

    plain = theirs.gptq_quantize

    def spoilt(model: nn.Module, *arguments: Any) -> Any:
        made = plain(model, *arguments)
        calls.append(model)
        if len(calls) == 2:  # of the second block
            layer = dict(model.named_modules())["part.mlp.up_proj"]
            setattr(layer, spoilt_part, getattr(layer, spoilt_part) * float("nan"))
        return made

    calls: list[nn.Module] = []

    monkeypatch.setattr(theirs, "gptq_quantize", spoilt)
    model, _ = _llama()
    with pytest.raises(CallError) as caught:
        _learn("gptq", model, _plan(model, FOUR))
    assert str(caught.value) == (
        'quantize.method = "gptq": model.layers.1.mlp.up_proj has scales or biases that are not finite. '
        "Calibrate on more rows (calibration_rows)."
    )


def test_symmetric_embeddings_keep_their_zero_point() -> None:
    model, _ = _llama()
    packed = _learn("gptq", model, _plan(model, FOUR, embed_tokens=SYMMETRIC))["model.embed_tokens"]
    assert packed.biases is not None
    assert mx.array_equal(packed.biases, packed.scales * -8)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "gptq",
        {"v_proj": SYMMETRIC},
        'learns affine layers, and model.layers.0.self_attn.v_proj is symmetric. Set mode = "affine".',
    ),
    (
        "dwq",
        {"o_proj": SYMMETRIC},
        "trains scales and biases apart, which moves the fixed zero point of model.layers.0.self_attn.o_proj. "
        'Set mode = "affine", or use method = "qat".',
    ),
]


@pytest.mark.parametrize(("method", "others", "message"), REFUSED)
def test_a_plan_that_cannot_be_followed_is_refused(method: str, others: dict[str, Any], message: str) -> None:
    model, _ = _llama()
    with pytest.raises(CallError) as caught:
        _learn(method, model, _plan(model, FOUR, **others))
    assert str(caught.value) == f'quantize.method = "{method}": {message}'


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        (
            "gptq",
            Setting("affine", 3, 32),
            "mlx-lm's GPTQ has 2, 4 and 8 bits, and model.layers.0.mlp.down_proj has 3. Use one of them.",
        ),
        ("dwq", EIGHT, "trains affine layers under 8 bits, and the plan has none. Use fewer bits."),
    ],
)
def test_bits_that_a_method_does_not_have_are_refused(method: str, setting: Setting, message: str) -> None:
    model, _ = _llama()
    with pytest.raises(CallError) as caught:
        _learn(method, model, _plan(model, setting))
    assert str(caught.value) == f'quantize.method = "{method}": {message}'
