"""Which kernels serve on this device: proved once, kept in the user's cache."""

import functools
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxflow.device import compute_device
from mlxflow.kernels.codegen import language
from mlxflow.kernels.early_start import COMMAND, WAITING, Ahead, cache_file, lock_file
from mlxflow.kernels.verification_outcome import Outcome
from mlxflow.storage import artifact_files
from mlxflow.storage.locks import hold
from mlxflow.system import terminal

if TYPE_CHECKING:
    from mlxflow.kernels.verifier_process import Prover

#: Seconds without a word after which a kernel hangs: on CUDA MLX may compile six operations for one, 3 to 5 s each.
LIMIT_SECONDS = 120.0

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


def begin(ahead: Ahead | None = None, command: Sequence[str] = COMMAND) -> Ahead:
    """Start the process that proves kernels before it is known which, where none was proved yet.

    So it makes itself ready while the model is built.

    Args:
        ahead: of `ahead.begin_early`; ended where something was proved.
        command: see `prove_all`.
    """
    ahead = ahead or Ahead()
    if language() is None or known_outcomes(environment()):
        ahead.stop()
    elif ahead.prover is None:
        ahead.start(command, lambda: not known_outcomes(environment()))  # nor proved just now
    return ahead


def choose(
    names: Iterable[str], ahead: Ahead | None = None, meanwhile: Callable[[Choice], object] = lambda _: None
) -> Choice:
    """Return which of the wanted kernels serve on the default device; prove those of which nothing is known.

    Args:
        names: of the wanted kernels.
        ahead: of `begin`; ended.
        meanwhile: called where what is proved must be compiled by MLX first, which takes a minute, with what is to
            be expected: that all serve. They are not proved yet, and nothing may be timed.
    """
    wanted = sorted(set(names))
    words = language()
    with ahead or nullcontext():
        if words is None:
            return Choice(dict.fromkeys(wanted, _LACKING))
        compiler = (*COMMAND, "--compile") if words == "cuda" else None  # seconds each; Metal's takes a moment
        outcomes = prove_all(
            wanted,
            environment(),
            command=COMMAND,
            compiler=compiler,
            limit_seconds=LIMIT_SECONDS,
            prover=None if ahead is None else ahead.prover,
            meanwhile=lambda: meanwhile(recorded(wanted, wanted)),
        )
    return Choice(outcomes)


def environment() -> str:
    """Return what an outcome depends on beside the kernel's name: device, system, MLX and the kernels' sources."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return " | ".join([compute_device.name(), system, f"mlx {compute_device.environment(None)['mlx']}", _sources()])


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def prove_all(
    names: Sequence[str],
    place: str,
    *,
    command: Sequence[str],
    compiler: Sequence[str] | None,
    limit_seconds: float,
    prover: "Prover | None" = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, Outcome]:
    """Return the outcome of each kernel, from the cache where it is there; say of new ones why they do not serve.

    Where two processes want the same, one proves and the other waits. A cache that is damaged counts as empty, one
    that cannot be written is done without.

    Args:
        names: of the wanted kernels.
        place: what the outcomes hold for.
        command: proves the kernels whose names it reads, and tells as `mlxflow.kernels.verification` does.
        compiler: compiles the kernel whose name it reads, so that its proof finds it compiled; where compiling takes
            long, all are compiled at the same time. None where it takes no time to speak of.
        limit_seconds: that one kernel may take, of each of the two.
        prover: a process of the command that was started already; then the lock is held.
        meanwhile: see `processes.prove`.
    """
    known = known_outcomes(place)
    if all(name in known for name in names):
        return {name: known[name] for name in names}
    with hold(lock_file(), WAITING, wait=True) if prover is None else nullcontext():
        known = known_outcomes(place)
        missing = [name for name in names if name not in known]
        if missing:
            known |= _proved(
                missing,
                command=command,
                compiler=compiler,
                limit_seconds=limit_seconds,
                ahead=prover,
                meanwhile=meanwhile,
            )
            _keep(place, known)
            for name in missing:
                if not known[name].serves:
                    _say(f"GPU kernel {name} is not used on this device: {known[name].reason}")
    return {name: known[name] for name in names}


def _proved(names: Sequence[str], *, meanwhile: Callable[[], object], **how: Any) -> dict[str, Outcome]:
    """Return what the processes come to, and say what is waited for."""
    from mlxflow.kernels import verifier_process

    def waiting() -> None:
        _say("MLX compiles its own operations for that and for training, once on this machine: about a minute")
        meanwhile()

    _say(f"proving {len(names)} GPU kernels, once on this device: {', '.join(names)}")
    return verifier_process.prove(names, meanwhile=waiting, **how)


def known_outcomes(place: str) -> dict[str, Outcome]:
    """Return what the cache knows of a place."""
    entries = _read().get(place, {})
    found = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        try:
            outcome = Outcome(**entry)
        except TypeError:
            continue
        if isinstance(outcome.serves, bool) and isinstance(outcome.reason, str):
            found[name] = outcome
    return found


def _read() -> dict[str, Any]:
    try:
        told = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _keep(place: str, outcomes: Mapping[str, Outcome]) -> None:
    told = _read() | {place: {name: outcome._asdict() for name, outcome in sorted(outcomes.items())}}
    with suppress(OSError):  # proved anew next time
        artifact_files.write_whole(cache_file(), json.dumps(told, indent=1).encode())


def _say(line: str) -> None:
    terminal.say(line)
