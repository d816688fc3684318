from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.cli import command
from mlxflow.device import memory_errors
from tests.late_device import MESSAGE, LateDevice


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("[malloc] Unable to allocate 123 bytes.", 123),
        (
            "[metal::malloc] Attempting to allocate 500 bytes which is greater than the maximum allowed buffer size "
            "of 400 bytes.",
            500,
        ),
        (MESSAGE, 0),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", 0),
        ("[matmul] shapes do not fit", None),
    ],
)
def test_errors_about_memory_are_distinguished_from_others(message: str, needed: int | None) -> None:
    assert memory_errors.out_of_memory_bytes(RuntimeError(message)) == needed


def test_only_the_error_of_a_command_buffer_may_be_about_earlier_work() -> None:
    assert memory_errors.is_late(RuntimeError(MESSAGE))
    assert not memory_errors.is_late(RuntimeError("[malloc] Unable to allocate 123 bytes."))


def test_waiting_raises_a_late_error_unless_the_work_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice(monkeypatch)
    device.calls_left = 1
    memory_errors.settle(drops=True)
    assert device.raised_by == ["synchronize"]
    device.calls_left = 1
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        memory_errors.settle()


def test_a_command_that_runs_out_of_memory_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(parsed: object) -> int:
        raise RuntimeError("[malloc] Unable to allocate 5000 bytes.")

    monkeypatch.setattr("mlxflow.cli.doctor.run", fail)
    monkeypatch.setattr(mx, "get_memory_limit", lambda: 4000)
    assert command.main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "mlxflow: out of memory: 5.0 kB more needed, memory limit 4.0 kB. "
        "Close other programs, or use a smaller batch_size or model, and run it again.\n"
    )
