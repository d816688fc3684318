"""The training benchmark: recipes and their rows, timing, convergence, parts of a step, and roofline ceilings."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.benchmarking import roofline
from mlxflow.benchmarking.convergence import converge
from mlxflow.benchmarking.interleaved_timing import measure_recipes, rows_of
from mlxflow.benchmarking.recipe import Recipe
from mlxflow.benchmarking.report_comparison import training_name
from mlxflow.benchmarking.step_runner import Parts, Runner
from mlxflow.benchmarking.throughput import FEWEST_ROUNDS
from mlxflow.benchmarking.time_budget import Budget
from mlxflow.benchmarking.unpacked_rows import apart, holds_several
from mlxflow.data.row_widths import mean_width
from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.messages import terminal
from mlxflow.models import model_folder, quantized_layers
from mlxflow.report.stage_reports.benchmark import BottleneckFigures, ConvergenceCurve, DriftFigures
from mlxflow.report.stage_reports.benchmark_rows import ModelRow, TrainingRow
from mlxflow.training import build
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.weight_dtypes import dtype_of

# Number of unpacked rows: batches are rarely repeated, and the rows are made quickly
_ROWS_APART = 2048

# Rows, spread over the file, in which tokens are counted: a large file is not read as a whole
_COUNTED_ROWS = 4096

# Warm-up steps of a new model
_WARMUP_STEPS = 9

# The most steps whose parts are timed
_PARTED_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The training benchmark of a workflow.

    Attributes:
        load: loads the model to train, a new copy each time.
        build: builds an untrained model of the same shape.
        tokens: the training tokens.
        settings: of the workflow's training.
        names: of the settings, for messages.
        batch_sizes: batch sizes to time.
        num_steps: timed steps of each recipe.
        memory_limit_bytes: MLX's memory limit.
        seed: of the order of the rows.
        budget: of time, for all that is measured.
    """

    load: Callable[[], nn.Module]
    build: Callable[[], nn.Module]
    tokens: TokenFile
    settings: TrainingSettings
    names: SettingNames
    batch_sizes: Sequence[int]
    num_steps: int
    memory_limit_bytes: int
    seed: int
    budget: Budget

    @property
    def own_batch_size(self) -> int:
        """The timed batch size nearest to the workflow's; the ablations use it."""
        own = self.settings.batch_size
        return min(self.batch_sizes, key=lambda size: abs(size - own))

    @cached_property
    def is_packed(self) -> bool:
        """Whether some row holds more than one document."""
        return holds_several(self.tokens.rows)

    @cached_property
    def _rows_apart(self) -> Rows:
        return apart(self.tokens.rows, count=max(_ROWS_APART, 4 * max(self.batch_sizes)), seed=self.seed)

    def recipes(self) -> Iterator[Recipe]:
        """Yield the recipes to time, in the order of the report."""
        parted = self.own_batch_size
        for place, batch_size in enumerate(self.batch_sizes):
            workflow = self.workflow(batch_size)
            yield workflow.baseline()
            yield workflow
            if batch_size == parted and batch_size not in self.batch_sizes[:place]:
                yield from workflow.ablations()

    def workflow(self, batch_size: int) -> Recipe:
        """Return the workflow's recipe."""
        return Recipe.of(self.settings.replace(batch_size=batch_size), is_packed=self.is_packed)

    @contextmanager
    def open(self, recipe: Recipe, *, learns: bool = False) -> Iterator[Runner]:
        """Yield a runner of a recipe on a model of its own.

        Args:
            recipe: how a step is done.
            learns: use an untrained model with a constant learning rate after warm-up; else the trained one.
        """
        model = self.build() if learns else self.load()
        build.prepare_model(model, recipe.settings, adapter_seed=self.seed, names=self.names)
        settings = recipe.settings
        if learns:
            settings = settings.replace(schedule="constant", warmup_steps=_WARMUP_STEPS)
        subject = build.Subject(model, settings, self.tokens.vocab_size, self.tokens.context_length, self.names)
        with Runner.running(subject, self.rows(recipe), recipe=recipe, seed=self.seed) as runner:
            yield runner

    def rows(self, recipe: Recipe) -> Rows:
        """Return the rows for a recipe."""
        return self.tokens.rows if recipe.is_packed or not self.is_packed else self._rows_apart

    def targets_per_row(self, recipe: Recipe) -> float:
        """Return the mean number of targets in a row of a recipe."""
        rows = self.rows(recipe)
        if rows is self.tokens.rows:
            return self.tokens.targets / max(1, rows.num_rows)
        return float((rows.marks[:, 1:] & 1).sum()) / max(1, rows.num_rows)

    def tokens_per_row(self, recipe: Recipe) -> float:
        """Return the mean number of tokens without padding in a row of a recipe, from a sample of rows."""
        rows = self.rows(recipe)
        marks = rows.marks[:: max(1, rows.num_rows // _COUNTED_ROWS), :-1]
        return float((marks != 0).sum()) / max(1, len(marks))

    def measure(self, only: Set[str] | None = None) -> tuple[tuple[TrainingRow, ...], DriftFigures | None]:
        """Time recipes; return the report's `training` and `drift`.

        Args:
            only: names of rows as in a comparison; None for all.
        """
        measured, drift = measure_recipes(
            (one for one in self.recipes() if only is None or training_name(one.name, one.batch_size) in only),
            self.open,
            num_steps=self.num_steps,
            memory_limit_bytes=self.memory_limit_bytes,
            budget=self.budget,
        )
        rows = rows_of(measured, targets_per_row=self.targets_per_row, tokens_per_row=self.tokens_per_row)
        return rows, drift

    def converge(self, num_steps: int) -> tuple[ConvergenceCurve, ...]:
        """Train an untrained model by the baseline and by the workflow; return the report's `convergence`.

        Raises:
            RuntimeError: the two do not fit into the memory.
        """
        workflow = self.workflow(self.own_batch_size)
        with ExitStack() as held:
            runners = {
                recipe.name: held.enter_context(self.open(recipe, learns=True))
                for recipe in (workflow.baseline(), workflow)
            }
            return converge(runners, num_steps=num_steps, budget=self.budget)

    def time_parts(self) -> Parts:
        """Return the seconds of the parts of a step of the workflow, medians of several steps.

        Raises:
            RuntimeError: it does not fit into the memory.
        """
        with self.open(self.workflow(self.own_batch_size)) as runner:
            runner.run(2)
            steps = [runner.time_parts()]
            most = min(_PARTED_STEPS, max(3, self.num_steps))
            while len(steps) < most and (len(steps) < FEWEST_ROUNDS or not self.budget.is_over):
                steps.append(runner.time_parts())
        return Parts(*(statistics.median(column) for column in zip(*steps, strict=True)))

    def against_ceilings(self, training: Iterable[TrainingRow], dense: ModelRow | None) -> BottleneckFigures:
        """Return the measured ceilings of the device, and the rates that training and decode of the dense model reach.

        Args:
            training: rows of `measure`.
            dense: the row of the dense model; None if it was not measured.

        Raises:
            RuntimeError: the matrices to measure with do not fit into the memory.
        """
        model = self.load()
        stored_bytes = model_folder.num_bytes(model)
        model, _ = quantized_layers.made_dense(model, {})  # for its shapes only: never evaluated
        decode = None if dense is None else dense.decode_tokens_per_second
        return BottleneckFigures(
            ceiling_flops_per_second=roofline.flops_ceiling(dtype_of(self.settings)),
            ceiling_bytes_per_second=roofline.bytes_ceiling(_main_type(model)),
            flops_per_second=self._flops_per_second(model, training),
            decode_bytes_per_second=None if decode is None else stored_bytes * decode,
        )

    def _flops_per_second(self, model: nn.Module, training: Iterable[TrainingRow]) -> float | None:
        """Return the FLOP/s of the workflow's steps; None if they were not timed or the model says no hidden size."""
        own_size = self.own_batch_size
        own = [row.timed for row in training if (row.name, row.batch_size) == ("workflow", own_size) and row.timed]
        width = getattr(getattr(model, "args", None), "hidden_size", None)
        if not own or not width:
            return None
        per_token = roofline.flops_per_token(
            model.parameters(),
            hidden_size=width,
            num_layers=len(model.layers),
            context_length=self.tokens.context_length,
        )
        positions = mean_width(self.tokens.rows.marks, own_size)
        return own[0].samples_per_second * positions * per_token


def sizes_with_rows(
    sizes: tuple[int, ...], default: tuple[int, ...], *, own: int, num_rows: int, task: str
) -> tuple[int, ...]:
    """Return the batch sizes to time, and say where there are fewer rows.

    Of the default ones those are timed that have enough rows. A batch of a written size takes some rows repeatedly.

    Args:
        sizes: of the table.
        default: the default of the table.
        own: the batch size of the training, which is timed if there are too few rows for all others.
        num_rows: of the training file.
        task: the stage, for the line.
    """
    fact = f"the training text fills {num_rows:,} rows"
    if sizes != default:
        if max(sizes) > num_rows:
            terminal.say(f"{task}.batch_sizes: {max(sizes)} rows repeat some: {fact}")
        return sizes
    fitting = tuple(size for size in sizes if size <= num_rows) or (min(own, num_rows),)
    if fitting != sizes:
        listed, every = (", ".join(map(str, some)) for some in (fitting, sizes))
        terminal.say(f"{task}.batch_sizes: {listed} instead of {every}, the default: {fact}")
    return fitting


def _main_type(model: nn.Module) -> mx.Dtype:
    """Return the dtype of a model's largest weight."""
    leaves: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return max((leaf for _, leaf in leaves), key=lambda leaf: leaf.size).dtype
