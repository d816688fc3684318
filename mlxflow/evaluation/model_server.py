"""Answer requests of OpenAI's API over HTTP with one model: mlx-lm's server, in this process, bound to one model.

mlx-lm's server opens whatever model a request names, also one of the hub. Here every name means the same model, so
that clients with a fixed name work, and no request makes the machine download or open anything. A stop text ends an
answer wherever its tokens begin, see `stop_texts`.
"""

import _thread
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxflow.data.guarded_tokenizer import GuardedTokenizer
from mlxflow.evaluation.stop_texts import until_stop
from mlxflow.evaluation.text_generation import open_template
from mlxflow.messages.errors import ArtifactError, reason_of
from mlxflow.models import adapter_files, model_folder, trial_calls
from mlxflow.ops import mlx_lm_import, patching
from mlxflow.storage.temporary_files import scratch_folder


def require_model(folder: Path) -> int:
    """Refuse a folder whose model, tokenizer or chat template cannot be opened; no weights are read.

    Args:
        folder: a model folder.

    Returns:
        the number of rows of the model's embedding; 0 if unknown.

    Raises:
        ArtifactError: the reason.
        SourceError: the tokenizer or the template takes too much time or memory.
    """
    tokenizer = GuardedTokenizer(folder)
    try:
        rows = trial_calls.require_generation(*model_folder.load(folder, lazy=True), str(folder / "config.json"))
        tokenizer.open()
        open_template(folder, tokenizer.call)
    finally:
        tokenizer.close()
    return rows


def answer_requests(folder: Path, *, num_rows: int, host: str, port: int, trusts_code: bool) -> None:
    """Answer requests until the process is ended.

    Args:
        folder: a model folder, with adapters beside the model or without.
        num_rows: of the model's embedding; a prompt with an id beyond them is answered by an error. 0 if unknown.
        host: address to listen on.
        port: of it.
        trusts_code: whether Python code of the folder may run.

    Raises:
        ArtifactError: mlx-lm cannot open the model.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    arguments = ["--model", str(folder), "--host", host, "--port", str(port)]
    if adapter_files.are_in(folder):
        arguments += ["--adapter-path", str(folder)]
    if trusts_code:
        arguments.append("--trust-remote-code")
    with scratch_folder() as empty:
        os.environ["HF_HUB_CACHE"] = str(empty)  # mlx-lm lists its models as available, and fails without the folder
        mlx_lm_import.prepare()
        from mlx_lm import server

        sys.argv = ["mlx_lm.server", *arguments]
        with bound_to_one_model(num_rows, str(folder / "tokenizer.json")) as failures:
            try:
                server.main()
            except KeyboardInterrupt:
                if not failures:
                    raise
        if failures:
            raise ArtifactError(f"{folder}: mlx-lm cannot open it ({failures[0]}). Make it again.")


@contextmanager
def bound_to_one_model(num_rows: int = 0, name: str = "") -> Iterator[list[str]]:
    """Let mlx-lm's server open its one model for every name, and stop at texts, until the block ends.

    Args:
        num_rows: of the model's embedding; prompts with an id beyond them are refused. 0 if unknown.
        name: of the tokenizer, for the message.

    Yields:
        why the model could not be opened, if so; the server is interrupted then.
    """
    from mlx_lm import server

    failures: list[str] = []
    one = _one_model(server.ModelProvider, failures)
    stopping = _stopping_at_texts(server.ResponseGenerator, num_rows, name)
    changes = ((server, "ModelProvider", one), (server, "ResponseGenerator", stopping))
    with patching.attributes(*changes, by=__name__):
        yield failures


def _stopping_at_texts(generator: Any, num_rows: int, name: str) -> Any:
    """Return a class of mlx-lm's generator of responses that stops at texts, and refuses ids without a row."""

    class StoppingAtTexts(generator):  # type: ignore[misc]
        """A generator whose responses end at the texts of a request."""

        def generate(self, request: Any, arguments: Any, *others: Any, **named: Any) -> Any:
            """Return the context of a generation and its responses."""
            context, responses = super().generate(request, arguments, *others, **named)
            return context, until_stop(responses, arguments.stop_words, context.stop)

        def _tokenize(self, *request: Any) -> Any:
            """Return the ids of a prompt and what belongs to them; mlx-lm answers an error with its text."""
            found = super()._tokenize(*request)
            trial_calls.require_rows(found[0], num_rows, name)
            return found

    return StoppingAtTexts


def _one_model(provider: Any, failures: list[str]) -> Any:
    """Return a class of mlx-lm's provider of models that opens only the one of its command line.

    mlx-lm opens it in the thread that generates, and would leave a server that answers nothing if that failed.
    """

    class OneModel(provider):  # type: ignore[misc]
        """A provider that ignores the name in a request."""

        def load(self, *_: object) -> Any:
            """Return the model, or note why it cannot be opened and interrupt the server."""
            try:
                return super().load("default_model", None, "default_model")
            except Exception as error:
                failures.append(reason_of(error))
                _thread.interrupt_main()
                raise SystemExit from error  # ends this thread alone

    return OneModel
