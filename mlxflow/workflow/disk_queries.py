"""Queries of the disk and the environment made while a workflow is resolved, each recorded with its answer.

A cached workflow is valid as long as every query has the same answer; see `mlxflow.tasks.graph`. Everything that
resolving depends on must therefore be queried here: a new query is a new method of `Disk` with `@_question`.
"""

import errno
import os
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from mlxflow.data import sources
from mlxflow.distributed.hosts import MAX_BYTES
from mlxflow.messages.errors import ArtifactError
from mlxflow.storage import config_json, gguf_header, model_files, paths, regular_files, remote_code

#: The name of a query, its arguments, its answer and its error, as JSON values.
Lookup = list[Any]

P = ParamSpec("P")
T = TypeVar("T")

_QUESTIONS: set[str] = set()


def _question(method: Callable[Concatenate["Disk", P], T]) -> Callable[Concatenate["Disk", P], T]:
    """Record the answer of a method of `Disk`; the same query again returns the recorded answer.

    Arguments are positional. They and the answer are JSON values: text, numbers, booleans, None, and lists of them. An
    `OSError` is recorded, too.
    """
    name = method.__name__
    _QUESTIONS.add(name)

    @wraps(method)
    def ask(self: "Disk", /, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (name, *args)
        if key not in self._answers:
            self._answers[key] = _answer_of(lambda: method(self, *args, **kwargs))
        answer, error = self._answers[key]
        if error is not None:
            raise OSError(*error)
        return cast("T", answer)

    return ask


def _answer_of(look: Callable[[], object]) -> tuple[object, list[Any] | None]:
    try:
        return look(), None
    except OSError as error:
        return None, [error.errno, error.strerror, error.filename]


class Disk:
    """Queries of files, by names relative to the workflow's folder or absolute ones.

    Args:
        root: the workflow's folder.
        lookups: answers that are returned without querying the disk.
    """

    def __init__(self, root: Path, lookups: Iterable[Lookup] = ()) -> None:
        self.root = root
        self._answers: dict[tuple[object, ...], tuple[object, list[Any] | None]] = {
            (name, *args): (answer, error) for name, args, answer, error in lookups
        }

    @property
    def lookups(self) -> list[Lookup]:
        """Every query so far with its answer, as JSON values."""
        return [[key[0], list(key[1:]), answer, error] for key, (answer, error) in self._answers.items()]

    @_question
    def expand(self, name: str) -> str:
        """Return a path with `~` and environment variables expanded; see `mlxflow.storage.paths.expand`."""
        return paths.expand(name)

    @_question
    def spelling(self, name: str) -> list[str] | None:
        """Return the leading part of a path, expanded and as written; see `mlxflow.storage.paths.spelling`."""
        leading = paths.spelling(name)
        return list(leading) if leading else None

    @_question
    def unset_variables(self, name: str) -> list[str]:
        """Return the unset environment variables in a path."""
        return paths.unset_variables(name)

    @_question
    def hostfile(self, name: str) -> str:
        """Return the text of a hostfile; bytes that are no UTF-8 are replaced.

        Raises:
            OSError: it cannot be read, or is too large.
        """
        data = regular_files.read_regular(self.root / paths.expand(name))
        if len(data) > MAX_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), name)
        return data.decode(errors="replace")

    @_question
    def is_file(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return os.path.isfile(os.path.join(self.root, name))  # noqa: PTH113, PTH118 - asked at every no-op

    @_question
    def stamp(self, name: str) -> list[int]:
        """Return size, times and inode of a file: what was found in it holds until they change.

        Raises:
            OSError: it is missing.
        """
        status = os.stat(os.path.join(self.root, name))  # noqa: PTH116, PTH118 - asked at every no-op
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]

    @_question
    def is_dir(self, name: str) -> bool:
        """Return whether there is a folder of this name."""
        return os.path.isdir(os.path.join(self.root, name))  # noqa: PTH112, PTH118 - asked at every no-op

    @_question
    def model_folder(self, folder: str) -> list[Any]:
        """Return the fields of `mlxflow.storage.model_files.ModelFolderFiles` for a folder.

        Raises:
            OSError: the folder is missing or cannot be read.
        """
        return list(model_files.find(self.root / folder))

    @_question
    def tokenizer_files(self, folder: str) -> list[str]:
        """Return the names of the tokenizer's files in a folder, sorted.

        Raises:
            OSError: the folder is missing or cannot be read.
        """
        return model_files.tokenizer_files(self.root / folder)

    @_question
    def link_leading_out(self, folder: str) -> str:
        """Return a tokenizer file that links to a file outside of its folder; empty if there is none.

        Raises:
            OSError: the folder is missing or cannot be read.
        """
        place = self.root / folder
        return model_files.leading_out(place, model_files.tokenizer_files(place))

    @_question
    def tokenizer_code(self, folder: str) -> list[str]:
        """Return the file that names Python code of a folder's tokenizer, and the code; empty texts if none does."""
        return list(remote_code.tokenizer_code(self.root / folder))

    @_question
    def is_quantized(self, folder: str) -> bool | None:
        """Return whether a model folder is quantized by its `config.json`; None without a valid one."""
        try:
            return config_json.keeps_codes(config_json.read(Path(self.root, folder)))
        except ArtifactError:
            return None

    @_question
    def num_positions(self, folder: str) -> int | None:
        """Return the positions that the model of a folder is made for; None without a valid `config.json`."""
        try:
            return config_json.num_positions(config_json.read(Path(self.root, folder)))
        except ArtifactError:
            return None

    @_question
    def gguf_header(self, file: str) -> list[Any]:
        """Return the fields of `mlxflow.storage.gguf_header.GgufHeader` for a file.

        Raises:
            OSError: it cannot be read.
        """
        return list(gguf_header.read(Path(self.root, file)))

    @_question
    def model_type(self, folder: str) -> str:
        """Return the `model_type` of a model folder; empty without a valid `config.json`."""
        try:
            return str(config_json.read(Path(self.root, folder)).get("model_type", ""))
        except ArtifactError:
            return ""

    @_question
    def has_package(self, name: str) -> bool:
        """Return whether a package is installed."""
        return find_spec(name) is not None

    @_question
    def source(self, pattern: str) -> list[str]:
        """Return the files that a source names; see `mlxflow.data.sources.find`.

        Raises:
            OSError: a folder cannot be read.
        """
        return [path.as_posix() for path in sources.source_files(pattern, self.root)]

    @_question
    def left_out(self, pattern: str) -> list[int]:
        """Return how many files a source leaves out: hidden, binary, broken links, and those beside records.

        Raises:
            OSError: a folder cannot be read.
        """
        return list(sources.find(pattern, self.root)[1:])

    @_question
    def has_text(self, pattern: str) -> bool:
        """Return whether any file of a source is not empty.

        Raises:
            OSError: a file cannot be looked up.
        """
        return any(os.stat(os.path.join(self.root, name)).st_size for name in self.source(pattern))  # noqa: PTH116, PTH118


def unchanged(root: Path, lookups: Iterable[Lookup]) -> bool:
    """Return whether each query still has the recorded answer.

    Args:
        root: the workflow's folder.
        lookups: of an earlier `Disk`, through JSON.
    """
    disk = Disk(root)
    for name, args, answer, error in lookups:
        if name not in _QUESTIONS:
            return False
        current: tuple[object, list[Any] | None]
        try:
            current = getattr(disk, name)(*args), None
        except OSError as problem:
            current = None, [problem.errno, problem.strerror, problem.filename]
        if current != (answer, error):
            return False
    return True
