"""Quantization: quality against rounding and mlx-lm's methods, sizes, and what it costs; each part in one run.

    python benchmarks/quantize.py base FOLDER          trains the model, 1.1 million parameters, of most parts
    python benchmarks/quantize.py qat FOLDER [SEED [MODES [BITS]]]
                                                       perplexities of QAT against a control; half an hour
    python benchmarks/quantize.py recovery FOLDER [BASES [ORDERS]]
                                                       the same over several base models and orders of the data, on the
                                                       GPU where there is one: five minutes there, hours on a CPU
    python benchmarks/quantize.py learned FOLDER       perplexities of rounding, GPTQ, AWQ and DWQ, the same model
    python benchmarks/quantize.py step FOLDER          a step of quantization-aware training over a plain one, paired
    python benchmarks/quantize.py budget FOLDER        bits by layer against uniform ones and mlx-lm's dynamic_quant
    python benchmarks/quantize.py symmetric FOLDER     errors of symmetric and affine codes on random matrices and the
                                                       model's, and of the best of 800 symmetric scales
    python benchmarks/quantize.py sizes                bytes of a model of 135 million parameters
    python benchmarks/quantize.py evaluate FOLDER      evaluation of a quantized model on the CPU over the dense one
    python benchmarks/quantize.py convert [LAYERS]     time, peak memory, bytes against mlx_lm.convert, of 135 million
                                                       parameters (30 layers) or more
    python benchmarks/quantize.py memory [SHAPE [METHODS [LAYERS]]]
                                                       memory and time of each method on random weights of Llama 3's
                                                       shape with few layers, and what grows with their number
    python benchmarks/quantize.py compensation [WIDTHS [ROWS]]
                                                       seconds to factor the inputs of a layer, and to compensate rows
                                                       of its weights, by width
    python benchmarks/quantize.py forecast [NAMES [LAYERS [RUNS]]]
                                                       forecasts of time and memory beside what each method took, in
                                                       its first run and in further ones

Prints one line of JSON a row. Everything but `recovery` is on the CPU.
"""

import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[1])  # the modules beside this one are those of a package
from benchmarks.conversion import convert, write
from benchmarks.processes import let_children_import_checkout
from benchmarks.quantization_forecast import forecast
from benchmarks.quantization_job import WORKFLOW, Job, print_row, uniform_plan
from benchmarks.quantization_memory import memory
from benchmarks.quantization_quality import budget, learned, qat, recovery
from benchmarks.shapes import SMOLLM2_135M
from mlxflow.device import cpu_backend


def base(folder: str) -> None:
    """Train the dense model."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    (where / "workflow.toml").write_text(WORKFLOW)
    for stage in ("pretokenize", "train"):
        subprocess.run([sys.executable, "-m", "mlxflow", "run", stage], cwd=where, check=True)


def step(folder: str) -> None:
    """Time steps in pairs of short runs."""
    job = Job(folder)
    for mode, bits in (("affine", 4), ("affine", 2), ("symmetric", 4)):
        ratios = []
        for _ in range(5):
            medians = []
            for faked in (False, True):
                model = job.model()
                with job.trained(model, uniform_plan(model, mode, bits) if faked else {}, steps=12) as (_, seconds):
                    medians.append(statistics.median(seconds[2:]))
            ratios.append(medians[1] / medians[0])
        print_row(f"step, {mode} {bits}", median_ratio=statistics.median(ratios), low=min(ratios), high=max(ratios))


def symmetric(folder: str) -> None:
    """Compare relative errors on matrices of normal and of Laplace numbers, and on a trained model's together."""
    import mlx.core as mx

    from mlxflow.quantization.codec import round_trip
    from mlxflow.quantization.settings import Setting

    normal = mx.random.normal((1024, 1024), key=mx.random.key(0))
    matrices = {"normal": normal, "laplace": mx.random.laplace((1024, 1024), key=mx.random.key(1))}
    for name, weight in matrices.items():
        for bits in (2, 3, 4):
            lost = [
                float(mx.linalg.norm(round_trip(weight, Setting(mode, bits, 64)) - weight) / mx.linalg.norm(weight))
                for mode in ("affine", "symmetric")
            ]
            best = float(mx.sqrt(_best_symmetric(weight, bits) / weight.square().sum()))
            print_row(f"{name}, {bits} bits", affine=lost[0], symmetric=lost[1], best_of_800_scales=best)
    layers = [layer.weight for _, layer in Job(folder).model().named_modules() if hasattr(layer, "to_quantized")]
    whole = sum(float(weight.square().sum()) for weight in layers)
    for bits in (2, 3, 4):
        settings = [Setting(mode, bits, 64) for mode in ("affine", "symmetric")]
        errors = [
            sum(float((round_trip(weight, one) - weight).square().sum()) for weight in layers) for one in settings
        ]
        print_row(
            f"trained model, {bits} bits", affine=math.sqrt(errors[0] / whole), symmetric=math.sqrt(errors[1] / whole)
        )


def _best_symmetric(weight: Any, bits: int) -> Any:
    """Return the squared error of the best of 800 scales for each group."""
    import mlx.core as mx

    groups, half = weight.reshape(-1, 64), 2 ** (bits - 1)
    largest = mx.abs(groups).max(-1, keepdims=True)
    best = mx.full((len(groups),), mx.inf)
    for share in (sign * number / 400 for sign in (1, -1) for number in range(100, 500)):
        scale = share * largest / half
        rounded = mx.clip(mx.round(groups / scale), -half, half - 1) * scale
        best = mx.minimum(best, (rounded - groups).square().sum(-1))
        mx.eval(best)
    return best.sum()


def sizes() -> None:
    """Print the bytes of all tensors of SmolLM2-135M's shape, embedding quantized, scales of 16 bits."""
    import mlx.core as mx

    from mlxflow.models import model_folder
    from mlxflow.quantization import budget as budgets

    model = model_folder.build(SMOLLM2_135M, seed=0)
    count = model_folder.num_parameters(model)
    for bits in (4, 8):
        plan = uniform_plan(model, "affine", bits)
        candidates = {path: [setting] for path, setting in plan.items()}
        packed = budgets.plan_bytes(plan, budgets.sizes_of(model, candidates, dtype=mx.bfloat16))
        packed += budgets.fixed_bytes(model, candidates, dtype=mx.bfloat16)
        print_row(
            f"{bits} bits", parameters=count, bytes=packed, times_fp32=4 * count / packed, times_bf16=2 * count / packed
        )


def evaluate(folder: str) -> None:
    """Time the perplexity of a packed model, dequantized for it, against the dense one's, in turns."""
    from mlx.nn import quantize

    from mlxflow.models.quantized_layers import for_evaluation

    job, ratios, gap = Job(folder), [], 0.0
    for _ in range(5):
        packed, dense = job.model(), job.model()
        quantize(packed, group_size=64, bits=4)
        begin = time.perf_counter()
        job.perplexity(dense)
        middle = time.perf_counter()
        gap = job.perplexity(for_evaluation(packed))
        ratios.append((time.perf_counter() - middle) / (middle - begin))
    print_row(
        "evaluation, 4 bits", median_ratio=statistics.median(ratios), low=min(ratios), high=max(ratios), perplexity=gap
    )


def compensation(widths: str = "1024,4096", rows: str = "4096") -> None:
    """Time the compensation of rounding errors by numbers of columns: of one factorization, and of the rows."""
    import numpy as np

    from mlxflow.quantization.error_compensation import Compensation
    from mlxflow.quantization.grids import nearest
    from mlxflow.quantization.settings import Setting

    setting, random = Setting("affine", 4, 64), np.random.default_rng(0)
    for width in map(int, widths.split(",")):
        inputs = random.standard_normal((512, width), dtype=np.float32)
        products = inputs.T @ inputs
        weight = random.standard_normal((int(rows), width), dtype=np.float32)
        low, high = (end(weight.reshape(len(weight), -1, 64), axis=-1) for end in (np.min, np.max))
        times = [(time.perf_counter(), time.process_time())]
        made = Compensation(products)
        times.append((time.perf_counter(), time.process_time()))
        made.applied(weight, np.stack([(high - low) / 15, low]), nearest=nearest(setting))
        times.append((time.perf_counter(), time.process_time()))
        figures = np.diff(np.asarray(times), axis=0).reshape(-1).tolist()
        names = ("factor_seconds", "factor_cpu_seconds", "rows_seconds", "rows_cpu_seconds")
        print_row(f"{width} columns, {rows} rows", **dict(zip(names, figures, strict=True)))


PARTS = {
    part.__name__: part
    for part in (
        base,
        qat,
        recovery,
        learned,
        step,
        budget,
        symmetric,
        sizes,
        evaluate,
        convert,
        write,
        memory,
        compensation,
        forecast,
    )
}

if __name__ == "__main__":
    let_children_import_checkout()
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        sys.exit(__doc__)
    cpu_backend.prepare()
    import mlx.core as mx

    if sys.argv[1] != "recovery":
        mx.set_default_device(mx.cpu)
    command: Any = PARTS[sys.argv[1]]
    command(*sys.argv[2:])
