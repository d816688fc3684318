"""Speed of prefill and decode of several models, measured in turns so that drift of the device affects all equally.

Prefill runs all of a prompt through the model at once and is bound by arithmetic. Decode runs one token at a time,
reads every weight for it, and is bound by memory bandwidth.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.benchmarking.machine_speed import fixed_work
from mlxflow.benchmarking.statistics import Interval, median_interval, ratio_interval
from mlxflow.benchmarking.throughput import FEWEST_ROUNDS, time_once
from mlxflow.benchmarking.time_budget import Budget
from mlxflow.device import phase_peaks
from mlxflow.device.memory_errors import out_of_memory_bytes, settle
from mlxflow.ops import mlx_lm_import

#: Returns a model in eval mode; its weights may be lazy.
Load = Callable[[], nn.Module]


class GenerationSpeed(NamedTuple):
    """How fast one model generates.

    Attributes:
        prefill: tokens per second, by length of the prompt in tokens.
        decode: tokens per second.
        peak_memory_bytes: peak of its arrays, without those of other models.
        machine_seconds: median duration of the fixed work of `machine_speed` in the same rounds.
        relative_prefill: tokens in the time of the fixed work, by length of the prompt in tokens.
        relative_decode: tokens in the time of the fixed work.
    """

    prefill: dict[int, Interval]
    decode: Interval
    peak_memory_bytes: int
    machine_seconds: float
    relative_prefill: dict[int, Interval]
    relative_decode: Interval


class _Turns:
    """The timed rounds of one model."""

    def __init__(self, load: Load, prompts: dict[int, mx.array], decode_tokens: int) -> None:
        self._load = load
        self._prompts = prompts
        self._decode_tokens = decode_tokens
        self._model: nn.Module | None = None
        self._own_bytes = self._peak_bytes = 0
        self._seconds: list[tuple[list[float], float]] = []
        self.failure: RuntimeError | None = None

    def take(self) -> None:
        """Time one round; a model that is not loaded is loaded and warmed up first."""
        if self._model is None:
            before = mx.get_active_memory()
            self._model = self._load()
            mx.eval(self._model.parameters())
            self._own_bytes = mx.get_active_memory() - before
            self._pass(self._model)
        beside = mx.get_active_memory() - self._own_bytes
        with phase_peaks.followed() as peak:
            self._seconds.append(self._pass(self._model))
        self._peak_bytes = max(self._peak_bytes, peak.bytes - beside)

    def _pass(self, model: nn.Module) -> tuple[list[float], float]:
        shortest = next(iter(self._prompts.values()))
        reading = [_prefill(model, prompt) for prompt in self._prompts.values()]
        decoding = _decode(model, shortest, self._decode_tokens)
        settle()
        return reading, decoding

    def release(self) -> None:
        """Free the model's memory."""
        if self._model is not None:
            self._model = None
            gc.collect()
        mx.clear_cache()

    def speed(self, machine: Sequence[float]) -> GenerationSpeed:
        """Return the speed over all rounds.

        Args:
            machine: seconds of the fixed work in each round.
        """
        reading = list(zip(*(prefill for prefill, _ in self._seconds), strict=True))
        decoding = [seconds for _, seconds in self._seconds]
        return GenerationSpeed(
            prefill={
                length: median_interval(taken).inverse(length)
                for length, taken in zip(self._prompts, reading, strict=True)
            },
            decode=median_interval(decoding).inverse(self._decode_tokens),
            peak_memory_bytes=max(self._peak_bytes, self._own_bytes),
            machine_seconds=statistics.median(machine),
            relative_prefill={
                length: ratio_interval(taken, machine).inverse(length)
                for length, taken in zip(self._prompts, reading, strict=True)
            },
            relative_decode=ratio_interval(decoding, machine).inverse(self._decode_tokens),
        )


def measure_generation(
    loads: Sequence[Load],
    *,
    prompt_lengths: Sequence[int],
    decode_tokens: int,
    num_rounds: int,
    vocab_size: int,
    holds: bool,
    budget: Budget,
) -> list[GenerationSpeed | RuntimeError]:
    """Return how fast each model generates, from rounds in which they take turns.

    Args:
        loads: functions that load the models.
        prompt_lengths: tokens of each prompt, ascending.
        decode_tokens: tokens to generate after the shortest prompt.
        num_rounds: timed rounds.
        vocab_size: V.
        holds: keep all models in memory; else each is loaded again for every round. If one runs out of memory beside
            the others, models are no longer kept.
        budget: of time; rounds beyond its end are left out, after `FEWEST_ROUNDS`.

    Returns:
        for each model its speed, or the error if it cannot be run even alone.
    """
    prompts = {length: (mx.arange(length) * 7919 % vocab_size)[None] for length in prompt_lengths}
    mx.eval(prompts)
    gc.collect()  # garbage that is freed later would distort the memory of a model
    models = [_Turns(load, prompts, decode_tokens) for load in loads]
    work, machine = fixed_work(), []
    try:
        begin = time.perf_counter()
        for number in range(num_rounds):
            taken = time.perf_counter() - begin
            if number == 1:
                budget.announce(f"generation of {len(models)} models, {num_rounds} rounds", taken * num_rounds)
            budget.progress("generation, round", number, num_rounds, taken)
            if number >= FEWEST_ROUNDS and budget.is_over:
                break
            machine += [time_once(work)]
            for one in (one for one in models if one.failure is None):
                holds = _take(one, models, holds)
    finally:
        for one in models:
            one.release()
    return [model.failure or model.speed(machine) for model in models]


def _take(turns: _Turns, models: Sequence[_Turns], holds: bool) -> bool:
    """Run a round of one model; return whether models are still kept in memory."""
    try:
        turns.take()
    except RuntimeError as error:
        if out_of_memory_bytes(error) is not None:
            settle(drops=True)
        if not holds:
            turns.failure = error.with_traceback(None)  # the traceback's frames hold the model
    else:
        if holds:
            return True
        turns.release()
        return False
    for other in models:
        other.release()
    return _take(turns, models, False) if holds else False


def _prompt_cache(model: nn.Module) -> list[Any]:
    """Return an empty key-value cache for each layer, of the layer's kind."""
    mlx_lm_import.prepare()
    from mlx_lm.models.cache import make_prompt_cache

    caches: list[Any] = make_prompt_cache(model)
    return caches


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
        mx.async_eval(token)  # the host builds the next step while the device computes, as in mlx-lm
    mx.eval(token)
    return time.perf_counter() - begin
