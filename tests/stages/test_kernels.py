"""`train.kernels` and `quantize.kernels` in whole stages, the references standing in for the kernels."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mlxflow.device import compute_device
from mlxflow.kernels import adamw, registry
from mlxflow.kernels import early_start as ahead_of
from mlxflow.kernels.early_start import EarlyVerifier
from mlxflow.kernels.verifier_process import VerificationResult
from mlxflow.messages.errors import WorkflowError
from mlxflow.models import model_folder
from mlxflow.storage import report_files
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import REPOSITORY, mlxflow, rest_in_matrix
from tests.kernels.stand_ins import uncompiled, use_references  # noqa: F401

TEXT = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 8
warmup_steps = 1
batch_size = 4
eval_every = 0
save_every = 0
max_validation_rows = 8
model = { hidden_size = 32, intermediate_size = 64 }
kernels = "auto"
[quantize]
method = "qat"
group_size = 32
num_steps = 4
batch_size = 4
max_validation_rows = 8
kernels = "auto"
"""

NAMES = [
    "adamw/float32/float32",
    "cross_entropy/float32",
    "embedding/float32",
    "mlp_silu/float32",
    "rms_norm/float32/32",
    "rotary/float32/16",
    "sum_of_squares/float32",
    "sum_rms_norm/float32/32",
]
#: Of quantization-aware training, in which nothing is a plain product: its embedding is summed in plain operations.
QAT_NAMES = sorted({*NAMES, "gated_silu/float32"} - {"embedding/float32", "mlp_silu/float32"})


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A workflow whose tokens are there."""
    for name in ("notes", "artifacts/pretokenize"):
        shutil.copytree(built / name, tmp_path / "job" / name)
    (tmp_path / "job" / "workflow.toml").write_text(TEXT)
    return tmp_path / "job"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, uncompiled: None) -> Counter[str]:  # noqa: F811
    """A device that takes kernels, as far as the stages know."""
    monkeypatch.setattr(compute_device, "select", lambda _, *, key: "gpu")
    return use_references(monkeypatch)


Meanwhile = Callable[[registry.KernelSelection], object]


def _choose(monkeypatch: pytest.MonkeyPatch, *, serve: bool, is_cold: bool = False) -> list[list[str]]:
    """Let all kernels come out of the proof as serving, or none; return what was asked for.

    Args:
        serve: what they come out as.
        is_cold: whether the proof waits for MLX's compiler.
    """
    asked: list[list[str]] = []

    def choose(names: Iterable[str], ahead: EarlyVerifier | None, meanwhile: Meanwhile) -> registry.KernelSelection:
        asked.append(sorted(names))
        if is_cold:
            meanwhile(registry.recorded(asked[-1], asked[-1]))
        return registry.KernelSelection(
            dict.fromkeys(asked[-1], VerificationResult(serve, "" if serve else "it is slow"))
        )

    monkeypatch.setattr(registry, "choose", choose)
    return asked


def _run(folder: Path, stage: str, into: Path | None = None) -> Path:
    workflow = load_workflow(folder / "workflow.toml")
    return execute_stage(workflow, workflow.find(stage), into)


def _kernels(made: Path) -> tuple[list[str], list[str]]:
    report = report_files.read_report(made / "report.toml")
    return report["kernels"], report["run"]["kernels_refused"]


def test_verified_kernels_are_used_and_reported(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _choose(monkeypatch, serve=True)
    assert _kernels(_run(folder, "train")) == (NAMES, [])
    assert asked == [NAMES]
    assert calls.keys() == {
        "rms_norm.kernel",
        "rms_norm.kernel_gradients",
        "rms_norm.kernel_sum",
        "rms_norm.kernel_sum_gradients",
        "gated_activation.kernel_joined",
        "rotary.kernel",
        "embedding.kernel_gradient",
        "adamw.kernel",
        "adamw.kernel_sum_of_squares",
    }


def test_norms_beside_adapters_compute_no_gradient_of_their_weights(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _choose(monkeypatch, serve=False)
    _run(folder, "train", folder / "base")
    (folder / "workflow.toml").write_text(TEXT.replace(_MODEL, _ADAPTERS))
    asked = _choose(monkeypatch, serve=True)
    made = _run(folder, "train")
    norms = {"rms_norm_frozen/float32/32", "sum_rms_norm_frozen/float32/32"}
    assert norms == {name for name in asked[0] if "rms_norm" in name}
    assert norms <= set(_kernels(made)[0])
    assert {"rms_norm.kernel_frozen_gradient", "rms_norm.kernel_sum_frozen_gradient"} <= calls.keys()
    assert not calls.keys() & {"rms_norm.kernel_gradients", "rms_norm.kernel_sum_gradients"}


def test_kernels_that_fail_verification_are_reported_with_the_reason(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _choose(monkeypatch, serve=False)
    assert _kernels(_run(folder, "train")) == ([], [f"{name}: it is slow" for name in NAMES])
    assert not calls


_MODEL = "model = { hidden_size = 32, intermediate_size = 64 }"
_ADAPTERS = 'grad_accum_steps = 2\nmethod = "lora"\nmodel = { from = "base" }\nlora = { dropout = 0.5, rank = 2 }'


@pytest.mark.parametrize("serve", [True, False], ids=["all serve", "none serves"])
@pytest.mark.parametrize(
    ("stage", "settings"),
    rest_in_matrix([("train", _MODEL), ("train", _ADAPTERS), ("quantize", _MODEL)], ("train", _ADAPTERS)),
    ids=["train", "adapters", "quantize"],
)
def test_precompiling_during_verification_does_not_change_the_result(
    folder: Path,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    serve: bool,
    stage: str,
    settings: str,
) -> None:
    _choose(monkeypatch, serve=False)
    if settings == _ADAPTERS:
        _run(folder, "train", folder / "base")
    if stage == "quantize":
        _run(folder, "train")
    (folder / "workflow.toml").write_text(TEXT.replace(_MODEL, settings))
    _choose(monkeypatch, serve=serve)
    plain = _run(folder, stage, folder / "plain")
    before = calls.copy()
    calls.clear()
    _choose(monkeypatch, serve=serve, is_cold=True)
    made = _run(folder, stage, folder / "made")
    assert "compiled ahead" not in capfd.readouterr().err, "it came to its end"
    assert calls["rotary.kernel"] > before["rotary.kernel"], "it is rehearsed with kernels"
    assert calls["adamw.kernel"] > before["adamw.kernel"] or settings == _ADAPTERS, "its vectors are too short"
    assert _losses(made) == _losses(plain)
    assert (made / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def _losses(made: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (made / "metrics.jsonl").read_text().splitlines() if "loss" in line]


@pytest.mark.parametrize("first", [True, False])
def test_a_rebuild_reuses_the_recorded_kernel_selection_and_gives_the_same_bytes(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    _choose(monkeypatch, serve=first)
    made = _run(folder, "train")
    chosen, _ = _kernels(made)
    calls.clear()
    asked = _choose(monkeypatch, serve=not first)
    again = _run(folder, "train", folder / "again")  # what doit reproduce does
    assert not asked
    assert _kernels(again)[0] == chosen == (NAMES if first else [])
    assert bool(calls) == first
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_a_resumed_run_keeps_its_kernel_selection(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _choose(monkeypatch, serve=True)
    whole = (_run(folder, "train") / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "artifacts/train")

    update = adamw.kernel

    def stopping(*arguments: object) -> object:
        if calls["adamw.kernel"] == 4:  # two arrays an update
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)  # type: ignore[arg-type]

    calls.clear()
    monkeypatch.setattr(adamw, "kernel", stopping)
    with pytest.raises(SystemExit) as stopped:
        _run(folder, "train")
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(adamw, "kernel", update)
    asked = _choose(monkeypatch, serve=False)
    made = _run(folder, "train")
    assert not asked
    assert _kernels(made)[0] == NAMES
    assert (made / "model.safetensors").read_bytes() == whole


def test_verification_starts_before_the_model_is_built_unless_a_selection_is_recorded(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    build = model_folder.build

    def begin(early: EarlyVerifier | None) -> EarlyVerifier:
        told.append("begin")
        ahead = EarlyVerifier()
        ahead.callback(told.append, "end")
        return ahead

    def built(*arguments: Any, **named: Any) -> Any:
        told.append("model")
        return build(*arguments, **named)

    def choose(names: Iterable[str], ahead: EarlyVerifier, _: Meanwhile) -> registry.KernelSelection:
        told.append("choose")
        with ahead:
            return registry.KernelSelection(dict.fromkeys(names, VerificationResult(False, "it is slow")))

    monkeypatch.setattr(registry, "begin", begin)
    monkeypatch.setattr(registry, "choose", choose)
    monkeypatch.setattr(model_folder, "build", built)
    _run(folder, "train")
    assert told == ["begin", "model", "choose", "end"]
    told.clear()
    _run(folder, "train", folder / "again")
    assert told == ["model"]
    _run(folder, "quantize")
    assert told == ["model", "begin", "choose", "end"]
    shutil.rmtree(folder / "artifacts/train")
    told.clear()
    monkeypatch.setattr(model_folder, "build", lambda *_, **__: None)
    with pytest.raises(AttributeError):
        _run(folder, "train")
    assert told == ["begin", "end"], "it ends with a stage that fails before it knows its kernels"


@pytest.mark.parametrize("stage", rest_in_matrix(["train", "quantize"], "train"))
def test_the_verifier_process_starts_before_device_selection(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    _choose(monkeypatch, serve=False)
    if stage == "quantize":
        _run(folder, "train")
    told: list[str] = []
    early = EarlyVerifier()

    def begin_early() -> EarlyVerifier:
        told.append("early")
        early.callback(told.append, "end")
        return early

    def select(_: str, *, key: str) -> str:
        told.append("device")
        return "gpu"

    def begin(ahead: EarlyVerifier | None) -> EarlyVerifier:
        assert ahead is early
        told.append("begin")
        return early

    monkeypatch.setattr(ahead_of, "begin_early", begin_early)
    monkeypatch.setattr(registry, "begin", begin)
    monkeypatch.setattr(compute_device, "select", select)
    _run(folder, stage)
    assert told == ["early", "device", "begin", "end"]
    told.clear()
    _run(folder, stage, folder / "again")
    assert told == ["early", "device", "end"] if stage == "train" else ["early", "device", "begin", "end"]
    told.clear()
    text = TEXT.replace('kernels = "auto"', 'kernels = "off"')
    (folder / "workflow.toml").write_text(text)
    _run(folder, stage, folder / "off")
    assert told == ["device"]


def test_quantization_aware_training_uses_kernels(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _choose(monkeypatch, serve=False)
    _run(folder, "train")
    unfitted = _run(folder, "quantize", folder / "plain")
    assert not calls
    asked = _choose(monkeypatch, serve=True)
    made = _run(folder, "quantize")
    assert asked == [QAT_NAMES]
    assert _kernels(made) == (QAT_NAMES, [])
    assert {"rms_norm.kernel_gradients", "gated_activation.kernel_gradients", "adamw.kernel"} <= calls.keys()
    reports = [report_files.read_report(one / "report.toml")["training"] for one in (made, unfitted)]
    found, expected = (report["trained_validation_perplexity"] for report in reports)
    assert found == pytest.approx(expected, rel=1e-3)
    _choose(monkeypatch, serve=False)
    again = _run(folder, "quantize", folder / "again")
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


# --- "require" and "off"


def test_requiring_kernels_on_a_device_without_any_is_an_error_with_their_names(folder: Path) -> None:
    path = folder / "workflow.toml"
    path.write_text('[workflow]\ndevice = "cpu"\n' + TEXT.replace('kernels = "auto"', 'kernels = "require"', 1))
    done = mlxflow(folder, "run", "train")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1:] == [
        f'train.kernels = "require": {compute_device.processor()} lacks {", ".join(NAMES)} '
        '(MLX takes no kernels on this device). Set train.kernels = "auto".'
    ]
    assert "Traceback" not in done.stderr
    assert not (folder / "artifacts/train").exists()


def test_required_kernels_that_fail_verification_are_an_error_with_each_reason(
    folder: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "workflow.toml"
    path.write_text(TEXT.replace('kernels = "auto"', 'kernels = "require"'))
    outcomes = dict.fromkeys(NAMES, VerificationResult(True, "")) | {
        "cross_entropy/float32": VerificationResult(False, "it is slow"),
        "mlp_silu/float32": VerificationResult(False, "it is wrong"),
        "rms_norm/float32/32": VerificationResult(False, "it is slow"),
    }
    monkeypatch.setattr(registry, "choose", lambda *_: registry.KernelSelection(outcomes))
    lacking = "cross_entropy/float32, rms_norm/float32/32 (it is slow); mlp_silu/float32 (it is wrong)"
    with pytest.raises(WorkflowError) as raised:
        _run(folder, "train")
    advice = f'{compute_device.name()} lacks {lacking}. Set train.kernels = "auto".'
    assert str(raised.value) == f'train.kernels = "require": {advice}'
    path.write_text(TEXT)
    outcomes |= dict.fromkeys(NAMES, VerificationResult(True, ""))
    _run(folder, "train")
    outcomes["gated_silu/float32"] = VerificationResult(False, "it hangs")
    path.write_text(TEXT.replace('batch_size = 4\nmax_validation_rows = 8\nkernels = "auto"', 'kernels = "require"'))
    with pytest.raises(WorkflowError, match=r'^quantize.kernels = "require": .* lacks gated_silu/float32 \(it hangs\)'):
        _run(folder, "quantize")


def test_with_kernels_off_no_kernel_module_is_imported(folder: Path) -> None:
    program = f"""
import sys
from pathlib import Path

from mlxflow.device import compute_device
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow

compute_device.select = lambda _, *, key: "gpu"
selector = ("mlxflow.kernels", "mlxflow.kernels.model_kernels")
text = {TEXT!r}
for kernels, stage in [("off", "train"), ("off", "quantize"), ("auto", "quantize")]:
    Path("workflow.toml").write_text(text.replace('"auto"', f'"{{kernels}}"'))
    workflow = load_workflow(Path("workflow.toml"))
    execute_stage(workflow, workflow.find(stage))
    print(sorted(name for name in sys.modules if name.startswith("mlxflow.kernels") and name not in selector))
"""
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    *off, wanted = done.stdout.splitlines()
    assert off == ["[]", "[]"]
    assert "mlxflow.kernels.layer_patching" in wanted, "the test would see it"
