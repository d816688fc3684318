"""Quantize the trained model into mlx-lm's own form."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.config import Problem
from mlxflow.stage import Artifacts, Context, ModelFolder

VERSION = 1

#: The group sizes and bits that each mode has; the first of each is the default.
_GROUP_SIZES = {"affine": (64, 32, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
_BITS = {"affine": (4, 2, 3, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[quantize]` table, or one of `[[quantize]]`."""

    input: Annotated[str, Meta(description="the dense model: a train stage")] = "train"
    mode: Annotated[
        Literal["affine", "mxfp4", "mxfp8", "nvfp4"], Meta(description="how codes become weights; MLX's names")
    ] = "affine"
    bits: Annotated[
        Literal[2, 3, 4, 5, 6, 8], Meta(description="bits of a code; mxfp4 and nvfp4 have 4, mxfp8 has 8")
    ] = 4
    group_size: Annotated[
        Literal[16, 32, 64, 128],
        Meta(description="weights that share a scale; mxfp4 and mxfp8 have 32, nvfp4 has 16"),
    ] = 64

    def problems(self) -> Any:
        """Yield bits and group sizes that the mode does not have."""
        for key, value, choices in (
            ("bits", self.bits, _BITS[self.mode]),
            ("group_size", self.group_size, _GROUP_SIZES[self.mode]),
        ):
            if value not in choices:
                one_of = (
                    f"{key} {choices[0]}" if len(choices) == 1 else f"one of {', '.join(map(str, sorted(choices)))}"
                )
                advice = f"Set {key} = {choices[0]}" + (' or mode = "affine".' if self.mode != "affine" else ".")
                yield Problem(key, value, f'mode "{self.mode}" needs {one_of}', advice)


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """A dense model folder."""

    config: Path = Path()
    model: Path = Path()
    tokenizer: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take the model from a train stage."""
        folder = artifacts.folder(config.input, "input")
        return cls(
            config=folder / "config.json",
            model=folder / "model.safetensors",
            tokenizer=(folder / "tokenizer.json", folder / "tokenizer_config.json"),
        )


class Outputs(ModelFolder, frozen=True, kw_only=True):
    """A quantized model folder."""


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Quantize every layer that mlx-lm's converter would, and write the model folder.

    Raises:
        SourceError: no layer's width divides by the group size.
    """
    from mlxflow import models
    from mlxflow.quantization.apply import quantize

    model, model_config = models.load(inputs.model.parent)
    dense_bytes = inputs.model.stat().st_size
    quantized = quantize(
        model, model_config, bits=config.bits, group_size=config.group_size, mode=config.mode, key=context.task
    )
    models.save(
        model=model,
        config=quantized.config,
        config_file=outputs.config,
        model_file=outputs.model,
        provenance=context.provenance,
    )
    models.copy_tokenizer(inputs.tokenizer, context.folder)
    file_bytes = outputs.model.stat().st_size
    return {
        "bits_per_weight": quantized.bits_per_weight,
        "dense_bits_per_weight": quantized.dense_bits_per_weight,
        "model_bytes": file_bytes,
        "dense_model_bytes": dense_bytes,
        "compression_ratio": dense_bytes / file_bytes,
        "quantized_layers": quantized.layers,
        "dense_layers": quantized.dense_layers,
    }
