"""Suggestions of settings that save memory, with the predicted saving, from trials with a part of the rows."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mlxflow.profiling.step_memory import Peaks, ProfiledModel, predict
from mlxflow.training.settings import Recomputation, TrainingSettings

# What each kind of gradient checkpointing costs
_RECOMPUTING = {
    "layers": "layers are computed twice, about a third more time",
    "pairs": "every second layer is computed once more, about a tenth more time",
}

# Suggestions that save less than this share of the total are left out
_WORTH_SHARE = 0.02


class Suggestion(NamedTuple):
    """A suggested setting.

    Attributes:
        name: of the setting: batch_size, fused_loss, checkpointing, grad_accum_steps, precision, packing, cache_limit.
        value: the suggested value.
        saves_bytes: predicted reduction of the process's peak.
        evidence: the measurement behind it, in words.
    """

    name: str
    value: Any
    saves_bytes: int
    evidence: str


class Situation(NamedTuple):
    """The measured state of training.

    Attributes:
        peaks: of the measured steps.
        cache_memory_bytes: freed buffers that MLX kept beyond the arrays' peak.
        real_share: share of the positions that hold a token; the rest is padding.
        is_gpu: whether training runs on a GPU, where bf16 is an option.
        packing: the setting of that name.
        batch_size: rows in a forward pass of training, which may differ from that of the measured steps.
    """

    peaks: Peaks
    cache_memory_bytes: int
    real_share: float
    is_gpu: bool
    packing: str
    batch_size: int


def suggest(
    model: ProfiledModel,
    settings: TrainingSettings,
    situation: Situation,
    *,
    predicts: Callable[[ProfiledModel, TrainingSettings], Peaks] = predict,
) -> list[Suggestion]:
    """Return suggestions, the largest saving first.

    Settings that training uses already, and those that save too little, are left out.

    Args:
        model: the model to train.
        settings: the current ones.
        situation: measured with them.
        predicts: predicts the peaks of other settings.
    """
    suggestions = [*_by_settings(model, settings, situation, predicts), *_by_cache(situation)]
    least = _WORTH_SHARE * (situation.peaks.whole + situation.cache_memory_bytes)
    return sorted(
        (suggestion for suggestion in suggestions if suggestion.saves_bytes > least), key=lambda one: -one.saves_bytes
    )


def _candidates(settings: TrainingSettings, situation: Situation) -> Iterator[tuple[str, Any, TrainingSettings, str]]:
    """Yield the name, value and settings of each candidate, and its cost in words."""
    size, passes = settings.batch_size, settings.grad_accum_steps
    if size % 2 == 0 and size // 2 < situation.batch_size:
        halved = settings.replace(batch_size=size // 2, grad_accum_steps=2 * passes)
        yield "batch_size", size // 2, halved, f"with grad_accum_steps = {2 * passes} an update sums the same rows"
    if not settings.fused_loss:
        yield "fused_loss", True, settings.replace(fused_loss=True), "the logits of all tokens are never held at once"
    if following := Recomputation.in_use(settings).following:
        yield "checkpointing", following, Recomputation.of(following).applied_to(settings), _RECOMPUTING[following]
    if passes > 1:
        yield "grad_accum_steps", 1, settings.replace(grad_accum_steps=1), "an update then sums fewer rows"
    if situation.is_gpu and settings.precision == "fp32":
        yield "precision", "bf16", settings.replace(precision="bf16"), "weights and moments stay in fp32 beside it"


def _by_settings(
    model: ProfiledModel,
    settings: TrainingSettings,
    situation: Situation,
    predicts: Callable[[ProfiledModel, TrainingSettings], Peaks],
) -> Iterator[Suggestion]:
    now = situation.peaks.whole
    halved: float | None = None
    for name, value, changed, cost in _candidates(settings, situation):
        then = predicts(model, changed).whole
        evidence = (
            f"trials with a quarter and a half of {changed.batch_size} rows predict a peak of {then / 1e6:,.1f} MB "
            f"instead of {now / 1e6:,.1f} MB; {cost}"
        )
        yield Suggestion(name, value, round(now - then), evidence)
        if name == "batch_size":
            halved = then
    size = settings.batch_size
    if situation.packing == "none" and situation.real_share < 0.9 and size > 1:
        if halved is None:  # not predicted above: the number of rows is odd, or larger than in training
            fewer = settings.replace(batch_size=size // 2, grad_accum_steps=2 * settings.grad_accum_steps)
            halved = predicts(model, fewer).whole
        a_row = (situation.peaks.forward_backward - halved) / (size - size // 2)
        saved = min(a_row * size * (1 - situation.real_share), now - situation.peaks.update)
        padding = f"{1 - situation.real_share:.0%} of the positions are padding; as many tokens fit into fewer rows"
        yield Suggestion("packing", "best-fit", round(max(0.0, saved)), padding)


def _by_cache(situation: Situation) -> Iterator[Suggestion]:
    held = situation.cache_memory_bytes
    limit = held // 2 // 2**20
    if limit:
        evidence = (
            f"MLX kept {held / 1e6:,.1f} MB of freed buffers beside the arrays of the peak; half of that is a limit it "
            "still can work with"
        )
        yield Suggestion("cache_limit", f"{limit} MiB", held - limit * 2**20, evidence)
