import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxflow.device.stop_signals import StopFlag
from mlxflow.kernels import model_kernels
from mlxflow.storage import tensor_writing
from mlxflow.storage.observed_inputs import ObservedInputs
from mlxflow.storage.run_context import Context
from mlxflow.training import build
from mlxflow.training import run as running
from mlxflow.training.run import RunFiles, describe, exceeded_lines, train
from mlxflow.training.run_state import Result
from mlxflow.training.settings import SettingNames, TrainingSettings
from tests.training.small_training import GB, small_model, small_rows

SETTINGS = TrainingSettings(
    num_steps=6, batch_size=4, optimizer_options={}, log_every=1, eval_every=3, save_every=0, workers=1
)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    """The files of a run on a few rows."""
    tokens = tmp_path / "tokens.safetensors"
    rows = small_rows()
    about = {"context_length": "8", "vocab_size": "50", "end_of_text": "0", "targets": "1"}
    about |= {"has_conversations": "false", "end_tokens": "0"}
    tensor_writing.write_arrays(tokens, {"tokens": rows.tokens, "marks": rows.marks}, about)
    return RunFiles(tokens, tokens, tmp_path / "metrics.jsonl", tmp_path / "checkpoints", {"train.num_steps": 6})


def _train(
    files: RunFiles, if_interrupted: list[Callable[[], None]] | None = None
) -> tuple[Result, dict[str, mx.array]]:
    model = small_model()
    build.prepare_model(model, SETTINGS, adapter_seed=0)
    subject = build.Subject(model, SETTINGS, 50, 8, SettingNames("train:a"))
    result = train(
        subject,
        model_kernels.no_kernels(),
        files,
        task="train",
        data_seed=1,
        memory_limit_bytes=GB,
        if_interrupted=[] if if_interrupted is None else if_interrupted,
    )
    trained = dict(tree_flatten(model.parameters()))
    model.update(tree_map(mx.zeros_like, model.parameters()))  # as if its adapters were taken out, or it was rounded
    return result, trained


def _records(files: RunFiles) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    return [(line["kind"], line["step"]) for line in lines if line["kind"] in ("train", "validation")]


def test_a_run_logs_every_step_and_validation(files: RunFiles) -> None:
    result, _ = _train(files)
    assert result.steps == 6
    steps = [("train", step) for step in range(1, 7)]
    validations = [("validation", step) for step in (0, 3, 6)]
    assert sorted(_records(files)) == sorted(steps + validations)


def test_a_stopped_run_continues_to_the_same_weights(
    files: RunFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, whole = _train(files)
    curve = _records(files)

    class Stopping(StopFlag):
        def __call__(self) -> bool:
            self.signal = signal.SIGTERM if len(_records(files)) > 3 else 0
            return super().__call__()

    @contextmanager
    def stopping() -> Iterator[StopFlag]:
        yield Stopping()

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(running, "stop_on_signals", stopping)
        with pytest.raises(SystemExit) as raised:
            _train(files)
    assert raised.value.code == 128 + signal.SIGTERM
    (checkpoint,) = files.checkpoints.glob("step-*")
    step = int(checkpoint.name.partition("-")[2])
    assert 0 < step < 6
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"train:a: stopped after step {step}; {checkpoint} lets the next run resume from there"
    )
    _, continued = _train(files)
    assert f"train:a: resumes from step {step} ({checkpoint})" in capsys.readouterr().err.splitlines()
    assert _records(files) == curve
    assert all(mx.array_equal(continued[name], value) for name, value in whole.items())


def test_a_run_that_was_interrupted_after_its_end_continues_from_its_last_step(
    files: RunFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    if_interrupted: list[Callable[[], None]] = []
    first, whole = _train(files, if_interrupted)
    curve = _records(files)
    assert not list(files.checkpoints.glob("step-*"))
    (save,) = if_interrupted
    save()
    (checkpoint,) = files.checkpoints.glob("step-*")
    stopped, resumes = f"stopped after step 6; {checkpoint} lets the next run resume from there", "resumes from step 6"
    assert capsys.readouterr().err.splitlines()[-1] == f"train:a: {stopped}"
    second, continued = _train(files)
    assert f"train:a: {resumes} ({checkpoint})" in capsys.readouterr().err.splitlines()
    assert _records(files) == curve
    assert second._replace(peak_memory_bytes=first.peak_memory_bytes) == first
    assert all(mx.array_equal(continued[name], value) for name, value in whole.items())


def test_a_signal_after_the_last_check_ends_the_run(files: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def stopping() -> Iterator[StopFlag]:
        flag = StopFlag()
        yield flag
        flag.signal = signal.SIGINT

    monkeypatch.setattr(running, "stop_on_signals", stopping)
    if_interrupted: list[Callable[[], None]] = []
    with pytest.raises(SystemExit) as raised:
        _train(files, if_interrupted)
    assert raised.value.code == 128 + signal.SIGINT
    assert len(if_interrupted) == 1


def test_a_run_is_described_by_dotted_keys_and_its_inputs(tmp_path: Path) -> None:
    given: dict[str, Any] = dict.fromkeys(("state", "folder", "unfinished", "root"), tmp_path)
    context = Context(
        task="train:a",
        seed=7,
        device="cpu",
        memory_limit_bytes=GB,
        provenance={"mlx": "1.2", "inputs_digest": "ab", "stage": "train:a"},
        tasks=(),
        members=(),
        name="tiny",
        digests=ObservedInputs(tmp_path / "digests.json"),
        **given,
    )
    table = {"num_steps": 3, "model": {"num_layers": 2, "rope": {"base": 10.0}}, "workers": 4}
    assert describe(table, SettingNames("train:a"), context, without=("workers",)) == {
        "train:a.num_steps": 3,
        "train:a.model.num_layers": 2,
        "train:a.model.rope.base": 10.0,
        "seed": 7,
        "mlx": "1.2",
        "inputs": "ab",
    }


@pytest.mark.parametrize(("peak", "is_said"), [(GB, False), (GB + 1, True)])
def test_a_peak_above_the_memory_limit_is_one_line(peak: int, is_said: bool, files: RunFiles) -> None:
    result = _train(files)[0]._replace(peak_memory_bytes=peak)
    assert result.memory_limit_bytes == GB
    names = SettingNames("train", "pretokenize.context_length", "workflow.memory_limit")
    lines = exceeded_lines(result, build.Subject(small_model(), SETTINGS, 50, 8, names))
    expected = (
        "train: training took up to 1,000,000,001 bytes, more than the 1,000,000,000 bytes allowed. "
        'Lower train.batch_size or pretokenize.context_length, set train.checkpointing = "layers" and '
        "train.fused_loss = true, or raise workflow.memory_limit."
    )
    assert lines == ([expected] if is_said else [])
