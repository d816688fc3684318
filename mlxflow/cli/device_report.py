"""What a device is and does, as one JSON made to be pasted into an issue: no names of users or hosts, and no paths."""

import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mlxflow.device import compute_device, cpu_backend
from mlxflow.device.gpu_cores import gpu_cores

#: The packages whose versions matter.
PACKAGES = ("mlxflow", "mlx", "mlx-lm", "doit", "numpy", "safetensors", "tokenizers", "transformers")

# What may be a path: it begins with a slash or with a home folder
_PATH = re.compile(r"(?<![\w.>])[~/][^\s:;,'\"()]*")

# Rows of the matrices that are multiplied, the most products, and seconds after which no other one begins
_PRODUCT_SIZE, _PRODUCTS, _PRODUCTS_SECONDS = 1024, 5, 0.5


def collect(names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the report of the default device, as JSON values; kernels without a cached result are verified.

    Args:
        names: of the kernels and checks; None for one of each kind.
    """
    kind = compute_device.select("auto")
    results = _verify(kernels_to_verify() if names is None else list(names)) if kind == "gpu" else {}
    return {
        "format": 1,
        "date": datetime.now(UTC).date().isoformat(),
        "system": system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions(),
        "device": kind,
        "device_name": compute_device.name(),
        **({"gpu_cores": gpu_cores()} if kind == "gpu" and platform.system() == "Darwin" else {}),
        **_memory(),
        "compiles": not cpu_backend.lacks_compiler(),
        "tf32": os.environ.get("MLX_ENABLE_TF32", "the default of MLX"),
        "matrix_product_gflops": {dtype: round(measure_gflops(dtype), 1) for dtype in ("float32", "bfloat16")},
        "kernels": {name: result for name, result in results.items() if not _is_check(name)},
        "attention_gradient_repeats": {name: one["passed"] for name, one in results.items() if _is_check(name)},
    }


def kernels_to_verify() -> list[str]:
    """Return the names of a kernel of each kind for common shapes, and of the checks of this device's attention."""
    import mlx.core as mx

    from mlxflow.kernels import kernel_names as names
    from mlxflow.kernels import repeatability

    found = [
        *(names.adamw_name(mx.float32, dtype) for dtype in (mx.float32, mx.bfloat16)),
        names.sum_of_squares_name(mx.float32),
        names.rms_norm_name(mx.bfloat16, 2048, is_frozen=False),
        names.block_name(mx.bfloat16, 576, is_frozen=False),
        *(names.gated_name(kind, mx.bfloat16) for kind in ("silu", "gelu_approx")),
        names.mlp_name("silu", mx.bfloat16),
    ]
    for dtype in (mx.float32, mx.bfloat16):
        found += [
            names.rms_norm_name(dtype, 128, is_frozen=False),
            names.rotary_name(dtype, 64, interleaved=False),
            names.embedding_name(dtype),
            names.cross_entropy_name(dtype),
        ]
        if mx.metal.is_available():
            found += [repeatability.attention_check(dtype, 64, is_masked=masked) for masked in (False, True)]
    return sorted(found)


def _verify(names: list[str]) -> dict[str, dict[str, Any]]:
    from mlxflow.kernels import registry

    results = registry.choose(names).results
    return {name: result._asdict() | {"reason": without_paths(result.reason)} for name, result in results.items()}


def _is_check(name: str) -> bool:
    from mlxflow.kernels import repeatability

    return repeatability.is_check(name)


def without_paths(text: str) -> str:
    """Return a text with every path replaced."""
    return _PATH.sub("<path>", text)


def system() -> str:
    """Return the operating system's name and version, such as `macOS 15.5`."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {platform.release().partition('-')[0]}"


def versions() -> dict[str, str]:
    """Return the version of each package that matters."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _memory() -> dict[str, int]:
    import mlx.core as mx
    import psutil

    info = mx.device_info()
    sizes = {
        "memory_bytes": int(psutil.virtual_memory().total),
        "working_set_bytes": compute_device.working_set_bytes(),
        "memory_limit_bytes": mx.get_memory_limit(),
    }
    most = int(info.get("max_buffer_length", 0))
    return sizes | ({"max_buffer_bytes": most} if most else {})


def measure_gflops(dtype: str) -> float:
    """Return the rate of MLX's matrix product on the default device, in GFLOP/s: the best of five, or in half a second.

    Args:
        dtype: "float32" or "bfloat16".
    """
    import mlx.core as mx

    a = mx.random.normal((_PRODUCT_SIZE, _PRODUCT_SIZE), key=mx.random.key(0)).astype(getattr(mx, dtype))
    mx.eval(a, a @ a)
    taken: list[float] = []
    while len(taken) < _PRODUCTS and sum(taken) < _PRODUCTS_SECONDS:
        begin = time.perf_counter()
        mx.eval(a @ a)
        taken.append(time.perf_counter() - begin)
    return 2 * _PRODUCT_SIZE**3 / min(taken) / 1e9


#: The head of the table in docs/platforms.md to which reports add rows.
COLUMNS = (
    "device", "system", "Python, MLX", "kernels used", "MLX's attention", "fp32, bf16 products (GFLOP/s)",
    "memory, working set (GB)", "date",
)  # fmt: skip


def table_row(report: Mapping[str, Any]) -> str:
    """Return the row of a report in the table of docs/platforms.md.

    Args:
        report: of `collect`.
    """
    kernels, repeats = report["kernels"], report["attention_gradient_repeats"]
    cores = f", {report['gpu_cores']} cores" if "gpu_cores" in report else ""
    used = sum(bool(one["passed"]) for one in kernels.values())
    products = report["matrix_product_gflops"]
    cells = (
        f"{report['device']}: {report['device_name']}{cores}",
        report["system"],
        f"{report['python']}, {report['versions']['mlx']}",
        f"{used} of {len(kernels)}" if kernels else "none on this device",
        _describe_repeats(repeats.values()),
        f"{products['float32']:,.0f}, {products['bfloat16']:,.0f}",
        f"{report['memory_bytes'] / 1e9:.1f}, {report['working_set_bytes'] / 1e9:.1f}",
        report["date"],
    )
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _describe_repeats(repeats: Iterable[bool]) -> str:
    answers = list(repeats)
    if not answers:
        return "not checked"
    return "equal to the bit" if all(answers) else f"differs in {answers.count(False)} of {len(answers)}"
