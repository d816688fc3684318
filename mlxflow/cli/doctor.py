"""`mlxflow doctor`: the device, its limits and versions, and what makes this machine slow."""

import argparse
import json
import platform
from pathlib import Path

from rich.table import Table

from mlxflow.cli import device_report
from mlxflow.cli.arguments import user_path
from mlxflow.device import compute_device, cpu_backend
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError
from mlxflow.storage import atomic_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--report`."""
    parser.add_argument(
        "--report",
        type=user_path,
        metavar="FILE",
        help="write all of it, without names and paths, as JSON for an issue",
    )


def run(parsed: argparse.Namespace) -> int:
    """Print the device, limits and versions of this machine, or write the report; return 0.

    Raises:
        CallError: the report cannot have that name.
    """
    return examine() if parsed.report is None else write_report(parsed.report)


def examine() -> int:
    """Print the device, its limits, the BLAS, the compiler and the versions; return 0."""
    library = cpu_backend.prepare()
    table = Table(show_header=False, box=None)
    for row in [*_describe_device(library), *device_report.versions().items()]:
        table.add_row(*row)
    console = terminal.console()
    console.print(table)
    for lacking in cpu_backend.missing():
        console.print(f"slow: no {lacking}. Run: {cpu_backend.install_command()}", soft_wrap=True)
    return 0


def write_report(path: Path) -> int:
    """Write the report of this machine and print its row for docs/platforms.md; return 0.

    The kernels that were never verified on this device are verified, which takes a moment.

    Args:
        path: the file; one that exists is replaced.

    Raises:
        CallError: its folder is missing, or it is a folder.
    """
    if path.is_dir():
        raise CallError(f"--report {path}: is a folder. Name a file.")
    if not path.parent.is_dir():
        raise CallError(f"--report {path}: the folder {path.parent} is missing. Make it, or name another file.")
    cpu_backend.prepare()
    report = device_report.collect()
    atomic_folders.write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    terminal.show(device_report.table_row(report))
    return 0


def _describe_device(library: str | None) -> list[tuple[str, str]]:
    import mlx.core as mx

    chosen = compute_device.select("auto")
    return [
        ("device", f"{chosen}: {compute_device.name()}"),
        ("memory MLX can use well", f"{compute_device.working_set_bytes() / 1e9:.1f} GB"),
        ("matrix products, fp32", f"{device_report.measure_gflops('float32'):.0f} GFLOP/s (1024 x 1024, best of 5)"),
        ("BLAS", f"{cpu_backend.describe_blas(library)}, computes with {cpu_backend.thread_count()} threads"),
        ("mx.compile", "runs uncompiled" if cpu_backend.lacks_compiler() else "available"),
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
