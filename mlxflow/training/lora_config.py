"""The `lora` table of a workflow: the low-rank adapters that a training adds to a model; imports no MLX."""

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from mlxflow.storage.toml_tables import MAX_SIZE, limit

if TYPE_CHECKING:
    from mlxflow.training.settings import AdapterShape


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train.lora]` table: low-rank adapters, for the methods "lora" and "dora"."""

    rank: Annotated[int, Meta(ge=1, le=MAX_SIZE, description="columns of the low-rank factors")] = 8
    scale: Annotated[float, Meta(gt=0, le=1e6, description="factor of the adapters' product")] = 20.0
    dropout: Annotated[float, Meta(ge=0, lt=1, description="share of an adapter's inputs zeroed in training")] = 0.0
    num_layers: Annotated[int, limit(MAX_SIZE, "number of last blocks that get adapters; 0 or inf: all")] = 0
    keys: Annotated[
        tuple[str, ...], Meta(min_length=1, description='patterns of layers within a block, such as "self_attn.*"')
    ] = ("*",)

    def shape(self, method: Literal["full", "lora", "dora", "scales"]) -> "AdapterShape | None":
        """Return the adapters that a training method adds; None if it adds none.

        Args:
            method: "lora" or "dora" for adapters; "full" for all weights, "scales" for those of a quantized model.
        """
        from mlxflow.training.settings import AdapterShape

        return None if method == "full" or method == "scales" else AdapterShape(method, **msgspec.structs.asdict(self))


def decide_fuse(fuse: str, *, is_quantized: bool) -> str:
    """Return how trained adapters are saved: `fuse`, with "auto" resolved by the base model.

    Args:
        fuse: "auto", "never", "requantize" or "dense".
        is_quantized: whether the base model is quantized.
    """
    if fuse != "auto":
        return fuse
    return "never" if is_quantized else "dense"
