"""mlx-lm's models without its tokenizers: its package imports transformers, and that PyTorch where it is installed.

The import costs a second and 50 MB, with PyTorch four seconds and half a gigabyte, and a stage needs none of it to
build or open a model. Here mlx-lm's own modules are imported with stand-ins for the few names that come from there;
whoever uses one of these names gets the real thing, imported then.

`mlx_lm.utils` sets the limit of open files to 2,048 and the most that it can be raised to to 4,096, which fails where
less is allowed, and takes away what is allowed beyond. Here the limit is raised as far as is allowed, and no further.
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

# What mlx_lm.utils takes from modules that are not to be imported with it: functions it calls, and a type it names
_FUNCTIONS = {"mlx_lm.tokenizer_utils": ("load",), "huggingface_hub": ("snapshot_download",)}
_TYPES = {"mlx_lm.tokenizer_utils": ("TokenizerWrapper",)}


# Open files that mlx-lm wants to be able to have, for models of many files
_OPEN_FILES = 2048


def raise_open_files() -> None:
    """Let this process have as many files open as mlx-lm wants, or as many as it may where that is fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _KeepingLimits(MetaPathFinder):
    """Finds `mlx_lm.utils` such that its import leaves the limits of open files to `raise_open_files`."""

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
    """Make `mlx_lm.models` and what they import available; the package's own names are imported when one is asked for.

    Does nothing where mlx-lm is imported already.
    """
    if "mlx_lm" in sys.modules:
        return
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("No module named 'mlx_lm'", name="mlx_lm")
    loader, package = spec.loader, importlib.util.module_from_spec(spec)

    def whole(name: str) -> Any:
        if name.startswith("__"):  # the import system asks for some
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


def _stand_in(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update({function: _deferred(name, function) for function in _FUNCTIONS[name]})
    vars(module).update({kind: type(kind, (), {}) for kind in _TYPES.get(name, ())})
    return module


def _deferred(module: str, function: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments, **named)

    return call
