"""Programs for CUDA are compiled here too, where there is NVIDIA's compiler: it needs no GPU."""

import os
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.kernels import codegen, model_kernels, nvrtc, verification
from mlxflow.kernels.model_kernels import TrainingTraits
from mlxflow.kernels.verification_cases import case_of
from mlxflow.ops.overrides import OperationOverrides
from mlxflow.storage import cache_files
from mlxflow.training.objective import plain_objective
from mlxflow.training.optimizers import make_optimizer
from mlxflow.training.step import Step
from mlxflow.training.update import Update
from tests.kernels.stand_ins import uncompiled  # noqa: F401
from tests.small_models import llama

NAMES = [
    f"{kind}/{dtype}{rest}"
    for dtype in ("float32", "bfloat16")
    for kind, rest in [
        ("rms_norm", "/72"),
        ("rms_norm", "/8192"),
        ("sum_rms_norm", "/576"),
        ("rotary", "/64"),
        ("rotary_interleaved", "/32"),
        ("embedding", ""),
        ("gated_silu", ""),
        ("gated_gelu", ""),
        ("gated_gelu_approx", ""),
        ("mlp_silu", ""),
        ("mlp_gelu", ""),
        ("cross_entropy", ""),
        ("adamw", "/bfloat16"),
        ("sum_of_squares", ""),
    ]
]

NAMES += [f"attention{kind}/bfloat16/{width}" for kind in ("", "_bounded") for width in (64, 128)]

Launched = list[dict[str, Any]]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """A device for which programs are compiled, and the launches that it would get."""
    if nvrtc.find_library() is None:
        pytest.skip("NVIDIA's compiler is not installed")
    launches: Launched = []

    def launch(**arguments: Any) -> list[mx.array]:
        if arguments["name"].startswith("mlxflow_trial_"):
            return [arguments["inputs"][0] + 1]
        launches.append(arguments)
        shapes, dtypes = arguments["output_shapes"], arguments["output_dtypes"]
        return [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(codegen, "language", lambda: "cuda")
    monkeypatch.setattr(nvrtc, "_architecture", lambda: "sm_90")
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    codegen.compile_program.cache_clear()
    codegen.programs_run.cache_clear()
    return launches


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_compiles(launched: Launched, name: str) -> None:
    tried = case_of(name)
    tried.kernel(*tried.inputs(1 << 12))
    assert launched
    for one in launched:
        assert one["compiled_source"].startswith(b"\x7fELF")
        assert one["name"].encode() in one["compiled_source"]
        sizes = [size for array in one["inputs"] for size in (array.size, array.shape[-1])]
        assert one["scalars"] == sizes


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("tokens", [mx.uint16, mx.uint32])  # as a token file has them
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-pure"])
def test_a_training_step_uses_precompiled_kernels_only(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, precision: str, tokens: mx.Dtype
) -> None:
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **_: pytest.fail("it is made by MLX"), raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    model, _ = llama(hidden_size=64, intermediate_size=64, vocab_size=104)
    dtype = mx.float32 if precision == "fp32" else mx.bfloat16
    model.set_dtype(dtype)
    choose = partial(model_kernels.choose_for, model, TrainingTraits(precision, 16, sums_gradients=True))
    use = choose(recorded=choose(recorded=[]).refused)
    optimizer = make_optimizer(name="adamw", schedule=lambda _: mx.array(1e-3), weight_decay=0.1, options={})
    update = Update(model, optimizer, max_grad_norm=1.0, has_masters=precision == "bf16", uses_kernel=use.uses)
    with use.patched():
        how = OperationOverrides(attention=use.attention)
        step = Step(model, update, plain_objective(masks_documents=False, uses_kernel=True), overrides=how)
        rows = mx.zeros((2, 17), tokens)
        marks = mx.full(rows.shape, 3, mx.uint8)
        step.update(step.add(step.compute(rows, marks), rows, marks))
    symbols = {one["name"].rpartition("_")[0] for one in launched}
    kinds = ["rms_norm", "rotary", "gated_backward_joined", "cross_entropy", "adamw", "sum_of_squares", "embedding"]
    kinds += ["attention_backward_keys"] if dtype == mx.bfloat16 else []
    assert not [kind for kind in kinds if not any(kind in symbol for symbol in symbols)], symbols


def test_kernels_for_other_types_and_widths_have_other_names(launched: Launched) -> None:
    for name in ("rms_norm/float32/72", "rms_norm/bfloat16/72", "rms_norm/bfloat16/776", "gated_silu/float32"):
        tried = case_of(name)
        tried.kernel(*tried.inputs(1 << 12))
    assert len(launched) == 10
    assert len({one["name"] for one in launched}) == 9, "shares of a weight's gradient in bf16 are added up alike"


def _program(launched: Launched) -> bytes:
    codegen.compile_program.cache_clear()
    tried = case_of("sum_of_squares/float32")
    tried.kernel(*tried.inputs(1 << 12))
    code: bytes = launched[-1]["compiled_source"]
    return code


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"!"])
def test_a_compiled_program_is_cached_unless_its_file_is_damaged(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    code = _program(launched)
    kept = next(path for path in (tmp_path / "mlxflow/kernels").iterdir() if cache_files.read_payload(path) == code)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compile_for", lambda *_: pytest.fail("it was compiled again"))
        assert _program(launched) == code
    kept.write_bytes(spoil(kept.read_bytes()))
    assert _program(launched) == code
    assert cache_files.read_payload(kept) == code


def test_without_a_cache_folder_programs_are_compiled_each_time(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _program(launched) == _program(launched)


def _fails(**arguments: Any) -> list[mx.array]:
    raise RuntimeError("Failed to load compiled kernel")


@pytest.mark.parametrize("lacking", ["compiler", "architecture", "launch", "right numbers"])
def test_without_a_precompiled_program_mlx_compiles_the_kernel(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    made: list[dict[str, Any]] = []

    def make(**arguments: Any) -> Any:
        made.append(arguments)
        return lambda **launch: [mx.zeros(launch["output_shapes"][0])]

    codegen._mlx_kernel.cache_clear()
    monkeypatch.setattr(mx.fast, "cuda_kernel", make)
    if lacking == "compiler":
        monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    elif lacking == "architecture":
        monkeypatch.setattr(nvrtc, "_architecture", lambda: "sm_1")
    elif lacking == "launch":
        monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", _fails)
    else:
        monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", lambda **launch: [launch["inputs"][0]])
    for dtype in ("float32", "bfloat16"):
        tried = case_of(f"sum_of_squares/{dtype}")
        tried.kernel(*tried.inputs(1 << 12))
    codegen._mlx_kernel.cache_clear()
    assert not launched
    names = [f"mlxflow_sum_of_squares_{dtype}_float32" for dtype in ("float32", "bfloat16")]
    assert [one["name"] for one in made] == names
    assert all("x_size *= x_shape[i]" in one["source"] for one in made)


def test_the_programs_of_several_kernels_are_compiled_before_they_are_called(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["rms_norm/float32/72", "rms_norm/bfloat16/72", "sum_of_squares/float32", "adamw/float32/bfloat16"]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    verification.make_ready(names)
    assert {one["compiled_source"] for one in launched} == {b""}, "built, and not computed"
    assert capsys.readouterr().out.split() == [word for name in names for word in ("begin", name)]
    launched.clear()
    monkeypatch.setattr(nvrtc, "compile_for", lambda *_: pytest.fail("it was compiled one by one"))
    for name in names:
        tried = case_of(name)
        for size in (1 << 12, verification._CHECKED):
            tried.kernel(*tried.inputs(size))
    assert all(one["compiled_source"].startswith(b"\x7fELF") for one in launched)


def test_a_broken_program_does_not_affect_those_compiled_with_it(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    programs = [f'extern "C" __global__ void f{number}() {{}}' for number in range(3)]
    with nvrtc.compiling_at_once([programs[0], "no program", *programs[1:], programs[0]]):
        pass
    monkeypatch.setattr(nvrtc, "compile_for", lambda *_: None)
    assert [bool(nvrtc.compiled(text)) for text in programs] == [True] * 3
    assert nvrtc.compiled("no program") is None


@pytest.mark.parametrize("kept", ["nowhere", "here"])
def test_programs_that_are_cached_or_cannot_be_cached_are_not_compiled_ahead(
    launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    programs = [f'extern "C" __global__ void g{number}() {{}}' for number in range(3)]
    if kept == "here":
        assert all(nvrtc.compiled(text) for text in programs)
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it starts a process"))
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with nvrtc.compiling_at_once(programs):
        pass
    assert all(nvrtc.compiled(text) for text in programs)


def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_MOST_SECONDS", 0.1)
    hanging = subprocess.Popen(["sleep", "60"], text=True)
    done = subprocess.Popen(["true"], text=True)
    nvrtc._wait([hanging, done])
    assert hanging.returncode == -signal.SIGKILL
    assert done.returncode is not None
