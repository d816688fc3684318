"""The bottleneck of a training step: the one change of a setting with the largest expected gain."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mlxflow.benchmarking.step_runner import Parts
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.report.stage_reports.benchmark_rows import TrainingRow

# Shares of a step above which waiting for data, or building the graph, is reported
_DATA_SHARE, _GRAPH_SHARE = 0.02, 0.2

#: The setting that switches an optimization off, by the name of its row in the report.
_SWITCHES = {
    "without fused_loss": "fused_loss = false",
    "without checkpointing": 'checkpointing = "none"',
    "without bf16": 'precision = "fp32"',
    "without bf16-pure": 'precision = "fp32"',
    "without packing": 'packing = "none"',
}


class Change(NamedTuple):
    """A possible change of a setting.

    Attributes:
        gain: expected factor in tokens per second.
        advice: the change and the evidence, in words.
    """

    gain: float
    advice: str


def advise(
    shares: Parts,
    rows: Sequence[TrainingRow],
    own_batch_size: int,
    *,
    training_table: str,
    tokens_table: str,
) -> str:
    """Return the change with the largest expected gain, in words.

    Args:
        shares: of a step's time.
        rows: of the report's `training`.
        own_batch_size: the workflow's batch size.
        training_table: name of the table with the settings of the training.
        tokens_table: name of the table that made the tokens.
    """
    changes = [
        *_of_shares(shares, training_table),
        *_of_switches(rows, training_table, tokens_table),
        *_of_batch_sizes(rows, own_batch_size, training_table),
    ]
    if not changes:
        return (
            f"{shares.compute:.0%} of a step is computing, and nothing that was measured makes it faster: "
            "a smaller model or a faster device would."
        )
    return max(changes).advice


def _of_shares(shares: Parts, table: str) -> Iterable[Change]:
    data, graph = shares.data, shares.graph
    if data > _DATA_SHARE:
        yield Change(
            1 / (1 - data),
            f"raise {table}.workers and {table}.prefetch_batches: {data:.0%} of a step is spent waiting for data",
        )
    if graph > _GRAPH_SHARE:
        yield Change(
            1 / (1 - graph),
            f"raise {table}.batch_size: the host takes {graph:.0%} of a step to build its graph",
        )


def _of_switches(rows: Iterable[TrainingRow], training: str, tokens: str) -> Iterable[Change]:
    for row in rows:
        speedup = row.speedup
        if row.name in _SWITCHES and speedup is not None and speedup.high < 1:
            gain = 1 / speedup.value
            table = tokens if row.name == "without packing" else training
            yield Change(gain, f"set {table}.{_SWITCHES[row.name]}: steps {row.name} were {gain:.2f} times as fast")


def _of_batch_sizes(rows: Iterable[TrainingRow], own: int, table: str) -> Iterable[Change]:
    timed = {row.batch_size: row.timed for row in rows if row.name == "workflow" and row.timed is not None}
    if own not in timed:
        return
    for size, figures in timed.items():
        if figures.speed.low > timed[own].speed.high:
            gain = figures.speed.value / timed[own].speed.value
            yield Change(
                gain,
                f"set {table}.batch_size = {size}: {gain:.2f} times the tokens a second of {own} rows, "
                f"in {show_bytes(figures.peak_memory_bytes)}",
            )
