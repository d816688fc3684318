"""Select the fused GPU kernels of a training run: verified once, kept for runs that continue or repeat it.

MLX is imported only inside the functions: `begin_early` runs before it is loaded.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import msgspec

from mlxflow.device import compute_device
from mlxflow.distributed import rank
from mlxflow.messages.errors import WorkflowError
from mlxflow.storage import layout
from mlxflow.storage.run_context import Context

if TYPE_CHECKING:
    from mlxflow.data.token_file import Rows
    from mlxflow.kernels.early_start import EarlyVerifier
    from mlxflow.kernels.model_kernels import ModelKernels
    from mlxflow.training.build import Subject

Mode = Literal["auto", "off", "require"]

_SELECTION = "selection of kernels"


class _ReportedKernels(msgspec.Struct, frozen=True):
    """The kernels in the report of a stage that trains; None if nothing was trained."""

    kernels: tuple[str, ...] | None = None


class KernelRequest(NamedTuple):
    """The kernels that a training run requests.

    Attributes:
        mode: "auto", "off", or "require": an error if one is missing.
        device: "gpu" or "cpu".
        memory_file: keeps the selection until the run ends.
        published: the artifact that the run repeats, whose report names its kernels; None for a new one.
        begun: the verifier process, where it was started early.
    """

    mode: Mode
    device: str
    memory_file: Path
    published: Path | None = None
    begun: Any = None

    @classmethod
    def of(cls, mode: Mode, context: Context) -> Self:
        """Return the request of a running stage.

        Args:
            mode: as the stage's table has it.
            context: of the stage.
        """
        memory_file = context.unfinished / "kernels.json"
        return cls(mode, context.device, memory_file, context.published, context.begun)

    @property
    def uses_none(self) -> bool:
        """Whether no kernel is wanted."""
        return self.mode == "off" or (self.mode == "auto" and self.device == "cpu")

    def recorded(self) -> list[str] | None:
        """Return the kernels of the run that is continued or repeated; None for a new one.

        Raises:
            ArtifactError: the report of the artifact that is repeated is missing or damaged.
        """
        from mlxflow.storage import report_structs, state_files

        if self.published is not None:
            file = self.published / layout.REPORT
            kernels = report_structs.read_part(file, _ReportedKernels, advice="Remove it and build it again.").kernels
            return None if kernels is None else list(kernels)
        try:
            names = state_files.parse_json(state_files.read_bytes(self.memory_file))
        except (OSError, ValueError):
            return None
        return [str(name) for name in names] if isinstance(names, list) else None

    def remember(self, names: list[str]) -> None:
        """Save the selection for a run that continues this one."""
        from mlxflow.storage import atomic_folders

        self.memory_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_folders.write_whole(self.memory_file, json.dumps(names).encode())


def begin_early(mode: str, device: str) -> AbstractContextManager[Any]:
    """Start the verifier process before MLX is imported, where there may be a GPU with unverified kernels.

    Args:
        mode: of the workflow: "auto", "off" or "require".
        device: of the workflow: "auto", "gpu" or "cpu".

    Returns:
        a context manager that gives the process for `KernelRequest.begun` and ends it.
    """
    if mode == "off" or device == "cpu" or not rank.of_this_process().is_first:
        return nullcontext()
    from mlxflow.kernels import early_start

    return early_start.begin_early()


def begin_verification(request: KernelRequest) -> AbstractContextManager[Any]:
    """Start the verifier process, if it is needed, so that it starts up while the model is built.

    Returns:
        a context manager that gives the process for `select_kernels` and ends it.
    """
    if request.uses_none or request.recorded() is not None or not rank.of_this_process().is_first:
        if request.begun is not None:
            request.begun.stop()
        return nullcontext()
    from mlxflow.kernels import model_kernels

    return model_kernels.begin_verification(request.begun)


def select_kernels(
    request: KernelRequest, subject: "Subject", rows: "Rows", ahead: "EarlyVerifier | None" = None
) -> "ModelKernels":
    """Return the kernels of a training run; of a run that continues or repeats another one, those of that run.

    In a distributed run rank 0 selects, and the other ranks use its selection.

    Args:
        request: the request of the run.
        subject: what is trained; its settings name no kernels yet.
        rows: one batch, for compiling in advance.
        ahead: of `begin_verification`.

    Raises:
        WorkflowError: all are required and one is missing.
    """
    from mlxflow.distributed.team import of_this_process
    from mlxflow.kernels import model_kernels

    if request.uses_none:
        return model_kernels.no_kernels()
    team = of_this_process()
    if not team.rank.is_first:
        team.exchange(_SELECTION, ())  # waits until rank 0 has saved its selection
    selected = model_kernels.choose_for(
        subject.model,
        subject.kernel_traits,
        recorded=request.recorded(),
        ahead=ahead,
        precompile_step=lambda expected: _precompile(subject, expected, rows),
    )
    if request.mode == "require" and selected.refused:
        name = subject.names.of("kernels")
        raise WorkflowError(
            f'{name} = "require": {compute_device.name()} lacks {_missing(selected.refused)}. Set {name} = "auto".'
        )
    if team.rank.is_first:
        request.remember(selected.selected)
        team.exchange(_SELECTION, ())
    return selected


def _precompile(subject: "Subject", kernels: "ModelKernels", rows: "Rows") -> None:
    """Let MLX compile the kernels of the first step and validation."""
    from mlxflow.training import build, precompile

    chosen = subject.objective(uses_kernel=kernels.uses_loss_kernel)
    with build.patched(subject, kernels):
        precompile.precompile_step(
            subject.model,
            lambda: build.make_step(subject, chosen, kernels),
            rows,
            is_one_pass=subject.settings.grad_accum_steps == 1,
            masks_documents=subject.settings.masks_documents,
        )


def _missing(refused: Mapping[str, str]) -> str:
    """Return the kernels that are not used, grouped by reason."""
    reasons = dict.fromkeys(refused.values())
    names = {reason: [name for name, why in refused.items() if why == reason] for reason in reasons}
    return "; ".join(f"{', '.join(names[reason])} ({reason})" for reason in reasons)
