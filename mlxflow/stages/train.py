"""Train a language model on the token files."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from mlxflow.config import Problem
from mlxflow.errors import StageError
from mlxflow.stage import Artifacts, Context, ModelFolder, derive_seed

VERSION = 2

#: Keys that say how the work is done and change nothing of what comes out.
MANNER = ("workers", "prefetch_batches")


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train.model]` table: the model's shape."""

    architecture: Annotated[Literal["llama"], Meta(description="the model's kind, from mlx-lm")] = "llama"
    hidden_size: Annotated[int, Meta(ge=8, description="width of the residual stream")] = 128
    num_layers: Annotated[int, Meta(ge=1, description="transformer blocks")] = 2
    num_heads: Annotated[int, Meta(ge=1, description="attention heads")] = 2
    num_kv_heads: Annotated[int, Meta(ge=1, description="heads of keys and values")] = 2
    intermediate_size: Annotated[int, Meta(ge=8, description="width inside the gated MLP")] = 256
    tie_word_embeddings: Annotated[bool, Meta(description="whether the head shares the embedding's weights")] = True
    rope_theta: Annotated[float, Meta(gt=0, description="base of the rotary embedding")] = 10_000.0

    def problems(self) -> Any:
        """Yield what does not divide."""
        if self.hidden_size % (2 * self.num_heads):
            yield Problem(
                "hidden_size",
                self.hidden_size,
                f"expected a multiple of twice num_heads = {self.num_heads}",
                "Change one of the two.",
            )
        if self.num_heads % self.num_kv_heads:
            yield Problem(
                "num_kv_heads",
                self.num_kv_heads,
                f"expected a divisor of num_heads = {self.num_heads}",
                "Change one of the two.",
            )


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[train]` table."""

    input: Annotated[str, Meta(description="the token files: a pretokenize stage")] = "pretokenize"
    num_steps: Annotated[int, Meta(ge=1, description="optimizer updates")] = 240
    batch_size: Annotated[int, Meta(ge=1, description="rows in one forward pass")] = 32
    learning_rate: Annotated[float, Meta(gt=0, description="at its highest, after the warm-up")] = 1.5e-2
    warmup_steps: Annotated[
        int, Meta(ge=0, description="steps over which the learning rate rises; at most half of num_steps")
    ] = 20
    weight_decay: Annotated[float, Meta(ge=0, description="of AdamW")] = 0.1
    betas: Annotated[
        tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]],
        Meta(description="of AdamW: how slowly its two moments follow the gradient"),
    ] = (0.9, 0.95)
    max_grad_norm: Annotated[float, Meta(gt=0, description="gradients of a larger norm are scaled down to it")] = 1.0
    log_every: Annotated[int, Meta(ge=1, description="steps between two lines of metrics.jsonl")] = 10
    eval_every: Annotated[int, Meta(ge=0, description="steps between two validations; 0: first and last only")] = 100
    max_validation_rows: Annotated[int, Meta(ge=1, description="validation rows used")] = 256
    document_mask: Annotated[
        Literal["auto"] | bool,
        Meta(description="whether a token sees only its own document; auto: where there are conversations"),
    ] = "auto"
    workers: Annotated[int, Meta(ge=1, le=64, description="threads that gather batches")] = 8
    prefetch_batches: Annotated[int, Meta(ge=1, le=64, description="batches gathered ahead")] = 4
    model: Annotated[ModelConfig, Meta(description="the model's shape")] = ModelConfig()


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Token files and tokenizer."""

    train: Path = Path()
    validation: Path = Path()
    tokenizer: tuple[Path, ...] = ()

    @classmethod
    def of(cls, config: Config, artifacts: Artifacts) -> Self:
        """Take them from a pretokenize stage."""
        folder = artifacts.folder(config.input, "input")
        return cls(
            train=folder / "train.safetensors",
            validation=folder / "validation.safetensors",
            tokenizer=(folder / "tokenizer.json", folder / "tokenizer_config.json"),
        )


class Outputs(ModelFolder, frozen=True, kw_only=True):
    """A model folder and the learning curve."""

    metrics: Path = Path("metrics.jsonl")


def run(*, config: Config, inputs: Inputs, outputs: Outputs, context: Context) -> dict[str, Any]:
    """Train and write the model folder.

    Raises:
        SourceError: there are fewer rows than one batch holds.
        StageError: the loss is not finite.
    """
    import math

    import mlx.core as mx
    import mlx.optimizers as optim

    from mlxflow import models
    from mlxflow.data.loader import Loader
    from mlxflow.data.token_file import TokenFile
    from mlxflow.training import loop, progress, step

    train_file, validation_file = TokenFile.open(inputs.train), TokenFile.open(inputs.validation)
    rows = train_file.full_rows(config.batch_size, f"{context.task}.batch_size")
    model_config = _model_config(config.model, train_file)
    model = models.build(model_config, seed=derive_seed(context.seed, "train.model"))
    model.train()
    optimizer = optim.AdamW(
        learning_rate=step.warmup_cosine(
            learning_rate=config.learning_rate,
            num_steps=config.num_steps,
            warmup_steps=min(config.warmup_steps, config.num_steps // 2),
        ),
        weight_decay=config.weight_decay,
        betas=list(config.betas),
    )
    optimizer.init(model.trainable_parameters())
    masks = _masks_documents(config, train_file, model, context.task)
    compiled, state = step.compile_step(model, optimizer, max_grad_norm=config.max_grad_norm, masks_documents=masks)
    loader = Loader(
        rows,
        batch_size=config.batch_size,
        seed=derive_seed(context.seed, "train.batches"),
        workers=config.workers,
        prefetch_batches=config.prefetch_batches,
        name_rows=train_file.name_rows,
    )
    mx.reset_peak_memory()
    with progress.show_progress(num_steps=config.num_steps) as show, outputs.metrics.open("w") as metrics, loader:

        def log(record: dict[str, Any]) -> None:
            metrics.write(json.dumps(record) + "\n")
            metrics.flush()
            show(record)

        result = loop.train(
            model=model,
            step=compiled,
            state=state,
            loader=loader,
            validation_rows=validation_file.rows.head(config.max_validation_rows),
            num_steps=config.num_steps,
            log_every=config.log_every,
            eval_every=config.eval_every,
            eval_batch_size=config.batch_size,
            masks_documents=masks,
            learning_rate=lambda: optimizer.learning_rate,
            log=log,
        )
    models.save(
        model=model,
        config=model_config,
        config_file=outputs.config,
        model_file=outputs.model,
        provenance=context.provenance,
    )
    models.copy_tokenizer(inputs.tokenizer, context.folder)
    return {
        "parameters": models.num_parameters(model),
        "tokens": result.tokens,
        "first_validation_perplexity": math.exp(result.first_validation_loss),
        "last_validation_perplexity": math.exp(result.last_validation_loss),
        "document_mask": masks,
        "run": {
            "tokens_per_second": result.tokens / result.seconds,
            "training_seconds": result.seconds,
            "data_wait_seconds": loader.waited_seconds,
        },
    }


def _masks_documents(config: Config, tokens: Any, model: Any, task: str) -> bool:
    """Return whether tokens see only their own document.

    Raises:
        StageError: they are to, and the model's architecture cannot tell documents apart.
    """
    from mlxflow import packed

    wanted = tokens.has_conversations if config.document_mask == "auto" else config.document_mask
    if wanted and not packed.can_mask_documents(model, tokens.vocab_size):
        raise StageError(
            f"{task}.document_mask: this architecture counts positions through the whole row and cannot keep the "
            f'documents in it apart. Set {task}.document_mask = false, or pretokenize.packing = "none".'
        )
    return bool(wanted)


def _model_config(shape: ModelConfig, tokens: Any) -> dict[str, Any]:
    from mlxflow import models

    return models.llama_config(
        vocab_size=tokens.vocab_size,
        context_length=tokens.context_length,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        tie_word_embeddings=shape.tie_word_embeddings,
        rope_theta=shape.rope_theta,
        end_of_text=tokens.end_of_text,
    )
