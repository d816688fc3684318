import signal

from mlxflow.device.stop_signals import stop_on_signals


def test_the_first_signal_sets_the_flag_and_the_next_one_ends_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGTERM)
        assert asked()
        assert asked.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before
