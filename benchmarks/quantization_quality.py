"""Perplexities: quantization-aware training against a control, mlx-lm's methods, and bits chosen by layer."""

import copy
import itertools
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.quantization_job import Job, print_row, uniform_plan


def qat(folder: str, seed: str = "1", modes: str = "affine,symmetric", bits: str = "4,3,2") -> None:
    """Compare perplexities of a control, dense and rounded, and of QAT, at the stage's own settings."""
    job = Job(folder)
    print_row("dense model", perplexity=job.perplexity(job.model()))
    control = job.model()
    with job.trained(control, {}, seed=int(seed)):
        pass
    best = job.perplexity(control)
    print_row("control, dense", perplexity=best, seed=seed)
    for mode in modes.split(","):
        for width in map(int, bits.split(",")):
            model = job.model()
            plan = uniform_plan(model, mode, width)
            rounded = job.rounded(control, plan)
            with job.trained(model, plan, seed=int(seed)) as (packed, _):
                parts = packed()
            ours = job.perplexity_of(model, parts, plan)
            recovered = (rounded - ours) / (rounded - best)
            print_row(f"{mode} {width}", rtn_of_control=rounded, qat=ours, recovered=recovered)


def recovery(folder: str, bases: str = "4", orders: str = "2") -> None:
    """Tell what QAT recovers over several base models, of which the folder's is the first, and orders of the rows."""
    job = Job(folder, held_out=1_000_000)
    shares: dict[str, list[tuple[float, float]]] = {}
    for number in range(int(bases)):
        base_model = job.model() if number == 0 else job.another(number)
        for order in range(1, int(orders) + 1):
            control, continued = copy.deepcopy(base_model), copy.deepcopy(base_model)
            with job.trained(control, {}, seed=order):
                pass
            job.continued(continued, seed=order)
            print_row(
                f"base {number}, order {order}",
                base=job.perplexity(base_model),
                control=job.perplexity(control),
                trained_on=job.perplexity(continued),
            )
            for mode, bits in itertools.product(("affine", "symmetric"), (4, 3, 2)):
                model = copy.deepcopy(base_model)
                plan = uniform_plan(model, mode, bits)
                with job.trained(model, plan, seed=order) as (packed, _):
                    parts = packed()
                ours = job.perplexity_of(model, parts, plan)
                perplexities: dict[str, float] = {"qat": ours}
                recovered = []
                for name, dense in (("control", control), ("trained_on", continued)):
                    perplexities[f"rtn_of_{name}"] = rounded = job.rounded(dense, plan)
                    recovered.append((rounded - ours) / (rounded - job.perplexity(dense)))
                shares.setdefault(f"{mode} {bits}", []).append((recovered[0], recovered[1]))
                print_row(f"base {number}, order {order}, {mode} {bits}", **perplexities, recovered=recovered[0])
    for name, found in shares.items():
        ours_all, others = zip(*found, strict=True)
        error = statistics.stdev(ours_all) / len(ours_all) ** 0.5 if len(ours_all) > 1 else math.nan
        print_row(
            name,
            recovered=statistics.mean(ours_all),
            standard_error=error,
            runs=len(ours_all),
            recovered_of_trained_on=statistics.mean(others),
        )


def learned(folder: str) -> None:
    """Compare perplexities of rounding and of mlx-lm's methods on the dense model."""
    from mlxflow.quantization import calibrated, dwq

    job = Job(folder)
    tokens = job.calibration
    for bits in (4, 3, 2):
        plan = uniform_plan(job.model(), "affine", bits)
        perplexities = {"rtn": job.rounded(job.model(), plan)}
        if bits != 3:  # mlx-lm's GPTQ does not have it
            model, rows = job.model(), tokens[:, :-1]
            with tempfile.TemporaryDirectory() as codes:
                made = calibrated.gptq(job.model, plan, rows, batch_size=8, folder=Path(codes), key="quantize")
                perplexities["gptq"] = job.perplexity_of(model, made, plan)
        model = job.model()
        with tempfile.TemporaryDirectory() as scaled:
            rows = tokens[:, :-1]
            made = calibrated.awq(model, plan, rows, search_steps=20, folder=Path(scaled), key="quantize")
            perplexities["awq"] = job.perplexity_of(model, made, plan)
        model = job.model()
        made = dwq.train_scales(job.model, plan, tokens, batch_size=4, learning_rate=1e-4, seed=0, name="dwq")
        perplexities["dwq"] = job.perplexity_of(model, made, plan)
        print_row(f"affine {bits}, of the dense model", **perplexities)


def budget(folder: str) -> None:
    """Compare plans of equal size; scales and biases of 16 bits count."""
    import mlx.core as mx

    from mlxflow.quantization import budget as budgets
    from mlxflow.quantization.sensitivity import measure_costs
    from mlxflow.quantization.settings import Setting
    from mlxflow.quantization.streamed_gradients import GradientRows
    from mlxflow.training.objective import plain_objective

    job = Job(folder)
    model, objective = job.model(), plain_objective(masks_documents=False)
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "to_quantized")}
    settings = [Setting("affine", bits, size) for bits in (2, 3, 4, 6, 8) for size in (64, 32, 128)]
    candidates = dict.fromkeys(layers, settings)
    parameters = sum(layer.weight.size for layer in layers.values())
    dense = job.perplexity(model)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as inputs:
        rows = GradientRows(job.calibration, job.marks, objective, Path(inputs))
        costs = measure_costs(job.model, candidates, rows, dtype=mx.bfloat16)
    sizes = budgets.sizes_of(model, candidates, dtype=mx.bfloat16)
    print_row("costs", seconds=time.perf_counter() - begin, layers=len(layers), settings=len(settings), dense=dense)
    sensitivities: dict[float, Any] = {}
    for target in (3.0, 3.5, 4.0, 4.5):
        begin = time.perf_counter()
        room = int(target * parameters / 8)
        plan = budgets.cheapest_plan(costs, sizes, budget_bytes=room, budget_setting="", parameters=parameters)
        uniform = budgets.uniform_plans(sizes, budget_bytes=room)
        plan, _ = budgets.best_measured(
            model,
            [plan, *uniform],
            job.calibration,
            job.marks,
            objective=objective,
            dtype=mx.bfloat16,
            batch_size=16,
        )
        seconds = time.perf_counter() - begin
        ours = job.rounded(model, plan, mx.bfloat16)
        theirs = min(job.rounded(model, one, mx.bfloat16) for one in uniform)
        dynamic, bits = _dynamic(job, model, target, sensitivities)
        print_row(
            f"budget {target}",
            bits_per_weight=8 * budgets.plan_bytes(plan, sizes) / parameters,
            perplexity=ours,
            uniform=theirs,
            gone=(theirs - ours) / (theirs - dense),
            dynamic_quant=dynamic,
            dynamic_quant_bits_per_weight=bits,
            plan_seconds=seconds,
        )


def _dynamic(job: Job, model: Any, target: float, known: dict[float, Any]) -> tuple[float, float]:
    """Return the perplexity of mlx-lm's dynamic_quant, one bit up and one down from the target, and its size."""
    import mlx.core as mx
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

    from mlxflow.quantization.budget import plan_bytes, sizes_of
    from mlxflow.quantization.settings import Setting

    low = int(target - 0.5)
    low, high = (low, low + 1) if target - 0.5 != low else (low - 1 if low > 2 else low, low + 1)
    if low not in known:
        found = estimate_sensitivities(copy.deepcopy(model), job.calibration[:, :-1], low, 64, high, 64)
        known[low] = dict(found)
    stored = copy.deepcopy(model)
    stored.set_dtype(mx.bfloat16)
    threshold = estimate_threshold(stored, known[low], target, low, 64, high, 64)
    plan = {path: Setting("affine", high if one > threshold else low, 64) for path, one in known[low].items()}
    sizes = sizes_of(model, {path: [one] for path, one in plan.items()}, dtype=mx.bfloat16)
    parameters = sum(dict(model.named_modules())[path].weight.size for path in plan)
    return job.rounded(model, plan, mx.bfloat16), 8 * plan_bytes(plan, sizes) / parameters
