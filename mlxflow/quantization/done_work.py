"""The part of a quantization that an interrupted run has done, read from the names of the files that it left.

Only the forecast depends on it. Whether a file is used is decided where the work is resumed.
"""

from pathlib import Path
from typing import NamedTuple

from mlxflow.quantization.hidden_streams import count_finished
from mlxflow.quantization.learned_codes import blocks_kept, has_learned
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.tuning_saves import tuning_progress
from mlxflow.training.checkpoints import last_step

#: The beginning of the names of folders in which a budget learns uniform plans.
TRIAL = "setting-"


class DoneWork(NamedTuple):
    """What an interrupted run has done.

    Attributes:
        learned: share of the method's work without `scale_steps` and training, such as that of the blocks.
        scale_steps: updates of all scales after the blocks.
        training_steps: updates of "qat".
        trials: methods on uniform plans that a budget compares, as many as whole ones.
        description: in words, for the forecast; empty for nothing.
    """

    learned: float = 0.0
    scale_steps: int = 0
    training_steps: int = 0
    trials: float = 0.0
    description: str = ""


def done_work(request: QuantizationRequest, folder: Path, *, num_blocks: int) -> DoneWork:
    """Return what an interrupted run has done of a request.

    Args:
        request: method and settings.
        folder: of its files; it may be missing.
        num_blocks: of the model.
    """
    trials = sum(_learned(trial, num_blocks) for trial in folder.glob(f"{TRIAL}*")) if request.budget else 0.0
    return _of_method(request, folder, num_blocks)._replace(trials=trials)


def _of_method(request: QuantizationRequest, folder: Path, num_blocks: int) -> DoneWork:
    if request.training is not None:
        return _trained(request.training.settings.num_steps, last_step(folder))
    if has_learned(folder):
        return DoneWork(1.0, request.scale_steps, description="the layers are learned")
    steps, total = tuning_progress(folder)
    if request.method == "block" and request.scale_steps and steps:
        return DoneWork(1.0, steps, description=f"{steps:,} of {request.scale_steps:,} scale_steps are done")
    if request.method == "dwq":
        return DoneWork(_share_of_steps(folder), description=f"{steps:,} of {total:,} steps are done" if steps else "")
    if request.method in ("block", "gptq", "awq") and (share := _learned(folder, num_blocks)):
        return DoneWork(share, description=f"{round(share * num_blocks):,} of {num_blocks:,} blocks are done")
    return DoneWork()


def _share_of_steps(folder: Path) -> float:
    done, total = tuning_progress(folder)
    return done / total if total else 0.0


def _learned(folder: Path, num_blocks: int) -> float:
    """Return the share of a plan that is learned."""
    if has_learned(folder):
        return 1.0
    finished = count_finished(folder) + len(blocks_kept(folder))
    return max(min(finished, num_blocks) / num_blocks, _share_of_steps(folder))


def _trained(num_steps: int, done: int) -> DoneWork:
    done = min(done, num_steps)
    description = f"{done:,} of {num_steps:,} steps are done" if done else ""
    return DoneWork(training_steps=done, description=description)
