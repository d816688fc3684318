"""The measurements of a benchmark in their order: training, convergence, models, the parts of a step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from mlxflow.benchmarking.bottleneck import advise
from mlxflow.benchmarking.model_measurement import ComparedModels
from mlxflow.benchmarking.suite import Suite
from mlxflow.benchmarking.targets import MODEL_SIZE, check_targets
from mlxflow.benchmarking.time_budget import AskedAmounts, Budget, lowered
from mlxflow.device.memory_errors import out_of_memory_bytes, settle
from mlxflow.messages import terminal
from mlxflow.report.stage_reports.benchmark import (
    BenchmarkReport,
    BottleneckFigures,
    ConvergenceCurve,
    DeviceFacts,
    DriftFigures,
)
from mlxflow.report.stage_reports.benchmark_rows import ModelRow, TrainingRow

T = TypeVar("T")

# Shares of the time after which each part should end; the rest is for the parts of a step
_SHARES = {"training": 0.5, "convergence": 0.65, "models": 0.95}


class BenchmarkRequest(NamedTuple):
    """What is measured, and where.

    Attributes:
        version: of the report.
        device: that is measured.
        amounts: of steps, rows and seconds.
        training_table: the train stage, for the advice.
        tokens_table: the pretokenize stage, for the advice.
    """

    version: int
    device: DeviceFacts
    amounts: AskedAmounts
    training_table: str
    tokens_table: str


class _TimedTraining(NamedTuple):
    """The figures of the training benchmark, without the parts of a step."""

    rows: tuple[TrainingRow, ...] = ()
    drift: DriftFigures | None = None
    curves: tuple[ConvergenceCurve, ...] | None = None


def measure(request: BenchmarkRequest, suite: Suite | None, models: ComparedModels, budget: Budget) -> BenchmarkReport:
    """Return all figures, without a comparison.

    Args:
        request: what is measured.
        suite: the training benchmark; None to measure only the models.
        models: to measure.
        budget: of time.
    """
    amounts = request.amounts
    training = _TimedTraining() if suite is None else _measure_training(suite, amounts.convergence_steps, budget)
    budget.begin(_SHARES["models"])
    rows = models.measure(budget)
    budget.begin(1.0)
    if suite is None:
        bottleneck = BottleneckFigures()
        targets = check_targets((), rows, None, 0)
        targets = {MODEL_SIZE: targets[MODEL_SIZE]}
    else:
        bottleneck = _bottleneck(request, suite, training.rows, models.dense_row(rows))
        targets = check_targets(training.rows, rows, bottleneck.data_share, suite.own_batch_size)
    less = lowered(amounts, training=training.rows, convergence=training.curves or (), models=rows)
    return BenchmarkReport(
        version=request.version,
        device=request.device,
        training=training.rows,
        drift=training.drift,
        convergence=training.curves,
        models=rows,
        bottleneck=bottleneck,
        promises=targets,
        lowered=tuple(less) or None,
    )


def _measure_training(suite: Suite, convergence_steps: int, budget: Budget) -> _TimedTraining:
    budget.begin(_SHARES["training"])
    rows, drift = suite.measure()
    if not convergence_steps:
        return _TimedTraining(rows, drift)
    budget.begin(_SHARES["convergence"])
    return _TimedTraining(rows, drift, if_it_fits(lambda: suite.converge(convergence_steps)) or ())


def _bottleneck(
    request: BenchmarkRequest, suite: Suite, training: Sequence[TrainingRow], dense: ModelRow | None
) -> BottleneckFigures:
    """Return the shares of a step's time, the ceilings of the device, and the most promising change of a setting."""
    parts = if_it_fits(suite.time_parts)
    ceilings = if_it_fits(lambda: suite.against_ceilings(training, dense)) or BottleneckFigures()
    if parts is None:
        return ceilings
    shares = parts.shares()
    tables = {"training_table": request.training_table, "tokens_table": request.tokens_table}
    return msgspec.structs.replace(
        ceilings,
        data_share=shares.data,
        graph_share=shares.graph,
        compute_share=shares.compute,
        synchronize_share=shares.synchronize,
        advice=advise(shares, training, suite.own_batch_size, **tables),
    )


def if_it_fits(compute: Callable[[], T]) -> T | None:
    """Return the result; None, with a line for the terminal, if it runs out of memory."""
    try:
        computed = compute()
        settle()
    except RuntimeError as error:
        if out_of_memory_bytes(error) is None:
            raise
        settle(drops=True)
        terminal.say(f"benchmark: left out, it does not fit into the memory ({error})")
        return None
    return computed
