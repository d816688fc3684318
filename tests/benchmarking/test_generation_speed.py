from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.benchmarking.generation_speed import GenerationSpeed, measure_generation
from tests.late_device import LateDevice
from tests.small_models import FREE, llama


class _Counting(nn.Module):  # type: ignore[misc]
    """Notes its name and how many tokens each pass takes, and lets a clock run by it."""

    def __init__(self, name: str, passes: list[tuple[str, int]], clock: list[float], **shape: int) -> None:
        super().__init__()
        self.inner, self._name, self._passes, self._clock = llama(**shape)[0], name, passes, clock
        self.layers = self.inner.layers

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        self._passes.append((self._name, tokens.shape[1]))
        self._clock[0] += 2.0 if self._name == "a" else 4.0
        result: mx.array = self.inner(tokens, cache=cache)
        return result


class _Bench:
    """Two models, a clock that only they move, and what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = [0.0]
        self.passes: list[tuple[str, int]] = []
        self.loaded: list[str] = []
        monkeypatch.setattr("time.perf_counter", lambda: self.clock[0])
        monkeypatch.setattr("mlxflow.benchmarking.generation_speed.fixed_work", lambda: self._fixed_work)

    def load(self, name: str, **shape: int) -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            self.loaded.append(name)
            return _Counting(name, self.passes, self.clock, **shape)

        return load

    def _fixed_work(self) -> None:
        self.clock[0] += 1

    def measure(self, *loads: Callable[[], nn.Module], holds: bool) -> list[GenerationSpeed | RuntimeError]:
        return measure_generation(
            loads, prompt_lengths=[4, 8], decode_tokens=3, num_rounds=2, vocab_size=50, holds=holds, budget=FREE
        )

    @property
    def turns(self) -> str:
        """The models in the order in which they took turns."""
        return "".join(name for name, tokens in self.passes if tokens == 8)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> _Bench:
    return _Bench(monkeypatch)


def test_prefill_is_one_pass_over_a_prompt_and_decode_one_for_each_token(bench: _Bench) -> None:
    (found,) = bench.measure(bench.load("a"), holds=True)
    assert isinstance(found, GenerationSpeed)
    assert [tokens for _, tokens in bench.passes] == [4, 8, 4, 1, 1, 1] * 3  # the first time is left out
    assert {length: rate.median for length, rate in found.prefill.items()} == {4: 2.0, 8: 4.0}
    assert found.decode.median == 3 / 6


@pytest.mark.parametrize(("holds", "loaded", "turns"), [(True, "ab", "aabbab"), (False, "abab", "aabbaabb")])
def test_models_are_timed_alternately(bench: _Bench, holds: bool, loaded: str, turns: str) -> None:
    a, b = bench.measure(bench.load("a"), bench.load("b"), holds=holds)
    assert isinstance(a, GenerationSpeed)
    assert isinstance(b, GenerationSpeed)
    assert "".join(bench.loaded) == loaded
    assert bench.turns == turns  # twice where one was just loaded
    assert a.prefill[8].median == 2 * b.prefill[8].median


def test_a_models_memory_leaves_out_other_loaded_models(bench: _Bench) -> None:
    held = mx.ones((1 << 20,))
    mx.eval(held)
    shape = {"hidden_size": 128, "intermediate_size": 256}  # when a few kilobytes are given back is another thread's
    (alone,) = bench.measure(bench.load("a", **shape), holds=False)
    for together in (*bench.measure(bench.load("a", **shape), bench.load("b", **shape), holds=True),):
        assert isinstance(alone, GenerationSpeed)
        assert isinstance(together, GenerationSpeed)
        assert together.peak_memory_bytes == pytest.approx(alone.peak_memory_bytes, rel=0.05)
        assert 0 < together.peak_memory_bytes < held.nbytes


def test_models_that_do_not_fit_together_are_loaded_one_at_a_time(bench: _Bench) -> None:
    def load_alone() -> nn.Module:
        bench.loaded.append("b")
        if bench.loaded == ["a", "b"]:
            raise RuntimeError("[malloc] Unable to allocate 5 bytes.")
        return _Counting("b", bench.passes, bench.clock)

    a, b = bench.measure(bench.load("a"), load_alone, holds=True)
    assert isinstance(a, GenerationSpeed)
    assert isinstance(b, GenerationSpeed)
    assert "".join(bench.loaded) == "abbab"


def test_a_model_that_cannot_run_alone_has_an_error_and_the_others_are_measured(bench: _Bench) -> None:
    def fail() -> nn.Module:
        bench.loaded.append("x")
        raise RuntimeError("no room")

    failed, b = bench.measure(fail, bench.load("b"), holds=True)
    assert isinstance(failed, RuntimeError)
    assert str(failed) == "no room"
    assert isinstance(b, GenerationSpeed)
    assert bench.loaded.count("x") == 2
    assert bench.turns == "bbbb"


def test_an_error_that_is_raised_late_belongs_to_the_model_whose_turn_it_was(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = LateDevice(monkeypatch)

    class _FailsLate(_Counting):
        def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
            is_last = [count for _, count in bench.passes[-4:]] == [4, 8, 4, 1]
            device.calls_left = 4 if is_last else device.calls_left  # after the calls that wait for its tokens
            return super().__call__(tokens, cache)

    failed, b = bench.measure(lambda: _FailsLate("a", bench.passes, bench.clock), bench.load("b"), holds=False)
    assert isinstance(failed, RuntimeError)
    assert device.raised_by == ["synchronize"]
    assert isinstance(b, GenerationSpeed)
