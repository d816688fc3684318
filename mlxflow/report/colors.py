"""One style for each thing on the page: a model, a phase or a kind of memory has the same color on every plot.

Two things may share a color where they never stand in the same plot.
"""

from collections.abc import Sequence

#: Number of series that can be distinguished in one plot.
STYLES = 32
_COLORS = 8

#: The style of each thing with a name of its own.
_THINGS = {
    # Losses, and the ways of training
    "training": "c0",
    "held-out": "c1",
    "workflow": "c0",
    "baseline": "c1",
    # Memory
    "active": "c0",
    "peak": "c1",
    "cache": "c2",
    "resident": "c0",
    "footprint": "c1",
    "proportional": "c2",
    "unique": "c3",
    "available": "c4",
    "swap": "c1",
    "device": "c2",
    # Phases: whole ones, parts of a step, and what is in memory meanwhile
    "load_model": "c6",
    "first_step": "c7",
    "training_step": "c7 p2",
    "step": "c7 p2",
    "data": "c3",
    "forward_backward": "c4",
    "activations": "c4",
    "update": "c5",
    "gradients": "c6",
    "optimizer": "c7",
    "weights": "c0",
    "logits": "c1",
    "other": "c0 p1",
    # Where a step's time goes
    "waiting for data": "c3",
    "computing": "c4",
    "building the graph": "c6",
    "synchronizing": "c7",
}

#: The style of a way of training that is neither the workflow's nor the baseline.
VARIATION = "c7"

#: The styles of phases without a color of their own, in the order in which they appear.
_FURTHER = ("c6", "c7", "c2", "c0", "c1")


def style_of(index: int) -> str:
    """Return the CSS classes of one of many series: eight colors, each plain and in three patterns.

    A pattern is the dash of a line, the shape of a mark, or the opacity of a bar.
    """
    pattern = index // _COLORS % (STYLES // _COLORS)
    return f"c{index % _COLORS}" + (f" p{pattern}" if pattern else "")


def style_of_thing(name: str) -> str:
    """Return the style of a thing by its name; of an unknown one that of other ways of training."""
    return _THINGS.get(name, VARIATION)


def styles_of_phases(names: Sequence[str]) -> dict[str, str]:
    """Return a style for each phase of a run, in the order in which they appear."""
    unknown = [name for name in dict.fromkeys(names) if name not in _THINGS]
    further = {name: _FURTHER[index % len(_FURTHER)] for index, name in enumerate(unknown)}
    return {name: _THINGS.get(name) or further[name] for name in dict.fromkeys(names)}


def styles_of_models(tasks: Sequence[str]) -> dict[str, str]:
    """Return a style for each model of a run, in the order of its stages."""
    return {task: style_of(index) for index, task in enumerate(dict.fromkeys(tasks))}
