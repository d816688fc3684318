"""What a run is, in a few lines at the top of the page: date, commit, parameters, tokens, epochs and settings."""

from collections.abc import Iterator
from typing import NamedTuple

from mlxflow.report.formatting import clean, plural, show, show_large
from mlxflow.report.load_run import LoadedStage, Run
from mlxflow.report.stage_reports.pretokenize import PretokenizeReport
from mlxflow.report.stage_reports.train import TrainReport
from mlxflow.training.settings import Recomputation, TrainingSettings

_COMMIT_DIGITS = 10


class Fact(NamedTuple):
    """One line: what it is about, and the fact in words."""

    name: str
    text: str


def facts(run: Run) -> list[Fact]:
    """Return the facts that the reports and the lock hold."""
    return [*_origin(run), *(fact for stage in run.stages for fact in _training(run, stage))]


def _origin(run: Run) -> Iterator[Fact]:
    """Yield when and where the artifacts were made."""
    about = [stage.report.run for stage in run.stages if stage.report]
    if ended := sorted(clean(one.ended) for one in about if one.ended):
        yield Fact("Built", ended[-1].replace("T", " ").replace("Z", " UTC"))
    commits = dict.fromkeys(_commit(str(made.get("commit", "unknown"))) for made in run.lock.values())
    if commits:
        known = ", ".join(clean(commit) for commit in commits if commit != "unknown")
        yield Fact("Commit", known or "none: the folder is in no git repository")
    if devices := dict.fromkeys(clean(one.device_name) for one in about):
        yield Fact("Device", ", ".join(devices))


def _commit(full: str) -> str:
    commit, _, changed = full.partition("+")
    return commit[:_COMMIT_DIGITS] + (f" with {changed}" if changed else "")


def _training(run: Run, one: LoadedStage) -> Iterator[Fact]:
    """Yield the facts of a train stage."""
    report = one.figures(TrainReport)
    if report is None:
        return
    suffix = f" of {clean(one.task.partition(':')[2] or one.task)}" if len(run.of_kind("train")) > 1 else ""
    yield Fact(f"Parameters{suffix}", show_large(report.parameters))
    said = f"{show_large(report.tokens)} tokens in {plural(report.steps, 'step')}"
    epochs = epochs_of(run, one)
    yield Fact(f"Trained on{suffix}", said + (f", {show(epochs, 2)} epochs" if epochs is not None else ""))
    yield Fact(f"Settings{suffix}", settings_in_words(report.settings, _context_length(run, one)))


def epochs_of(run: Run, one: LoadedStage) -> float | None:
    """Return how often a train stage saw its data; None if its data were not reported."""
    report = one.figures(TrainReport)
    targets = sum(data.train.targets for data in _data_of(run, one))
    return report.tokens / targets if report and targets else None


def _data_of(run: Run, one: LoadedStage) -> list[PretokenizeReport]:
    made = [stage.figures(PretokenizeReport) for stage in run.stages if stage.task in one.member.reads]
    return [report for report in made if report]


def _context_length(run: Run, one: LoadedStage) -> int | None:
    return max((data.context_length for data in _data_of(run, one)), default=None)


def settings_in_words(settings: TrainingSettings, context_length: int | None) -> str:
    """Return how a model was trained, in one line."""
    rows = f"{settings.rows_per_step} rows" + (f" of {show(context_length)} tokens" if context_length else "")
    rate = f"learning rate {settings.learning_rate:g} ({settings.schedule}, "
    shape = settings.adapter_shape
    trained = f"{'LoRA' if shape.method == 'lora' else 'DoRA'} of rank {shape.rank}" if shape else "all weights"
    parts = (
        rate + f"{plural(settings.warmup_steps, 'step')} of warm-up)",
        f"{rows} a step",
        clean(settings.optimizer),
        f"weight decay {settings.weight_decay:g}",
        settings.precision,
        trained,
        Recomputation.in_use(settings).words,
    )
    return "; ".join(parts)
