"""Watch the ranks of a run: end all when one ends or makes no progress, and start them again from their checkpoint.

MLX's backends have no timeout: a rank waits for ever for one that is stopped. So every rank sends heartbeats, and the
supervisor ends all of them when one is silent for too long. A rank that is killed at any moment leaves only whole
checkpoints, so no rank needs time to clean up.
"""

import select
import signal
import time
from contextlib import ExitStack
from typing import NamedTuple

from mlxflow.device.stop_signals import StopFlag, stop_on_signals
from mlxflow.distributed.heartbeat import Failure
from mlxflow.distributed.launcher import Launch, RankProcess, start_ranks
from mlxflow.distributed.memory_deaths import MemoryDeaths
from mlxflow.distributed.remote_rank import HostError
from mlxflow.distributed.running_rank import RunningRank
from mlxflow.distributed.ssh_link import StopRequestedError
from mlxflow.messages import terminal
from mlxflow.messages.errors import StageError, UserError

# Time between two checks of processes and clocks
_TICK_SECONDS = 0.1

# A rank notices at once that a peer has ended: this long the supervisor waits for news of that peer itself
_CAUSE_SECONDS = 2.0

# For a checkpoint after SIGTERM; doit waits for 30 s
_GRACE_SECONDS = 25.0

# How often the ranks start again because a port was taken by another program; these restarts are not counted
_MAX_PORT_RETRIES = 5

# Before the ranks start again after another host was lost: the first time, and at most
_HOST_SECONDS, _MOST_HOST_SECONDS = 5.0, 60.0


class RestartLimits(NamedTuple):
    """When the supervisor intervenes.

    Attributes:
        timeout: of a rank without progress, as the user wrote it.
        timeout_seconds: the same as a number.
        restarts: how often all ranks may start again.
    """

    timeout: str
    timeout_seconds: float
    restarts: int


class Cause(NamedTuple):
    """Why the ranks were ended.

    Attributes:
        reason: in words, such as "rank 1 ended with signal SIGKILL at step 3 (forward pass)".
        rank: the rank that failed.
        failure: the rank's own message; None if it sent none.
        is_final: whether another start would fail in the same way.
        has_trained: whether a rank had begun to train, or another start may be different.
        too_many_rows: of the forward passes in which memory ran out; 0 for another reason.
    """

    reason: str
    rank: int
    failure: Failure | None = None
    is_final: bool = False
    has_trained: bool = True
    too_many_rows: int = 0

    @property
    def kind(self) -> str:
        """The kind of the rank's own message; empty if it sent none."""
        return self.failure.kind if self.failure else ""


def supervise(task: str, launch: Launch, limits: RestartLimits) -> None:
    """Run all ranks to the end of their stage.

    Args:
        task: the stage, for messages.
        launch: how to start the ranks.
        limits: when to intervene.

    Raises:
        SystemExit: SIGINT or SIGTERM ended the run; a checkpoint is saved if the training had begun.
        StageError: a rank failed, more often than it may start again.
        UserError: a rank found a mistake of the user.
    """
    restarts = port_retries = 0
    has_trained = False
    last = ""
    while True:
        cause = _Watch(task, launch, limits).run()
        if cause is None:
            return
        _refuse_mistake(cause)
        if cause.kind == "join" and port_retries < _MAX_PORT_RETRIES:
            port_retries += 1
            terminal.say(f"{task}: {cause.reason}; the ranks start again with other ports")
            continue
        if 0 < cause.too_many_rows < (launch.too_many_rows or cause.too_many_rows + 1):
            launch = launch._replace(too_many_rows=cause.too_many_rows)
            terminal.say(
                f"{task}: {cause.reason}; all ranks start again from the last checkpoint with fewer than "
                f"{cause.too_many_rows} rows in a forward pass"
            )
            continue
        has_trained |= cause.has_trained
        if end := _end_of_restarts(cause, restarts, limits, has_trained=has_trained, last=last):
            raise StageError(f"{task}: {cause.reason}{end[0]}. See {launch.logs[cause.rank]}.{end[1]}")
        restarts += 1
        last = cause.reason
        terminal.say(
            f"{task}: {cause.reason}; all ranks start again from the last checkpoint (restart {restarts} of "
            f"{limits.restarts})"
        )
        if cause.kind == "host":
            time.sleep(min(_MOST_HOST_SECONDS, _HOST_SECONDS * 3 ** (restarts - 1)))


def _end_of_restarts(
    cause: Cause, restarts: int, limits: RestartLimits, *, has_trained: bool, last: str
) -> tuple[str, str] | None:
    """Return words after the reason and advice if the ranks must not start again; None if they may.

    Args:
        cause: of their end.
        restarts: so far.
        limits: when to intervene.
        has_trained: whether the ranks of any start trained.
        last: the reason of the last restart.
    """
    if cause.is_final or (not has_trained and cause.kind in ("", "error", "host")):
        return "", ""
    if cause.kind == "error" and cause.reason == last:
        return ", as before the last restart", ""
    if restarts < limits.restarts:
        return None
    tried = f" after {restarts} restart{'s' * (restarts > 1)}" if restarts else ""
    return tried, " Run it again, which resumes from the last checkpoint."


def _refuse_mistake(cause: Cause) -> None:
    """Raise the error of a rank that a restart would repeat."""
    failure = cause.failure
    if failure is None or failure.kind not in ("refused", "memory") or cause.too_many_rows:
        return
    if failure.exit_code == UserError.exit_code:
        raise UserError(*failure.lines)
    raise StageError("\n".join(failure.lines))


class _Watch:
    """One start of all ranks, watched until the last of them has ended."""

    def __init__(self, task: str, launch: Launch, limits: RestartLimits) -> None:
        self._task = task
        self._launch = launch
        self._limits = limits
        self._ranks: list[RunningRank] = []
        self._alive: dict[int, float] = {}
        self._failed_since: float | None = None
        self._stopping_since: float | None = None
        self._memory = MemoryDeaths()

    def run(self) -> Cause | None:
        """Start the ranks and wait for them; return why they failed, None if they are done.

        Raises:
            SystemExit: a signal ended the run.
        """
        with stop_on_signals() as stop_requested, ExitStack() as held:
            try:
                start_ranks(self._launch, self._ranks, held, stop_requested=stop_requested, start=RankProcess)
                self._alive = dict.fromkeys(range(self._launch.size), time.monotonic())
                cause = self._watch(stop_requested)
            except HostError as error:
                failure = Failure("host", (str(error),), 1)
                words = f"rank {error.number} could not be started: {error}".rstrip(".")
                cause = Cause(words, error.number, failure, is_final=error.is_final, has_trained=False)
            except StopRequestedError:
                cause = Cause("a signal ended the start", 0)
            finally:
                self._end()
            if stop_requested() and (cause or any(rank.exit_code for rank in self._ranks)):
                raise SystemExit(128 + stop_requested.signal)
            return cause

    def _watch(self, stop_requested: StopFlag) -> Cause | None:
        while True:
            self._read(_TICK_SECONDS)
            if stop_requested() and self._stopping_since is None:
                self._stopping_since = time.monotonic()
                for rank in self._ranks:
                    rank.release()
                    rank.signal(signal.SIGTERM)
            for rank in self._ranks:
                rank.tick()
            ended = [rank for rank in self._ranks if rank.exit_code is not None or rank.hangs_in_its_end]
            if self._stopping_since is not None:
                if len(ended) == len(self._ranks) or time.monotonic() > self._stopping_since + _GRACE_SECONDS:
                    return None
            elif cause := self._failed(ended) or self._silent():
                return cause
            elif len(ended) == len(self._ranks):
                return None

    def _read(self, seconds: float) -> None:
        """Take messages and output of the ranks, waiting for them at most so long."""
        owners = {pipe: rank for rank in self._ranks for pipe in rank.pipes}
        if not owners:
            time.sleep(seconds)
            return
        poll = select.poll()
        for pipe in owners:
            poll.register(pipe, select.POLLIN | select.POLLHUP)
        for pipe, _ in poll.poll(seconds * 1000):
            if owners[pipe].read(pipe):
                self._alive[owners[pipe].number] = time.monotonic()

    def _failed(self, ended: list[RunningRank]) -> Cause | None:
        """Return why the first rank failed; None while none has, or while its own cause may still become known."""
        if not _failed_ones(ended):
            return None
        self._drain()  # an ended rank may have sent that it was done
        if not (failed := _failed_ones(ended)):
            return None
        self._failed_since = self._failed_since or time.monotonic()
        causes = sorted(failed, key=_order_of_blame)
        is_consequence = _order_of_blame(causes[0]) >= _CONSEQUENCE
        may_follow = len(ended) < len(self._ranks)
        if is_consequence and may_follow and time.monotonic() < self._failed_since + _CAUSE_SECONDS:
            return None
        has_trained = any(rank.beat.step >= 0 for rank in self._ranks)
        return _cause_of(causes[0], has_trained=has_trained, by_memory=self._ended_by_memory(causes[0]))

    def _ended_by_memory(self, rank: RunningRank) -> bool:
        if rank.failure is not None:
            return rank.failure.kind == "memory"
        return isinstance(rank, RankProcess) and self._memory.explains(rank.exit_code or 0)

    def _silent(self) -> Cause | None:
        """Return which rank made no progress for too long; a rank that waits for others is not to blame for that."""
        running = [rank for rank in self._ranks if rank.is_training]
        waiting = [rank for rank in running if rank.beat.waits]
        late = self._late_ones(running, waiting)
        if not late:
            return None
        # one that computes waits for a stopped one, too, when its device has no more room for work
        slowest = min([*late, *(rank for rank in waiting if rank.is_stopped)], key=self._order_of_silence)
        return Cause(_describe_silence(slowest, waiting, self._limits.timeout), slowest.number)

    def _late_ones(self, running: list[RunningRank], waiting: list[RunningRank]) -> list[RunningRank]:
        """Return the ranks whose time is over; of ranks that wait, only a stopped one, or all of them."""
        busy = [rank for rank in running if not rank.beat.waits and (rank.beat.step >= 0 or waiting)]
        late = [rank for rank in [*busy, *waiting] if self._is_late(rank, waiting)]
        stopped = [rank for rank in late if rank.is_stopped]
        if stopped:
            return stopped
        late_and_busy = [rank for rank in late if not rank.beat.waits]
        return late_and_busy if busy else late if len(late) == len(waiting) else []

    def _order_of_silence(self, rank: RunningRank) -> tuple[bool, int, float]:
        """Return the order of late ranks: the first one is to blame."""
        return not rank.is_stopped, rank.beat.step, self._alive[rank.number]

    def _is_late(self, rank: RunningRank, waiting: list[RunningRank]) -> bool:
        """Return whether a rank's time is over.

        It began with the rank's last sign of life or, before the training, when another one began to wait.
        """
        begin = self._alive[rank.number]
        if rank.beat.step < 0 and waiting:
            begin = max(begin, min(self._alive[other.number] for other in waiting))
        return time.monotonic() > begin + self._limits.timeout_seconds

    def _drain(self) -> None:
        """Take what ended ranks have sent before."""
        for _ in range(100):
            before = sum(len(rank.pipes) for rank in self._ranks)
            self._read(0.0)
            if before == sum(len(rank.pipes) for rank in self._ranks):
                return

    def _end(self) -> None:
        """Kill every rank that still runs, and take the rest of the output."""
        for rank in self._ranks:
            rank.signal(signal.SIGKILL)
        for rank in self._ranks:
            rank.end()
        self._drain()
        for rank in self._ranks:
            rank.close()


# From this place on in the order of blame, the end of a rank may be a consequence of another one's
_CONSEQUENCE = 3


def _failed_ones(ended: list[RunningRank]) -> list[RunningRank]:
    return [rank for rank in ended if rank.exit_code or not rank.beat.is_done]


def _order_of_blame(rank: RunningRank) -> int:
    """Return how likely a rank's end is the cause of the others' ends: 0 comes first."""
    if rank.failure is None:
        return 0 if (rank.exit_code or 0) < 0 else _CONSEQUENCE  # NCCL ends a process that lost a peer
    return {"refused": 1, "error": 1, "host": 1, "memory": 1, "join": 2, "peer": _CONSEQUENCE + 1}[rank.failure.kind]


def _cause_of(rank: RunningRank, *, has_trained: bool, by_memory: bool) -> Cause:
    code, name = rank.exit_code or 0, rank.name
    if by_memory and rank.beat.batch_size:
        reason = f"{name} ran out of memory {_place(rank)}"
        return Cause(reason, rank.number, rank.failure, too_many_rows=rank.beat.batch_size)
    if rank.failure is not None:
        words = {
            "join": "could not join the others",
            "peer": "lost the connection to another rank",
            "host": "was lost",
        }
        what = words.get(rank.failure.kind, "failed")
        reason = f"{name} {what} {_place(rank)}: {rank.failure.lines[0]}"
        return Cause(reason, rank.number, rank.failure, has_trained=has_trained)
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    said = f": {rank.last_line}" if rank.last_line and not has_trained and code > 0 else ""
    return Cause(f"{name} ended with {how} {_place(rank)}{said}", rank.number, has_trained=has_trained or code < 0)


def _describe_silence(slowest: RunningRank, waiting: list[RunningRank], timeout: str) -> str:
    stopped = " and is stopped" if slowest.is_stopped else ""
    others = [rank for rank in waiting if rank is not slowest]
    meanwhile = f"; {others[0].name} waited in: {others[0].beat.doing}" if others else ""
    return f"{slowest.name} made no progress for {timeout} {_place(slowest)}{stopped}{meanwhile}"


def _place(rank: RunningRank) -> str:
    """Return in words where a rank is in its run."""
    beat = rank.beat
    where = "before the training" if beat.step < 0 else "before step 1" if not beat.step else f"at step {beat.step}"
    return f"{where} ({beat.doing})"
