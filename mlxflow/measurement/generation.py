"""How fast a model reads a prompt and writes after it.

Reading (prefill) puts all of a prompt through the model at once and is bound by arithmetic; writing (decode) puts one
token through at a time, reads every weight for it, and is bound by the memory's bandwidth.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow import bare
from mlxflow.measurement.statistics import Interval, median_interval


class GenerationSpeed(NamedTuple):
    """How fast one model generates.

    Attributes:
        prefill: tokens a second, by the tokens of the prompt.
        decode: tokens a second.
        peak_memory_bytes: most that arrays held meanwhile, those held before left out.
    """

    prefill: dict[int, Interval]
    decode: Interval
    peak_memory_bytes: int


def measure_generation(
    model: nn.Module,
    *,
    prompt_lengths: Sequence[int],
    decode_tokens: int,
    num_rounds: int,
    vocab_size: int,
    before: int,
) -> GenerationSpeed:
    """Return how fast a model generates; the first round, which may compile, is left out.

    Args:
        model: in evaluation mode.
        prompt_lengths: tokens of each prompt, from the shortest to the longest.
        decode_tokens: written after the shortest prompt.
        num_rounds: that are timed.
        vocab_size: V.
        before: bytes that MLX held before the model was there.
    """
    mx.reset_peak_memory()
    prompts = {length: (mx.arange(length) * 7919 % vocab_size)[None] for length in prompt_lengths}
    seconds: dict[int, list[float]] = {length: [] for length in prompt_lengths}
    decoding: list[float] = []
    for _ in range(num_rounds + 1):
        for length, prompt in prompts.items():
            seconds[length].append(_prefill(model, prompt))
        decoding.append(_decode(model, prompts[prompt_lengths[0]], decode_tokens))
    return GenerationSpeed(
        prefill={length: median_interval(taken[1:]).inverse(length) for length, taken in seconds.items()},
        decode=median_interval(decoding[1:]).inverse(decode_tokens),
        peak_memory_bytes=max(mx.get_peak_memory(), mx.get_active_memory()) - before,
    )


def _prompt_cache(model: nn.Module) -> list[Any]:
    """Return an empty cache of keys and values, of each layer's own kind."""
    bare.prepare()
    from mlx_lm.models.cache import make_prompt_cache

    made: list[Any] = make_prompt_cache(model)
    return made


def _prefill(model: nn.Module, prompt: mx.array) -> float:
    cache = _prompt_cache(model)
    begin = time.perf_counter()
    mx.eval(model(prompt, cache=cache)[:, -1])
    return time.perf_counter() - begin


def _decode(model: nn.Module, prompt: mx.array, num_tokens: int) -> float:
    cache = _prompt_cache(model)
    token = mx.argmax(model(prompt, cache=cache)[:, -1], axis=-1)
    mx.eval(token)
    begin = time.perf_counter()
    for _ in range(num_tokens):
        token = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
        mx.async_eval(token)  # the host builds the next step meanwhile, as mlx-lm's generation does
    mx.eval(token)
    return time.perf_counter() - begin
