"""A process in which doit is imported already: it forks for each command, which saves the start of an interpreter.

Run as a program it takes a command a line from its standard input, as JSON, and answers with the command's process id
and, at its end, with its exit code, each on a line. The injector is preloaded and begins to count in the forked
process. A cheap stage of that process is forked, too, where doit would start an interpreter; all else about it is as in
a process that was started: its session, its streams, its descriptors and its environment.
"""

import ctypes
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

_IMPORTED = (
    *(f"doit.{name}" for name in ("cmd_clean", "cmd_forget", "cmd_run", "doit_cmd")),
    *(f"mlxflow.storage.{name}" for name in ("locks", "ownership", "report_files", "tensor_writing")),
    *(f"mlxflow.tasks.{name}" for name in ("adoption", "archive", "cleaning", "commands", "creator", "doit_action")),
    *(f"mlxflow.tasks.{name}" for name in ("graph", "lockfile", "run", "stage_process", "verbs")),
    *(
        "mlxflow.storage.unfinished_runs",
        "mlxflow.__main__",
        "mlxflow.cli.command",
        "mlxflow.cli.run",
        "mlxflow.device.compute_device",
        "mlxflow.workflow.loader",
        "email.parser",
        "tomli_w",
    ),
)

_C = ctypes.CDLL(None, use_errno=True)

#: From here on lie the descriptors of the injector.
_FIRST_OF_INJECTOR = 900


_start = subprocess.Popen.__init__


def _fork_stage(self: "subprocess.Popen[bytes]", command: Sequence[str], **options: Any) -> None:
    """Run a Python file in a copy of this process, not in an interpreter that is started for it."""
    if command[1] == "-P" and command[2].endswith(".py"):
        options["preexec_fn"] = partial(_run_stage, command[2:], options["env"], options["pass_fds"])
    _start(self, command, **options)


def _run_stage(arguments: Sequence[str], environment: Mapping[str, str], kept: Sequence[int]) -> None:
    """Run a file and end the process, in the place of `exec`."""
    begin = 3
    for descriptor in (*sorted(kept), _FIRST_OF_INJECTOR):
        if begin < descriptor:
            _C.close_range(begin, descriptor - 1, 0)  # by the kernel, as at an exec: it is no call of the stage
        begin = descriptor + 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    _set_environment(environment)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = open(descriptor, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os._exit(_run_file(arguments))


def _run_file(arguments: Sequence[str]) -> int:
    sys.argv = list(arguments)
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # as the interpreter words it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _next_command() -> dict[str, Any] | None:
    """Answer commands from processes that are forked for them, in which this returns; None in the first, at the end."""
    for line in sys.stdin:
        process = os.fork()
        if not process:
            return dict(json.loads(line))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


def _become(command: dict[str, Any]) -> None:
    """Run a module as the command says, up to the end of the interpreter."""
    os.setsid()
    _set_environment(command["environment"])
    os.chdir(command["folder"])
    streams = ((os.devnull, os.O_RDONLY), (command["out"], os.O_WRONLY), (command["err"], os.O_WRONLY))
    for number, (path, flags) in enumerate(streams):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    subprocess.Popen.__init__ = _fork_stage  # type: ignore[assignment,method-assign]
    _C.begin_faults()
    sys.argv = ["", *command["arguments"]]
    runpy.run_module("doit", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in _IMPORTED:
        importlib.import_module(name)
    if received := _next_command():
        _become(received)
