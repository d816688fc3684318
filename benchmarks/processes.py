"""Programs run in processes of their own: their seconds and the most memory they held."""

import os
import subprocess
import sys
import time
from pathlib import Path

# ru_maxrss of a new process begins at what its parent had (Linux), so the system is asked for the process's own peak.
_PRINT_PEAK = """
import resource
from pathlib import Path
status = Path("/proc/self/status")
if status.exists():
    peak = next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print("peak", peak)
"""


def let_children_import_checkout() -> None:
    """Put this checkout first on the import path of child processes, also of those that verify kernels."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def run_script(script: str, *arguments: str, cwd: Path | None = None) -> tuple[float, float]:
    """Run a Python script in a process of its own; return its seconds and its peak memory, without its children."""
    code = f"import sys\n{script}\n{_PRINT_PEAK}"
    begin = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, float(done.stdout.rpartition("peak ")[2])


def run_command(command: list[str], folder: Path) -> tuple[float, int]:
    """Return the seconds of a process and the most memory it held, in bytes."""
    begin = time.perf_counter()
    environment = {**os.environ, "USE_TORCH": "0"}  # transformers would import it, for neither's use
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.perf_counter() - begin, usage.ru_maxrss * (1024 if sys.platform.startswith("linux") else 1)
