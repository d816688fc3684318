"""Build a training step or a trainer from settings; the only place that assembles the parts of training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlxflow.data.loader import Loader, name_by_number
from mlxflow.data.token_file import Rows
from mlxflow.distributed.team import SOLO, Team
from mlxflow.kernels import model_kernels
from mlxflow.ops.gradient_checkpointing import recomputed
from mlxflow.ops.overrides import OperationOverrides
from mlxflow.training import adapters, objective, optimizers
from mlxflow.training.batch_size import BatchSizes, Decision
from mlxflow.training.batches import TrainingData
from mlxflow.training.frozen_shards import FrozenShards
from mlxflow.training.objective import Objective
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.sharded_layers import ShardedLayers
from mlxflow.training.step import Step
from mlxflow.training.trainer import Session, Trainer
from mlxflow.training.update import Update
from mlxflow.training.weight_dtypes import cast_weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NAMES = SettingNames()

#: The kernels that replace parts of a model.
ModelKernels = model_kernels.ModelKernels

#: Returns the loss to minimize; takes whether a kernel computes the gradient of the cross-entropy.
ObjectiveMaker = Callable[[bool], Objective]


class Subject(NamedTuple):
    """A model and how it is trained.

    Attributes:
        model: as `prepare_model` leaves it; without kernels.
        settings: of the training.
        vocab_size: number of ids, V.
        context_length: positions of a row that the model sees, L.
        names: of the settings, for messages.
        make_objective: another loss than the cross-entropy of the tokens; None for the cross-entropy.
        has_head: whether the settings have a fused loss because the model's head was found; else it is looked for.
    """

    model: nn.Module
    settings: TrainingSettings
    vocab_size: int
    context_length: int
    names: SettingNames = _NAMES
    make_objective: ObjectiveMaker | None = None
    has_head: bool = False

    def objective(self, *, uses_kernel: bool, chunk_share: float = 1.0) -> Objective:
        """Return the loss to minimize; call it before kernels are installed in the model.

        Args:
            uses_kernel: see `loss.cross_entropy`.
            chunk_share: see `objective.make_objective`.
        """
        if self.make_objective is not None:
            return self.make_objective(uses_kernel)
        return objective.make_objective(
            self.model,
            fused=self.settings.fused_loss,
            vocab_size=self.vocab_size,
            masks_documents=self.settings.masks_documents,
            uses_kernel=uses_kernel,
            chunk_share=chunk_share,
            has_head=self.has_head,
        )

    def recorded_kernels(self) -> model_kernels.ModelKernels:
        """Return the kernels listed in the settings, without verifying them again."""
        return model_kernels.recorded_for(self.model, self.kernel_traits, self.settings.kernels)

    @property
    def kernel_traits(self) -> model_kernels.TrainingTraits:
        """The properties of the training that the kernel selection depends on."""
        return model_kernels.TrainingTraits(
            precision=self.settings.precision,
            context_length=self.context_length,
            masks_documents=self.settings.masks_documents,
            sums_gradients=self.settings.sums_gradients,
            is_deterministic=self.settings.deterministic,
        )


def prepare_model(
    model: nn.Module, settings: TrainingSettings, *, adapter_seed: int, names: SettingNames = _NAMES
) -> None:
    """Make a model ready for its first step: its dtype, adapters beside frozen weights, training mode.

    Args:
        model: changed and evaluated; existing adapters are trained further.
        settings: of the training.
        adapter_seed: of the initial weights of new adapters.
        names: of the settings, for messages.
    """
    if settings.adapter_shape is not None:
        key = names.of("lora.keys")
        adapters.ensure_adapters(model, settings.adapter_shape, seed=adapter_seed, key=key)
    cast_weights(model, settings)
    model.train()
    mx.eval(model.parameters())


def make_optimizer(settings: TrainingSettings, *, names: SettingNames = _NAMES) -> optim.Optimizer:
    """Return the optimizer with its schedule of the learning rate.

    Raises:
        ArtifactError: an option that the optimizer does not know.
    """
    optimizers.require_known(
        settings.optimizer, settings.optimizer_options, reserved=["weight_decay"], key=names.of("optimizer_options")
    )
    schedule = optimizers.make_schedule(
        name=settings.schedule,
        learning_rate=settings.learning_rate,
        final_learning_rate=settings.final_learning_rate,
        num_steps=settings.num_steps,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.decay_steps,
    )
    return optimizers.make_optimizer(
        name=settings.optimizer,
        schedule=schedule,
        weight_decay=settings.weight_decay,
        options=settings.optimizer_options,
    )


def make_update(
    subject: Subject, kernels: model_kernels.ModelKernels, team: Team = SOLO, layers: ShardedLayers | None = None
) -> Update:
    """Return the optimizer's update of a model.

    Args:
        subject: the model and its settings.
        kernels: in use.
        team: the ranks of a distributed run.
        layers: of the model, split between the ranks; None if they are whole.
    """
    return Update(
        subject.model,
        make_optimizer(subject.settings, names=subject.names),
        max_grad_norm=subject.settings.max_grad_norm,
        has_masters=subject.settings.precision == "bf16",
        uses_kernel=kernels.uses,
        team=team,
        layers=layers,
    )


def overrides_of(settings: TrainingSettings, kernels: model_kernels.ModelKernels) -> OperationOverrides:
    """Return which MLX operations are replaced in a step."""
    return OperationOverrides(
        is_deterministic=settings.deterministic,
        attention=kernels.attention,
        keeps_mlx_attention=kernels.keeps_mlx_attention,
        is_faster_dense=kernels.is_faster_dense,
    )


@contextmanager
def patched(subject: Subject, kernels: model_kernels.ModelKernels) -> Iterator[None]:
    """Install kernels and gradient checkpointing in the model's layers until the block ends."""
    with kernels.patched(), _recomputed(subject):
        yield


def _recomputed(subject: Subject) -> AbstractContextManager[None]:
    """Install gradient checkpointing in the model's layers."""
    every, segment = subject.settings.checkpoint_every, subject.settings.checkpoint_segment
    return recomputed(subject.model, every=every, segment=segment)


def make_step(
    subject: Subject,
    chosen: Objective,
    kernels: model_kernels.ModelKernels,
    *,
    replaces_operations: bool = True,
    team: Team = SOLO,
    layers: ShardedLayers | None = None,
) -> Step:
    """Return the compiled training step.

    Args:
        subject: the model, patched, and its settings.
        chosen: the loss to minimize; made before the model was patched.
        kernels: in use.
        replaces_operations: whether MLX operations are replaced, see `ops.overrides`.
        team: the ranks of a distributed run.
        layers: of the model, split between the ranks; None if they are whole.

    Raises:
        ArtifactError: an option that the optimizer does not know.
    """
    how = overrides_of(subject.settings, kernels)._replace(is_enabled=replaces_operations)
    return Step(subject.model, make_update(subject, kernels, team, layers), chosen, overrides=how)


@contextmanager
def ready_step(
    subject: Subject, kernels: model_kernels.ModelKernels, *, chunk_share: float = 1.0, team: Team = SOLO
) -> Iterator[Step]:
    """Yield the compiled training step, with kernels and gradient checkpointing installed until the block ends.

    Args:
        subject: the model and its settings.
        kernels: in use.
        chunk_share: see `objective.make_objective`.
        team: the ranks of a distributed run.

    Raises:
        ArtifactError: an option that the optimizer does not know.
    """
    chosen = subject.objective(uses_kernel=kernels.uses_loss_kernel, chunk_share=chunk_share)
    with ExitStack() as patches:
        patches.enter_context(kernels.patched())
        layers, frozen = None, None
        if team.rank.shards_layers and subject.settings.adapter_shape is None:
            layers = patches.enter_context(ShardedLayers(subject.model, team).installed())
        elif team.rank.shards_layers:
            frozen = patches.enter_context(FrozenShards(subject.model, team).installed())
        patches.enter_context(_recomputed(subject))
        step = make_step(subject, chosen, kernels, team=team, layers=layers)
        step.frozen = frozen
        yield step


def make_loader(
    rows: Rows,
    settings: TrainingSettings,
    *,
    num_rows: int,
    seed: int,
    cursor: int = 0,
    own: "NDArray[np.int64] | None" = None,
    name_rows: Callable[["NDArray[np.int64]"], str] = name_by_number,
) -> Loader:
    """Return the data loader of a training.

    Args:
        rows: the training rows.
        settings: of the training.
        num_rows: per batch.
        seed: of the order.
        cursor: number of rows of the stream already used.
        own: see `Loader`.
        name_rows: see `Loader`.
    """
    return Loader(
        rows,
        batch_size=num_rows,
        seed=seed,
        workers=settings.workers,
        prefetch_batches=settings.prefetch_batches,
        cursor=cursor,
        own=own,
        name_rows=name_rows,
    )


def make_data(
    rows: Rows,
    validation: Rows,
    settings: TrainingSettings,
    *,
    seed: int,
    name_rows: Callable[["NDArray[np.int64]"], str] = name_by_number,
) -> TrainingData:
    """Return the rows that a trainer reads.

    Args:
        rows: to train on.
        validation: validation rows; the first `max_validation_rows` are used.
        settings: of the training.
        seed: of the order of the training rows.
        name_rows: see `Loader`.
    """

    def open_loader(num_rows: int, cursor: int, own: "NDArray[np.int64] | None") -> Loader:
        return make_loader(rows, settings, num_rows=num_rows, seed=seed, cursor=cursor, own=own, name_rows=name_rows)

    return TrainingData(open_loader, validation.head(settings.max_validation_rows))


@contextmanager
def ready_trainer(
    subject: Subject,
    kernels: model_kernels.ModelKernels,
    data: TrainingData,
    session: Session,
    *,
    replay: Iterable[Decision] = (),
) -> Iterator[Trainer]:
    """Yield the trainer of a model, with kernels and gradient checkpointing installed until the block ends.

    Args:
        subject: the model and its settings.
        kernels: in use.
        data: the rows.
        session: the environment of the run.
        replay: recorded batch size decisions to follow instead of the memory.
    """
    with ready_step(subject, kernels, team=session.team) as step:
        sizes = BatchSizes(subject.settings, replay=replay, names=subject.names, ranks=session.team.size)
        yield Trainer(
            subject.model, step, subject.settings, sizes=sizes, data=data, session=session, names=subject.names
        )
