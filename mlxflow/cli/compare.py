"""`mlxflow compare`: the figures of two benchmark reports side by side."""

import argparse
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlxflow.benchmarking.report_comparison import compare_reports, markdown_of_differences
from mlxflow.cli.arguments import user_path
from mlxflow.device import developer_tools
from mlxflow.messages.advice import advise_build, command
from mlxflow.messages.errors import ArtifactError, CallError
from mlxflow.messages.markdown_tables import write_markdown
from mlxflow.report.stage_reports.benchmark import BenchmarkReport
from mlxflow.stages.benchmark import read_benchmark
from mlxflow.storage import layout

# Where a benchmark's report is in an artifact folder, in the artifacts folder, and in a workflow's folder
_BENCHMARK = layout.stage_folder("benchmark") / layout.REPORT
_PLACES = (layout.REPORT, f"benchmark/{layout.REPORT}", _BENCHMARK.as_posix())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow compare`."""
    for name in ("before", "after"):
        parser.add_argument(name, help="a report.toml, a folder that holds one, or COMMIT:FILE of either")
    parser.add_argument("--force", action="store_true", help="compare even if they were measured on different devices")


def run(parsed: argparse.Namespace) -> None:
    """Print the table of `compare`."""
    write_markdown(compare(parsed.before, parsed.after, force=parsed.force))


def compare(before: str, after: str, *, force: bool) -> str:
    """Return a table in Markdown of every figure that two reports have.

    Args:
        before: a report, a folder that holds one, or `COMMIT:FILE` for one that was saved in git.
        after: another one.
        force: also compare reports of different devices.

    Raises:
        ArtifactError: one is missing, damaged or of another version.
        CallError: they are of different devices.
    """
    first, second = _read(before), _read(after)
    if first.device != second.device and not force:
        names = [f"{name} on {describe_device(report)}" for name, report in ((before, first), (after, second))]
        raise CallError(
            f"compare: {names[0]}, {names[1]}: different devices. Add --force to compare them nevertheless."
        )
    differences = compare_reports(first, second)
    if not differences:
        raise CallError(
            f"compare: {before} and {after} have no row in common. Measure the same batch sizes and models."
        )
    return markdown_of_differences(differences)


def describe_device(report: BenchmarkReport) -> str:
    """Return the name and kind of the device that a report was measured on."""
    return f"{report.device.name} ({report.device.kind})"


def _read(name: str) -> BenchmarkReport:
    path = user_path(name)
    if path.is_dir():
        existing = [path / place for place in _PLACES if (path / place).is_file()]
        if not existing:
            raise ArtifactError(f"{name}: no benchmark's report in it. {advise_build('benchmark')}")
        return read_benchmark(existing[0])
    if not path.exists() and ":" in name:
        return _read_commit(name)
    if not path.exists():
        raise ArtifactError(f"{name}: missing. {advise_build('benchmark')}")
    return read_benchmark(path)


def _read_commit(name: str) -> BenchmarkReport:
    """Return a report as stored in a git commit.

    Raises:
        ArtifactError: git has no such file; the message says what to commit.
    """
    commit, _, file = name.partition(":")
    if Path(file).name == layout.LOCKFILE:
        raise ArtifactError(f"{name}: a lock holds no figures. Name a benchmark's report: {commit}:{_BENCHMARK}")
    data = next(
        (content for place in _places_in_git(file) if (content := _blob(f"{commit}:{place}")) is not None), None
    )
    if data is None:
        raise ArtifactError(f"{name}: {_why_not_in_git(commit, file)}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / layout.REPORT
        path.write_bytes(data)
        try:
            return read_benchmark(path)
        except ArtifactError as error:
            raise ArtifactError(*(line.replace(str(path), name) for line in error.problems)) from error


def _places_in_git(file: str) -> Iterator[str]:
    """Yield where a commit may hold the report: the file or one in the folder, from the root or the current folder."""
    for start in (file, f"./{file}"):
        yield start
        yield from (f"{start.rstrip('/')}/{place}" for place in _PLACES)


def _why_not_in_git(commit: str, file: str) -> str:
    """Return why a file is not in a commit, and what to do."""
    here = next((place for place in _places_in_git(file) if Path(place).is_file()), None)
    commands = f'git add -f {shlex.quote(Path(here or _BENCHMARK).as_posix())} && git commit -m "Benchmark"'
    if here is None:
        commands = f"{command('build benchmark')} && {commands}"
    if (about := _git("rev-parse", "--git-dir")).returncode:
        message = about.stderr.decode(errors="replace").strip().partition("\n")[0]
        return f"git cannot be asked ({message}). Name a report or a folder, or run: git init && {commands}"
    if _git("rev-parse", "--verify", "--quiet", "HEAD").returncode:
        return f"nothing is committed yet. Run: {commands}"
    if not commit:
        return f"not in git's index. Run: {commands}"
    known = _git("rev-parse", "--verify", "--quiet", "--short", "--end-of-options", f"{commit}^{{commit}}")
    if known.returncode:
        return "git knows no such commit. Name one that `git log` shows"
    return f"not in commit {known.stdout.decode().strip()}. Commit the report once, then compare: {commands}"


def _blob(name: str) -> bytes | None:
    """Return the content of `COMMIT:FILE`; None if git has no such file."""
    shown = _git("cat-file", "blob", "--end-of-options", name)
    return None if shown.returncode else shown.stdout


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run git in the current folder.

    Raises:
        CallError: it is not installed.
    """
    program = developer_tools.find("git")
    if program is None:
        raise CallError("compare: git is not installed. Install it, or name a report or a folder.")
    return subprocess.run([program, *arguments], capture_output=True, check=False)
