"""Quantization settings of a matrix: modes, their bits and group sizes; imports no mlx."""

from typing import NamedTuple

#: The supported group sizes and bits of each mode; the first is the default.
GROUP_SIZES = {"affine": (64, 32, 128), "symmetric": (64, 32, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
BITS = {"affine": (4, 2, 3, 5, 6, 8), "symmetric": (4, 2, 3, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}

#: Bits that mlx-lm's GPTQ has.
GPTQ_BITS = (2, 4, 8)

# Codes with as many bits need scales and biases in fp32
_WIDE_BITS = 8


class Setting(NamedTuple):
    """How one matrix is quantized.

    Attributes:
        mode: "affine", "symmetric", "mxfp4", "mxfp8" or "nvfp4".
        bits: of a code.
        group_size: weights along the last axis that share a scale.
        narrows_scales: whether fp32 weights get scales and biases in bf16, except for codes of 8 bits: there the
            rounding of scales adds to the error (0.0087 instead of 0.0054 of the norm), and below it does not (0.0911
            instead of 0.0909 for 4 bits).
    """

    mode: str
    bits: int
    group_size: int
    narrows_scales: bool = False

    @property
    def has_narrow_scales(self) -> bool:
        """Whether fp32 weights get scales and biases in bf16."""
        return self.narrows_scales and self.stored_mode == "affine" and self.bits < _WIDE_BITS

    @property
    def stored_mode(self) -> str:
        """The mode in `config.json`: symmetric codes are stored as affine ones."""
        return "affine" if self.mode == "symmetric" else self.mode

    def stored(self) -> dict[str, str | int]:
        """Return the entry of `config.json` for the setting."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.stored_mode}


class RequestedSetting(NamedTuple):
    """A mode with the bits and the group size as written; None if they were not written.

    Attributes:
        mode: see `Setting`.
        bits: of a code.
        group_size: weights that share a scale.
    """

    mode: str
    bits: int | None = None
    group_size: int | None = None

    @property
    def setting(self) -> Setting:
        """The setting, with the mode's defaults for values that were not written."""
        return Setting(self.mode, self.bits or BITS[self.mode][0], self.group_size or GROUP_SIZES[self.mode][0])

    def by_rule(self, mode: str, bits: int | None, group_size: int | None) -> dict[str, int | None]:
        """Return bits and group size of a rule that sets a mode, in a table with this request.

        A value that neither sets is the default of the rule's mode, or None if both modes have the same choices: then
        the rule follows the table, whose bits a budget may choose.
        """
        table = self.setting
        given: dict[str, int | None] = {"bits": bits, "group_size": group_size}
        for key, choices in (("bits", BITS), ("group_size", GROUP_SIZES)):
            written = getattr(self, key)
            if given[key] is None and choices[mode] != choices[table.mode]:
                given[key] = written if written in choices[mode] else choices[mode][0]
        return given


class Mistake(NamedTuple):
    """A value that the mode does not support.

    Attributes:
        key: "bits" or "group_size".
        value: as given.
        expected: the supported values, in words.
        usual: the default, to use instead.
    """

    key: str
    value: int
    expected: str
    usual: int


def mistakes_in(setting: Setting) -> list[Mistake]:
    """Return the values of a setting that its mode does not support."""
    mistakes = []
    for key, value, choices in (
        ("bits", setting.bits, BITS[setting.mode]),
        ("group_size", setting.group_size, GROUP_SIZES[setting.mode]),
    ):
        if value not in choices:
            listed = f"{key} {choices[0]}" if len(choices) == 1 else f"one of {', '.join(map(str, sorted(choices)))}"
            mistakes.append(Mistake(key, value, f'mode "{setting.mode}" needs {listed}', choices[0]))
    return mistakes


def completed(default: Setting, *, mode: str | None, bits: int | None, group_size: int | None) -> Setting:
    """Complete a partial setting from the default, or with the mode's usual value if it lacks the default's."""
    mode = mode or default.mode
    usual_bits = default.bits if default.bits in BITS[mode] else BITS[mode][0]
    usual_size = default.group_size if default.group_size in GROUP_SIZES[mode] else GROUP_SIZES[mode][0]
    return Setting(mode, bits or usual_bits, group_size or usual_size, default.narrows_scales)
