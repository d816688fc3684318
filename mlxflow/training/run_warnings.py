"""What a user should know of a training run: before its first step, and when its model is written; imports no MLX.

Each warning is a `Problem`: the key, its value, what is wrong with it, and what to do. The text of all of them is
written here; the terminal, the report, the page and `mlxflow check` show it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.messages.errors import StageError
from mlxflow.storage.toml_tables import Problem, toml_value
from mlxflow.training import length
from mlxflow.training.figures import TrainingFigures

#: Passes over the same rows above which a model mostly learns them by heart.
MAX_EPOCHS = 4

#: Trained weights for each token of the training text above which a model mostly learns it by heart.
MAX_WEIGHTS_PER_TOKEN = 100

#: Validation rows below which a loss is mostly chance.
MIN_VALIDATION_ROWS = 20

#: Validations in a row without a better one after which a run should have ended.
MAX_RISES = 3

# Relative difference of two perplexities that is none
_SAME = 1e-3


class RunOutline(NamedTuple):
    """What is known of a training run before its first step.

    Attributes:
        length_key: the key that says how long it is, "num_steps" or "num_epochs".
        length: its value.
        num_epochs: passes over the training rows.
        num_rows: of the training file.
        tokens: of the training file, each counted once, that are learned from.
        trained_weights: number of them; None if it is not known, or if all weights of a pretrained model are trained.
        is_adapter: whether the trained weights are adapters.
        validation_rows: in the file.
        max_validation_rows: the most that are used.
        tokens_table: the table that makes the tokens, such as "pretokenize".
    """

    length_key: str
    length: float
    num_epochs: float
    num_rows: int
    tokens: int
    trained_weights: int | None
    is_adapter: bool
    validation_rows: int
    max_validation_rows: int
    tokens_table: str


def outline_of(config: Any, train: Path, validation: Path) -> RunOutline | None:
    """Return what is known of a training run from its table and the headers of its token files.

    Args:
        config: a `[train]` table.
        train: the token file to train on.
        validation: the token file of validations.

    Returns:
        None if a file is missing or damaged.
    """
    sides = [length.read_rows(file) for file in (train, validation)]
    if sides[0] is None or sides[1] is None:
        return None
    rows, metadata = sides[0]
    in_epochs = config.num_epochs != "auto"
    per_step = length.batch_size_of(config, rows) * config.grad_accum_steps
    num_steps = length.planned_steps(config, rows)
    num_epochs = length.epochs_of(num_steps, num_rows=rows, rows_per_step=per_step)
    is_new = not config.model.from_
    return RunOutline(
        length_key="num_epochs" if in_epochs else "num_steps",
        length=config.num_epochs if in_epochs else config.num_steps,
        num_epochs=config.num_epochs if in_epochs else num_epochs,
        num_rows=rows,
        tokens=int(metadata["targets"]),
        trained_weights=config.model.num_weights(int(metadata["vocab_size"])) if is_new else None,
        is_adapter=config.method != "full",
        validation_rows=sides[1][0],
        max_validation_rows=config.max_validation_rows,
        tokens_table=config.input,
    )


class RunWarning(NamedTuple):
    """A warning about a table of the workflow.

    Attributes:
        table: such as "train" or "pretokenize".
        problem: the key of the table, its value, what is wrong and what to do.
    """

    table: str
    problem: Problem

    @property
    def line(self) -> str:
        """The warning as one line."""
        key, value, expected, advice = self.problem
        written = "" if value is None else f" = {toml_value(value)}"
        return f"{self.table}.{key}{written}: {expected}. {advice}"


def before(outline: RunOutline, *, task: str) -> Iterator[RunWarning]:
    """Yield the warnings that are known before the first step.

    Args:
        outline: of the run.
        task: the stage's name.
    """
    if outline.num_epochs > MAX_EPOCHS:
        expected = f"{outline.num_epochs:.3g} epochs of {outline.num_rows:,} rows, more than {MAX_EPOCHS}: "
        expected += "the model learns the text by heart"
        advice = f'Lower it, add text to {outline.tokens_table}.sources, or set keep = "best" and patience.'
        yield RunWarning(task, Problem(outline.length_key, outline.length, expected, advice))
    weights = outline.trained_weights
    if weights is not None and weights > MAX_WEIGHTS_PER_TOKEN * outline.tokens:
        expected = (
            f"{weights:,} trained weights for {outline.tokens:,} tokens, more than {MAX_WEIGHTS_PER_TOKEN} for each"
        )
        key, advice = ("lora.rank", "Lower it") if outline.is_adapter else ("model", "Train a smaller one")
        advice += f" or add text to {outline.tokens_table}.sources."
        yield RunWarning(task, Problem(key, None, expected, advice))
    rows = min(outline.validation_rows, outline.max_validation_rows)
    if rows < MIN_VALIDATION_ROWS:
        expected = (
            f"{rows} validation row{'s' * (rows != 1)}, fewer than {MIN_VALIDATION_ROWS}: their loss is mostly chance"
        )
        if outline.max_validation_rows < MIN_VALIDATION_ROWS <= outline.validation_rows:
            yield RunWarning(task, Problem("max_validation_rows", outline.max_validation_rows, expected, "Raise it."))
        else:
            advice = "Raise it, add text, or name validation_sources."
            yield RunWarning(outline.tokens_table, Problem("holdout", None, expected, advice))


class Ending(NamedTuple):
    """What is known of a training run when its model is written.

    Attributes:
        figures: of the training.
        published_perplexity: of the model in the files, on the validation rows.
        keep: "last" or "best".
        patience: validations without a better one that end the run; 0 for none.
        validations_since_best: that followed the best one.
    """

    figures: TrainingFigures
    published_perplexity: float
    keep: str
    patience: int
    validations_since_best: int

    @property
    def is_improvement(self) -> bool:
        """Whether the written model is better than the one that training started from."""
        return self.published_perplexity < self.figures.first_validation_perplexity

    def warnings(self, task: str) -> Iterator[RunWarning]:
        """Yield the warnings about the written model, the gravest last.

        Args:
            task: the stage's name.
        """
        figures, published = self.figures, self.published_perplexity
        rises = self.validations_since_best
        if not self.patience and rises >= MAX_RISES:
            expected = f"the last {rises} validations were all worse than that of step {figures.best_validation_step:,}"
            yield RunWarning(
                task, Problem("patience", 0, expected, f"Set patience = {MAX_RISES}, which ends such a run.")
            )
        first, best = figures.first_validation_perplexity, figures.best_validation_perplexity
        keep = Problem("keep", self.keep, "", "")
        if not published <= first * (1 + _SAME):
            expected = f"the published weights are worse than the start: perplexity {_shown(first)} before training, "
            expected += f"{_shown(published)} after"
            best_of = 'Set keep = "best", with a lower eval_every, or lower' if self.keep == "last" else "Lower"
            yield RunWarning(task, keep._replace(expected=expected, advice=f"{best_of} learning_rate or the epochs."))
        elif self.keep == "last" and not published <= best * (1 + _SAME):
            expected = (
                f"the published weights are worse than the best: perplexity {_shown(published)}, and {_shown(best)} "
            )
            expected += f"after step {figures.best_validation_step:,}"
            yield RunWarning(task, keep._replace(expected=expected, advice='Set keep = "best".'))

    def refusal(self, task: str) -> str:
        """Return the error of a run that `require_improvement` fails.

        Args:
            task: the stage's name.
        """
        first = self.figures.first_validation_perplexity
        return (
            f"{task}.require_improvement = true: perplexity {_shown(first)} before training and "
            f"{_shown(self.published_perplexity)} after, nothing is published. Lower {task}.learning_rate or the "
            f'epochs, or set {task}.keep = "best".'
        )

    def judged(self, task: str, *, requires_improvement: bool) -> list[str]:
        """Return the warnings about the written model as lines.

        Args:
            task: the stage's name.
            requires_improvement: whether a model that is no better than the start is refused.

        Raises:
            StageError: it is refused.
        """
        if requires_improvement and not self.is_improvement:
            raise StageError(self.refusal(task))
        return [warning.line for warning in self.warnings(task)]


def _shown(perplexity: float) -> str:
    return f"{perplexity:,.0f}" if 1000 <= perplexity < 1e9 else f"{perplexity:.4g}"
