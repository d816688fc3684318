import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.quantization.codec import Packed, unpack
from mlxflow.quantization.grid_training import grids_in_training
from mlxflow.quantization.grids import first_grid, pack_on
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.training.objective import plain_objective
from mlxflow.training.step import Step
from mlxflow.training.update import Update
from tests.small_models import llama

SETTINGS = [
    Setting("affine", 2, 32, narrows_scales=True),
    Setting("symmetric", 3, 32),
    Setting("mxfp4", 4, 32),
    Setting("nvfp4", 4, 16),
]


def _llama(dtype: mx.Dtype = mx.float32) -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=2, intermediate_size=96)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def _plan(model: nn.Module) -> dict[str, Setting]:
    """Return a plan in which every setting has layers, the embedding included."""
    return {path: SETTINGS[place % len(SETTINGS)] for place, path in enumerate(sorted(quantizable_layers(model)))}


def _packed(model: nn.Module, plan: dict[str, Setting]) -> dict[str, Packed]:
    layers = quantizable_layers(model)
    return {path: pack_on(layers[path].weight, one, first_grid(layers[path].weight, one)) for path, one in plan.items()}


def _train(model: nn.Module, *, steps: int) -> None:
    update = Update(model, optim.AdamW(2e-2), max_grad_norm=1.0, has_masters=False)
    step = Step(model, update, plain_objective(masks_documents=False))
    tokens = mx.random.randint(0, 60, (4, 17), key=mx.random.key(0))
    for _ in range(steps):
        mx.eval(step.update(step.compute(tokens, mx.full(tokens.shape, 3, mx.uint8))), step.state)


@pytest.mark.parametrize("trains_codes", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_training_begins_with_the_packed_model_and_ends_with_what_it_computed(
    dtype: mx.Dtype, *, trains_codes: bool
) -> None:
    model = _llama(dtype)
    plan = _plan(model)
    packed = _packed(model, plan)
    before = dict(tree_flatten(model.parameters()))
    tokens = mx.array(np.random.default_rng(0).integers(0, 60, (2, 8)))
    with grids_in_training(model, plan, packed, trains_codes=trains_codes) as pack:
        model.train()
        modules = dict(model.named_modules())
        for path, setting in plan.items():
            exact = unpack(packed[path], setting, dtype)
            assert mx.allclose(modules[path].fake_weight(), exact, atol=1e-6 if dtype == mx.float32 else 2e-3), path
        _train(model, steps=6)
        logits, made = model(tokens), pack()
        mx.eval(logits, made)
    plain = _llama(dtype)
    plain.update(model.parameters())
    for path, setting in plan.items():
        dict(plain.named_modules())[path].weight = unpack(made[path], setting, dtype)
    assert mx.allclose(plain(tokens), logits, atol=1e-4 if dtype == mx.float32 else 0.3)
    same = {path: mx.array_equal(made[path].weight, packed[path].weight) for path in plan}
    assert all(same.values()) if not trains_codes else not any(same.values())
    grids = {path: mx.array_equal(made[path].scales, packed[path].scales) for path in plan}
    assert all(is_same == (plan[path].mode == "mxfp4") for path, is_same in grids.items())
    # and the dense weights are back; norms were trained only with the codes
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[f"{path}.weight"], before[f"{path}.weight"]) for path in plan)
    assert mx.array_equal(after["model.norm.weight"], before["model.norm.weight"]) != trains_codes
    assert model.trainable_parameters().keys() <= {"model", "lm_head"}


def test_only_grids_are_trainable_with_fixed_codes() -> None:
    model = _llama()
    plan = _plan(model)
    with grids_in_training(model, plan, _packed(model, plan), trains_codes=False):
        names = {name.rpartition(".")[2] for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {"stretch", "shift"}


@pytest.mark.parametrize(
    ("is_tied", "bits", "share"), [(True, 4, 0.1), (True, 3, 0.1), (True, 2, 1.0), (False, 4, 1.0)]
)
def test_the_grid_of_an_embedding_that_is_also_the_head_moves_less_unless_it_has_2_bits(
    is_tied: bool, bits: int, share: float
) -> None:
    model, _ = llama(hidden_size=64, num_layers=1, intermediate_size=96, tie_word_embeddings=is_tied)
    plan = {path: Setting("affine", bits, 32) for path in ("model.embed_tokens", "model.layers.0.mlp.up_proj")}
    modules, packed = dict(model.named_modules()), _packed(model, plan)
    with grids_in_training(model, plan, packed, trains_codes=False) as pack:
        for path in plan:
            modules[path].stretch = mx.full(modules[path].stretch.shape, 0.5)
        moved = pack()
    changes = [float((moved[path].scales / packed[path].scales).mean()) - 1 for path in plan]
    assert changes == pytest.approx([0.5 * share, 0.5], rel=0.02)
