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

Prints one line of JSON a row. Everything but `recovery` is on the CPU.
"""

import copy
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from mlxflow.device import cpu_backend

WORKFLOW = """
[workflow]
device = "cpu"
[pretokenize]
context_length = 128
tokenizer = { vocab_size = 1024 }
[train]
num_steps = 2000
batch_size = 16
dynamic_batch_size = false
learning_rate = 6e-3
warmup_steps = 100
[train.model]
hidden_size = 128
num_layers = 4
num_heads = 4
num_kv_heads = 4
intermediate_size = 384
tie_word_embeddings = false
"""
STEPS, BATCH, CALIBRATION = 300, 16, 64
SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49_152,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}


def _tell(row: str, **told: Any) -> None:
    shown = {name: round(one, 4) if isinstance(one, float) else one for name, one in told.items()}
    print(json.dumps({"row": row} | shown), flush=True)


def base(folder: str) -> None:
    """Train the dense model."""
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    (where / "workflow.toml").write_text(WORKFLOW)
    for stage in ("pretokenize", "train"):
        subprocess.run([sys.executable, "-m", "mlxflow", "run", stage], cwd=where, check=True)


class _Job:
    """The dense model, its tokens, and the perplexity on held-out ones."""

    def __init__(self, folder: str, *, held_out: int = 400) -> None:
        import mlx.core as mx

        from mlxflow.data.token_file import TokenFile
        from mlxflow.quantization.calibrated import choose_rows

        self._folder = Path(folder) / "artifacts"
        self.tokens = TokenFile.open(self._folder / "pretokenize" / "train.safetensors")
        self._held_out = TokenFile.open(self._folder / "pretokenize" / "validation.safetensors").rows.head(held_out)
        rows = self.tokens.rows
        batch = rows.take(choose_rows(rows.marks, count=CALIBRATION, seed=0))
        self.calibration, self.marks = mx.array(batch.tokens.astype("int32")), mx.array(batch.marks)

    def model(self) -> Any:
        from mlxflow.models import model_folder

        return model_folder.load(self._folder / "train")[0]

    def another(self, seed: int) -> Any:
        """Return a dense model of the same shape, trained in the same way from other numbers and in another order."""
        from mlxflow.models import model_folder
        from mlxflow.stages import train

        table = tomllib.loads(WORKFLOW)["train"]
        table = {key: table[key] for key in ("num_steps", "batch_size", "learning_rate", "warmup_steps")}
        model = model_folder.build(json.loads((self._folder / "train" / "config.json").read_text()), seed=seed)
        self._train(model, train.Config(**table), seed=seed)
        return model

    def perplexity(self, model: Any) -> float:
        from mlxflow.evaluation.perplexity import measure_perplexity

        return measure_perplexity(model, self._held_out, batch_size=50).perplexity

    def perplexity_of(self, model: Any, packed: Any, plan: Any) -> float:
        """Return the perplexity of packed layers; the model's weights are replaced."""
        import mlx.core as mx

        from mlxflow.quantization.codec import unpack

        weights = [(f"{path}.weight", unpack(packed[path], plan[path]).astype(mx.float32)) for path in plan]
        model.load_weights(weights, strict=False)
        return self.perplexity(model)

    def rounded(self, model: Any, plan: Any, dtype: Any = None) -> float:
        """Return the perplexity of rounding to nearest; the model stays as it was."""
        from mlxflow.quantization.codec import pack

        one = copy.deepcopy(model)
        layers = dict(one.named_modules())
        weights = {path: layers[path].weight for path in plan}
        packed = {path: pack(weights[path].astype(dtype or weights[path].dtype), plan[path]) for path in plan}
        return self.perplexity_of(one, packed, plan)

    @contextmanager
    def trained(
        self, model: Any, plan: Any, *, steps: int = STEPS, seed: int = 1, **table: Any
    ) -> Iterator[tuple[Any, list[float]]]:
        """Train a model as `method = "qat"` does, with fake quantization where there is a plan.

        Args:
            model: dense.
            plan: of the layers; empty for a control.
            steps: of training.
            seed: of the order of the rows.
            table: what else the `[quantize]` table says.

        Yields:
            The packing function, and the seconds of every step.
        """
        from mlxflow.quantization.fake_quant import fake_quantized
        from mlxflow.stages import quantize
        from mlxflow.stages.quantize_methods import training_settings

        config = quantize.Config(method="qat", num_steps=steps, batch_size=BATCH, **table)
        with fake_quantized(model, plan) as packed:
            yield packed, self._train(model, training_settings(config, model), seed=seed)

    def continued(self, model: Any, *, seed: int) -> None:
        """Train a model on as `[train]` would by its own defaults, as long and as fast as the quantize table has it."""
        from mlxflow.stages import quantize, train
        from mlxflow.stages.quantize_methods import training_settings

        rate = training_settings(quantize.Config(method="qat", num_steps=STEPS), model).learning_rate
        config = train.Config(num_steps=STEPS, batch_size=BATCH, learning_rate=rate, warmup_steps=STEPS // 10)
        self._train(model, train.training_settings(config), seed=seed)

    def _train(self, model: Any, settings: Any, *, seed: int) -> list[float]:
        """Train a model; return the seconds of every step."""
        import mlx.core as mx

        from mlxflow.kernels import model_kernels
        from mlxflow.training import build

        model.train()
        seconds = []
        settings = settings.replace(fused_loss=True, workers=1)
        subject = build.Subject(model, settings, self.tokens.vocab_size, self.tokens.context_length)
        with (
            build.ready_step(subject, model_kernels.no_kernels()) as step,
            build.make_loader(self.tokens.rows, settings, num_rows=BATCH, seed=seed) as loader,
        ):
            for _ in range(settings.num_steps):
                batch = next(loader)
                begin = time.perf_counter()
                mx.eval(*step.update(step.compute(batch.tokens, batch.marks)), step.state)
                seconds.append(time.perf_counter() - begin)
        model.eval()
        return seconds


def _uniform(model: Any, mode: str, bits: int, group_size: int = 64) -> dict[str, Any]:
    from mlxflow.quantization.settings import Setting

    setting = Setting(mode, bits, group_size)
    return {path: setting for path, layer in model.named_modules() if hasattr(layer, "to_quantized")}


def qat(folder: str, seed: str = "1", modes: str = "affine,symmetric", bits: str = "4,3,2") -> None:
    """Compare perplexities of a control, dense and rounded, and of QAT, at the stage's own settings."""
    job = _Job(folder)
    _tell("dense model", perplexity=job.perplexity(job.model()))
    control = job.model()
    with job.trained(control, {}, seed=int(seed)):
        pass
    best = job.perplexity(control)
    _tell("control, dense", perplexity=best, seed=seed)
    for mode in modes.split(","):
        for width in map(int, bits.split(",")):
            model = job.model()
            plan = _uniform(model, mode, width)
            rounded = job.rounded(control, plan)
            with job.trained(model, plan, seed=int(seed)) as (packed, _):
                parts = packed()
            ours = job.perplexity_of(model, parts, plan)
            recovered = (rounded - ours) / (rounded - best)
            _tell(f"{mode} {width}", rtn_of_control=rounded, qat=ours, recovered=recovered)


def recovery(folder: str, bases: str = "4", orders: str = "2") -> None:
    """Tell what QAT recovers over several base models, of which the folder's is the first, and orders of the rows."""
    job = _Job(folder, held_out=1_000_000)
    shares: dict[str, list[tuple[float, float]]] = {}
    for number in range(int(bases)):
        base_model = job.model() if number == 0 else job.another(number)
        for order in range(1, int(orders) + 1):
            control, continued = copy.deepcopy(base_model), copy.deepcopy(base_model)
            with job.trained(control, {}, seed=order):
                pass
            job.continued(continued, seed=order)
            _tell(
                f"base {number}, order {order}",
                base=job.perplexity(base_model),
                control=job.perplexity(control),
                trained_on=job.perplexity(continued),
            )
            for mode, bits in itertools.product(("affine", "symmetric"), (4, 3, 2)):
                model = copy.deepcopy(base_model)
                plan = _uniform(model, mode, bits)
                with job.trained(model, plan, seed=order) as (packed, _):
                    parts = packed()
                ours = job.perplexity_of(model, parts, plan)
                told, recovered = {"qat": ours}, []
                for name, dense in (("control", control), ("trained_on", continued)):
                    told[f"rtn_of_{name}"] = rounded = job.rounded(dense, plan)
                    recovered.append((rounded - ours) / (rounded - job.perplexity(dense)))
                shares.setdefault(f"{mode} {bits}", []).append((recovered[0], recovered[1]))
                _tell(f"base {number}, order {order}, {mode} {bits}", **told, recovered=recovered[0])
    for name, found in shares.items():
        ours_all, others = zip(*found, strict=True)
        error = statistics.stdev(ours_all) / len(ours_all) ** 0.5 if len(ours_all) > 1 else math.nan
        _tell(
            name,
            recovered=statistics.mean(ours_all),
            standard_error=error,
            runs=len(ours_all),
            recovered_of_trained_on=statistics.mean(others),
        )


def learned(folder: str) -> None:
    """Compare perplexities of rounding and of mlx-lm's methods on the dense model."""
    from mlxflow.quantization import calibrated as methods

    job = _Job(folder)
    tokens = job.calibration
    for bits in (4, 3, 2):
        plan = _uniform(job.model(), "affine", bits)
        told = {"rtn": job.rounded(job.model(), plan)}
        if bits != 3:  # mlx-lm's GPTQ does not have it
            model = job.model()
            made = methods.gptq(model, plan, tokens[:, :-1], batch_size=8, key="quantize")
            told["gptq"] = job.perplexity_of(model, made, plan)
        model = job.model()
        made = methods.awq(model, plan, tokens[:, :-1], search_steps=20, key="quantize")
        told["awq"] = job.perplexity_of(model, made, plan)
        model = job.model()
        made = methods.dwq(model, plan, tokens, batch_size=4, learning_rate=1e-4, seed=0, key="quantize")
        told["dwq"] = job.perplexity_of(model, made, plan)
        _tell(f"affine {bits}, of the dense model", **told)


def step(folder: str) -> None:
    """Time steps in pairs of short runs."""
    job = _Job(folder)
    for mode, bits in (("affine", 4), ("affine", 2), ("symmetric", 4)):
        ratios = []
        for _ in range(5):
            medians = []
            for faked in (False, True):
                model = job.model()
                with job.trained(model, _uniform(model, mode, bits) if faked else {}, steps=12) as (_, seconds):
                    medians.append(statistics.median(seconds[2:]))
            ratios.append(medians[1] / medians[0])
        _tell(f"step, {mode} {bits}", median_ratio=statistics.median(ratios), low=min(ratios), high=max(ratios))


def budget(folder: str) -> None:
    """Compare plans of equal size; scales and biases of 16 bits count."""
    import mlx.core as mx

    from mlxflow.quantization import budget as budgets
    from mlxflow.quantization.sensitivity import measure_costs
    from mlxflow.quantization.settings import Setting
    from mlxflow.training.objective import plain_objective

    job = _Job(folder)
    model, objective = job.model(), plain_objective(masks_documents=False)
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "to_quantized")}
    settings = [Setting("affine", bits, size) for bits in (2, 3, 4, 6, 8) for size in (64, 32, 128)]
    candidates = dict.fromkeys(layers, settings)
    parameters = sum(layer.weight.size for layer in layers.values())
    dense = job.perplexity(model)
    begin = time.perf_counter()
    costs = measure_costs(model, candidates, job.calibration, job.marks, objective=objective, dtype=mx.bfloat16)
    sizes = budgets.sizes_of(model, candidates, dtype=mx.bfloat16)
    _tell("costs", seconds=time.perf_counter() - begin, layers=len(layers), settings=len(settings), dense=dense)
    sensitivities: dict[float, Any] = {}
    for target in (3.0, 3.5, 4.0, 4.5):
        begin = time.perf_counter()
        room = int(target * parameters / 8)
        plan = budgets.cheapest_plan(costs, sizes, budget_bytes=room, asked="", parameters=parameters)
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
        _tell(
            f"budget {target}",
            bits_per_weight=8 * budgets.plan_bytes(plan, sizes) / parameters,
            perplexity=ours,
            uniform=theirs,
            gone=(theirs - ours) / (theirs - dense),
            dynamic_quant=dynamic,
            dynamic_quant_bits_per_weight=bits,
            plan_seconds=seconds,
        )


def _dynamic(job: _Job, model: Any, target: float, known: dict[float, Any]) -> tuple[float, float]:
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
            _tell(f"{name}, {bits} bits", affine=lost[0], symmetric=lost[1], best_of_800_scales=best)
    layers = [layer.weight for _, layer in _Job(folder).model().named_modules() if hasattr(layer, "to_quantized")]
    whole = sum(float(weight.square().sum()) for weight in layers)
    for bits in (2, 3, 4):
        settings = [Setting(mode, bits, 64) for mode in ("affine", "symmetric")]
        errors = [
            sum(float((round_trip(weight, one) - weight).square().sum()) for weight in layers) for one in settings
        ]
        _tell(
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
        plan = _uniform(model, "affine", bits)
        candidates = {path: [setting] for path, setting in plan.items()}
        packed = budgets.plan_bytes(plan, budgets.sizes_of(model, candidates, dtype=mx.bfloat16))
        packed += budgets.fixed_bytes(model, candidates, dtype=mx.bfloat16)
        _tell(
            f"{bits} bits", parameters=count, bytes=packed, times_fp32=4 * count / packed, times_bf16=2 * count / packed
        )


def evaluate(folder: str) -> None:
    """Time the perplexity of a packed model, dequantized for it, against the dense one's, in turns."""
    from mlx.nn import quantize

    from mlxflow.models.quantized_layers import for_evaluation

    job, ratios, gap = _Job(folder), [], 0.0
    for _ in range(5):
        packed, dense = job.model(), job.model()
        quantize(packed, group_size=64, bits=4)
        begin = time.perf_counter()
        job.perplexity(dense)
        middle = time.perf_counter()
        gap = job.perplexity(for_evaluation(packed))
        ratios.append((time.perf_counter() - middle) / (middle - begin))
    _tell(
        "evaluation, 4 bits", median_ratio=statistics.median(ratios), low=min(ratios), high=max(ratios), perplexity=gap
    )


def convert(layers: str = "30", rounds: str = "3") -> None:
    """Run `mlxflow run quantize` and `mlx_lm.convert -q` in turns on a bf16 model of SmolLM2-135M's width."""
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(temporary)
        # in a process of its own: what this one holds would count as its children's peak
        subprocess.run([sys.executable, __file__, "write", str(where / "dense"), layers], check=True)
        (where / "workflow.toml").write_text('[workflow]\ndevice = "cpu"\n[quantize]\nmodel = "dense"\n')
        python = [sys.executable, "-m"]
        ours = [*python, "mlxflow", "run", "quantize"]
        theirs = [*python, "mlx_lm", "convert", "--hf-path", "dense", "--mlx-path", "theirs", "-q"]
        measured: dict[str, list[tuple[float, int]]] = {"mlxflow": [], "mlx_lm.convert": []}
        for _ in range(int(rounds)):
            shutil.rmtree(where / "theirs", ignore_errors=True)
            for name, command in zip(measured, (ours, theirs), strict=True):
                measured[name].append(_run_measured(command, where))
        _tell_conversion(where, measured)


def _tell_conversion(where: Path, measured: dict[str, list[tuple[float, int]]]) -> None:
    import mlx.core as mx

    files = [where / "artifacts" / "quantize" / "model.safetensors", where / "theirs" / "model.safetensors"]
    one, other = (cast("dict[str, mx.array]", mx.load(str(file))) for file in files)
    same = one.keys() == other.keys() and all(bool(mx.array_equal(one[name], other[name])) for name in one)
    dense = (where / "dense" / "model.safetensors").stat().st_size
    for name, runs in measured.items():
        seconds, peaks = zip(*runs, strict=True)
        _tell(name, seconds=statistics.median(seconds), peak_rss_bytes=statistics.median(peaks), tensors_equal=same)
    pairs = list(zip(*measured.values(), strict=True))
    _tell(
        "mlxflow over mlx_lm.convert",
        seconds=statistics.median(ours[0] / theirs[0] for ours, theirs in pairs),
        peak_rss=statistics.median(ours[1] / theirs[1] for ours, theirs in pairs),
        dense_file_over_ours=dense / files[0].stat().st_size,
    )


def write(where: str, layers: str) -> None:
    """Write a model folder with random bf16 weights and a tokenizer, such as mlx-lm asks for."""
    import mlx.core as mx
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    from mlxflow.models import model_folder

    folder = Path(where)
    folder.mkdir()
    shape = SMOLLM2_135M | {"num_hidden_layers": int(layers), "torch_dtype": "bfloat16"}
    model = model_folder.build(shape, seed=0)
    model.set_dtype(mx.bfloat16)
    model_folder.save(
        model=model,
        config=shape,
        config_file=folder / "config.json",
        model_file=folder / "model.safetensors",
        provenance={},
    )
    Tokenizer(BPE()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def _run_measured(command: list[str], folder: Path) -> tuple[float, int]:
    """Return the seconds of a process and the most memory it held, in bytes."""
    import os

    begin = time.perf_counter()
    environment = {**os.environ, "USE_TORCH": "0"}  # transformers would import it, for neither's use
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - begin, usage.ru_maxrss * (1024 if sys.platform.startswith("linux") else 1)


PARTS = {
    one.__name__: one
    for one in (base, qat, recovery, learned, step, budget, symmetric, sizes, evaluate, convert, write)
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        sys.exit(__doc__)
    cpu_backend.prepare()
    import mlx.core as mx

    if sys.argv[1] != "recovery":
        mx.set_default_device(mx.cpu)
    part: Any = PARTS[sys.argv[1]]
    part(*sys.argv[2:])
