"""`mlxflow doctor`: the device, its limits and versions, and what makes this machine slow."""

import argparse
import platform
import time
from importlib.metadata import PackageNotFoundError, version

from rich.table import Table

from mlxflow.device import compute_device, cpu_backend
from mlxflow.messages import terminal

_PACKAGES = ("mlxflow", "mlx", "mlx-lm", "doit", "numpy", "safetensors", "tokenizers", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `mlxflow doctor` takes no arguments."""


def run(parsed: argparse.Namespace) -> int:
    """Print the device, limits and versions of this machine; return 0."""
    return examine()


def examine() -> int:
    """Print the device, its limits, the BLAS, the compiler and the versions; return 0."""
    library = cpu_backend.prepare()
    table = Table(show_header=False, box=None)
    for row in [*_describe_device(library), *_describe_versions()]:
        table.add_row(*row)
    console = terminal.console()
    console.print(table)
    for lacking in cpu_backend.missing():
        console.print(f"slow: no {lacking}. Run: {cpu_backend.install_command()}", soft_wrap=True)
    return 0


def _describe_device(library: str | None) -> list[tuple[str, str]]:
    import mlx.core as mx

    chosen = compute_device.select("auto")
    return [
        ("device", f"{chosen}: {compute_device.name()}"),
        ("memory MLX can use well", f"{compute_device.working_set_bytes() / 1e9:.1f} GB"),
        ("matrix products, fp32", f"{_measure_gflops():.0f} GFLOP/s (1024 x 1024, best of 5)"),
        ("BLAS", f"{library or 'built in'}, computes with {cpu_backend.thread_count()} threads"),
        ("mx.compile", "available" if not _lacks_compiler() else "runs uncompiled"),
        ("GPU kernels", _describe_kernels()),
        ("Metal", "yes" if mx.metal.is_available() and mx.is_available(mx.gpu) else "no"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    ]


def _describe_kernels() -> str:
    """Return the verification result of each kernel on this device, as far as it is cached."""
    from mlxflow.kernels.codegen import language
    from mlxflow.kernels.fingerprint import environment
    from mlxflow.kernels.registry import known_results

    if language() is None:
        return "none on this device"
    known = known_results(environment())
    lines = [f"{name}: {'used' if result.passed else result.reason}" for name, result in known.items()]
    return "\n".join(lines) or "not verified yet; the first training run does it"


def _lacks_compiler() -> bool:
    return any(lacking.startswith("g++") for lacking in cpu_backend.missing())


def _describe_versions() -> list[tuple[str, str]]:
    rows = []
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _measure_gflops() -> float:
    """Return the rate of MLX's fp32 matrix product on the default device, in GFLOP/s."""
    import mlx.core as mx

    size = 1024
    a = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(a, a @ a)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e9
