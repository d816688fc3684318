"""Calibrated quantization on rows of tokens: GPTQ and DWQ by mlx-lm's functions, and AWQ.

Each function returns the packed layers of a dense model and leaves the model dense. A setting that a method cannot
learn is refused by name; layers that it only rounds, such as embeddings, may have any setting.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.messages.errors import CallError
from mlxflow.quantization import dwq
from mlxflow.quantization.codec import Packed, narrowed, pack
from mlxflow.quantization.gptq import compensated_layers
from mlxflow.quantization.kept_tensors import unread
from mlxflow.quantization.learned_codes import BlockStore, LearningFiles, blocks_folder
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.progress import show_layers
from mlxflow.quantization.settings import GPTQ_BITS, Setting
from mlxflow.quantization.stored_codes import CodesOnDisk
from mlxflow.quantization.tuning_saves import TuningSaves

#: Rows in a forward pass of the methods.
BATCH_SIZE = 4

# Scales that AWQ tries, as in mlx-lm
_AWQ_STEPS = 20

_DWQ_LEARNING_RATE = 1e-5


def require_learnable(method: str, model: nn.Module, plan: Mapping[str, Setting], *, key: str) -> None:
    """Check that a method supports a plan, by shapes and classes only.

    Args:
        method: "gptq", "awq", "dwq", or one without calibration.
        model: dense; its weights need not be evaluated.
        plan: module path to setting.
        key: of the table with the settings, for messages.

    Raises:
        CallError: names the first layer that the method cannot learn.
    """
    name = _named(method, key)
    if method in ("gptq", "awq") and not plan.keys() & _inside_blocks(model):
        raise CallError(f"{name}: the plan has no layer that it could learn. Leave one of the blocks' to be quantized.")
    if method == "gptq":
        _check_gptq(model, plan, name)
    if method == "dwq":
        dwq.require_trainable(plan, name)


def learn(
    method: str,
    model: nn.Module,
    load: Callable[[], nn.Module],
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    files: LearningFiles,
    seed: int,
    key: str,
) -> dict[str, Packed]:
    """Return the packed layers that a method learns, with its default hyperparameters.

    Args:
        method: "gptq", "awq" or "dwq".
        model: dense, in eval mode, with lazy weights; "awq" changes it.
        load: returns the same model with weights of its own; see the functions of the other methods.
        plan: module path to setting.
        tokens: (R, L + 1) ids to calibrate on.
        files: for codes, the changed weights of "awq", and the state of "dwq".
        seed: of the order of the rows.
        key: of the table with the settings, for messages.

    Raises:
        CallError: the method does not support the plan, or there are too few rows.
    """
    mx.eval(tokens)
    if method == "gptq":
        packed = gptq(load, plan, tokens[:, :-1], batch_size=BATCH_SIZE, key=key, **files._asdict())
    elif method == "awq":
        packed = awq(model, plan, tokens[:, :-1], search_steps=_AWQ_STEPS, key=key, **files._asdict())
    else:
        total = max(0, len(tokens) - BATCH_SIZE) // BATCH_SIZE
        saves = TuningSaves(files.folder, files.identity, task=key, total=total)
        rate = _DWQ_LEARNING_RATE
        name = _named("dwq", key)
        packed = dwq.train_scales(
            load, plan, tokens, batch_size=BATCH_SIZE, learning_rate=rate, seed=seed, name=name, saves=saves
        )
    return {path: narrowed(packed.pop(path), plan[path]) for path in list(packed)}


def gptq(
    load: Callable[[], nn.Module],
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    batch_size: int,
    folder: Path,
    key: str,
    identity: str = "",
) -> dict[str, Packed]:
    """Return layers whose codes compensate each other's errors (GPTQ; Frantar et al. 2022, arXiv:2210.17323).

    Linear layers and experts are learned, each with its own setting. Layers outside of the blocks, such as the head,
    are rounded if GPTQ does not support their setting; embeddings are always rounded.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own; those of a finished block are removed.
        plan: module path to setting; layers that are not in it stay dense.
        tokens: (R, L) ids to calibrate on.
        batch_size: rows in a forward pass.
        folder: for the codes, which are read when they are used; blocks of an interrupted run are taken.
        key: of the table with the settings, for messages.
        identity: of everything that the codes depend on.

    Raises:
        CallError: mlx-lm's function does not support the plan, cannot invert the Hessian of a layer, or returns codes
            that are not finite.
    """
    name = _named("gptq", key)
    require_learnable("gptq", load(), plan, key=key)
    blocks, stored = BlockStore(folder, identity), CodesOnDisk(folder)
    packed = compensated_layers(load, plan, tokens, batch_size=batch_size, store=blocks, name=name)
    layers = quantizable_layers(load())
    for path, setting in plan.items():
        if path not in packed:
            packed |= stored.kept({path: pack(layers.pop(path).pop("weight"), setting)})
    return packed


def awq(
    model: nn.Module,
    plan: Mapping[str, Setting],
    tokens: mx.array,
    *,
    search_steps: int,
    folder: Path,
    key: str,
    identity: str = "",
) -> dict[str, Packed]:
    """Return layers after activation-aware scaling and clipping (AWQ; Lin et al. 2023, arXiv:2306.00978).

    Layers of the blocks are learned, each with its own setting of any mode; embedding and head are rounded. Norms and
    dense weights of the model absorb the scales: save the changed model.

    Args:
        model: dense, in eval mode; norms and weights of its blocks are changed in place, and then lie in files.
        plan: module path to setting; layers that are not in it stay dense.
        tokens: (R, L) ids to calibrate on; the hidden states of one block on all of them are held in memory.
        search_steps: number of scales to try for each group of layers.
        folder: for codes and weights, which are read when they are used, and for the inputs of one block; blocks of an
            interrupted run are taken.
        key: of the table with the settings, for messages.
        identity: of everything that codes and weights depend on.

    Raises:
        CallError: the plan has no layer of the blocks.
    """
    from mlxflow.quantization.awq import scale_and_clip

    require_learnable("awq", model, plan, key=key)
    modules, scaled, stored = dict(model.named_modules()), BlockStore(folder, identity), CodesOnDisk(folder)
    packed: dict[str, Packed] = {}
    known: set[str] = set()
    with show_layers(key, len(model.layers)) as watch:

        def finished(block: str) -> None:
            own = [path for path in plan if path.startswith(f"{block}.")]
            packed.update(stored.kept({path: pack(modules[path].weight, plan[path]) for path in own}))
            if block not in known:
                _update(modules[block], scaled.keep(block, dict(tree_flatten(modules[block].parameters()))))
            mx.clear_cache()
            watch(block)

        def is_known(block: str) -> bool:
            if (tensors := scaled.tensors(block)) is not None:
                known.add(block)
                _update(modules[block], tensors)
            return block in known

        inputs = folder / "inputs"
        scale_and_clip(model, plan, tokens, search_steps=search_steps, folder=inputs, is_known=is_known, watch=finished)
    for path in (path for path in plan if path not in packed):
        packed |= stored.kept({path: pack(modules[path].weight, plan[path])})
    return packed


def scaled_model(load: Callable[[], nn.Module], folder: Path) -> Callable[[], nn.Module]:
    """Return a function that loads the model that "awq" changed, with lazy weights of its own.

    Args:
        load: returns the dense model.
        folder: with the changed weights, see `awq`.
    """

    def loaded() -> nn.Module:
        model = load()
        for path, block in model.named_modules():
            if tensors := unread(blocks_folder(folder), path):
                _update(block, tensors)
        return model

    return loaded


def _update(block: nn.Module, tensors: Mapping[str, mx.array]) -> None:
    block.update(tree_unflatten(list(tensors.items())))


def _inside_blocks(model: nn.Module) -> set[str]:
    """Return the paths of all layers within the model's blocks; of all layers if the model has no list of blocks."""
    blocks = getattr(model, "layers", None)
    if not blocks:
        return set(quantizable_layers(model))
    ids = {id(module) for block in blocks for module in block.modules()}
    return {path for path, module in model.named_modules() if id(module) in ids}


def _check_gptq(model: nn.Module, plan: Mapping[str, Setting], name: str) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    layers, inside = quantizable_layers(model), _inside_blocks(model)
    for path in (path for path in plan if path in inside and type(layers[path]) in (nn.Linear, SwitchLinear)):
        if plan[path].mode != "affine":
            raise CallError(f'{name}: learns affine layers, and {path} is {plan[path].mode}. Set mode = "affine".')
        if plan[path].bits not in GPTQ_BITS:
            raise CallError(
                f"{name}: mlx-lm's GPTQ has 2, 4 and 8 bits, and {path} has {plan[path].bits}. Use one of them."
            )


def _named(method: str, key: str) -> str:
    return f'{key}.method = "{method}"'
