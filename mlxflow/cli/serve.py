"""`mlxflow serve`: answer requests of OpenAI's API over HTTP with a model."""

import argparse
import socket
from pathlib import Path

from mlxflow.cli.arguments import add_workflow
from mlxflow.cli.generate import refuse_unfit
from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import ArtifactError, CallError
from mlxflow.storage import model_files, paths, remote_code

_PORT = 8080


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow serve`."""
    parser.add_argument("model", help="a stage such as train or quantize:q4, a model folder, or a GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, for this machine only")
    parser.add_argument("--port", type=int, default=_PORT, help=f"default: {_PORT}")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code of the folder; read it first")
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> None:
    """Answer requests until Ctrl-C.

    Raises:
        CallError: an argument has no valid value, or the address is in use.
        ArtifactError: there is no model, or it cannot be opened.
        WorkflowError: the workflow file of a stage has mistakes.
    """
    is_port = 0 < parsed.port < 1 << 16
    refuse_unfit(
        "mlxflow serve", [("--port", parsed.port, is_port, "expected 1 to 65535", f"Use {_PORT} (the default)")]
    )
    folder = _folder_of(parsed)
    _require_free(parsed.host, parsed.port)
    from mlxflow.device import cpu_backend

    cpu_backend.prepare()
    from mlxflow.evaluation import model_server
    from mlxflow.models import gguf_reading

    folder = gguf_reading.opened(folder)
    files = model_files.find(folder)
    if files.problem:
        raise ArtifactError(f"{paths.shown(folder)}: {files.problem}. {files.advice}")
    if files.code and not parsed.trust_remote_code:
        raise ArtifactError(
            f"{paths.shown(folder)}: its config.json names Python code of its own, {files.code}. Read it, then add "
            "--trust-remote-code to run it."
        )
    with remote_code.trusting_code(parsed.trust_remote_code):
        rows = model_server.require_model(folder)
    terminal.say(
        f"mlxflow serve: {parsed.model}: http://{parsed.host}:{parsed.port}/v1 answers OpenAI's API; Ctrl-C ends it"
    )
    model_server.answer_requests(
        folder, num_rows=rows, host=parsed.host, port=parsed.port, trusts_code=parsed.trust_remote_code
    )


def _folder_of(parsed: argparse.Namespace) -> Path:
    """Return the model that the command line names; a folder or file of that name wins over a stage.

    Raises:
        ArtifactError: the stage makes no model, or is not built.
        CallError: there is no such stage.
    """
    place = Path(paths.expand(parsed.model))
    if place.exists() or "/" in parsed.model:
        if not place.exists():
            raise ArtifactError(f"{parsed.model}: missing. Name a stage, a model folder, or a GGUF file.")
        return place
    from mlxflow.workflow.loader import load_workflow
    from mlxflow.workflow.stage import names_stage

    workflow = load_workflow(parsed.workflow)
    stage = workflow.find(parsed.model)
    folder = workflow.root / stage.folder
    if stage.name != "export" and (not names_stage(stage.name) or stage.name == "pretokenize"):
        raise CallError(f"mlxflow serve: {parsed.model}: makes no model. Name a train or quantize stage.")
    if not folder.is_dir():
        raise ArtifactError(f"{paths.shown(folder)}: missing. {advise_build(stage.task)}")
    return folder / "model.gguf" if (folder / "model.gguf").is_file() else folder


def _require_free(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before the model is opened.

    Raises:
        CallError: it cannot.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or str(error)
            raise CallError(
                f"mlxflow serve: {host}:{port}: cannot be listened on ({reason}). Name another --port."
            ) from error
