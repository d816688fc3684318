"""Import mlx-lm's models without transformers and PyTorch.

mlx-lm's package imports transformers, and that imports PyTorch if it is installed: a second and 50 MB, with PyTorch
four seconds and half a gigabyte. Building or opening a model needs neither. Here mlx-lm's modules are imported with
stand-ins for the few names that come from there; a call of such a name imports the real one.

`mlx_lm.utils` sets the limit of open files to 2,048 and the hard limit to 4,096, which fails where the hard limit is
lower and lowers it where it is higher. Here the limit is raised only as far as the hard limit allows.
"""

import importlib
import importlib.util
import os
import resource
import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from mlxflow.ops import patching

# Names that mlx_lm.utils imports from modules that shall not be imported: functions it calls, and a type
_FUNCTIONS = {"mlx_lm.tokenizer_utils": ("load",), "huggingface_hub": ("snapshot_download",)}
_TYPES = {"mlx_lm.tokenizer_utils": ("TokenizerWrapper",), "transformers": ("PreTrainedTokenizer",)}

# Libraries that the reports of mlx-lm's own trainer go to, imported with it if they are installed
_TRACKERS = ("wandb", "swanlab")

# The limit of open files that mlx-lm sets, for models of many files
_OPEN_FILES = 2048


def raise_open_files() -> None:
    """Raise this process's limit of open files to mlx-lm's, or to the hard limit if that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class _KeepingLimits(MetaPathFinder):
    """Imports `mlx_lm.utils` without its change of the limit of open files; `raise_open_files` does it instead."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "mlx_lm.utils":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_keeping_limits(module: types.ModuleType) -> None:
            with patching.attributes((resource, "setrlimit", lambda *_: None), by=__name__):
                execute(module)
            raise_open_files()

        spec.loader.exec_module = execute_keeping_limits  # type: ignore[method-assign]
        return spec


def prepare() -> None:
    """Make `mlx_lm.models` importable without running mlx-lm's `__init__`, which runs when a name of it is used.

    Does nothing if mlx-lm is imported already.

    Raises:
        ModuleNotFoundError: mlx-lm is not installed.
    """
    if "mlx_lm" in sys.modules:
        return
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'mlx_lm'", name="mlx_lm")
    loader, package = spec.loader, importlib.util.module_from_spec(spec)

    def whole(name: str) -> Any:
        if name.startswith("__"):  # the import system looks some up
            raise AttributeError(name)
        del vars(package)["__getattr__"]
        loader.exec_module(package)
        return getattr(package, name)

    vars(package)["__getattr__"] = whole
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # as the package does
    sys.meta_path.insert(0, _KeepingLimits())
    patching.install_module("mlx_lm", package, by=__name__)


def mlx_lm_utils() -> types.ModuleType:
    """Return `mlx_lm.utils`."""
    prepare()
    if "mlx_lm.utils" in sys.modules:
        return sys.modules["mlx_lm.utils"]
    stand_ins = {name: _stand_in(name) for name in _FUNCTIONS if name not in sys.modules}
    with patching.imported_modules(stand_ins, by=__name__):
        return importlib.import_module("mlx_lm.utils")


def tuner_utils() -> types.ModuleType:
    """Return `mlx_lm.tuner.utils`, which adds adapters.

    Its package imports transformers for a type of its own trainer, which takes seconds and is not used here, and the
    trackers that are installed.
    """
    mlx_lm_utils()
    if "mlx_lm.tuner.utils" in sys.modules:
        return sys.modules["mlx_lm.tuner.utils"]
    stand_ins = {name: _stand_in(name) for name in ("transformers",) if name not in sys.modules}
    stand_ins |= {name: _late(name) for name in _TRACKERS if name not in sys.modules and importlib.util.find_spec(name)}
    with patching.imported_modules(stand_ins, by=__name__):
        return importlib.import_module("mlx_lm.tuner.utils")


def _late(name: str) -> types.ModuleType:
    """Return a module that imports the one of its name when an attribute is looked up."""
    module = types.ModuleType(name)

    def attribute(key: str) -> Any:
        if key.startswith("__"):  # the import system looks some up
            raise AttributeError(key)
        return getattr(importlib.import_module(name), key)

    vars(module)["__getattr__"] = attribute
    return module


def _stand_in(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update({function: _deferred(name, function) for function in _FUNCTIONS.get(name, ())})
    vars(module).update({kind: type(kind, (), {}) for kind in _TYPES.get(name, ())})
    return module


def _deferred(module: str, function: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments, **named)

    return call
