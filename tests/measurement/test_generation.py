import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.measurement import generation
from tests.small_models import llama


class _Counting(nn.Module):  # type: ignore[misc]
    """Notes how many tokens each pass takes, and lets a clock run by it."""

    def __init__(self, model: nn.Module, clock: list[float]) -> None:
        super().__init__()
        self.inner, self._clock = model, clock
        self._passes: list[int] = []
        self.layers = model.layers

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        self._passes.append(tokens.shape[1])
        self._clock[0] += 2.0
        result: mx.array = self.inner(tokens, cache=cache)
        return result


def test_prefill_is_one_pass_over_a_prompt_and_decode_one_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    model = _Counting(llama()[0], clock)
    found = generation.measure_generation(
        model, prompt_lengths=[4, 8], decode_tokens=3, num_rounds=2, vocab_size=50, before=0
    )
    assert model._passes == [4, 8, 4, 1, 1, 1] * 3  # the first round is left out
    assert {length: rate.median for length, rate in found.prefill.items()} == {4: 2.0, 8: 4.0}
    assert found.decode.median == 3 / 6
    assert found.peak_memory_bytes > 0
