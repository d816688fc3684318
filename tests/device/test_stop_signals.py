import signal

import pytest

from mlxflow.device.stop_signals import saving_if_interrupted, stop_on_signals


def test_the_first_signal_sets_the_flag_and_the_next_one_ends_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGTERM)
        assert asked()
        assert asked.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("error", "is_saved"), [(KeyboardInterrupt(), True), (SystemExit(143), True), (ValueError(), False), (None, False)]
)
def test_work_is_saved_if_a_signal_ends_a_block_and_only_then(error: BaseException | None, is_saved: bool) -> None:
    saved: list[bool] = []
    try:
        with saving_if_interrupted() as functions:
            functions.append(lambda: saved.append(True))
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error  # noqa: PT017
    assert bool(saved) == is_saved
