"""The predicted memory of a training, remembered for later starts of a training of the same shapes.

The prediction follows each operation of a step and takes seconds for a large model. It is remembered in the user's
cache folder by everything that it depends on: the layers with their classes, numbers and shapes, the settings that
change a step, kernels, device, MLX and the code of this package.
"""

import dataclasses
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.device import compute_device
from mlxflow.distributed.code_digest import code_digest
from mlxflow.distributed.team import of_this_process
from mlxflow.kernels.model_kernels import ModelKernels
from mlxflow.storage import cache_files
from mlxflow.storage.digests import digest_json
from mlxflow.storage.locks import device_lock
from mlxflow.training import build
from mlxflow.training.memory_forecast import MemoryForecast, forecast_memory

# Predictions that are kept; the oldest are dropped first
_MOST = 256

# Settings that change no step: how many there are, their rates, and what is done between them
_OTHER_SETTINGS = frozenset(
    {
        "num_steps",
        "learning_rate",
        "final_learning_rate",
        "warmup_steps",
        "decay_steps",
        "max_bad_steps",
        "lazy_eval_every",
        "log_every",
        "eval_every",
        "max_validation_rows",
        "patience",
        "keep",
        "save_every",
        "keep_checkpoints",
        "workers",
        "prefetch_batches",
    }
)

# Values of a layer that are described by their text
_PLAIN = (int, float, str, bool, tuple, type(None))

# Packages whose layers are the same as long as their version is, or the digest of this package
_KNOWN_PACKAGES = ("mlx", "mlx_lm", "mlxflow")


def remembered_forecast(subject: build.Subject, kernels: ModelKernels, rows: Rows) -> MemoryForecast:
    """Return `forecast_memory` of a training, without computing it if an earlier process has.

    A model with a class of another package, whose code may change, is traced each time, as is one with another loss.

    Args:
        subject: see `forecast_memory`.
        kernels: in use.
        rows: of one pass.

    Raises:
        ValueError: the model uses an operation that cannot be traced.
    """
    key = _key(subject, kernels, rows)
    if key is None:
        return forecast_memory(subject, kernels, rows)
    file = device_lock().with_name("forecasts.json")
    found = cache_files.read_table(file).get(key)
    if isinstance(found, list) and len(found) == len(MemoryForecast._fields):
        return MemoryForecast(*found)
    made = forecast_memory(subject, kernels, rows)
    cache_files.add_entries(file, {key: list(made)}, most=_MOST)
    return made


def _key(subject: build.Subject, kernels: ModelKernels, rows: Rows) -> str | None:
    """Return a digest of all that a prediction depends on; None if that is not known."""
    modules = dict(subject.model.named_modules())
    kinds = {type(module) for module in modules.values()}
    if subject.make_objective or any(kind.__module__.partition(".")[0] not in _KNOWN_PACKAGES for kind in kinds):
        return None
    settings = {name: value for name, value in subject.settings.table().items() if name not in _OTHER_SETTINGS}
    trained = sorted(name for name, _ in tree_flatten(subject.model.trainable_parameters()))
    on_gpu = mx.default_device() != mx.cpu
    return digest_json(
        {
            "layers": {path: list(_described(module)) for path, module in modules.items()},
            "trained": trained,
            "settings": settings,
            "sizes": [subject.vocab_size, subject.context_length, subject.has_head, *rows.tokens.shape],
            "kernels": [kernels.selected, kernels.uses_loss_kernel, kernels.keeps_mlx_attention],
            "ranks": of_this_process().size,
            "device": [str(mx.default_device()), compute_device.name()],
            "batches": compute_device.batch_limits() if on_gpu else [],
            "variables": {name: value for name, value in os.environ.items() if name.startswith("MLX_")},
            "versions": [version("mlx"), version("mlx-lm"), code_digest()],
        }
    )


def _described(module: nn.Module) -> Iterator[Any]:
    """Yield the class of a layer, the numbers, texts and settings it holds, and the shapes of its own arrays."""
    yield f"{type(module).__module__}.{type(module).__qualname__}"
    yield sorted(
        (name, repr(value))
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) or dataclasses.is_dataclass(value)
    )
    for name, value in module.items():
        if not isinstance(value, nn.Module):
            leaves = tree_flatten({name: value}, is_leaf=lambda one: isinstance(one, nn.Module))
            yield [(path, _shown(leaf)) for path, leaf in leaves]


def _shown(value: Any) -> Any:
    """Return the shape and dtype of an array, the class of a layer, which is described apart, or a value in words."""
    if isinstance(value, mx.array):
        return value.shape, str(value.dtype)
    return type(value).__qualname__ if isinstance(value, nn.Module) else repr(value)
