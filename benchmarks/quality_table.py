"""The tables of `benchmarks/quality.py`: each method beside the best of mlx-lm's, and what each model writes."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

#: The methods whose functions are mlx-lm's.
MLX_LM = ("gptq", "awq", "dwq", "dynamic")


def table_of(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: one for each model, width and method, its seeds averaged.

    The increase is compared with the least of mlx-lm's methods at the same width, that of a budget with the uniform
    plan of the same size. The part of rounding's cost that a method recovers is given for the increase of perplexity
    and for that of its logarithm.
    """
    yield (
        "| model | width | method | bits a weight | perplexity | increase | of the best of mlx-lm, or of uniform "
        "| KL to dense | RTN's cost recovered: perplexity, nats | seconds | GB: MLX, resident |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        groups.setdefault((line["model"], line["size"]), {}).setdefault(line["method"], []).append(line)
    for (model, size), methods in groups.items():
        increases = {name: _increase(some) for name, some in methods.items()}
        rivals = [name for name in methods if name in MLX_LM or name.startswith("uniform")]
        best = min((increases[name] for name in rivals), default=math.nan)
        rounded = math.nan if "rtn" not in methods else _mean(methods["rtn"], "nats_lost")
        for name, some in methods.items():
            perplexity, error = _mean(some, "perplexity"), _mean(some, "perplexity_standard_error")
            recovered = 1 - _mean(some, "nats_lost") / rounded if rounded else math.nan
            of_perplexity = 1 - increases[name] / increases["rtn"] if increases.get("rtn") else math.nan
            yield (
                f"| {model} | {size} | {name} | {_mean(some, 'bits_per_weight'):.2f} "
                f"| {perplexity:,.2f} ± {error:.2f}{_over_seeds(some)} "
                f"| {increases[name]:.1%} | {_shown(increases[name] / best if best else math.nan, '.2f')} "
                f"| {_mean(some, 'kl'):.3f} ± {_mean(some, 'kl_standard_error'):.3f} "
                f"| {_both(of_perplexity, recovered, '.0%')} | {_mean(some, 'seconds'):,.0f} "
                f"| {_mean(some, 'peak_memory_bytes') / 1e9:.2f}, {_mean(some, 'peak_rss_bytes') / 1e9:.2f} |"
            )


def texts_of(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what each model writes after the first of its prompts, one line each."""
    for line in lines:
        for prompt, text in list(line.get("texts", {}).items())[:1]:
            yield f"{line['name']}: {prompt} {' '.join(text.split())}"


def _shown(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _both(first: float, second: float, form: str) -> str:
    return ", ".join(filter(None, (_shown(value, form) for value in (first, second))))


def _increase(lines: list[dict[str, Any]]) -> float:
    return _mean(lines, "perplexity") / _mean(lines, "dense_perplexity") - 1


def _mean(lines: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([line[key] for line in lines]))


def _over_seeds(lines: list[dict[str, Any]]) -> str:
    """Return the standard deviation of the perplexity over calibration seeds, in words; empty for one seed."""
    found = [line["perplexity"] for line in lines]
    return f" (seeds: ± {np.std(found, ddof=1):.2f})" if len(found) > 1 else ""
