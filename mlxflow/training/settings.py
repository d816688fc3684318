"""The settings of a training, with every choice resolved; stored in the report of a training run.

Nothing here imports MLX.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import msgspec
from msgspec import Meta

from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import ArtifactError
from mlxflow.storage import report_files, report_structs

_Count = Annotated[int, Meta(ge=0, le=2**40)]
_Positive = Annotated[int, Meta(ge=1, le=2**40)]
_Number = Annotated[float, Meta(ge=0, le=1e12)]

#: The table of a report that holds the settings.
TABLE = "settings"


class AdapterShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The low-rank adapters that are trained beside frozen weights.

    Attributes:
        method: "lora" (Hu et al. 2021, arXiv:2106.09685) or "dora" (Liu et al. 2024, arXiv:2402.09353).
        rank: columns of the low-rank factors.
        scale: factor on their product.
        dropout: share of the adapter's inputs that is zeroed in training.
        num_layers: number of last blocks that get adapters; 0 for all.
        keys: patterns of layers within a block, such as `self_attn.*`.
    """

    method: Literal["lora", "dora"]
    rank: _Positive
    scale: float
    dropout: Annotated[float, Meta(ge=0, lt=1)]
    num_layers: _Count
    keys: tuple[str, ...]


class TrainingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a training run, from which `build` makes a step or a trainer.

    Attributes:
        adapters: the adapters to train; "none" if all weights are trained.
        num_steps: optimizer updates.
        batch_size: rows in one forward pass, initially.
        grad_accum_steps: forward passes of `batch_size` rows per update.
        dynamic_batch_size: whether the batch size follows the memory.
        max_batch_size: the most rows that a forward pass may grow to.
        constant_tokens_per_step: whether the rows per update are constant when the batch size changes.
        grow_below: share of the memory limit under which the batch size grows.
        shrink_above: share of the memory limit over which it shrinks.
        adjust_every: steps between two readings of the memory; 0 for none.
        optimizer: a class of `mlx.optimizers`, in lower case.
        optimizer_options: its options by MLX's names, without learning rate and weight decay.
        weight_decay: of matrices; vectors have none.
        learning_rate: the highest.
        final_learning_rate: after the last step, for schedules that decay.
        schedule: "cosine", "linear", "constant" or "wsd"; see `optimizers.make_schedule`.
        warmup_steps: first steps, over which the learning rate rises.
        decay_steps: last steps, over which the learning rate of "wsd" falls.
        max_grad_norm: gradients of a larger norm are scaled down to it; 0: neither clipped nor measured.
        max_bad_steps: updates in a row without a finite loss and gradient after which training fails.
        precision: "fp32", "bf16" (weights and moments in fp32 beside the bf16 model) or "bf16-pure".
        checkpoint_every: N such that one of every N layers is recomputed in the backward pass; 0 for none.
        checkpoint_segment: such layers in a row that keep only the input of the first.
        fused_loss: whether output head and loss are computed together, without all logits.
        masks_documents: whether a token attends only to its own document.
        kernels: names of the fused GPU kernels in use.
        deterministic: whether gradients are summed in a fixed order.
        lazy_eval_every: steps between two waits for the device.
        log_every: steps between two records of the loss.
        eval_every: steps between two validations; 0: only the first and the last.
        max_validation_rows: the most rows of a validation.
        patience: validations without improvement after which training ends; 0: never.
        keep: the weights that are kept: "last", or those of the "best" validation.
        save_every: steps between two checkpoints; 0 for none.
        keep_checkpoints: checkpoints kept.
        workers: threads that gather batches.
        prefetch_batches: batches gathered ahead.
    """

    adapters: AdapterShape | Literal["none"] = "none"
    num_steps: _Positive = 240
    batch_size: _Positive = 32
    grad_accum_steps: _Positive = 1
    dynamic_batch_size: bool = True
    max_batch_size: _Positive = 64
    constant_tokens_per_step: bool = True
    grow_below: _Number = 0.5
    shrink_above: _Number = 0.8
    adjust_every: _Count = 50
    optimizer: str = "adamw"
    optimizer_options: dict[str, Any] = msgspec.field(default_factory=lambda: {"betas": [0.9, 0.95]})
    weight_decay: _Number = 0.1
    learning_rate: _Number = 1.5e-2
    final_learning_rate: _Number = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: _Count = 20
    decay_steps: _Positive = 48
    max_grad_norm: _Number = 1.0
    max_bad_steps: _Positive = 10
    precision: Literal["fp32", "bf16", "bf16-pure"] = "fp32"
    checkpoint_every: _Count = 0
    checkpoint_segment: _Positive = 1
    fused_loss: bool = False
    masks_documents: bool = False
    kernels: tuple[str, ...] = ()
    deterministic: bool = True
    lazy_eval_every: _Positive = 4
    log_every: _Positive = 10
    eval_every: _Count = 100
    max_validation_rows: _Positive = 256
    patience: _Count = 0
    keep: Literal["last", "best"] = "last"
    save_every: _Count = 100
    keep_checkpoints: _Positive = 2
    workers: _Positive = 8
    prefetch_batches: _Positive = 4

    @property
    def adapter_shape(self) -> AdapterShape | None:
        """The adapters that are trained; None if all weights are trained."""
        return None if isinstance(self.adapters, str) else self.adapters

    @property
    def rows_per_step(self) -> int:
        """Initial number of rows whose gradients an update sums."""
        return self.batch_size * self.grad_accum_steps

    @property
    def sums_gradients(self) -> bool:
        """Whether an update may take more than one forward pass."""
        return self.grad_accum_steps > 1 or self.dynamic_batch_size

    def replace(self, **changes: Any) -> Self:
        """Return a copy of the settings with changed values."""
        return msgspec.structs.replace(self, **changes)

    def table(self) -> dict[str, Any]:
        """Return the settings as a table for a report."""
        table: dict[str, Any] = msgspec.to_builtins(self)
        return table


class Recomputation(NamedTuple):
    """Which layers are recomputed in the backward pass.

    Attributes:
        every: one of so many; 0 for none.
        segment: such layers in a row that keep only the input of the first.
    """

    every: int
    segment: int = 1

    @classmethod
    def of(cls, checkpointing: str | int) -> Self:
        """Return what a table's `checkpointing` stands for.

        Args:
            checkpointing: "none", "layers" for all of them, "pairs" for all in segments of two, or N for one of every
                N; "auto" stands for all of them until it is chosen.
        """
        every = checkpointing if isinstance(checkpointing, int) else int(checkpointing != "none")
        return cls(every, 2 if checkpointing == "pairs" else 1)

    @classmethod
    def in_use(cls, settings: TrainingSettings) -> Self:
        """Return the layers that a training recomputes."""
        return cls(settings.checkpoint_every, settings.checkpoint_segment)

    @property
    def words(self) -> str:
        """Which layers are recomputed, in words."""
        if self.every == 0:
            return "no layer is recomputed"
        which = "every layer is" if self.every == 1 else f"one of {self.every} layers is"
        segments = {1: "", 2: ", in pairs"}.get(self.segment, f", in segments of {self.segment}")
        return f"{which} recomputed{segments}"

    @property
    def following(self) -> str:
        """What a table's `checkpointing` is set to next to hold less memory: "layers", "pairs", or "" after that."""
        return {self.of("layers"): "pairs", self.of("pairs"): ""}.get(self, "layers")

    def applied_to(self, settings: TrainingSettings) -> TrainingSettings:
        """Return settings of a training that recomputes these layers."""
        return settings.replace(checkpoint_every=self.every, checkpoint_segment=self.segment)


#: Settings that save memory, by which advice is given.
_SAVING = frozenset(("checkpointing", "fused_loss", "precision", "optimizer"))


class SettingNames(NamedTuple):
    """The names of the settings for messages: workflow keys, or argument names of a call from Python.

    Attributes:
        table: of the settings of training, such as "train" or "quantize:q4"; empty for a call from Python.
        context_length: of the tokens.
        memory_limit: of MLX.
        adjustable: settings that may be advised to save memory: those of the table that are not chosen by trials.
        packing: of documents into rows of tokens.
        sources: of the text.
        tokenizer: of the text.
    """

    table: str = ""
    context_length: str = "context_length"
    memory_limit: str = "memory_limit_bytes"
    adjustable: frozenset[str] = _SAVING
    packing: str = "packing"
    sources: str = "sources"
    tokenizer: str = "tokenizer.from"

    @classmethod
    def of_stage(cls, task: str, tokens: str, memory_limit: str, *, adjustable: frozenset[str] = _SAVING) -> Self:
        """Return the names of the settings of a stage or variant in a workflow.

        Args:
            task: the stage or variant that trains.
            tokens: the one that makes its tokens.
            memory_limit: see the attribute.
            adjustable: see the attribute.
        """
        length, packing, sources = f"{tokens}.context_length", f"{tokens}.packing", f"{tokens}.sources"
        return cls(task, length, memory_limit, adjustable, packing, sources, f"{tokens}.tokenizer.from")

    def without(self, setting: str) -> Self:
        """Return the same names, with a setting that is not adjustable."""
        return self._replace(adjustable=self.adjustable - {setting})

    def of(self, setting: str) -> str:
        """Return the name of a setting of training."""
        return f"{self.table}.{setting}" if self.table else setting


def read_settings(report_file: Path, *, shown: str, task: str, key: str) -> TrainingSettings:
    """Return the settings in the report of a training run.

    Args:
        report_file: a `report.toml`.
        shown: its path, for messages.
        task: the stage that writes it, for messages.
        key: the setting that names that stage, for messages.

    Raises:
        ArtifactError: the report is that of a quantized model, it or one of the settings is missing, there is an
            unknown one, or one has an invalid value; a line for each, with the file and the key.
    """
    report = report_files.read_report(report_file)
    advice = advise_build(task)
    table = report.get(TABLE)
    if TABLE not in report and (report_file.parent / "config.json").is_file():
        from mlxflow.models import model_folder

        model_folder.refuse_quantized(report_file.parent, f"{key}: {Path(shown).parent.as_posix()}")
    if not isinstance(table, dict):
        raise ArtifactError(f"{shown}: {TABLE}: missing: expected how the model was trained. {advice}")
    return report_structs.convert(table, TrainingSettings, shown=shown, prefix=f"{TABLE}.", advice=advice)
