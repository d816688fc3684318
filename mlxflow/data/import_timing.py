"""The processor time that a guarded process takes to import modules, published while it does.

Installed packages are trusted, and importing them can take longer than any untrusted work: packages installed without
bytecode are compiled at each import. transformers imports further modules while it opens a tokenizer, so the imports
cannot all precede that work; they are measured instead, and do not count as its time.
"""

import contextlib
import importlib.machinery
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.abc import Loader
from types import ModuleType


class ImportTimer:
    """A finder of modules, before the usual one, that measures how long each module found on `sys.path` executes.

    Code that is loaded by its file's name, as transformers loads the code of a model folder, is not measured.

    Args:
        publish: called at the beginning and the end of every module's execution with the change in the number of
            modules in execution, and the nanoseconds of processor time of importing since this thread's last call.
    """

    def __init__(self, publish: Callable[[int, int], None]) -> None:
        self._publish = publish
        self._thread = threading.local()

    def install(self) -> None:
        """Measure all imports of this process from now on."""
        sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder), self)

    def stop(self) -> None:
        """Publish nothing more."""
        self._publish = lambda change, nanoseconds: None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return what the usual finder does; the execution of the module is measured."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader = spec.loader if spec else None
        if loader is not None and "exec_module" not in getattr(loader, "__dict__", {"exec_module": None}):
            loader.exec_module = partial(self._execute, loader)  # type: ignore[method-assign]  # for one module
        return spec

    def _execute(self, loader: Loader, module: ModuleType) -> None:
        vars(loader).pop("exec_module", None)
        with self._measuring():
            loader.exec_module(module)

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        self._step(1)
        try:
            yield
        finally:
            self._step(-1)

    def _step(self, change: int) -> None:
        now, depth = time.thread_time_ns(), getattr(self._thread, "depth", 0)
        self._publish(change, now - self._thread.since if depth else 0)
        self._thread.depth, self._thread.since = depth + change, now
