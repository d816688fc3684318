"""`mlxflow init`: a new project from a template."""

import argparse
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from mlxflow.cli.arguments import user_path
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError
from mlxflow.storage import layout
from mlxflow.storage.atomic_folders import write_whole

#: Every template with its purpose; each is a workflow file `templates/NAME.toml`.
TEMPLATES = {
    "hello": "see the whole workflow once: a small model of Python's own library",
    "notes": "a small model of your own texts, trained from nothing",
    "chat": "teach a chat model your conversations, by LoRA",
    "quantize": "make a model folder smaller",
    "pretrain": "a model of your own shape, on a corpus of your own",
    "ci": "the hello project, built by GitHub on a Mac at every push",
}

_DODO = '''"""The task graph of workflow.toml: `doit` builds it, `doit list` shows it."""

from mlxflow.tasks.dodo import DOIT_CONFIG, task_stages  # noqa: F401
'''

#: The project's copy of the workflow file's JSON schema, which the first line of every template names, for editors.
SCHEMA_FILE = ".workflow.schema.json"

_GITIGNORE = f"{layout.ARTIFACTS}/\n.venv/\n__pycache__/\n"

_GITHUB = ".github/workflows/mlxflow.yml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow init`."""
    about = "; ".join(f"{name}: {what}" for name, what in TEMPLATES.items())
    parser.add_argument("folder", nargs="?", type=user_path, default=Path(), help="of the project; default: this one")
    parser.add_argument("--template", default="hello", metavar="NAME", help=f"default: hello. {about}")


def run(parsed: argparse.Namespace) -> None:
    """Write the files of a project and print what to do next.

    Raises:
        CallError: there is no such template, or a file would be overwritten.
        OSError: a file cannot be written.
    """
    if parsed.template not in TEMPLATES:
        expected = ", ".join(TEMPLATES)
        raise CallError(f"mlxflow init: --template {parsed.template}: expected one of {expected}. Use one of them.")
    write_project(parsed.folder, _files(parsed.template))
    folder = parsed.folder
    terminal.show(f"wrote {', '.join(str(folder / name) for name in _files(parsed.template))}")
    if note := _TO_EDIT.get(parsed.template):
        terminal.show(note.format(workflow=folder / layout.WORKFLOW))
    terminal.show("Next:")
    enter = [f"cd {shlex.quote(str(folder))}"] if folder != Path() else []
    for command in [*enter, *_COMMANDS.get(parsed.template, _USUAL_COMMANDS)]:
        terminal.show(f"    {command}")


_TO_EDIT = {
    "notes": "Put your texts into the folder notes, or name another in {workflow}: pretokenize.sources",
    "chat": "Name the model's folder and your conversations in {workflow}: train.model.from, pretokenize.sources",
    "quantize": "Name the model's folder in {workflow}: quantize.model",
    "pretrain": "Put your corpus into the folder corpus, or name another in {workflow}: pretokenize.sources",
}

_USUAL_COMMANDS = ("mlxflow build --plan", "mlxflow build", "mlxflow report --open")

_COMMANDS = {
    "quantize": ("mlxflow build quantize --plan", "mlxflow build quantize", "mlxflow show quantize:q4"),
    "ci": ("mlxflow build", "git add . && git commit -m 'A model'", "git push"),
}


def write_project(folder: Path, files: Mapping[str, str]) -> None:
    """Write all files into a folder or none; a missing folder is created.

    Args:
        folder: of the project; other files in it are unchanged.
        files: content by path relative to the folder.

    Raises:
        CallError: one of the files exists already, or the folder is a file.
        OSError: one of them cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise CallError(f"mlxflow init: {folder}: is no folder. Name another one.")
    if there := [name for name in files if (folder / name).exists() or (folder / name).is_symlink()]:
        listed = ", ".join(str(folder / name) for name in there)
        raise CallError(f"mlxflow init: {listed}: exists already, and nothing was written. Name another folder.")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())


def _files(template: str) -> dict[str, str]:
    """Return the files of a template, by path relative to the project."""
    folder = resources.files("mlxflow.cli") / "templates"
    workflow = "hello" if template == "ci" else template
    schema = resources.files("mlxflow.cli") / "workflow.schema.json"
    files = {
        layout.WORKFLOW: (folder / f"{workflow}.toml").read_text(encoding="utf-8"),
        "dodo.py": _DODO,
        ".gitignore": _GITIGNORE,
        SCHEMA_FILE: schema.read_text(encoding="utf-8"),
    }
    if template == "ci":
        files[_GITHUB] = (folder / "github.yml").read_text(encoding="utf-8")
    return files
