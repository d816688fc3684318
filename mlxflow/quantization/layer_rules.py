"""The entries of `quantize.layers`: settings for the layers that a pattern matches; imports no MLX."""

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from mlxflow.quantization.settings import RequestedSetting

if TYPE_CHECKING:
    from mlxflow.quantization.plan import Rule


class LayerRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of `layers`: the setting of the layers that a pattern matches."""

    match: Annotated[str, Meta(min_length=1, description="a pattern of module paths, such as `*.mlp.*`")]
    skip: Annotated[bool, Meta(description="whether they stay dense")] = False
    mode: Annotated[
        Literal["same", "affine", "symmetric", "mxfp4", "mxfp8", "nvfp4"],
        Meta(description="as above; same: the table's"),
    ] = "same"
    bits: Annotated[
        Literal["same", 2, 3, 4, 5, 6, 8], Meta(description="as above; same: the table's, or the mode's own")
    ] = "same"
    group_size: Annotated[
        Literal["same", 16, 32, 64, 128],
        Meta(description="as above; same: the table's, or the mode's own"),
    ] = "same"

    def completed(self, table: RequestedSetting) -> "LayerRule":
        """Return the rule with the defaults of its mode where they replace the table's values.

        Args:
            table: mode, bits and group size of the `[quantize]` table.
        """
        if self.mode == "same":
            return self
        own = table.by_rule(self.mode, *(None if one == "same" else one for one in (self.bits, self.group_size)))
        changes = {name: value for name, value in own.items() if value is not None}
        return msgspec.structs.replace(self, **changes)

    @property
    def rule(self) -> "Rule":
        """The rule for a plan, with None for "same"."""
        from mlxflow.quantization.plan import Rule

        return Rule(
            self.match,
            self.skip,
            None if self.mode == "same" else self.mode,
            None if self.bits == "same" else self.bits,
            None if self.group_size == "same" else self.group_size,
        )
