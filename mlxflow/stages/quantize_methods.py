"""How the stage `quantize` comes to a plan and to codes: rounding, mlx-lm's learned methods, training, a budget."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mlxflow.device.compute_device import parse_size
from mlxflow.quantization.settings import Setting
from mlxflow.system import terminal
from mlxflow.workflow.config import toml_value
from mlxflow.workflow.stage import Context, derive_seed

# Rows that the learned methods look at together
_CALIBRATION_BATCH = 4

# As mlx-lm's: scales that AWQ tries
_AWQ_STEPS = 20

# Of a safetensors header: what stands around the name of a tensor, and what tells where the file came from
_ENTRY_BYTES = 80
_HEADER_BYTES = 1024

_DWQ_LEARNING_RATE = 1e-5

# Of quantization-aware training: found best for so many steps, by `benchmarks/quantize.py recovery`
_QAT_LEARNING_RATE, _QAT_STEPS = 8e-4, 300


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
    from mlxflow.quantization.calibrated import require_learnable
    from mlxflow.quantization.plan import check_supported, resolve

    plan = resolve(model, default=config.default, rules=rules_of(config), key=context.task)
    check_supported(plan.layers, context.task)
    require_learnable(config.method, model, plan.layers, key=context.task)
    if warning := plan.warning(context.task):
        terminal.say(warning)
    if not config.has_budget or tokens is None:
        return plan, {}
    layers, losses = _within_budget(config, model, plan, tokens, context)
    plan = plan._replace(layers=layers)
    return plan, {"layers_toml": layers_toml(plan), "budget_losses": losses}


def _within_budget(
    config: Any, model: Any, plan: Any, tokens: Tokens, context: Context
) -> tuple[dict[str, Setting], list[float]]:
    """Return the layers of a plan with bits chosen under the budget, and the losses of the plans that were tried."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxflow.quantization import budget
    from mlxflow.quantization import plan as plans
    from mlxflow.quantization.sensitivity import measure_costs

    rules, modules = rules_of(config), dict(model.named_modules())
    candidates = {
        path: [setting]
        if plans.names_bits(path, rules)
        else [setting._replace(bits=bits) for bits in sorted(config.candidate_bits)]
        for path, setting in plan.layers.items()
    }
    plans.check_supported({str(one): one for some in candidates.values() for one in some}, context.task)
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    key = "target_size" if config.target_size else "target_bits_per_weight"
    total = int(config.target_bits_per_weight * parameters / 8)
    if config.target_size:
        total = parse_size(config.target_size, 0) - _header_bytes(model, candidates)
    objective = _objective(model, tokens, config.batch_size)
    rows, marks = (mx.array(part) for part in calibration_rows(config, tokens, context))
    sizes = budget.sizes_of(model, candidates, dtype=None)
    room = total - budget.fixed_bytes(model, candidates, dtype=None)
    costs = measure_costs(model, candidates, rows, marks, objective=objective, dtype=None)
    asked = f"{context.task}.{key} = {toml_value(getattr(config, key))}"
    cheapest = budget.cheapest_plan(
        costs,
        sizes,
        budget_bytes=room,
        asked=asked,
        parameters=sum(modules[path].weight.size for path in candidates),
    )
    tried = [cheapest, *budget.uniform_plans(sizes, budget_bytes=room)]
    return budget.best_measured(
        model, tried, rows, marks, objective=objective, dtype=None, batch_size=_CALIBRATION_BATCH
    )


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
    config: Any,
    inputs: Any,
    outputs: Any,
    context: Context,
    *,
    folder: Path,
    model: Any,
    plan: Any,
    tokens: Tokens | None,
) -> Made:
    """Return a model and the codes of its layers, made as `method` says; rounding is left to the export."""
    if config.method == "rtn" or tokens is None:
        return Made(model, plan, {}, {})
    if config.method == "qat":
        teacher = _teacher(folder) if config.distill else None
        return _trained(config, inputs, outputs, context, model=model, plan=plan, tokens=tokens, teacher=teacher)
    return Made(model, plan, _learned(config, model, plan.layers, tokens, context), {})


def _learned(
    config: Any, model: Any, layers: Mapping[str, Setting], tokens: Tokens, context: Context
) -> dict[str, Any]:
    """Return the codes that GPTQ, AWQ or DWQ learns from calibration rows."""
    import mlx.core as mx

    from mlxflow.quantization import calibrated

    rows = mx.array(calibration_rows(config, tokens, context).tokens).astype(mx.int32)
    mx.eval(model.parameters(), rows)
    key = context.task
    if config.method == "gptq":
        return calibrated.gptq(model, layers, rows[:, :-1], batch_size=_CALIBRATION_BATCH, key=key)
    if config.method == "awq":
        return calibrated.awq(model, layers, rows[:, :-1], search_steps=_AWQ_STEPS, key=key)
    return calibrated.dwq(
        model,
        layers,
        rows,
        batch_size=_CALIBRATION_BATCH,
        learning_rate=_DWQ_LEARNING_RATE,
        seed=derive_seed(context.seed, "quantize.rows"),
        key=key,
    )


def calibration_rows(config: Any, tokens: Tokens, context: Context) -> Any:
    """Return token rows and their marks, (R, L + 1) each, for what looks at data, chosen by seed."""
    from mlxflow.quantization.calibrated import choose_rows

    rows = tokens.train.rows
    seed = derive_seed(context.seed, "quantize.calibration")
    return rows.take(choose_rows(rows.marks, count=config.calibration_rows, seed=seed))


def masks_of(tokens: Tokens, model: Any) -> bool:
    """Return whether documents are kept apart: where there are conversations and the architecture can."""
    from mlxflow.ops import document_mask

    return tokens.train.has_conversations and document_mask.can_mask_documents(model, tokens.train.vocab_size)


def _header_bytes(model: Any, packed: Mapping[str, Any]) -> int:
    """Return the most that names, shapes and provenance take at the head of the file."""
    from mlx.utils import tree_flatten

    names = [name for name, _ in tree_flatten(model.parameters())]
    names += [f"{path}.{own}" for path in packed for own in ("scales", "biases")]
    return _HEADER_BYTES + sum(len(name) + _ENTRY_BYTES for name in names)


# --- training


def _trained(
    config: Any, inputs: Any, outputs: Any, context: Context, *, model: Any, plan: Any, tokens: Tokens, teacher: Any
) -> Made:
    """Train with the rounded weights in place, and pack what the last forward pass took."""
    import mlx.core as mx

    from mlxflow.models import adapter_files
    from mlxflow.quantization.fake_quant import fake_quantized
    from mlxflow.training import build, kernel_selection
    from mlxflow.training import run as training_run
    from mlxflow.training.objective import distilling_objective, uses_fused_loss
    from mlxflow.training.settings import SettingNames

    settings = training_settings(config, model)
    names = SettingNames(
        context.task, f"{config.token_stage}.context_length", "workflow.memory_limit", has_fused_loss=False
    )
    tokens.train.full_rows(config.batch_size, f"{context.task}.batch_size")
    length, vocab_size = tokens.train.context_length, tokens.train.vocab_size
    prepare_adapters(model, settings, seed=derive_seed(context.seed, "train.model"), key=names.of("lora.keys"))
    model.train()
    mx.eval(model.parameters())
    masks = masks_of(tokens, model)
    request = kernel_selection.KernelRequest(
        config.kernels, context.device, context.unfinished / "kernels.json", context.published, context.begun
    )
    with kernel_selection.begin_proof(request) as ahead, fake_quantized(model, plan.layers) as pack:
        fused = teacher is None and uses_fused_loss(
            model, wanted=None, vocab_size=vocab_size, tokens=config.batch_size * length
        )
        settings = settings.replace(masks_documents=masks, fused_loss=fused)
        subject = build.Subject(model, settings, vocab_size, length, names)
        if teacher is not None:
            distilling = distilling_objective(teacher, masks_documents=masks)
            subject = subject._replace(make_objective=lambda uses_kernel: distilling)
        kernels = kernel_selection.select_kernels(request, subject, tokens.train.rows.head(config.batch_size), ahead)
        result = training_run.train(
            subject._replace(settings=settings.replace(kernels=tuple(kernels.selected))),
            kernels,
            _files(config, inputs, outputs, context, names),
            data_seed=derive_seed(context.seed, "train.batches"),
            memory_limit_bytes=context.memory_limit_bytes,
        )
        packed = pack()
        mx.eval(packed)
    adapter_files.fuse(model)
    told = training_run.report_of(result, kernels, keeps_best=False)
    training = {key: value for key, value in told.items() if key != "run"}
    return Made(model, plan, packed, {"kernels": kernels.selected, "training": training, "run": told["run"]})


def prepare_adapters(model: Any, settings: Any, *, seed: int, key: str) -> None:
    """Put the adapters of settings beside a model's layers, where they ask for some."""
    from mlxflow.training import adapters

    if settings.adapter_shape is not None:
        adapters.add_adapters(model, settings.adapter_shape, seed=seed, key=key)


def _files(config: Any, inputs: Any, outputs: Any, context: Context, names: Any) -> Any:
    from mlxflow.training import run as training_run

    return training_run.RunFiles(
        train=inputs.tokens[0],
        validation=inputs.tokens[1],
        metrics=outputs.metrics[0],
        checkpoints=context.unfinished,
        description=training_run.describe(msgspec.to_builtins(config), names, context),
    )


def training_settings(config: Any, model: Any) -> Any:
    """Return how quantization-aware training takes its steps, but for the loss, masks and kernels."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxflow.training.settings import AdapterShape, TrainingSettings, checkpoint_every

    types = {value.dtype for _, value in tree_flatten(model.parameters())}
    trains_all = config.training == "full"
    return TrainingSettings(
        adapters="none" if trains_all else AdapterShape(config.training, **msgspec.structs.asdict(config.lora)),
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        max_batch_size=max(64, config.batch_size),
        learning_rate=_highest_rate(config) if config.learning_rate == "auto" else config.learning_rate,
        warmup_steps=min(max(1, config.num_steps // 10), config.num_steps // 2),
        schedule="linear",
        # No decay: weights are pulled to grid points. Low betas: old moments react too late to the rounding error.
        weight_decay=0.0,
        optimizer_options={"betas": [0.8, 0.99]},
        precision="fp32" if types == {mx.float32} else "bf16",
        checkpoint_every=checkpoint_every(config.checkpointing),
        deterministic=config.deterministic,
        max_validation_rows=config.max_validation_rows,
        eval_every=max(1, config.num_steps // 2),
    )


def _highest_rate(config: Any) -> float:
    """Return the learning rate for a number of steps: in few of them the noise of a high one is not averaged out."""
    return _QAT_LEARNING_RATE * math.sqrt(min(1.0, config.num_steps / _QAT_STEPS))


def _teacher(folder: Path) -> Any:
    """Return the dense model whose distributions are learnt."""
    from mlxflow.models import model_folder, quantized_layers

    teacher, _ = quantized_layers.made_dense(*model_folder.load(folder))
    teacher.freeze()
    return teacher


def _objective(model: Any, tokens: Tokens, batch_size: int) -> Any:
    """Return the loss by which a budget's costs are measured."""
    from mlxflow.training import objective

    size = tokens.train.vocab_size
    passed = batch_size * tokens.train.context_length
    fused = objective.uses_fused_loss(model, wanted=None, vocab_size=size, tokens=passed)
    return objective.make_objective(model, fused=fused, vocab_size=size, masks_documents=masks_of(tokens, model))


def layers_toml(plan: Any) -> str:
    """Return a plan as a `layers` table ready to paste into a `[quantize]` table."""
    entries = [
        f'    {{ match = "{path}", bits = {one.bits}, group_size = {one.group_size}, mode = "{one.mode}" }},'
        for path, one in plan.layers.items()
    ]
    entries += [f'    {{ match = "{path}", skip = true }},' for path in plan.skipped]
    return "\n".join(["layers = [", *entries, "]"]) + "\n"
