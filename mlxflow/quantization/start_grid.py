"""Codes and grids of a quantize stage's artifact, from which training starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.messages.errors import ArtifactError
from mlxflow.quantization.codec import Packed, unpack
from mlxflow.quantization.plan import QuantizationPlan, quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.report.stage_reports.quantize import LayerFigures
from mlxflow.storage import layout, model_files, report_files, report_structs

# Methods that leave the dense weights as they are
_KEEPS_WEIGHTS = ("rtn", "gptq", "dwq", "block", "qat")


class StartGrid(NamedTuple):
    """A quantized model to start from.

    Attributes:
        layers: module path to setting.
        packed: codes and grids by module path; lazy.
        others: all other parameters, such as norms; lazy.
        keeps_weights: whether its codes stand for the dense model's weights; AWQ and rotations change these.
    """

    layers: dict[str, Setting]
    packed: dict[str, Packed]
    others: dict[str, mx.array]
    keeps_weights: bool

    def put_into(self, model: nn.Module) -> None:
        """Give a dense model the parameters outside of the quantized layers, and the weights that the codes stand for.

        Those are the model's own, or where a method changed these the dequantized ones.
        """
        model.load_weights(list(self.others.items()), strict=False)
        modules = {} if self.keeps_weights else dict(model.named_modules())
        for path, setting in self.layers.items() if modules else ():
            modules[path].weight = unpack(self.packed[path], setting, modules[path].weight.dtype)


def read_start(files: Sequence[Path], *, default: Setting, key: str) -> StartGrid:
    """Return the quantized model of a quantize stage's artifact.

    Args:
        files: of the artifact: weights and report.
        default: of layers without a rule; says whether scales are narrow.
        key: the setting that names the stage, for messages.

    Raises:
        ArtifactError: the report does not list the layers, or the weights lack one.
    """
    folder = files[0].parent
    report = report_files.read_report(folder / layout.REPORT)
    shown, advice = f"{key}: {folder / layout.REPORT}", "Build it again."
    rows = report.get("layers", [])
    figures = [
        report_structs.convert(row, LayerFigures, shown=shown, prefix=f"layers[{place}].", advice=advice)
        for place, row in enumerate(rows if isinstance(rows, list) else [])
    ]
    layers = {
        one.path: Setting(one.mode, one.bits, one.group_size, default.narrows_scales)
        for one in figures
        if one.mode != "dense"
    }
    tensors: dict[str, mx.array] = mx.load(str(folder / model_files.WEIGHTS))  # type: ignore[assignment]
    missing = [path for path in layers if f"{path}.scales" not in tensors]
    if missing or not layers:
        raise ArtifactError(
            f"{shown}: lists other layers than {model_files.WEIGHTS} has ({', '.join(missing[:3])}). {advice}"
        )
    packed = {
        path: Packed(tensors.pop(f"{path}.weight"), tensors.pop(f"{path}.scales"), tensors.pop(f"{path}.biases", None))
        for path in layers
    }
    keeps = report.get("method") in _KEEPS_WEIGHTS and not report.get("rotation", {}).get("is_kept", False)
    return StartGrid(layers, packed, tensors, keeps)


def plan_of(start: StartGrid, model: nn.Module, *, default: Setting, key: str) -> QuantizationPlan:
    """Return the plan of a quantized model, for the dense model that it was made of.

    Args:
        start: the quantized model.
        model: dense.
        default: of layers without a rule.
        key: the setting that names the quantized model, for messages.

    Raises:
        ArtifactError: the dense model has no layer of a path.
    """
    layers = quantizable_layers(model)
    if unknown := [path for path in start.layers if path not in layers]:
        raise ArtifactError(f"{key}: has a layer {unknown[0]}, which the dense model lacks. Name a variant of it.")
    dense = [path for path in layers if path not in start.layers]
    return QuantizationPlan(default, {path: start.layers[path] for path in layers if path in start.layers}, dense, [])
