"""What saves memory where a training does not fit: settings that would help, given those that it has."""

from collections.abc import Iterator

from mlxflow.training.settings import Recomputation, SettingNames, TrainingSettings

# Optimizers with two moments of each trained weight, where others have one
_TWO_MOMENTS = ("adam", "adamw", "adamax", "adadelta")


def memory_advice(settings: TrainingSettings, names: SettingNames, *, rows: int, in_validation: bool = False) -> str:
    """Return the advice to a training that does not fit into the memory, a sentence.

    Args:
        settings: of the training.
        names: of the settings; only those that they list as adjustable are advised.
        rows: of the passes that do not fit.
        in_validation: whether it is a validation that does not fit, which keeps nothing for a backward pass.
    """
    fewer = [names.of("batch_size"), names.context_length] if rows > 1 else [names.context_length]
    changes = " and ".join(_without_backward_pass(settings, names) if in_validation else _changes(settings, names))
    ways = [f"Lower {' or '.join(fewer)}", *([f"set {changes}"] if changes else []), f"raise {names.memory_limit}"]
    return f"{', '.join(ways[:-1])}, or {ways[-1]}."


def _changes(settings: TrainingSettings, names: SettingNames) -> Iterator[str]:
    """Yield the changes that cost the result nothing; the others once there are none of them left."""
    free = [*_next_recomputation(settings, names), *_fused_loss(settings, names)]
    yield from free or _without_backward_pass(settings, names)


def _next_recomputation(settings: TrainingSettings, names: SettingNames) -> Iterator[str]:
    """Yield the next step of gradient checkpointing: of all layers, then in pairs."""
    following = Recomputation.in_use(settings).following
    if "checkpointing" in names.adjustable and following:
        yield f'{names.of("checkpointing")} = "{following}"'


def _fused_loss(settings: TrainingSettings, names: SettingNames) -> Iterator[str]:
    if "fused_loss" in names.adjustable and not settings.fused_loss:
        yield f"{names.of('fused_loss')} = true"


def _without_backward_pass(settings: TrainingSettings, names: SettingNames) -> Iterator[str]:
    """Yield the next change of what is held beside the activations that wait for the backward pass."""
    if "precision" in names.adjustable and settings.precision == "fp32":
        yield f'{names.of("precision")} = "bf16"'
    elif "optimizer" in names.adjustable and settings.adapter_shape is None and settings.optimizer in _TWO_MOMENTS:
        yield f'{names.of("optimizer")} = "lion", which holds one moment of each weight instead of two'
