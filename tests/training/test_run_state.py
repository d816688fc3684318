import mlx.core as mx
import pytest

from mlxflow.training.run_state import RunState


def test_tokens_per_second_leaves_out_updates_that_compiled() -> None:
    state = RunState()
    assert state.tokens_per_second() == 0
    state.tokens, state.seconds = 1000, 10.0
    assert state.tokens_per_second() == 100
    state.compile_tokens, state.compile_seconds = 200, 6.0
    assert state.tokens_per_second() == 200
    state.compile_tokens, state.compile_seconds = 1000, 10.0  # every update compiled something
    assert state.tokens_per_second() == 100


def test_the_reported_peak_never_decreases(monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState()
    for peak, active, expected in ((5, 7, 7), (6, 1, 7), (9, 1, 9)):
        monkeypatch.setattr(mx, "get_peak_memory", lambda peak=peak: peak)
        monkeypatch.setattr(mx, "get_active_memory", lambda active=active: active)
        state.note_peak()
        assert state.peak_memory_bytes == expected


def test_the_result_has_the_counts_of_the_run() -> None:
    state = RunState()
    state.step, state.tokens, state.seconds, state.best_step, state.best_loss = 4, 80, 2.0, 2, 1.5
    result = state.result()
    assert (result.steps, result.tokens_per_second, result.best_step, result.best_validation_loss) == (4, 40, 2, 1.5)
    assert result.last_validation_loss != result.last_validation_loss  # NaN: nothing was validated
