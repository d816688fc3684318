"""What would save memory, how much, and how one knows: every figure comes from trials with a part of the rows."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mlxflow.profiling.step_memory import Peaks, ProfiledModel, predict
from mlxflow.training.settings import TrainingSettings

# What saves less than this share of the whole is not worth a change
_WORTH_SHARE = 0.02


class Suggestion(NamedTuple):
    """A setting to change.

    Attributes:
        name: of the setting: batch_size, fused_loss, checkpointing, grad_accum_steps, precision, packing, cache_limit.
        value: to set it to.
        saves_bytes: that the process is predicted to take less at its highest.
        evidence: what was measured.
    """

    name: str
    value: Any
    saves_bytes: int
    evidence: str


class Situation(NamedTuple):
    """What was measured.

    Attributes:
        peaks: of the steps as they are.
        cache_memory_bytes: the most that MLX kept of freed buffers beside the arrays of the peak.
        real_share: of the tokens in the rows; the rest is padding.
        is_gpu: whether bf16 is worth a try.
        packing: how documents are laid into rows.
        batch_size: rows in a forward pass of training, which may be another number than that of the steps measured.
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
    """Return what to change, that with the largest effect first.

    What would not save is left out, and so is what training does already.

    Args:
        model: to train.
        settings: as they are.
        situation: what was measured with them.
        predicts: tells the peaks of other settings.
    """
    found = [*_by_settings(model, settings, situation, predicts), *_by_cache(situation)]
    least = _WORTH_SHARE * (situation.peaks.whole + situation.cache_memory_bytes)
    return sorted((one for one in found if one.saves_bytes > least), key=lambda one: -one.saves_bytes)


def _candidates(settings: TrainingSettings, situation: Situation) -> Iterator[tuple[str, Any, TrainingSettings, str]]:
    """Yield the name, value and settings of each change, and what it costs."""
    size, passes = settings.batch_size, settings.grad_accum_steps
    if size % 2 == 0 and size // 2 < situation.batch_size:
        halved = settings.replace(batch_size=size // 2, grad_accum_steps=2 * passes)
        yield "batch_size", size // 2, halved, f"with grad_accum_steps = {2 * passes} an update sums the same rows"
    if not settings.fused_loss:
        yield "fused_loss", True, settings.replace(fused_loss=True), "the logits of all tokens are never held at once"
    if not settings.checkpoint_every:
        checkpointed = settings.replace(checkpoint_every=1)
        yield "checkpointing", "layers", checkpointed, "layers are computed twice, about a third more time"
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
        if halved is None:  # an odd number of rows, or more than training takes
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
