"""Which kernels passed verification on this device: verified once, cached in the user's cache folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

from mlxflow.kernels.codegen import language
from mlxflow.kernels.early_start import COMMAND, WAITING, EarlyVerifier, cache_file, lock_file
from mlxflow.kernels.fingerprint import environment
from mlxflow.kernels.verifier_process import Verification, VerificationResult, Verifier
from mlxflow.messages import terminal
from mlxflow.storage import cache_files
from mlxflow.storage.locks import hold

if TYPE_CHECKING:
    from mlxflow.kernels.verifier_process import VerifierProcess

#: Seconds without output after which a kernel counts as hung: on CUDA, MLX may compile six operations for one kernel,
#: 3 to 5 s each.
LIMIT_SECONDS = 120.0

_NO_LANGUAGE = VerificationResult(False, "MLX takes no kernels on this device")


class KernelSelection(NamedTuple):
    """Which of the wanted kernels are used.

    Attributes:
        results: by the kernel's name.
    """

    results: Mapping[str, VerificationResult]

    def uses(self, name: str) -> bool:
        """Return whether a kernel is used; one that was not among the wanted ones is not."""
        result = self.results.get(name)
        return result is not None and result.passed

    @property
    def selected(self) -> list[str]:
        """The names of the kernels that are used."""
        return sorted(name for name, result in self.results.items() if result.passed)

    @property
    def refused(self) -> dict[str, str]:
        """Why the others are not used, by name."""
        return {name: result.reason for name, result in sorted(self.results.items()) if not result.passed}


def recorded(names: Iterable[str], selected: Iterable[str]) -> KernelSelection:
    """Return the selection that an earlier run recorded.

    Args:
        names: of all kernels wanted.
        selected: names of those that the run used.
    """
    used, reason = set(selected), "the recorded run did not use it"
    results = {name: VerificationResult(name in used, "" if name in used else reason) for name in names}
    return KernelSelection(results)


def begin(ahead: EarlyVerifier | None = None, command: Sequence[str] = COMMAND) -> EarlyVerifier:
    """Start the verifier process before the kernel names are known, unless results for this device are cached.

    It gets ready while the model is built.

    Args:
        ahead: of `early_start.begin_early`; ended if results are cached.
        command: see `verify_all`.
    """
    ahead = ahead or EarlyVerifier()
    if language() is None or known_results(environment()):
        ahead.stop()
    elif ahead.process is None:
        ahead.start(command, lambda: not known_results(environment()))  # another process may have just finished
    return ahead


def choose(
    names: Iterable[str],
    ahead: EarlyVerifier | None = None,
    meanwhile: Callable[[KernelSelection], object] = lambda _: None,
) -> KernelSelection:
    """Select the kernels that pass verification on the default device; verify those without a cached result.

    Args:
        names: of the wanted kernels.
        ahead: of `begin`; ended.
        meanwhile: called while MLX compiles what verification needs, about a minute, with the expected selection: all
            pass. Nothing is verified yet, and nothing may be timed.
    """
    wanted = sorted(set(names))
    kernel_language = language()
    with ahead or nullcontext():
        if kernel_language is None:
            return KernelSelection(dict.fromkeys(wanted, _NO_LANGUAGE))
        # CUDA's compiler takes seconds for each; Metal's takes a moment
        compiler = (*COMMAND, "--compile") if kernel_language == "cuda" else None
        results = verify_all(
            wanted,
            environment(),
            Verifier(COMMAND, compiler, LIMIT_SECONDS),
            process=None if ahead is None else ahead.process,
            meanwhile=lambda: meanwhile(recorded(wanted, wanted)),
        )
    return KernelSelection(results)


def verify_all(
    names: Sequence[str],
    place: str,
    verifier: Verifier,
    *,
    process: "VerifierProcess | None" = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, VerificationResult]:
    """Return the result of each kernel, from the cache if possible; print why new ones are not used.

    A failure of the verifier before it is ready for the kernels says nothing about them and is not cached, and a kernel
    for which the device had no memory left is verified again by the next run.

    Where two processes want the same kernels, one verifies and the other waits.

    Args:
        names: of the wanted kernels.
        place: the environment that the results hold for.
        verifier: how kernels are verified.
        process: of the verifier, started already; then the lock is held.
        meanwhile: see `verifier_process.verify`.
    """
    known = known_results(place)
    if all(name in known for name in names):
        return {name: known[name] for name in names}
    with hold(lock_file(), WAITING, wait=True) if process is None else nullcontext():
        known = known_results(place)
        missing = [name for name in names if name not in known]
        if missing:
            verification = _verify(missing, verifier, process, meanwhile)
            known |= verification.results
            keep_results(place, known)
            _say_refused({name: known[name] for name in missing if name in known and not known[name].passed})
            known |= _unverified([name for name in missing if name not in known], verification.failure)
    return {name: known[name] for name in names}


def _say_refused(refused: Mapping[str, VerificationResult]) -> None:
    """Print why kernels are refused, each reason once."""
    for result in {result.reason: result for result in refused.values()}.values():
        names = [name for name, one in refused.items() if one.reason == result.reason]
        where = "on this device" if result.holds else "in this run, the next one verifies again"
        terminal.say(f"{_kernels(names)} not used {where}: {result.reason}")


def _unverified(names: Sequence[str], failure: str) -> dict[str, VerificationResult]:
    """Return results, not to be cached, of kernels that the verifier did not get to; print why."""
    if names:
        terminal.say(
            f"{_kernels(names)} not used in this run, the next one verifies again. Verification failed: {failure}"
        )
    return dict.fromkeys(names, VerificationResult(False, f"not verified: {failure}"))


def _kernels(names: Sequence[str]) -> str:
    return f"GPU kernel {names[0]} is" if len(names) == 1 else f"GPU kernels {', '.join(names)} are"


def _verify(
    names: Sequence[str], verifier: Verifier, process: "VerifierProcess | None", meanwhile: Callable[[], object]
) -> Verification:
    """Verify kernels in other processes; print what is waited for."""

    def compiling() -> None:
        terminal.say("MLX compiles its own operations for that and for training, once on this machine: about a minute")
        meanwhile()

    terminal.say(f"verifying {len(names)} GPU kernels, once on this device: {', '.join(names)}")
    return verifier.verify(names, process, compiling)


def known_results(place: str) -> dict[str, VerificationResult]:
    """Return the cached results for an environment."""
    entries = cache_files.read_table(cache_file()).get(place, {})
    results = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        try:
            result = VerificationResult(**entry)
        except TypeError:
            continue
        if isinstance(result.passed, bool) and isinstance(result.reason, str):
            results[name] = result
    return results


def keep_results(place: str, results: Mapping[str, VerificationResult]) -> None:
    """Cache the results for an environment that hold for later runs, beside those of other environments."""
    entries = {name: result._asdict() for name, result in sorted(results.items()) if result.holds}
    cache_files.write_table(cache_file(), cache_files.read_table(cache_file()) | {place: entries})
