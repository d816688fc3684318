"""`checkpointing = "auto"`: as few layers as possible are recomputed within the memory limit."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mlxflow.data.token_file import Rows
from mlxflow.kernels import model_kernels
from mlxflow.messages.errors import ArtifactError
from mlxflow.training import build
from mlxflow.training.checkpointing_choice import choose_checkpointing, resolve_checkpointing
from mlxflow.training.settings import Recomputation, SettingNames, TrainingSettings
from mlxflow.training.step_trials import StepTrial, try_step
from tests.small_models import llama

LENGTH = 64
NONE = model_kernels.no_kernels()


@pytest.fixture
def subject() -> build.Subject:
    model, _ = llama(vocab_size=64, hidden_size=32, num_layers=8, seed=0)
    settings = TrainingSettings(batch_size=8, warmup_steps=0, shrink_above=1.0)
    build.prepare_model(model, settings, adapter_seed=0)
    return build.Subject(model, settings, 64, LENGTH, SettingNames("train"))


@pytest.fixture
def rows() -> Rows:
    tokens = np.random.default_rng(0).integers(0, 64, (8, LENGTH + 1)).astype(np.int32)
    return Rows(tokens, np.full(tokens.shape, 3, np.uint8))


def _peak(subject: build.Subject, rows: Rows, every: int) -> int:
    settings = subject.settings.replace(checkpoint_every=every)
    measured = try_step(subject._replace(settings=settings), NONE, rows)
    assert measured is not None
    assert measured.tokens == 8 * LENGTH
    return measured.peak_bytes


def _key() -> "NDArray[np.uint32]":
    state: Any = mx.random.state
    return np.array(state[0])


def test_as_many_layers_as_fit_keep_their_activations(subject: build.Subject, rows: Rows) -> None:
    kept, recomputed = (_peak(subject, rows, every) for every in (0, 1))
    assert recomputed < kept
    roomy = choose_checkpointing(subject, NONE, rows, limit_bytes=2 * kept)
    assert roomy.layers == Recomputation(0)
    assert roomy.line.startswith("no layer is recomputed: ")
    tight = choose_checkpointing(subject, NONE, rows, limit_bytes=(kept + 9 * recomputed) // 10)
    assert tight.layers.every > 0
    assert "to keep all activations takes about" in tight.line
    nothing = choose_checkpointing(subject, NONE, rows, limit_bytes=1000)
    assert nothing.layers == Recomputation(1, 2)
    assert nothing.line == "every layer is recomputed, in pairs, and exceeds the 1.0 kB allowed"


def test_trials_leave_weights_and_random_state_as_they_were(subject: build.Subject, rows: Rows) -> None:
    before = {name: np.array(value) for name, value in tree_flatten(subject.model.parameters())}
    key = _key()
    choose_checkpointing(subject, NONE, rows, limit_bytes=1 << 40)
    for name, value in tree_flatten(subject.model.parameters()):
        assert np.array_equal(before[name], np.array(value)), name
    assert np.array_equal(key, _key())
    assert {type(layer).__name__ for layer in subject.model.layers} == {"TransformerBlock"}


def test_a_run_that_goes_on_or_is_repeated_takes_the_recorded_choice(
    subject: build.Subject, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolve(published: Path | None = None) -> Recomputation:
        file = tmp_path / "unfinished" / "checkpointing.json"
        return resolve_checkpointing(subject, NONE, rows, limit_bytes=1 << 40, memory_file=file, published=published)

    assert resolve() == Recomputation(0)
    assert capsys.readouterr().err.startswith('train.checkpointing = "auto": no layer is recomputed: ')
    (tmp_path / "unfinished" / "checkpointing.json").write_text(json.dumps([1, 2]))
    assert resolve() == Recomputation(1, 2)
    (tmp_path / "report.toml").write_text("[settings]\ncheckpoint_every = 2\n")
    assert resolve(tmp_path) == Recomputation(2)
    (tmp_path / "report.toml").write_text("[settings]\ncheckpoint_every = 1\ncheckpoint_segment = 2\n")
    assert resolve(tmp_path) == Recomputation(1, 2)
    (tmp_path / "report.toml").write_text("[settings]\ncheckpoint_every = 'x'\n")
    with pytest.raises(ArtifactError):
        resolve(tmp_path)
    assert not capsys.readouterr().err


def test_a_pass_that_takes_no_time_beside_its_update_has_a_speed(
    subject: build.Subject, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are sent together may take less than the update of a lone one."""

    def try_nothing(_subject: build.Subject, _kernels: Any, some: Rows) -> StepTrial:
        return StepTrial(
            tokens=some.num_rows * LENGTH, peak_bytes=100, pass_peak_bytes=100, seconds=0, update_seconds=2
        )

    monkeypatch.setattr("mlxflow.training.checkpointing_choice.try_step", try_nothing)
    assert "256 tokens/s" in choose_checkpointing(subject, NONE, rows, limit_bytes=1 << 40).line


def test_of_a_batch_that_would_shrink_the_limit_counts_up_to_there(subject: build.Subject, rows: Rows) -> None:
    kept = _peak(subject, rows, 0)
    dynamic = subject._replace(settings=subject.settings.replace(shrink_above=0.5))
    fixed = subject._replace(settings=dynamic.settings.replace(dynamic_batch_size=False))
    shrinking = choose_checkpointing(dynamic, NONE, rows, limit_bytes=kept + kept // 2)
    assert shrinking.layers.every > 0
    assert "above which the batch shrinks" in shrinking.line
    fitting = choose_checkpointing(fixed, NONE, rows, limit_bytes=kept + kept // 2)
    assert fitting.layers == Recomputation(0)
    assert "allowed" in fitting.line
