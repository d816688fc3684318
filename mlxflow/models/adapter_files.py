"""LoRA adapters in a model folder, in mlx-lm's format: read, apply to the model, fuse into its weights.

A folder with `adapters.safetensors` and `adapter_config.json` beside `model.safetensors` holds a base model and its
adapters. `mlxflow.models.model_folder.load` applies them; mlx-lm does if its `adapter_path` names the folder.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.messages.errors import ArtifactError, reason_of
from mlxflow.messages.os_errors import advise_on
from mlxflow.ops import mlx_lm_import
from mlxflow.storage import layout, model_files, report_structs

WEIGHTS, CONFIG = model_files.ADAPTERS

#: Names of an adapter's own parameters: LoRA's two factors and DoRA's magnitudes.
PARAMETERS = ("lora_a", "lora_b", "m")

# The attribute of an adapter layer that holds its base layer
_INNER = ("linear", "embedding")


def are_in(folder: Path) -> bool:
    """Return whether a model folder holds adapters.

    Raises:
        ArtifactError: they are in another format than mlx-lm's, or one of their files is missing.
    """
    existing = [name for name in (WEIGHTS, CONFIG) if (folder / name).is_file()]
    if (folder / CONFIG).is_file() and "peft_type" in read_config(folder):
        raise ArtifactError(
            f"{folder / CONFIG}: is of PEFT's form, which mlx-lm does not read. Merge the adapter into the model, or "
            "move its files away."
        )
    if len(existing) == 1:
        missing = WEIGHTS if existing == [CONFIG] else CONFIG
        raise ArtifactError(
            f"{folder / missing}: missing beside {existing[0]}. Build it again, or remove {existing[0]}."
        )
    if not existing and _were_written(folder):
        raise ArtifactError(
            f"{folder}: {WEIGHTS} and {CONFIG} are missing: without them it is not the trained model. Build it again."
        )
    return bool(existing)


class _Fusing(msgspec.Struct, frozen=True):
    """The key `fuse` in the report of a train stage."""

    fuse: str | None = None


def _were_written(folder: Path) -> bool:
    """Return whether the folder belongs to a train stage whose report lists adapters."""
    try:
        return report_structs.read_part(folder / layout.REPORT, _Fusing, advice="").fuse == "never"
    except (OSError, ArtifactError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """Return the `adapter_config.json` of a folder.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        advice = advise_on(error, "Build it again")
        raise ArtifactError(f"{folder / CONFIG}: cannot be read ({error}). {advice}.") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder / CONFIG}: expected a table. Build it again.")
    return config


def apply(model: nn.Module, folder: Path) -> nn.Module:
    """Return a model with the adapters of its folder applied, in eval mode.

    Args:
        model: the base model of the same folder; changed.
        folder: contains both adapter files.

    Raises:
        ArtifactError: the adapters do not fit the model, or some are missing.
    """
    read_config(folder)
    try:
        adapted: nn.Module = mlx_lm_import.tuner_utils().load_adapters(model, str(folder))
        stored: Any = mx.load(str(folder / WEIGHTS))  # lazy: only the header is read
    except OSError as error:
        advice = advise_on(error, "Build it again")
        raise ArtifactError(f"{folder / WEIGHTS}: cannot be read ({error.strerror or error}). {advice}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = reason_of(error, None)
        raise ArtifactError(f"{folder / WEIGHTS}: does not fit the model ({reason}). Build it again.") from error
    # mlx-lm leaves an adapter without weights in the file at its random initialization
    lacking = [name for name in _parameters(adapted) if name not in stored]
    if lacking:
        raise ArtifactError(f"{folder / WEIGHTS}: has no {lacking[0]}. Build it again.")
    adapted.eval()
    return adapted


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapter layers of a model by path; each wraps its base layer."""
    return {path: layer for path, layer in model.named_modules() if "lora_a" in layer}


def _parameters(model: nn.Module) -> Iterator[str]:
    for path, layer in layers_of(model).items():
        own = {name: value for name, value in layer.items() if name in PARAMETERS}
        yield from (f"{path}.{name}" for name, _ in tree_flatten(own))


def fuse(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Return a model with its adapters fused into the weights of their base layers, in eval mode.

    Args:
        model: changed; without adapters it is returned unchanged. Lazily loaded weights stay on the disk.
        dequantize: whether quantized layers with an adapter become dense; else they are quantized again with their own
            settings, which may lose most of what the adapter learned.
    """
    fused = [(path, layer.fuse(dequantize=dequantize)) for path, layer in layers_of(model).items()]
    model.update_modules(tree_unflatten(fused))
    model.eval()
    return model


def take_out(model: nn.Module) -> nn.Module:
    """Return a model without its adapters: each adapter layer is replaced by its base layer.

    Args:
        model: changed.
    """
    bases = [(path, next(layer[name] for name in _INNER if name in layer)) for path, layer in layers_of(model).items()]
    model.update_modules(tree_unflatten(bases))
    return model
