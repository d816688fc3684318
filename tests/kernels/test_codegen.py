from typing import Any

import mlx.core as mx
import pytest

from mlxflow.kernels import codegen, nvrtc
from tests.kernels.stand_ins import uncompiled  # noqa: F401
from tests.kernels.test_nvrtc import (
    Launched,
    _fails,
    launched,  # noqa: F401
)


@pytest.fixture
def trials(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """The launches of the trial of this way, on a device with a driver."""
    names: list[str] = []
    usual = mx.fast.precompiled_cuda_kernel

    def launch(**arguments: Any) -> list[mx.array]:
        if arguments["name"].startswith("mlxflow_trial_"):
            names.append(arguments["name"])
        return usual(**arguments)

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    monkeypatch.setattr(codegen, "_driver", lambda: "driver 1")
    return names


def test_traced_kernels_are_launched_without_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[bytes] = []

    def launch(**arguments: Any) -> list[mx.array]:
        codes.append(arguments["compiled_source"])
        return [mx.zeros(shape) for shape in arguments["output_shapes"]]

    code = b"\x7fELF\xbe"  # no UTF-8, as MLX's export of a graph needs it
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    monkeypatch.setattr(codegen, "language", lambda: "cuda")
    monkeypatch.setattr(codegen, "programs_run", lambda: True)
    monkeypatch.setattr(codegen, "compile_program", lambda *_: codegen.Program("symbol", code))
    source = codegen.KernelSource("copy", ("x",), ("y",), "")

    def copied() -> list[mx.array]:
        return source.launch([mx.zeros(4)], constants=[], groups=1, shapes=[(4,)], dtypes=[mx.float32])

    copied()
    with codegen.traceable():
        mx.export_function(lambda _: None, lambda _: copied(), mx.zeros(4))
    copied()
    assert codes == [code, b"", code]


def _runs_in_another_process() -> bool:
    codegen.programs_run.cache_clear()
    return codegen.programs_run()


def test_the_trial_of_precompiled_programs_is_remembered_if_it_passes(
    trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert _runs_in_another_process()
    assert len(trials) == 1
    monkeypatch.setattr(codegen, "_driver", lambda: "driver 2")
    for _ in range(2):
        assert _runs_in_another_process()
    assert len(trials) == 2
    monkeypatch.setattr(codegen, "_driver", lambda: "")
    for _ in range(2):
        assert _runs_in_another_process()
    assert len(trials) == 4, "of a driver that is not told nothing is known"


def test_a_failed_trial_of_precompiled_programs_is_repeated(trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "precompiled_cuda_kernel", _fails)
        assert not _runs_in_another_process()
    assert _runs_in_another_process()
    assert len(trials) == 1


def test_a_remembered_trial_does_not_hold_without_the_compiler(
    trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _runs_in_another_process()
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    codegen.compile_program.cache_clear()
    assert not _runs_in_another_process()
