"""The `mlxflow` command: looks at, runs and uses single stages. Building what is stale is `doit`'s work."""

import sys

from mlxflow.storage import layout
from mlxflow.system import terminal

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))  # `python -m` puts the project's folder first: its random.py would be Python's

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mlxflow.errors import CallError, MlxflowError
from mlxflow.system.os_errors import is_about_a_file, word_cause


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code: 0 fine, 1 a stage failed, 2 the file or the call is wrong."""
    if arguments is None:
        _read_names_as_utf8()
    with terminal.guarded():
        return _main(arguments)


def _read_names_as_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding: MLX takes names of files as UTF-8."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.ignore_environment:
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606


def _main(arguments: Sequence[str] | None) -> int:
    parsed = argparse.Namespace()
    os.environ["PYTHONSAFEPATH"] = "1"  # of the processes that this one starts
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _parser().parse_args(arguments, parsed)
        return int(parsed.command(parsed) or 0)
    except MlxflowError as error:
        terminal.say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        terminal.discard_unwritable()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if not is_about_a_file(error):
            raise
        terminal.discard_unwritable()
        terminal.say_last(word_cause(error, str(getattr(parsed, "stage", "mlxflow"))))
        return 1


def _terminate(number: int, frame: object) -> NoReturn:
    """End as by an exception, so that what was begun is cleaned up."""
    raise SystemExit(128 + number)


class _Parser(argparse.ArgumentParser):
    """A parser whose help fails where it cannot be printed; argparse itself passes over that."""

    def print_help(self, file: object = None) -> None:
        """Print the help on standard output."""
        terminal.write(self.format_help())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mlxflow", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: object, help_: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_, description=help_)
        command.set_defaults(command=function)
        return command

    def add_workflow(command: argparse.ArgumentParser) -> None:
        command.add_argument("--workflow", type=Path, default=Path(layout.WORKFLOW), help=f"default: {layout.WORKFLOW}")

    add_workflow(add("check", _check, "print the resolved workflow with every default, or every mistake at once"))
    run = add("run", _run, "run one stage in this process, stale or not; doit calls this")
    run.add_argument("stage", help="such as train or quantize:q4")
    run.add_argument("--into", type=Path, help="write the artifact there instead; the workflow's own is left alone")
    add_workflow(run)
    show = add("show", _show, "print an artifact for a person: packed rows with loss masks, or each layer's bits")
    show.add_argument("stage", help="such as pretokenize or quantize:q4")
    show.add_argument("--row", type=int, help="one of the training rows, from 0; default: a summary and the first ones")
    add_workflow(show)
    fits = add("fit", _fit, "print which batch sizes and context lengths fit into the memory, from a few trials")
    fits.add_argument("stage", nargs="?", default="profile", help="a profile stage; default: profile")
    fits.add_argument("--batch-sizes", type=int, nargs="+", default=[], help="default: around the stage's own")
    fits.add_argument("--context-lengths", type=int, nargs="+", default=[], help="default: around the data's own")
    add_workflow(fits)
    add("doctor", _doctor, "print the device, limits and versions, and what is slow or missing")
    compare = add(
        "compare", _compare, "compare two benchmarks, figure by figure; what is within the noise is called that"
    )
    for name in ("before", "after"):
        compare.add_argument(name, help="a report.toml, a folder that holds one, or COMMIT:FILE")
    compare.add_argument("--force", action="store_true", help="compare even if they were measured on different devices")
    promises = add(
        "promises", _promises, "print each promise with its figure on this machine; exit code 1 if one fails"
    )
    promises.add_argument("--stage", default="benchmark", help="default: benchmark")
    promises.add_argument("--measure", action="store_true", help="measure now; default: what doit benchmark measured")
    add_workflow(promises)
    report = add("report", _report, "draw the page of whatever is there of a run: artifacts/index.html")
    report.add_argument("--open", action="store_true", help="show it in the browser")
    report.add_argument("--compare", type=Path, metavar="FOLDER", help="another run beside it: artifacts/compare.html")
    add_workflow(report)
    generate = add("generate", _generate, "ask a chat model through its template, or let a model continue a text")
    generate.add_argument("model", type=Path, help="a model folder, such as artifacts/train")
    generate.add_argument("--prompt", required=True, help="the question, or the text to continue")
    generate.add_argument(
        "--raw",
        "--no-chat-template",
        action="store_true",
        help="continue the text as it is, even where the folder has a chat template",
    )
    generate.add_argument("--max-tokens", type=int, default=100, help="default: 100")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
    generate.add_argument("--seed", type=int, default=0, help="default: 0")
    generate.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the folder brings; read it first"
    )
    return parser


def _check(parsed: argparse.Namespace) -> None:
    from mlxflow.workflow.loader import load_workflow, resolved_toml

    workflow = load_workflow(parsed.workflow)
    from mlxflow.cli.check import check_plans

    check_plans(workflow)
    for name, reasons in workflow.left_out.items():
        terminal.say(f"{name}: left out, for no [{name}] is written and its defaults do not fit:", *reasons)
    terminal.write(resolved_toml(workflow))


def _run(parsed: argparse.Namespace) -> None:
    from mlxflow.system.child_processes import end_with_parent
    from mlxflow.workflow import handover
    from mlxflow.workflow.disk_queries import Disk
    from mlxflow.workflow.execution import execute_stage, run_stage
    from mlxflow.workflow.loader import load_workflow

    started_by_doit = end_with_parent()
    if started_by_doit and (received := handover.receive()):
        text, lookups = received.basis
        workflow = load_workflow(parsed.workflow, Disk(parsed.workflow.parent, lookups), text.encode())
        execute_stage(workflow, workflow.find(parsed.stage), parsed.into, received)
        return
    workflow = load_workflow(parsed.workflow)
    run = execute_stage if started_by_doit else run_stage
    run(workflow, workflow.find(parsed.stage), parsed.into)


def _show(parsed: argparse.Namespace) -> None:
    from mlxflow.cli.show import show
    from mlxflow.workflow.loader import load_workflow

    workflow = load_workflow(parsed.workflow)
    show(workflow, workflow.find(parsed.stage), parsed.row)


def _fit(parsed: argparse.Namespace) -> None:
    from mlxflow.cli.fit import fit
    from mlxflow.workflow.loader import load_workflow

    workflow = load_workflow(parsed.workflow)
    one = workflow.find(parsed.stage)
    fit(workflow, one, batch_sizes=parsed.batch_sizes, context_lengths=parsed.context_lengths)


def _report(parsed: argparse.Namespace) -> None:
    from mlxflow.cli.report import report
    from mlxflow.storage import paths
    from mlxflow.workflow.loader import load_workflow

    page = report(load_workflow(parsed.workflow), compare=parsed.compare, opens=parsed.open)
    terminal.show(paths.shown(page))


def _doctor(parsed: argparse.Namespace) -> int:
    from mlxflow.cli.doctor import examine

    return examine()


def _compare(parsed: argparse.Namespace) -> None:
    from mlxflow.cli.compare import compare

    terminal.write(compare(parsed.before, parsed.after, force=parsed.force))


def _promises(parsed: argparse.Namespace) -> int:
    from mlxflow.cli.compare import promises
    from mlxflow.workflow.loader import load_workflow

    workflow = load_workflow(parsed.workflow)
    one = workflow.find(parsed.stage)
    if one.name != "benchmark":
        raise CallError(f"promises: --stage = {parsed.stage}: expected a benchmark stage. Use benchmark (the default).")
    text, all_hold = promises(workflow, one, measure=parsed.measure)
    terminal.write(text)
    return 0 if all_hold else 1


def _check_generate(parsed: argparse.Namespace) -> None:
    """Refuse what mlx-lm would answer with a traceback, or without end."""
    wanted = (
        ("--prompt", parsed.prompt, bool(parsed.prompt), "expected a question or a text", "Write a word at least"),
        ("--prompt", parsed.prompt, _is_utf8(parsed.prompt), "expected UTF-8", "Write it as UTF-8"),
        ("--max-tokens", parsed.max_tokens, parsed.max_tokens > 0, "expected at least 1", "Use 100 (the default)"),
        ("--temperature", parsed.temperature, parsed.temperature >= 0, "expected 0 or more", "Use 0 (the default)"),
        (
            "--seed",
            parsed.seed,
            0 <= parsed.seed < 2**64,
            "expected a number from 0 to 2^64 - 1",
            "Use 0 (the default)",
        ),
    )
    lines = [
        f"generate: {name} = {value!r}: {said}. {advice}." for name, value, fits, said, advice in wanted if not fits
    ]
    if lines:
        raise CallError(*lines)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _generate(parsed: argparse.Namespace) -> None:
    _check_generate(parsed)
    from mlxflow.device import cpu_backend

    cpu_backend.prepare()
    from mlxflow.evaluation.text_generation import Sampling, generate
    from mlxflow.storage import remote_code

    sampling = Sampling(parsed.max_tokens, parsed.temperature, parsed.seed)
    with remote_code.trusting_code(parsed.trust_remote_code):
        is_chat, texts = generate(parsed.model, prompt=parsed.prompt, sampling=sampling, raw=parsed.raw)
    if is_chat:
        said = "asked through its chat template; --raw continues the text as it is"
    else:
        said = "the text is continued as it is" + (" (--raw)" if parsed.raw else "; it has no chat template")
    terminal.say(f"generate: {parsed.model}: {said}")
    for text in texts:
        terminal.stream(text)
    terminal.write("\n")


if __name__ == "__main__":
    sys.exit(main())
