"""How often the leak test is right, on simulated series of memory readings.

    python benchmarks/leaks.py [--series 80]

Prints, for each of eight shapes without a leak, the share of series with an alarm, and the share of leaks found that
grow by some percent of the base over the run: for this test and, beside it, two classical ones.
"""

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mlxflow.profiling.leak_test import find_leak

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_STEPS = 400
BASE = 1e9  # bytes
MB = 1e6
LEAKS = (0.0, 0.02, 0.05, 0.1, 0.2)


def flat(random: np.random.Generator) -> "NDArray[np.float64]":
    """White noise of half a percent."""
    return random.normal(0, 5 * MB, NUM_STEPS)


def warm_up(random: np.random.Generator) -> "NDArray[np.float64]":
    """Return a rise by a third of the base within the first hundred steps."""
    steps = np.arange(NUM_STEPS)
    return -300 * MB * np.exp(-steps / random.uniform(15, 40)) + random.normal(0, 3 * MB, NUM_STEPS)


def sawtooth(random: np.random.Generator) -> "NDArray[np.float64]":
    """Garbage grows until it is collected, at thresholds that vary."""
    values, held = np.empty(NUM_STEPS), 0.0
    threshold = random.uniform(60, 200) * MB
    for step in range(NUM_STEPS):
        held += random.uniform(0, 6) * MB
        if held > threshold:
            held, threshold = random.uniform(0, 20) * MB, random.uniform(60, 200) * MB
        values[step] = held
    return values + random.normal(0, 3 * MB, NUM_STEPS)


def varying_length(random: np.random.Generator) -> "NDArray[np.float64]":
    """Each batch is as long as its longest row."""
    return random.beta(2, 3, NUM_STEPS) * 800 * MB


def autoregressive(random: np.random.Generator) -> "NDArray[np.float64]":
    """Noise that remembers: AR(1), 0.9, of one and a half percent."""
    values, now = np.empty(NUM_STEPS), random.normal(0, 15 * MB)
    for step in range(NUM_STEPS):
        now = 0.9 * now + random.normal(0, 15 * MB * math.sqrt(1 - 0.81))
        values[step] = now
    return values


def one_jump(random: np.random.Generator) -> "NDArray[np.float64]":
    """Return the jump of a buffer that is made once and kept."""
    at = random.integers(NUM_STEPS // 10, NUM_STEPS * 9 // 10)
    jumped = np.arange(NUM_STEPS) >= at
    return jumped * random.uniform(50, 300) * MB + random.normal(0, 3 * MB, NUM_STEPS)


def logarithmic(random: np.random.Generator) -> "NDArray[np.float64]":
    """Growth that slows down and down: a cache of things seen."""
    return random.uniform(30, 80) * MB * np.log1p(np.arange(NUM_STEPS)) + random.normal(0, 3 * MB, NUM_STEPS)


def phases(random: np.random.Generator) -> "NDArray[np.float64]":
    """Two levels in turns of 40 to 80 steps: training and validation."""
    values, step, high = np.empty(NUM_STEPS), 0, bool(random.integers(2))
    while step < NUM_STEPS:
        length = int(random.integers(40, 81))
        values[step : step + length] = 150 * MB * high
        step, high = step + length, not high
    return values + random.normal(0, 3 * MB, NUM_STEPS)


SHAPES = (flat, warm_up, sawtooth, varying_length, autoregressive, one_jump, logarithmic, phases)


def simulate(
    shape: Callable[[np.random.Generator], "NDArray[np.float64]"], seed: int, leak: float
) -> "NDArray[np.float64]":
    """Return a series: base, shape, and a leak of a share of the base over the run."""
    random = np.random.default_rng([seed, SHAPES.index(shape)])
    return BASE + shape(random) + leak * BASE * np.arange(NUM_STEPS) / NUM_STEPS


def ours(values: "NDArray[np.float64]") -> bool:
    """Return whether the profiler, asked about the memory of a process, finds a leak."""
    found = find_leak(values, floor_bytes_per_step=4096, floor_share=0.01, limit_bytes=None)
    return found.verdict == "leak"


def mann_kendall(values: "NDArray[np.float64]") -> bool:
    """Return whether Mann and Kendall find a rise, p < 0.01, the first quarter cut off."""
    kept = values[len(values) // 4 :]
    count = len(kept)
    rises = np.sign(kept[None, :] - kept[:, None])[np.triu_indices(count, 1)].sum()
    return bool((rises - 1) / math.sqrt(count * (count - 1) * (2 * count + 5) / 18) > 2.326)


def theil_sen(values: "NDArray[np.float64]") -> bool:
    """Return whether Theil and Sen's slope comes to more than 1 % of the base, the first quarter cut off."""
    kept = values[len(values) // 4 :]
    first, second = np.triu_indices(len(kept), 1)
    slope = float(np.median((kept[second] - kept[first]) / (second - first)))
    return slope * len(kept) > 0.01 * float(np.median(kept))


TESTS = {"this test": ours, "Mann-Kendall": mann_kendall, "Theil-Sen > 1 %": theil_sen}


def rates(test: Callable[["NDArray[np.float64]"], bool], leak: float, num_series: int, first: int) -> list[float]:
    """Return the share of series with an alarm, for each shape."""
    return [
        sum(test(simulate(shape, first + seed, leak)) for seed in range(num_series)) / num_series for shape in SHAPES
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=80, help="of each shape and leak; default: 80")
    parser.add_argument("--first", type=int, default=0, help="seed of the first; default: 0")
    parser.add_argument("--only-ours", action="store_true")
    parsed = parser.parse_args()
    print(f"{'alarms, %':16} {'leak':>5} {'mean':>5} " + " ".join(f"{shape.__name__[:10]:>10}" for shape in SHAPES))
    for name, test in TESTS.items():
        if parsed.only_ours and test is not ours:
            continue
        for leak in LEAKS:
            shares = rates(test, leak, parsed.series, parsed.first)
            row = " ".join(f"{100 * share:10.1f}" for share in shares)
            print(f"{name:16} {leak:5.0%} {100 * float(np.mean(shares)):5.1f} {row}", flush=True)


if __name__ == "__main__":
    main()
