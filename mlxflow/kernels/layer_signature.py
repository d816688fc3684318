"""Which layers of a model compute the same from their weights, and what such a layer is, in words for any process."""

import functools
import hashlib
import os
import sys
import types
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_PLAIN = (int, float, str, bool, type(None))

# What a layer keeps beside what it computes with
_ASIDE = ("_no_grad",)


def alike(model: nn.Module) -> list[list[nn.Module]]:
    """Return a model's layers, those together that have one class, equal settings and shapes, and so do theirs.

    Args:
        model: of any architecture.
    """
    numbers: dict[Hashable, int] = {}
    groups: list[list[nn.Module]] = []
    seen: dict[int, Hashable] = {}

    def look(value: Any) -> Hashable:
        kind = type(value)
        if kind is mx.array:
            return value.shape, value.dtype
        if kind in _PLAIN:
            return kind, value
        if kind is list or kind is tuple:
            return tuple([look(one) for one in value])
        if not isinstance(value, dict):
            return id(value)  # a function, or settings: of another one nothing is known
        if id(value) not in seen:
            seen[id(value)] = number(value)
        return seen[id(value)]

    def number(value: dict[str, Any]) -> Hashable:
        held = tuple([(key, look(one)) for key, one in value.items()])
        if not isinstance(value, nn.Module):
            return held
        aside = tuple([(key, look(one)) for key, one in vars(value).items() if key not in _ASIDE])
        found = numbers.setdefault((type(value), held, aside), len(groups))
        if found == len(groups):
            groups.append([])
        groups[found].append(value)
        return ("layer", found)

    look(model)
    return groups


def settings(module: nn.Module) -> Hashable:
    """Return the numbers, truths and texts that a layer holds, by name."""
    return tuple(sorted((key, repr(value)) for key, value in plain_values(module).items()))


def plain_values(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, truths and texts that a layer holds, as they are."""
    return {key: value for key, value in {**module, **vars(module)}.items() if isinstance(value, _PLAIN)}


# --- in any process

# A hidden array of more numbers is not told
_MOST_NUMBERS = 4096


class Untold(Exception):  # noqa: N818 nobody's mistake
    """What a layer is cannot be said for another process."""


class Telling:
    """Tells what layers are: their classes, settings and shapes, and those of the layers in them, in words.

    With the digest of `sources` this says what a layer computes from its weights.

    Attributes:
        modules: names of those in which the classes and functions are defined that were told so far.
    """

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._kinds: dict[type, list[str]] = {}

    def told(self, layer: nn.Module) -> str:
        """Return what a layer is.

        Raises:
            Untold: it holds what was made at run time, such as a class that is not found by its name.
        """
        return repr(self._told(layer, 0))

    def _told(self, value: Any, depth: int) -> Any:
        if depth > 16:
            raise Untold
        further = functools.partial(self._told, depth=depth + 1)
        if isinstance(value, mx.array):
            return list(value.shape), str(value.dtype)
        if type(value) in _PLAIN or type(value) is mx.Dtype:
            return str(value) if type(value) is mx.Dtype else value
        if type(value) in (list, tuple):
            return [further(one) for one in value]
        if type(value) in (set, frozenset):
            return sorted(repr(further(one)) for one in value)
        if type(value) is dict:
            return [(further(key), further(one)) for key, one in value.items()]
        if isinstance(value, functools.partial):
            return "partial", further(value.func), further(value.args), further(value.keywords)
        if isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)):
            return self._named(value)
        if not hasattr(value, "__dict__"):
            raise Untold
        aside = [(key, further(one)) for key, one in vars(value).items() if key not in _ASIDE]
        held = [(key, _held(key, one, further)) for key, one in value.items()] if isinstance(value, nn.Module) else []
        return self._kind(type(value)), held, aside

    def _kind(self, kind: type) -> list[str]:
        """Return the names of a class and of those that it inherits from; a layer's functions lie where these do."""
        if kind not in self._kinds:
            self._kinds[kind] = [self._named(one) for one in kind.__mro__ if one.__module__ != "builtins"]
        return self._kinds[kind]

    def _named(self, value: Any) -> str:
        """Return by which name a class or a function is found in its module."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(name, str):
            raise Untold
        found: Any = sys.modules.get(module)
        if module not in self.modules and module != "mlx.core" and not _is_as_read(found):
            raise Untold
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not value:
            raise Untold
        is_layer = isinstance(value, type) and issubclass(value, nn.Module)
        for function in vars(value).values() if is_layer else (value,):
            if isinstance(function, types.FunctionType):
                _require_source(function, module)
        self.modules.add(module)
        return f"{module}.{name}"


def _held(key: str, value: Any, further: Callable[[Any], Any]) -> Any:
    """Return what a layer holds under a name; of hidden arrays, which are no weights, their numbers too."""
    if not key.startswith("_") or not isinstance(value, mx.array):
        return further(value)
    if value.size > _MOST_NUMBERS:
        raise Untold
    return further(value), repr(value.tolist())


def _is_as_read(module: types.ModuleType | None) -> bool:
    """Return whether a module has a file, and one that is older than this process, which read it."""
    file = getattr(module, "__file__", None) or ""
    try:
        return file.endswith(".py") and Path(file).stat().st_mtime < _began()
    except OSError:
        return False


@functools.cache
def _began() -> float:
    import psutil

    return float(psutil.Process().create_time()) - 2  # told to the second


def _require_source(function: types.FunctionType, module: str) -> None:
    """Raise where a function was put in the place of one that a module's file has."""
    if function.__code__.co_filename != getattr(sys.modules.get(module), "__file__", None):
        raise Untold


def sources(modules: set[str]) -> str:
    """Return the digest of the files of modules, and of those that these take functions and classes from.

    Args:
        modules: names of such as are imported.

    Raises:
        Untold: a file changed since this process began.
        OSError: one cannot be read.
    """
    digest = hashlib.sha256(sys.version.encode())
    for name in sorted(_reached(modules)):
        path = getattr(sys.modules[name], "__file__", None) or ""
        digest.update(f"{name} ".encode())
        if not path.endswith(".py"):
            continue  # MLX itself, of a version, or compiled code that a module of Python calls
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_mtime >= _began():
                raise Untold
            text = file.read()
        digest.update(f"{len(text)} ".encode() + text)
    return digest.hexdigest()


def _reached(modules: set[str]) -> set[str]:
    """Return modules and those that they name, and so on within the packages that they are of."""
    packages = {name.partition(".")[0] for name in modules}
    reached, todo = set(), list(modules)
    while todo:
        name = todo.pop()
        package = name.partition(".")[0]
        if name in reached or name not in sys.modules or package in sys.stdlib_module_names:
            continue
        reached.add(name)
        if package in packages:
            todo += _named_in(sys.modules[name])
    return reached


def _named_in(module: types.ModuleType) -> set[str]:
    values = list(vars(module).values())
    names = [one.__name__ if isinstance(one, types.ModuleType) else getattr(one, "__module__", None) for one in values]
    return {name for name in names if isinstance(name, str)}
