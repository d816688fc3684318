"""Which kernels serve on this device: proved once, kept in the user's cache."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow import device
from mlxflow.kernels.language import language
from mlxflow.kernels.proof import Outcome
from mlxflow.locking import device_lock, hold

#: Seconds that the proof of one kernel may take, its compilation included.
LIMIT_SECONDS = 30.0

_COMMAND = (sys.executable, "-m", "mlxflow.kernels.proof")
_LACKING = Outcome(False, "MLX takes no kernels on this device")


class Choice(NamedTuple):
    """Which kernels serve.

    Attributes:
        outcomes: by the kernel's name.
    """

    outcomes: Mapping[str, Outcome]

    def serves(self, name: str) -> bool:
        """Return whether a kernel serves; one that was never asked for does not."""
        outcome = self.outcomes.get(name)
        return outcome is not None and outcome.serves

    @property
    def serving(self) -> list[str]:
        """The names of those that serve."""
        return sorted(name for name, outcome in self.outcomes.items() if outcome.serves)

    @property
    def refused(self) -> dict[str, str]:
        """Why others do not, by name."""
        return {name: outcome.reason for name, outcome in sorted(self.outcomes.items()) if not outcome.serves}


def recorded(names: Iterable[str], serving: Iterable[str]) -> Choice:
    """Return the choice that a run before this one made.

    Args:
        names: of all kernels wanted.
        serving: of those that served.
    """
    chosen = set(serving)
    return Choice({name: Outcome(name in chosen, "" if name in chosen else "it did not serve then") for name in names})


def cache_file() -> Path:
    """Return where outcomes are kept: in the user's cache folder."""
    return device_lock().with_name("kernels.json")


def choose(names: Iterable[str], *, command: Sequence[str] = _COMMAND, limit_seconds: float = LIMIT_SECONDS) -> Choice:
    """Return which of the wanted kernels serve on the default device; prove those of which nothing is known.

    Args:
        names: of the wanted kernels.
        command: what proves the names that follow it.
        limit_seconds: for each.
    """
    wanted = sorted(set(names))
    if language() is None:
        return Choice(dict.fromkeys(wanted, _LACKING))
    return Choice(prove_all(wanted, environment(), command=command, limit_seconds=limit_seconds))


def environment() -> str:
    """Return what an outcome depends on beside the kernel's name: device, system, MLX and the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return " | ".join([device.name(), platform.platform(), f"mlx {version('mlx')}", digest.hexdigest()[:16]])


def prove_all(names: Sequence[str], place: str, *, command: Sequence[str], limit_seconds: float) -> dict[str, Outcome]:
    """Return the outcome of each kernel, from the cache where it is there.

    Where two processes want the same, one proves and the other waits. A cache that is damaged counts as empty, one
    that cannot be written is done without.

    Args:
        names: of the wanted kernels.
        place: what the outcomes hold for.
        command: see `choose`.
        limit_seconds: see `choose`.
    """
    known = known_outcomes(place)
    if all(name in known for name in names):
        return {name: known[name] for name in names}
    waiting = "process {holder} is proving the GPU kernels; waiting for it"
    with hold(cache_file().with_name("kernels.lock"), waiting, wait=True):
        known = known_outcomes(place)
        missing = [name for name in names if name not in known]
        if missing:
            known |= _prove_alone(missing, command, limit_seconds)
            _keep(place, known)
    return {name: known[name] for name in names}


def known_outcomes(place: str) -> dict[str, Outcome]:
    """Return what the cache knows of a place."""
    entries = _read().get(place, {})
    found = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        try:
            found[name] = Outcome(**entry)
        except TypeError:
            continue
    return found


def _read() -> dict[str, Any]:
    try:
        told = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _keep(place: str, outcomes: Mapping[str, Outcome]) -> None:
    told = _read() | {place: {name: outcome._asdict() for name, outcome in sorted(outcomes.items())}}
    try:
        with tempfile.NamedTemporaryFile("w", dir=cache_file().parent, delete=False) as file:
            file.write(json.dumps(told, indent=1))
        Path(file.name).replace(cache_file())
    except OSError:
        return  # proved anew next time


def _prove_alone(names: Sequence[str], command: Sequence[str], limit_seconds: float) -> dict[str, Outcome]:
    """Prove kernels in a process of their own; go on after one that hangs or crashes."""
    left = list(names)
    outcomes: dict[str, Outcome] = {}
    while left:
        found, begun, end = _run([*command, *left], limit_seconds * len(left))
        outcomes |= found
        left = [name for name in left if name not in found]
        if left:
            failed = begun if begun in left else left[0]
            outcomes[failed] = Outcome(False, end)
            left.remove(failed)
    return outcomes


def _run(command: Sequence[str], limit_seconds: float) -> tuple[dict[str, Outcome], str, str]:
    """Return the outcomes that a process told, the name it began last, and how it ended."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit_seconds, env=dict(os.environ)
        )
        output = done.stdout
        said = done.stderr.strip().splitlines()
        end = f"its process ended with code {done.returncode}" + (f": {said[-1][:200]}" if said else "")
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode() if isinstance(expired.stdout, bytes) else (expired.stdout or "")
        end = f"its proof did not end within {limit_seconds:.0f} s"
    found, begun = {}, ""
    for line in output.splitlines():
        if line.startswith("begin "):
            begun = line.removeprefix("begin ")
            continue
        try:
            told = json.loads(line)
            name = told.pop("name")
            found[name] = Outcome(**told)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found, begun, end
