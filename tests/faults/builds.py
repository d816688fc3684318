"""A build of two cheap stages, or one of real ones, disturbed at a call and run again: what has to be true of both."""

import itertools
import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from tests.chain import DODO
from tests.conftest import write_workflow
from tests.faults.injection import KINDS, Call, Fault, Injector, Outcome

#: What is done to a template: the disturbed command, and those that bring the folder to its end.
COMMANDS = {
    "first": (("run",), (("run",),)),
    "again": (("run",), (("run",),)),
    "clean": (("clean",), (("clean",), ("run",))),
    "forget": (("forget", "s1"), (("run",),)),
    "pack": (("pack", "s2", "s2.tar"), (("pack", "s2", "s2.tar"), ("run",))),
    "unpack": (("unpack", "s2.tar"), (("unpack", "s2.tar"), ("run",))),
    "pretokenize": (("pretokenize",), (("pretokenize",),)),
    "train": (("train",), (("train",),)),
}


#: Those of real stages; the others are of a chain of two cheap ones.
REAL = ("pretokenize", "train")

#: Files that only save time, which nobody misses.
CACHES = ("digests.json", "graph.json")

# It goes through the door of the real command, which words what fails.
STAGE = """
import hashlib, sys
from pathlib import Path
from mlxflow.cli import command, run as verb
from mlxflow.storage import atomic_folders
from mlxflow.messages.os_errors import naming
from mlxflow.device.child_processes import end_with_parent

def build(parsed):
    end_with_parent()
    number = int(parsed.stage[1:])
    source = Path("source" if number == 1 else f"artifacts/s{number - 1}/a")
    with naming(source):
        read = source.read_bytes()
    print("at work on", parsed.stage, flush=True)
    folder = Path(f"artifacts/{parsed.stage}")
    keep = lambda: [path.name for path in folder.glob("*.txt")]
    with atomic_folders.publishing(folder, keep) as private, (private / "a").open("wb") as file:
        file.write(hashlib.shake_256(parsed.stage.encode() + read).digest(1000))

verb.run = build
sys.exit(command.main(["run", sys.argv[1]]))
"""


class UnmetError(Exception):
    """A run met no fault and succeeded with fewer calls than the undisturbed one, as with a settled digest."""


class Scenario(NamedTuple):
    """A command in a folder, and what the folder holds when it was never disturbed.

    Attributes:
        name: a key of `COMMANDS`.
        template: the folder, copied for each run.
        calls: the calls of the command.
        expected: what lies in the folder at the end, by path.
    """

    name: str
    template: Path
    calls: tuple[Call, ...]
    expected: dict[str, Any]

    def numbers(self, kind: str) -> list[int]:
        """Return the numbers of the calls that can meet a kind of fault, without those that would show the same.

        A process that is killed leaves the same disk at each of its calls up to the next change of the disk: only the
        first of them counts. Of equal calls in a row, as for the entries of a folder, the first two count. Of a real
        stage one call counts of those of one name whose paths differ in digests and numbers only.
        """
        if kind == "KILL":
            alike = self._since_changes()
        elif self.name in REAL:
            alike = [(call.name, re.sub(r"[0-9a-f]{32}|\d+", "N", call.path)) for call in self.calls]
        else:
            alike = self._runs()
        seen: set[object] = set()
        return [
            call.number
            for call, key in zip(self.calls, alike, strict=True)
            if kind in call.kinds and key not in seen and not seen.add(key)  # type: ignore[func-returns-value]
        ]

    def _since_changes(self) -> list[object]:
        """Return for each call its process and how often the disk was changed before."""
        changes = itertools.accumulate((call.changes_the_disk for call in self.calls), initial=0)
        return [(call.process, before) for call, before in zip(self.calls, changes, strict=False)]

    def _runs(self) -> list[object]:
        """Return for each call in which run of equal calls it is, and whether it is the first one of it."""
        runs = itertools.groupby(self.calls, lambda call: (call.process, call.name, call.path))
        return [(run, place > 0) for run, (_, calls) in enumerate(runs) for place, _ in enumerate(calls)]


def prepare(injector: Injector, folder: Path, name: str) -> Scenario:
    """Make the template of a scenario and run it undisturbed."""
    template = folder / name
    template.mkdir()
    if name in REAL:
        write_workflow(template)
        if name == "train":
            _succeed(injector.run(template, "pretokenize"))
    else:
        _prepare_cheap(injector, folder, template)
    copy = Path(shutil.copytree(template, folder / f"{name}-undisturbed"))
    disturbed, mending = COMMANDS[name]
    outcome = injector.run(copy, *disturbed)
    _succeed(outcome)
    for command in mending:
        _succeed(injector.run(copy, *command))
    return Scenario(name, template, outcome.calls, contents(copy))


def _prepare_cheap(injector: Injector, folder: Path, template: Path) -> None:
    name = template.name
    text = DODO.replace("KIND", repr({"uses_device": False})).replace("range(1, 7)", "range(1, 3)")
    stage = folder / "stage.py"  # not below what is disturbed: in its place would be an installed module
    stage.write_text(STAGE)
    (template / "dodo.py").write_text(text.replace('"stage.py"', f'"-P", {str(stage)!r}'))
    (template / "source").write_bytes(b"the source")
    if name != "first":
        _succeed(injector.run(template))
    if name == "again":
        (template / "source").write_bytes(b"another source")
        (template / "artifacts/s1/notes.txt").write_text("a file of the user's")
    if name == "unpack":
        _succeed(injector.run(template, "pack", "s2", "s2.tar"))
        shutil.rmtree(template / "artifacts/s2")


def _succeed(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome


def contents(folder: Path) -> dict[str, Any]:
    """Return what lies in a folder, by path; of what differs between equal builds only the part that does not."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if "cache" not in path.relative_to(folder).parts and path.name not in CACHES
    }


def _content(path: Path) -> Any:
    if path.is_dir():
        return "folder"
    if path.name in ("notes.json", "lock", "metrics.jsonl") or path.suffix == ".log":
        return "of one run and machine"
    data = path.read_bytes()
    if path.name == "report.toml":
        return {key: value for key, value in tomllib.loads(data.decode()).items() if key != "run"}
    if path.name == "mlxflow.lock":
        return re.sub(rb'(?m)^(seconds|commit|".*(report\.toml|metrics\.jsonl)") = .*$', b"", data)
    if path.name == "state.jsonl":
        return _records(data)
    return data


def _records(data: bytes) -> dict[str, Any]:
    """Return the record of each task in a journal, without its seconds."""
    entries = [json.loads(line) for line in data.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
    records = {entry["task"]: entry["record"] for entry in entries if entry["record"]}
    values = {task: dict(record["_values_:"]) for task, record in records.items()}
    return {task: (of["settings"], of["inputs"], sorted(of["outputs"])) for task, of in values.items()}


def disturb(injector: Injector, scenario: Scenario, fault: Fault, folder: Path) -> Outcome:
    """Run a scenario with a fault and then without.

    Raises:
        AssertionError: the disturbed run was a traceback, hid the fault or did not name it; or the folder is not what
            undisturbed runs leave.
        UnmetError: the run had fewer calls, and the end of an undisturbed one.
    """
    shutil.copytree(scenario.template, folder)
    disturbed, mending = COMMANDS[scenario.name]
    outcome = injector.run(folder, *disturbed, fault=fault)
    where = f"{fault} at {[(call.name, call.path) for call in outcome.calls]}: {outcome}"
    is_whole = scenario.name in ("first", "again", *REAL)
    if not outcome.calls:
        assert outcome.code == 0, where
        assert not is_whole or contents(folder) == scenario.expected, where
        raise UnmetError(where)
    is_own = all(is_of_python(call, folder) for call in outcome.calls)
    assert is_own or "Traceback" not in outcome.err + outcome.out, where
    if outcome.code == 0 and is_whole and not _says(fault, outcome.err):
        assert contents(folder) == scenario.expected, where
    if is_own:
        assert outcome.code == 0 or outcome.err.strip() or fault.kind == "KILL", where
    elif outcome.code != 0 and fault.kind not in ("KILL", "HALF"):
        _assert_named(fault, outcome, where)
    for command in mending:
        code, out, err, _ = injector.run(folder, *command)
        assert code == 0, f"{where}\n{command}: {out}{err}"
    found = contents(folder)
    differing = [
        name for name in found.keys() | scenario.expected.keys() if found.get(name) != scenario.expected.get(name)
    ]
    assert not differing, f"{where}\n{[(name, found.get(name), scenario.expected.get(name)) for name in differing]}"
    return outcome


def is_of_python(call: Call, folder: Path) -> bool:
    """Return whether a call is made by Python's import or by doit before the graph is known, who word its failure."""
    return Path(call.path) == folder or Path(call.path).name in ("dodo.py", "doit.cfg", "pyproject.toml")


def _assert_named(fault: Fault, outcome: Outcome, where: str) -> None:
    """One line names the reason, and the file or the folder that it lies in."""
    lines = _says(fault, outcome.err)
    if not lines:  # MLX, which reads and writes tensors, keeps the reason to itself
        lines = [line for line in outcome.err.splitlines() if re.search(r"\[(read|write)\] Unable to", line)]
    assert len(lines) == 1 or (lines and fault.times > 1), f"{len(lines)} lines say why: {where}"
    names = {part for call in outcome.calls for part in (Path(call.path).name, Path(call.path).parent.name)}
    names |= {re.sub(r"^\.?(.+)\.(\d+\.tmp|partial)$", r"\1", name) for name in names}  # of what will take a place
    assert any(name in lines[0] for name in names), f"{lines[0]!r} names no file: {where}"


def _says(fault: Fault, err: str) -> list[str]:
    """Return the lines that name the reason, or a folder that shutil could not remove after it closed a file twice."""
    reasons = [os.strerror(KINDS[fault.kind])] if KINDS[fault.kind] > 0 else []
    reasons += ["cannot be removed (Bad file descriptor)"]
    return [line for line in err.splitlines() if any(reason in line for reason in reasons)]
