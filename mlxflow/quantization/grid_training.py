"""Train the grids of a quantized model, alone or together with its codes, within the trainer of dense models.

The second phase of EfficientQAT (E2E-QP; Chen et al. 2024, arXiv:2407.11062) trains the scales of a model whose codes
were learned block by block. Here biases are trained, too, and on request the codes with the straight-through estimator.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.models.fp32_on_cpu import dtype_in_products
from mlxflow.ops import patching
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.fake_quant import computing_with
from mlxflow.quantization.grids import is_float
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.trained_grid import GridLayer, Trained

# Attribute of a layer with its first scales and biases, (2, ..., N / G, 1); no parameter
_GRID = "_grid"

# Trained arrays of a layer by the names of its parameters; codes move from where they begin
_MOVED, _GRID_NAMES = "moved", ("stretch", "shift")

# Rate at which the scales and biases of an embedding that is also the head are trained, as a share of that of other
# layers, and the bits from which on. Each step moves the logits of all tokens: at the whole rate the scales of Gemma 3
# 270M at 4 bits lost what they gained on text that was not learned, SmolLM2's at 2 bits needed it
_TIED_SHARE, _TIED_BITS = 0.1, 3

# Highest step of a code in units of that of a scale's relative change, as in the training of blocks
_CODE_STEP = 4.0


class _Kind(NamedTuple):
    """What layers of a class have in common.

    Attributes:
        setting: of the quantization.
        dtypes: of the weight in a forward pass, fp32 for 16 bits on a CPU, and in the model.
        share: of the learning rate that its scales and biases have.
    """

    setting: Setting
    dtypes: tuple[mx.Dtype, mx.Dtype]
    share: float


def rate_shares(model: nn.Module, layers: Mapping[str, Setting]) -> dict[str, float]:
    """Return the shares of the learning rate at which the scales and biases of layers are trained, by module path.

    Args:
        model: of the layers.
        layers: module path to setting.
    """
    modules = dict(model.named_modules())
    has_head = any(path.endswith("lm_head") for path in modules)
    slow = {path for path, one in layers.items() if hasattr(modules[path], "as_linear") and one.bits >= _TIED_BITS}
    return {path: _TIED_SHARE if path in slow and not has_head else 1.0 for path in layers}


@contextmanager
def grids_in_training(
    model: nn.Module, layers: Mapping[str, Setting], packed: Mapping[str, Packed], *, trains_codes: bool
) -> Iterator[Callable[[], dict[str, Packed]]]:
    """Let layers compute on trainable grids until the block ends; yield a function that packs them.

    Each layer gets a subclass of its class, as in `fake_quant.fake_quantized`. Its weight is replaced by its codes,
    which are frozen, and it gets parameters for the changes of scales and biases, and of codes if they are trained:
    then a code begins at the dense weight if that rounds to it, else in the middle of its range. Without training of
    codes all other parameters of the model are frozen.

    Args:
        model: dense; its weights may be lazy. Those of the layers are restored.
        layers: module path to setting.
        packed: codes and grids to begin with, by the same paths.
        trains_codes: whether codes, and all other parameters of the model, are trained as well.
    """
    modules = dict(model.named_modules())
    chosen = {path: modules[path] for path in layers}
    dense = {path: module["weight"] for path, module in chosen.items()}
    shares = rate_shares(model, layers)
    dtypes = {path: (dtype_in_products(weight.dtype), weight.dtype) for path, weight in dense.items()}
    kinds = {path: _Kind(setting, dtypes[path], shares[path]) for path, setting in layers.items()}
    changes = [(chosen[path], _grid_class(cast("Hashable", type(chosen[path])), kind)) for path, kind in kinds.items()]
    if not trains_codes:
        model.freeze()
    try:
        for path, module in chosen.items():
            _put_grid(module, packed[path], kinds[path], trains_codes=trains_codes)
        with patching.layer_classes(changes, by=__name__):
            yield lambda: {path: _packed_layer(chosen[path], kind) for path, kind in kinds.items()}
    finally:
        for path, module in chosen.items():
            for name in (_GRID, _MOVED, *_GRID_NAMES):
                module.pop(name, None)
            module["weight"] = dense[path]
            module.unfreeze(recurse=False)


def _put_grid(module: nn.Module, packed: Packed, kind: _Kind, *, trains_codes: bool) -> None:
    layer, trained = GridLayer.of_packed(packed, kind.setting, dtypes=kind.dtypes)
    positions, dense = trained.pop("positions"), module["weight"]
    module["weight"] = positions.reshape(layer.shape).astype(mx.bfloat16 if is_float(kind.setting) else mx.uint8)
    module[_GRID] = mx.stack([layer.scales, layer.biases])
    module.freeze(recurse=False)
    for name, array in trained.items():
        module[name] = array
    if trains_codes:
        away = layer.positions_of(dense, positions) - positions
        module[_MOVED] = away.reshape(layer.shape) / (_CODE_STEP * layer.spacing)
    own = [*trained, *([_MOVED] if trains_codes else []), *(["bias"] if trains_codes and "bias" in module else [])]
    module.unfreeze(recurse=False, keys=own)
    mx.eval(module.parameters(), module[_GRID])


def _layer(module: nn.Module, kind: _Kind) -> GridLayer:
    scales, biases = module[_GRID]
    return GridLayer(kind.setting, module["weight"].shape, *kind.dtypes, scales, biases)


def _arrays(module: nn.Module, layer: GridLayer, share: float) -> Trained:
    codes = module["weight"].astype(mx.float32)
    if _MOVED in module:
        codes = codes + _CODE_STEP * layer.spacing * module[_MOVED]
    positions = codes.reshape(*module[_GRID].shape[1:-1], -1)
    return {"positions": positions} | {name: share * module[name] for name in _GRID_NAMES if name in module}


def _packed_layer(module: nn.Module, kind: _Kind) -> Packed:
    layer = _layer(module, kind)
    return layer.packed(_arrays(module, layer, kind.share))


@functools.cache
def _grid_class(plain: type[nn.Module], kind: _Kind) -> type[nn.Module]:
    def weight(module: nn.Module) -> mx.array:
        layer = _layer(module, kind)
        return layer.weight(_arrays(module, layer, kind.share))

    return computing_with(plain, weight)
