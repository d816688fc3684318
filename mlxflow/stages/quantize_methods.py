"""How the stage `quantize` comes to a plan and to codes: rounding, mlx-lm's learned methods, training, a budget."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mlxflow.errors import ArtifactError
from mlxflow.stage import Context, derive_seed
from mlxflow.stages import train


class Tokens(NamedTuple):
    """The token files of a pretokenize stage."""

    train: Any
    validation: Any


class Made(NamedTuple):
    """What is to be written.

    Attributes:
        model: with the weights of everything that is not packed yet.
        plan: of the layers that are packed.
        packed: codes that are there already, by path.
        report: what there is to tell.
    """

    model: Any
    plan: Any
    packed: dict[str, Any]
    report: dict[str, Any]


def choose_plan(config: Any, model: Any, tokens: Tokens | None, context: Context) -> tuple[Any, dict[str, Any]]:
    """Return the plan of a quantize table for a model, and what there is to tell of it.

    Raises:
        WorkflowError: the table does not fit the model, or the budget cannot be met.
    """
    from mlxflow.quantization.plan import check_supported, resolve

    plan = resolve(model, default=config.default, rules=rules_of(config), key=context.task)
    check_supported(plan.layers, context.task)
    return plan, {}


def rules_of(config: Any) -> list[Any]:
    """Return the table's `layers` as rules."""
    from mlxflow.quantization.plan import Rule

    return [
        Rule(
            rule.match,
            rule.skip,
            None if rule.mode == "same" else rule.mode,
            None if rule.bits == "same" else rule.bits,
            None if rule.group_size == "same" else rule.group_size,
        )
        for rule in config.layers
    ]


def make(
    config: Any, inputs: Any, outputs: Any, context: Context, *, model: Any, plan: Any, tokens: Tokens | None
) -> Made:
    """Return a model and the codes of its layers, made as `method` says; rounding is left to the export."""
    if config.method == "rtn" or tokens is None:
        return Made(model, plan, {}, {})
    if config.method == "qat":
        return _trained(config, inputs, outputs, context, model=model, plan=plan, tokens=tokens)
    raise ArtifactError(f'{context.task}.method = "{config.method}": not yet.')


def calibration_rows(config: Any, tokens: Tokens, context: Context) -> Any:
    """Return token rows and their marks, (R, L + 1) each, for what looks at data, chosen by seed."""
    import numpy as np

    rows = tokens.train.rows
    random = np.random.default_rng(derive_seed(context.seed, "quantize.calibration"))
    count = min(config.calibration_rows, rows.num_rows)
    return rows.take(np.sort(random.choice(rows.num_rows, size=count, replace=False)))


# --- training


def _trained(
    config: Any, inputs: Any, outputs: Any, context: Context, *, model: Any, plan: Any, tokens: Tokens
) -> Made:
    """Train with the rounded weights in place, and pack what the last forward pass took."""
    import mlx.core as mx

    from mlxflow.quantization.fake import fake_quantized
    from mlxflow.training import adapters

    settings = _training_settings(config, model)
    tokens.train.full_rows(config.batch_size, f"{context.task}.batch_size")
    teacher = _teacher(inputs) if config.distill else None
    if config.training != "full":
        lora = config.lora
        shape = adapters.AdapterShape(config.training, lora.rank, lora.scale, lora.dropout, lora.num_layers, lora.keys)
        adapters.add_adapters(
            model, shape, seed=derive_seed(context.seed, "train.model"), key=f"{context.task}.lora.keys"
        )
    model.train()
    mx.eval(model.parameters())
    masks = train.masks_documents(settings, tokens.train, model, context.task)
    with fake_quantized(model, plan.layers) as pack:
        result = train.fit(
            settings,
            train.Inputs(train=inputs.tokens[0], validation=inputs.tokens[1]),
            outputs.metrics[0],
            context,
            model=model,
            objective=_objective(model, teacher, tokens, settings, masks),
            tokens=tokens.train,
            masks=masks,
        )
        packed = pack()
        mx.eval(packed)
    adapters.fuse_adapters(model)
    model.eval()
    told = train.report_of(result)
    return Made(model, plan, packed, {"training": {k: v for k, v in told.items() if k != "run"}, "run": told["run"]})


def _training_settings(config: Any, model: Any) -> Any:
    """Return the trainer's table for quantization-aware training."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    types = {value.dtype for _, value in tree_flatten(model.parameters())}
    return train.Config(
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        learning_rate=config.learning_rate,
        warmup_steps=max(1, config.num_steps // 10),
        precision="fp32" if types == {mx.float32} else "bf16",
        method=config.training,
        checkpointing=config.checkpointing,
        max_validation_rows=config.max_validation_rows,
        eval_every=max(1, config.num_steps // 2),
    )


def _teacher(inputs: Any) -> Any:
    """Return the dense model whose distributions are learnt."""
    from mlxflow import models

    teacher, _ = models.load(inputs.model[0].parent)
    teacher.freeze()
    return teacher


def _objective(model: Any, teacher: Any, tokens: Tokens, settings: Any, masks: bool) -> Any:
    from mlxflow.training import objective

    if teacher is not None:
        return objective.distilling_objective(teacher, masks_documents=masks)
    _, chosen = objective.choose_objective(
        model,
        fused=None,
        vocab_size=tokens.train.vocab_size,
        tokens=settings.batch_size * tokens.train.context_length,
        masks_documents=masks,
    )
    return chosen


def layers_toml(table: Mapping[str, Any]) -> str:
    """Return a plan as a `layers` table ready to paste."""
    entries = [
        "    { "
        + f'match = "{path}", bits = {setting.bits}, group_size = {setting.group_size}, mode = "{setting.mode}"'
        + " },"
        for path, setting in table.items()
    ]
    return "\n".join(["layers = [", *entries, "]"]) + "\n"
