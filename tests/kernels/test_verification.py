import itertools
import os
import queue
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.kernels import registry, verification
from mlxflow.kernels.verification import Requests, StopRequested, compile_only, verify
from mlxflow.kernels.verification_cases import case_of
from mlxflow.kernels.verification_inputs import Arrays
from mlxflow.kernels.verifier_process import Verifier
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_CHECKED", 1 << 14)
    monkeypatch.setattr(verification, "_TIMED", 1 << 10)


def _takes(kernel: float, own: float) -> Callable[[], float]:
    """Return a clock by which each round of the kernel and of MLX's implementation, in turn, take so many seconds."""
    return itertools.accumulate(itertools.cycle([0.0, kernel, 0.0, own])).__next__


_RIGHT = case_of("gated_silu/float32")


def _spoilt(spoil: Callable[[mx.array], mx.array]) -> Callable[..., Arrays]:
    def kernel(*inputs: mx.array) -> Arrays:
        da, db = _RIGHT.reference(*inputs)
        return [spoil(da), db]

    return kernel


def test_a_correct_and_clearly_faster_kernel_passes() -> None:
    result = verify(_RIGHT._replace(kernel=_RIGHT.reference), clock=_takes(1.0, 2.0))
    assert result.passed
    assert result.reason == ""
    assert result.seconds == pytest.approx(1.0), "what takes longer than a round is called once"
    assert result.mlx_seconds == pytest.approx(2.0)


def test_short_calls_are_repeated_within_a_round() -> None:
    called: list[str] = []

    def kernel(*inputs: mx.array) -> Arrays:
        called.append("kernel")
        return _RIGHT.reference(*inputs)

    result = verify(_RIGHT._replace(kernel=_RIGHT.reference, mlx=kernel), clock=_takes(3e-4, 3e-4))
    assert result.seconds == result.mlx_seconds == pytest.approx(3e-4 / 6)
    assert len(called) == 2 + 5 * 6


def test_very_short_calls_are_timed_on_larger_inputs() -> None:
    asked: list[int] = []

    def inputs(size: int) -> Arrays:
        asked.append(size)
        return _RIGHT.inputs(1 << 12)

    verify(_RIGHT._replace(kernel=_RIGHT.reference, inputs=inputs), clock=_takes(1e-5, 1e-5))
    assert asked == [1 << 14, 1 << 10, 1 << 12]


def test_a_kernel_that_is_wrong_with_further_inputs_only_does_not_pass() -> None:
    def kernel(*inputs: mx.array) -> Arrays:
        da, db = _RIGHT.reference(*inputs)
        return [da if len(da) < 64 else da * 1.01, db]

    def more() -> Arrays:
        return _RIGHT.inputs(1 << 16)

    result = verify(_RIGHT._replace(kernel=kernel, more_inputs=(more,)), clock=_takes(1.0, 2.0))
    assert not result.passed
    assert result.reason == "it deviates by 0.01 (at most 2e-05)"
    assert verify(_RIGHT._replace(kernel=kernel), clock=_takes(1.0, 2.0)).passed


def test_one_round_is_enough_for_a_clear_difference() -> None:
    rounds = iter([1.0] * 4 + [1.0, 3.0])
    ends = itertools.chain.from_iterable((0.0, seconds) for seconds in rounds)
    result = verify(_RIGHT._replace(kernel=_RIGHT.reference), clock=itertools.accumulate(ends).__next__)
    assert (result.passed, result.seconds, result.mlx_seconds) == (True, 1.0, 3.0)


def test_two_rounds_are_enough_if_both_agree_clearly() -> None:
    rounds = iter([1.0] * 4 + [1.0, 1.6, 1.1, 1.6])
    ends = itertools.chain.from_iterable((0.0, seconds) for seconds in rounds)
    result = verify(_RIGHT._replace(kernel=_RIGHT.reference), clock=itertools.accumulate(ends).__next__)
    assert result.passed
    assert [result.seconds, result.mlx_seconds] == pytest.approx([1.0, 1.6])


def test_the_fastest_round_counts() -> None:
    rounds = [1.0] * 4 + [3.0, 2.0, 1.0, 2.0, 5.0, 2.0, 1.5, 2.0, 3.0, 4.0]  # compiling, counting, and five in turn
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, seconds) for seconds in rounds)).__next__
    result = verify(_RIGHT._replace(kernel=_RIGHT.reference), clock=clock)
    assert (result.seconds, result.mlx_seconds) == (1.0, 2.0)


@pytest.mark.parametrize(("seconds", "serves"), [(0.85, True), (0.95, False), (1.0, False), (3.0, False)])
def test_a_kernel_that_is_not_clearly_faster_fails(seconds: float, serves: bool) -> None:
    result = verify(_RIGHT._replace(kernel=_RIGHT.reference), clock=_takes(seconds, 1.0))
    assert result.passed == serves
    reason = f"it takes {seconds * 1e6:.0f} us, MLX's implementation 1000000 us"
    assert result.reason == ("" if serves else reason)


def _one_more(x: mx.array) -> mx.array:
    return x + mx.where(mx.arange(x.shape[-1]) == x.shape[-1] - 1, 1e-3, 0.0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * 1.001,
        lambda x: x + 1e-6,  # told by the rows of tiny and of no numbers alone
        lambda x: mx.where(mx.abs(x).max(-1, keepdims=True) == 0, float("nan"), x),
        lambda x: mx.where(mx.abs(x) > 20, 20.0, x),  # told by the rows of large numbers alone
        _one_more,
        lambda x: x[:-1],
        lambda x: x.astype(mx.bfloat16),
    ],
    ids=["scaled", "tiny rows", "zero rows", "large rows", "last column", "shape", "rounding"],
)
def test_a_kernel_with_a_single_wrong_value_fails(spoil: Callable[[mx.array], mx.array]) -> None:
    result = verify(_RIGHT._replace(kernel=_spoilt(spoil)), clock=_takes(1.0, 2.0))
    assert not result.passed
    assert result.reason.startswith("it deviates by ")
    assert result.seconds == 0, "what is wrong is not timed"


def test_a_kernel_that_skips_the_remainder_of_a_vector_fails() -> None:
    right = case_of("adamw/float32/float32")

    def kernel(*inputs: mx.array) -> Arrays:
        whole = inputs[0].size // 8 * 8
        parts = right.reference(*inputs)
        return [mx.concatenate([new[:whole], old[whole:]]) for new, old in zip(parts, [inputs[0]] * 4, strict=True)]

    assert verify(right._replace(kernel=kernel)).reason.startswith("it deviates by ")


def test_a_nondeterministic_kernel_fails() -> None:
    calls = itertools.count()
    kernel = _spoilt(lambda x: x * (1 + 1e-7 * next(calls)))
    assert verify(_RIGHT._replace(kernel=kernel)).reason == "it deviates by inf (at most 2e-05)"


def _fails(said: str) -> Callable[..., Arrays]:
    def kernel(*inputs: mx.array) -> Arrays:
        raise RuntimeError(said)

    return kernel


def test_a_kernel_that_does_not_compile_fails_with_the_compiler_message() -> None:
    broken = _RIGHT._replace(kernel=_fails("Failed to compile kernel:\n  error: identifier 'x' is undefined"))
    said = "it does not run: Failed to compile kernel: error: identifier 'x' is undefined"
    assert verify(broken).reason == said
    assert compile_only(broken) == verify(broken)


def test_a_lack_of_memory_says_nothing_about_a_kernel() -> None:
    for said, holds in (("cudaMallocAsync(&data, size, stream) failed: out of memory", False), ("error: x", True)):
        result = verify(_RIGHT._replace(kernel=_fails(said)))
        assert not result.passed
        assert result.holds == holds


def test_a_stopped_verification_has_no_result_but_compiles_everything() -> None:
    called: list[str] = []

    def seen(name: str) -> Callable[..., Arrays]:
        def call(*inputs: mx.array) -> Arrays:
            called.append(name)
            return _RIGHT.reference(*inputs)

        return call

    tried = _RIGHT._replace(kernel=seen("kernel"), mlx=seen("own"))
    with pytest.raises(StopRequested):
        verify(tried, is_stopped=lambda: bool(called))
    assert called.count("own") in (2, 3), "MLX compiles one, and one or two measure how long a round may be"
    assert "kernel" in called


def test_a_wrong_kernel_is_reported_although_verification_was_stopped() -> None:
    result = verify(_RIGHT._replace(kernel=_spoilt(lambda x: x * 2)), is_stopped=lambda: True)
    assert result.reason.startswith("it deviates by ")


def test_requests_are_names_followed_by_stop() -> None:
    read, write = os.pipe()
    requests = Requests(read)
    os.write(write, b"a b/c/1")
    os.write(write, b" d\n")
    assert requests.names() == ["a", "b/c/1", "d"]
    assert not requests.is_stopped.is_set()
    os.write(write, b"stop\n")
    assert requests.is_stopped.wait(20)  # both ends stay open: the end of the input would end this process


@pytest.mark.parametrize("told", [b"", b"a b\n", b"a b\nstop\n"])
def test_the_verifier_ends_when_its_input_closes(told: bytes) -> None:
    read, write = os.pipe()
    ended = queue.SimpleQueue[int]()
    requests = Requests(read, ended.put)
    os.write(write, told)
    os.close(write)
    assert ended.get(timeout=20) == 0
    assert requests.have_names.is_set() == bool(told)
    assert requests.is_stopped.is_set() == (b"stop" in told)
    os.close(read)


def test_the_times_option_prints_the_time_of_each_part() -> None:
    command = [sys.executable, "-c", _STAND_INS, "--times", "good"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    parts = [line.partition(" s  ")[2] for line in done.stderr.splitlines()]
    assert parts == ["waking the device", "good: check", "good: timing"]


def test_compile_only_has_no_result_for_a_kernel_that_compiles() -> None:
    assert compile_only(_RIGHT._replace(kernel=_RIGHT.reference)) is None


def test_compile_only_compiles_what_timing_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_CHECKED", 1 << 12)
    monkeypatch.setattr(verification, "_TIMED", 1 << 14)
    seen = []

    def own(*inputs: mx.array) -> Arrays:
        seen.append(inputs[0].size)
        return _RIGHT.mlx(*inputs)

    assert compile_only(_RIGHT._replace(kernel=_RIGHT.reference, mlx=own)) is None
    assert len({*seen}) == 2, "what MLX takes depends on how much there is"


_STAND_INS = """
import sys
import mlx.core as mx
from mlxflow.kernels import verification
from mlxflow.kernels.verification_cases import case_of
from mlxflow.kernels.verification_inputs import Arrays
from mlxflow.kernels.verifier_process import Verifier

verification._CHECKED = verification._TIMED = 1 << 12
right = case_of("sum_of_squares/float32")
verification._time = lambda tried, clock, is_stopped: (2e-3, 1e-3) if tried.kernel is slow else (1e-3, 2e-3)

def slow(x): return right.reference(x)
def wrong(x): return [right.reference(x)[0] * 1.01]
def uncompiled(x): raise RuntimeError("[nvrtc] cannot open source file cuda_runtime.h; set CUDA_HOME")

cases = {"good": right.reference, "slow": slow, "wrong": wrong, "uncompiled": uncompiled}
verification.case_of = lambda name: right._replace(kernel=cases[name])
verification.main(sys.argv[1:])
"""


def test_the_verifier_process_distinguishes_good_and_bad_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ["good", "slow", "uncompiled", "wrong"]
    command = [sys.executable, "-c", _STAND_INS, "-"]
    found = registry.verify_all(names, "here", Verifier(command, None, 60.0))
    assert {name: result.reason for name, result in found.items()} == {
        "good": "",
        "slow": "it takes 2000 us, MLX's implementation 1000 us",
        "uncompiled": "it does not run: [nvrtc] cannot open source file cuda_runtime.h; set CUDA_HOME",
        "wrong": "it deviates by 0.01 (at most 2e-05)",
    }
    assert [name for name, result in found.items() if result.passed] == ["good"]


def test_the_verifier_process_reports_kernels_that_the_device_cannot_run() -> None:
    name = "sum_of_squares/float32"
    program = "import mlx.core as mx; mx.set_default_device(mx.cpu); from mlxflow.kernels import verification; "
    program += f"verification.main(['--compile', '{name}'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    begun, result = done.stdout.splitlines()
    assert begun == f"begin {name}"
    assert result.startswith(f'{{"name": "{name}", "passed": false, "reason": "it does not run: ')
