"""The rows of `benchmarks/quality.py`: methods at widths and at budgets."""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from mlxflow.quantization.settings import BITS

#: Keys of the `[quantize]` table by name of a method.
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "rtn": {},
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "dwq": {"method": "dwq"},
    "dynamic": {},
    "block": {"method": "block"},
    "scales": {"method": "qat", "training": "scales", "distill": True},
    "uniform": {},
    "budget": {"candidate_bits": [2, 3, 4], "candidate_group_sizes": [32, 64, 128]},
    "all": {"method": "qat", "training": "full", "distill": True},
    "e2e": {"method": "block"},
    "rotated": {"method": "block", "rotations": 4},
}

#: Methods that are left out unless they are named
EXTRA = ("all", "e2e", "rotated")

#: Methods that start from the codes of "block"
STARTS = ("scales", "all")

# Methods that are compared at a size; "uniform" comes first, since a budget takes its size
_AT_BUDGETS = ("uniform", "budget")

# mlx-lm's GPTQ has no 3 bits
_GPTQ_BITS = (2, 4)

#: Bits and group size of the uniform plan of a size, with scales and biases of 16 bits.
UNIFORM = {2.5: (2, 64), 3.0: (2, 32), 3.5: (3, 64), 4.0: (3, 32), 4.5: (4, 64)}


class Row(NamedTuple):
    """A row of the benchmark: a method at a width, or at a budget.

    Attributes:
        method: a name of `METHODS`.
        size: of the models that are compared: "w4g64", "3.5 bits" or "dense".
        bits: of a code; of a budget and of the dense model 0.
        group_size: likewise.
        budget: stored bits of a weight; 0 without.
        by: the method of the stage by which a budget, or its uniform rival, learns.
        seed: of the calibration.
    """

    method: str
    size: str
    bits: int
    group_size: int
    budget: float
    by: str
    seed: int

    @property
    def label(self) -> str:
        """The method for tables, with the one by which it learns."""
        return f"{self.method}-{self.by}" if self.by else self.method

    @property
    def variant(self) -> str:
        """The name of the variant of the stage."""
        return f"{self.label}_{self.size}".replace(" ", "").replace(".", "p").replace("-", "_")


def rows_of(parsed: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of a run: those of the first seed first."""
    methods = parsed.methods.split(",")
    if unknown := [name for name in methods if name not in METHODS]:
        raise SystemExit(f"--methods: {', '.join(unknown)}: expected some of {', '.join(METHODS)}.")
    order = [name for name in METHODS if name in methods]
    seeds = [int(seed) for seed in parsed.seeds.split(",")]
    if "dense" in order:
        yield Row("dense", "dense", 0, 0, 0.0, "", seeds[0])
    for seed in seeds:
        yield from _at_widths(parsed, [name for name in order if name not in ("dense", *_AT_BUDGETS)], seed)
        yield from _at_budgets(parsed, [name for name in order if name in _AT_BUDGETS], seed)


def _at_widths(parsed: argparse.Namespace, methods: list[str], seed: int) -> Iterator[Row]:
    for bits in map(int, parsed.widths.split(",")):
        for method in methods:
            if _has(method, bits):
                size = f"w{bits}g{parsed.group_size}" + (f"e{parsed.embedding_bits}" if parsed.embedding_bits else "")
                yield Row(method, size, bits, parsed.group_size, 0.0, "", seed)


def _at_budgets(parsed: argparse.Namespace, methods: list[str], seed: int) -> Iterator[Row]:
    for budget in map(float, parsed.budgets.split(",")):
        for by in parsed.budget_methods.split(","):
            for method in methods:
                bits, group_size = UNIFORM[budget] if method == "uniform" else (0, 0)
                yield Row(method, f"{budget} bits", bits, group_size, budget, by, seed)


def _has(method: str, bits: int) -> bool:
    """Return whether mlx-lm has a method at a width."""
    return (method != "gptq" or bits in _GPTQ_BITS) and (method != "dynamic" or bits - 1 in BITS["affine"])
