"""How much of its speed a training keeps on several ranks."""

from mlxflow.messages import terminal
from mlxflow.report.stage_reports.benchmark import RankFigures
from mlxflow.storage.run_context import Context

# Updates of each start are at least so many, because the first ones compile, and at most so many
_FEWEST_STEPS, _MOST_STEPS = 10, 50


def time_ranks(context: Context, task: str, num_steps: int) -> RankFigures | None:
    """Return the speed of a training on one process and on all ranks; None if the workflow has one rank.

    Args:
        context: of the stage.
        task: the train stage.
        num_steps: timed steps that the benchmark asks for.
    """
    speeds = context.time_ranks(task, min(_MOST_STEPS, max(_FEWEST_STEPS, num_steps)))
    if not speeds:
        return None
    alone, together = speeds
    figures = RankFigures(
        ranks=together.ranks,
        backend=together.backend,
        alone_tokens_per_second=alone.tokens_per_second,
        tokens_per_second=together.tokens_per_second,
        efficiency=together.tokens_per_second / (together.ranks * alone.tokens_per_second),
        waited_seconds=together.waited_seconds,
    )
    terminal.say(f"{context.task}: {figures.words}")
    return figures
