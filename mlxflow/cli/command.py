"""Parse the command line of `mlxflow`, run one verb and return its exit code.

Each verb is a module of this package with `add_arguments(parser)` and `run(parsed)`; it is imported when it is called.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mlxflow.messages import advice, terminal
from mlxflow.messages.errors import MlxflowError
from mlxflow.messages.os_errors import cause_message, is_about_a_file
from mlxflow.storage import layout

_DESCRIPTION = "Build the stages of a workflow.toml, inspect their artifacts, and generate text with the models."

_EPILOG = """\
mlxflow VERB --help lists the arguments of a verb; --workflow FILE names another file than workflow.toml. In a folder
with a dodo.py, doit has more verbs for the same stages, such as list, plan, info, clean and pack; it takes
workflow=FILE. See doit help.
"""

#: Every verb with its line of help, in the order of `mlxflow --help`.
VERBS = {
    "init": "write a new project from a template: a workflow.toml with its JSON schema, a dodo.py, a .gitignore",
    "build": "build every stale stage, or those that are named, as `doit` does; no dodo.py is needed",
    "check": "print the resolved workflow with every default, or every mistake at once",
    "schema": "print the JSON schema of workflow.toml, by which an editor completes and checks its keys",
    "run": "run one stage in this process, stale or not; doit calls this",
    "show": "print the contents of an artifact: packed rows with masks, the learning curve, each layer's bits, figures",
    "fit": "print which batch sizes and context lengths fit into the memory, from a few trials",
    "doctor": "print the device, limits and versions, and what is slow or missing",
    "compare": "compare two benchmark reports; differences within measurement noise are marked as noise",
    "promises": "print each promise with its figure on this machine; exit code 1 if one fails",
    "report": "write the HTML page about a run, finished or not: artifacts/index.html",
    "track": "report stages that are built to the trackers of the table [tracking]; what they have is not sent again",
    "completion": "print a script by which bash, zsh or fish completes commands, options, files and stages",
    "chat": "talk with a chat model in the terminal",
    "serve": "answer requests of OpenAI's API over HTTP with a model, on this machine",
    "generate": "ask a chat model through its template, or let a model continue a text",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code: 0 fine, 1 a stage failed, 2 the file or the call is wrong."""
    if arguments is None:
        _read_names_as_utf8()
    with terminal.guarded(), advice.about_workflow(""):
        return _main(arguments)


def _read_names_as_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding: MLX expects file names in UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.ignore_environment:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606


def _main(arguments: Sequence[str] | None) -> int:
    parsed = argparse.Namespace()
    os.environ["PYTHONSAFEPATH"] = "1"  # of the processes that this one starts
    signal.signal(signal.SIGTERM, _terminate)
    if sys.platform == "darwin" and (line := _system_mistake()):
        terminal.say_last(line)
        return 2
    try:
        _parser().parse_args(arguments, parsed)
        if hasattr(parsed, "workflow"):
            advice.name_workflow(layout.named_workflow(parsed.workflow))
        return int(parsed.command(parsed) or 0)
    except MlxflowError as error:
        terminal.say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        terminal.discard_unwritable()
        return 128 + signal.SIGPIPE
    except RuntimeError as error:
        from mlxflow.device import memory_errors

        if (line := memory_errors.describe(error, "mlxflow")) is None:
            raise
        terminal.say_last(line)
        return 1
    except OSError as error:
        if not is_about_a_file(error):
            raise
        terminal.discard_unwritable()
        terminal.say_last(cause_message(error, str(getattr(parsed, "stage", "mlxflow"))))
        return 1


def _system_mistake() -> str | None:
    from mlxflow.device import supported_system

    return supported_system.mistake()


def _terminate(number: int, frame: object) -> NoReturn:
    """Exit by an exception, so that cleanup code runs."""
    raise SystemExit(128 + number)


class _Parser(argparse.ArgumentParser):
    """A parser whose help raises an error if it cannot be printed; argparse ignores that."""

    def print_help(self, file: object = None) -> None:
        """Print the help on standard output."""
        terminal.write(self.format_help())


class _Version(argparse.Action):
    """Print the version and exit; the version is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, **named: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **named)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the version."""
        import mlxflow

        terminal.show(f"mlxflow {mlxflow.__version__}")
        parser.exit()


class _VerbParser(_Parser):
    """The parser of one verb; it imports the verb's module only to parse its arguments."""

    def add_own_arguments(self) -> None:
        """Add the arguments of the verb."""
        module = importlib.import_module(f"mlxflow.cli.{self.prog.rpartition(' ')[2]}")
        module.add_arguments(self)
        self.set_defaults(command=module.run)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments after the verb."""
        self.add_own_arguments()
        return super().parse_known_args(args, namespace)


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser with the arguments of every verb, which takes the imports of all of them."""
    return _parser(are_complete=True)


def _parser(*, are_complete: bool = False) -> argparse.ArgumentParser:
    parser = _Parser(prog="mlxflow", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action=_Version, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_VerbParser)
    for name, line in VERBS.items():
        verb = commands.add_parser(name, help=line, description=line)
        if are_complete:
            verb.add_own_arguments()
    return parser
