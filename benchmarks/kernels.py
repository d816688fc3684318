"""Measures each kernel against MLX's own way and against a plain addition that moves as many bytes.

    python benchmarks/kernels.py [NAME...]   the shapes of the reference job of benchmarks/train.py; needs a GPU
    python benchmarks/kernels.py attention   attention, forward and backward, in microseconds: ours, MLX's own way, and
                                             plain operations, which like ours come to the same bits every time
    python benchmarks/kernels.py first       seconds of `mlxflow run train`, two steps, in the reference job's shape:
                                             without kernels, a first start with them, and a later one, in turn; and
                                             of the proof, from the names of the kernels and with all of its process
    python benchmarks/kernels.py cold        the same where MLX has compiled none of its own operations; minutes
    python benchmarks/kernels.py start       what kernels cost a training run's start once they are proved; any device
    python benchmarks/kernels.py compile     what NVIDIA's compiler takes for each, alone and behind headers such as MLX
                                             puts before them (CUDA_HOME=...; needs the compiler and no GPU)

One line of JSON a kernel: microseconds, and how often the memory's own pace that is. Of the start a line for each of
seven processes and one of their medians: milliseconds of the imports (from bytecode), of everything else, and of its
parts; of this process's own work too.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

sys.path[0] = str(Path(__file__).parents[1])  # the modules beside this one are those of a package
from benchmarks.processes import let_children_import_checkout
from mlxflow.device import cpu_backend

ROWS, CALLS, ROUNDS = 16 * 1024, 10, 7

#: Name, numbers in an input, bytes that cannot be avoided per number: read and written.
CASES = (
    ("rms_norm/bfloat16/576", ROWS * 576, 2 * 5),
    ("rms_norm/bfloat16/2048", ROWS * 2048, 2 * 5),
    ("rms_norm/float32/576", ROWS * 576, 4 * 5),
    ("sum_rms_norm/bfloat16/576", ROWS * 576, 2 * 10),
    ("rotary/bfloat16/64", ROWS * 576, 2 * 4),
    ("embedding/bfloat16", ROWS * 576, 2 * 3),
    ("gated_silu/bfloat16", ROWS * 1536, 2 * 5),
    ("mlp_silu/bfloat16", ROWS * 1536, 2 * 5),
    ("gated_gelu_approx/bfloat16", ROWS * 1536, 2 * 5),
    ("gated_gelu/bfloat16", ROWS * 1536, 2 * 5),
    ("cross_entropy/bfloat16", ROWS * 8192, 2 * 2),
    ("adamw/bfloat16/bfloat16", 134_000_000, 2 * 7),
    ("adamw/float32/bfloat16", 134_000_000, 4 * 6 + 2 * 2),
    ("sum_of_squares/bfloat16", 134_000_000, 2),
)


def _microseconds(function: Callable[..., Any], inputs: Sequence[mx.array]) -> float:
    times = []
    for number in range(ROUNDS + 1):
        mx.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            mx.async_eval(function(*inputs))
        mx.synchronize()
        if number:
            times.append((time.perf_counter() - begin) / CALLS * 1e6)
    return statistics.median(times)


def _copy_microseconds(size: int) -> float:
    """Return the time of an addition that reads and writes so many bytes."""
    count = size // 6
    one = mx.random.normal((count,), key=mx.random.key(0)).astype(mx.bfloat16)
    other = mx.random.normal((count,), key=mx.random.key(1)).astype(mx.bfloat16)
    mx.eval(one, other)
    return _microseconds(lambda a, b: a + b, [one, other])


#: Rows, heads, heads of keys, tokens of a row, width of a head; and tokens of a document, 0 for whole rows.
ATTENTION = [
    (*shape, document)
    for shape in ((16, 9, 3, 1024, 64), (8, 32, 8, 2048, 64), (4, 16, 4, 2048, 128))
    for document in (0, 200)
]


def _attention() -> None:
    from mlxflow.kernels.attention import attention
    from mlxflow.ops.attention_overrides import plain_attention

    for rows, heads, grouped, length, width, document in ATTENTION:
        scale, places = width**-0.5, mx.arange(length)
        low = mx.broadcast_to(places // document * document if document else mx.zeros_like(places), (rows, length))
        sees = (places[:, None] >= places) & (places >= low[:, None, :, None])
        shapes = [(rows, length, count, width) for count in (heads, grouped, grouped, heads)]
        random = [
            mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16) for seed, shape in enumerate(shapes)
        ]
        first, mask = mx.contiguous(low.astype(mx.int32)), mx.contiguous(sees)
        mx.eval(random, first, mask)
        inputs = [array.transpose(0, 2, 1, 3) for array in random]
        named: dict[str, Any] = {"scale": scale, "mask": mask if document else "causal"}
        ways: dict[str, Callable[..., mx.array]] = {
            "us": lambda q, k, v, s=scale, f=first if document else None: attention(s)(q, k, v, *[f] * (f is not None)),
            "mlx_us": partial(mx.fast.scaled_dot_product_attention, **named),
            "plain_us": partial(plain_attention, **named),
        }
        took = {}
        for name, way in ways.items():
            both = mx.compile(lambda q, k, v, g, way=way: mx.vjp(way, [q, k, v], [g]))
            took[name] = round(_microseconds(both, inputs), 1)
            mx.clear_cache()
        case = {"rows": rows, "heads": heads, "keys": grouped, "length": length, "width": width, "document": document}
        print(json.dumps(case | took), flush=True)


_WORKFLOW = """
[pretokenize]
sources = ["mlxflow"]
context_length = 1024
tokenizer = { vocab_size = 4096 }
[train]
num_steps = 2
warmup_steps = 1
batch_size = 16
precision = "bf16"
eval_every = 0
save_every = 0
max_validation_rows = 2
kernels = "KERNELS"
[train.model]
hidden_size = 576
num_layers = 30
num_heads = 9
num_kv_heads = 3
intermediate_size = 1536
"""


@contextmanager
def _training() -> Iterator[Callable[..., float]]:
    """Give what runs a stage in a process, with kernels or without, and returns its wall seconds."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(__file__).parents[1] / "mlxflow", Path(folder) / "mlxflow")

        def seconds(stage: str, kernels: str, cache: str, **variables: str) -> float:
            Path(folder, "workflow.toml").write_text(_WORKFLOW.replace("KERNELS", kernels))
            begin = time.perf_counter()
            command = [sys.executable, "-m", "mlxflow", "run", stage]
            environment = {**os.environ, "XDG_CACHE_HOME": cache, **variables}
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
            return round(time.perf_counter() - begin, 2)

        with tempfile.TemporaryDirectory() as cache:
            seconds("pretokenize", "off", cache)
        yield seconds


def _first_starts() -> None:
    with _training() as seconds, tempfile.TemporaryDirectory() as known:
        for kernels in ("off", "auto"):  # MLX compiles its own operations
            seconds("train", kernels, known)
        rounds = []
        for _ in range(5):
            with tempfile.TemporaryDirectory() as nothing:
                ways = {"off_s": ("off", known), "first_s": ("auto", nothing), "later_s": ("auto", known)}
                rounds.append({name: seconds("train", *way) for name, way in ways.items()})
            print(json.dumps(rounds[-1]), flush=True)
        later = {name: statistics.median(one[name] - one["off_s"] for one in rounds) for name in ("first_s", "later_s")}
        print(json.dumps({f"{name.removesuffix('_s')}_later_by_s": round(took, 2) for name, took in later.items()}))
        _verifications(Path(known, "mlxflow/kernels.json"))


def _verifications(results: Path) -> None:
    """Print the seconds that verifying the kernels in a cache takes, with its process ready and from its start."""
    from mlxflow.kernels import early_start, verifier_process
    from mlxflow.storage import cache_files

    (verified,) = cache_files.read_table(results).values()
    rows = []
    for _ in range(5):
        row = {}
        for part, wait_seconds in (("from_names_s", 2.0), ("with_its_process_s", 0.0)):
            with tempfile.TemporaryDirectory() as nothing:
                os.environ["XDG_CACHE_HOME"] = nothing
                begin = time.perf_counter()
                with verifier_process.VerifierProcess(early_start.COMMAND) as process:
                    time.sleep(wait_seconds)  # as while the model is built
                    process.send(list(verified))
                    output = process.listen(list(verified), 60)
                row[part] = round(time.perf_counter() - begin - wait_seconds, 2)
                assert output.results.keys() == verified.keys(), output
        rows.append(row)
        print(json.dumps(row), flush=True)
    medians = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
    print(json.dumps({"verified": len(verified), **medians}))


def _cold_starts() -> None:
    with _training() as seconds:
        for _ in range(2):
            row = {}
            for name, kernels in (("off_s", "off"), ("first_s", "auto")):
                with tempfile.TemporaryDirectory() as nothing, tempfile.TemporaryDirectory() as compiled:
                    row[name] = seconds("train", kernels, nothing, MLX_PTX_CACHE_DIR=compiled)
            print(json.dumps(row), flush=True)


def _starts() -> None:
    """Print what a later start costs, in processes that share a cache in which everything is proved."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        variables = {"XDG_CACHE_HOME": cache, "PYTHONPYCACHEPREFIX": f"{cache}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
        for number in range(ROUNDS + 1):
            command = [sys.executable, "-m", "benchmarks.kernels", "start-once"]
            environment, root = {**os.environ, **variables}, Path(__file__).parents[1]
            done = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True)
            if number:  # the first process fills the cache
                print(done.stdout, end="", flush=True)
                rows.append(json.loads(done.stdout))
    print(json.dumps({f"median_{key}": statistics.median(row[key] for row in rows) for key in rows[0]}), flush=True)


def _start_once() -> None:
    """Do what `model_kernels.choose_for` does with all results cached, in the reference job's shape."""
    from benchmarks.shapes import SMOLLM2_135M
    from mlxflow.device import compute_device
    from mlxflow.models import model_folder
    from mlxflow.stages import train  # noqa: F401 what a training run has imported anyway

    model = model_folder.build(SMOLLM2_135M, seed=0)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    compute_device.environment(None), compute_device.working_set_bytes()  # asked before, too
    times, works = [time.perf_counter()], [time.process_time()]

    def lap() -> None:
        times.append(time.perf_counter())
        works.append(time.process_time())

    from mlxflow.kernels import codegen, fingerprint, layer_patching, registry
    from mlxflow.kernels.early_start import cache_file
    from mlxflow.kernels.layer_signature import group_layers
    from mlxflow.kernels.verifier_process import VerificationResult

    lap()
    place = fingerprint.environment()
    lap()
    layers = layer_patching.find_layers(model)
    lap()
    known = registry.known_results(place)
    lap()
    if codegen.language() == "cuda":
        codegen.programs_run()
    lap()
    names = sorted({pattern.kernel_name(module, mx.bfloat16) for module, pattern in layers})
    imports, *parts = [(later - sooner) * 1e3 for sooner, later in itertools.pairwise(times)]
    took = {"imports_ms": imports, "else_ms": sum(parts), "else_process_ms": (works[-1] - works[1]) * 1e3}
    took |= dict(zip(("environment_ms", "patterns_ms", "results_ms", "programs_ms"), parts, strict=True))
    begin = time.perf_counter()
    group_layers(model)
    took["grouping_ms"] = (time.perf_counter() - begin) * 1e3  # a part of patterns_ms
    if not known:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        registry.keep_results(place, dict.fromkeys(names, VerificationResult(True, "")))
    shown = {key: round(milliseconds, 1) for key, milliseconds in took.items()}
    print(json.dumps({"layers": len(layers), "known": len(known)} | shown), flush=True)


_INCLUDES = "".join(
    f"#include <{name}>\n"
    for name in (
        "cuda/std/array",
        "cuda/std/limits",
        "cuda/std/tuple",
        "cuda_bf16.h",
        "cuda_fp16.h",
        "cooperative_groups.h",
    )
)


def _compile() -> None:
    from mlxflow.kernels import adamw, codegen, cross_entropy, gated_activation, nvrtc, rms_norm_source

    fp32, bf16 = "float32", "bfloat16"
    programs = [
        (rms_norm_source.FORWARD, [bf16, bf16, fp32], [bf16], [("D", "576"), ("WARPS", "1")]),
        (rms_norm_source.BACKWARD, [bf16, bf16, bf16, fp32], [bf16, fp32], [("D", "576"), ("WARPS", "1")]),
        (gated_activation._SOURCE, [bf16] * 3, [bf16] * 2, [("ACT", "0")]),
        (cross_entropy._SOURCE, [bf16, fp32, "uint32", fp32], [bf16], []),
        (adamw._PLAIN, [bf16] * 4 + [fp32] * 2 + ["bool"] + [fp32] * 3, [bf16] * 3, [("W", bf16)]),
        (adamw._SQUARES, [bf16], [fp32], []),
    ]
    folder = Path(os.environ["CUDA_HOME"]) / "include"
    library = nvrtc.find_library()
    for source, inputs, outputs, constants in programs:
        _, text = codegen.program_text(source, inputs, outputs, [("THREADS", "256"), *constants])
        took = {}
        includes = [folder, folder / "cccl"]
        for what, before, paths in (("ms", "", []), ("with_headers_ms", _INCLUDES, includes)):
            begin = time.perf_counter()
            assert nvrtc.compile_for(library, before + text, "sm_90", includes=paths), "it did not compile"
            took[what] = round((time.perf_counter() - begin) * 1e3)
        print(json.dumps({"kernel": source.name, "nvrtc": nvrtc.library_version(library)} | took), flush=True)


def _main() -> None:
    if sys.argv[1:] == ["compile"]:
        return _compile()
    if sys.argv[1:] == ["attention"]:
        return _attention()
    if sys.argv[1:] == ["first"]:
        return _first_starts()
    if sys.argv[1:] == ["cold"]:
        return _cold_starts()
    if sys.argv[1:] == ["start"]:
        return _starts()
    if sys.argv[1:] == ["start-once"]:
        return _start_once()
    return _operations()


def _operations() -> None:
    from mlxflow.kernels.verification_cases import case_of

    for name, numbers, bytes_each in CASES:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        tried = case_of(name)
        inputs = tried.inputs(numbers)
        mx.eval(inputs)
        kernel, own = _microseconds(mx.compile(tried.kernel), inputs), _microseconds(tried.mlx, inputs)
        pace = _copy_microseconds(numbers * bytes_each)
        row = {"kernel": name, "us": kernel, "mlx_us": own, "pace_us": pace}
        shown = {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(shown | {"of_pace": round(kernel / pace, 2), "mlx_of_pace": round(own / pace, 2)}), flush=True)
        del inputs
        mx.clear_cache()


if __name__ == "__main__":
    let_children_import_checkout()
    cpu_backend.prepare()
    _main()
