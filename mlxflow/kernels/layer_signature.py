"""Groups layers with equal class, settings and shapes; computes a signature that is stable across processes."""

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

# Attributes of a layer that its result does not depend on
_IGNORED_ATTRIBUTES = ("_no_grad",)


def group_layers(model: nn.Module) -> list[list[nn.Module]]:
    """Return a model's layers in groups of equal class, settings and shapes, those of inner layers included.

    Args:
        model: of any architecture.
    """
    numbers: dict[Hashable, int] = {}
    groups: list[list[nn.Module]] = []
    seen: dict[int, Hashable] = {}

    def describe(value: Any) -> Hashable:
        kind = type(value)
        if kind is mx.array:
            return value.shape, value.dtype
        if kind in _PLAIN:
            return kind, value
        if kind is list or kind is tuple:
            return tuple([describe(item) for item in value])
        if not isinstance(value, dict):
            return id(value)  # a function or a settings object: equal only to itself
        if id(value) not in seen:
            seen[id(value)] = number(value)
        return seen[id(value)]

    def number(value: dict[str, Any]) -> Hashable:
        held = tuple([(key, describe(item)) for key, item in value.items()])
        if not isinstance(value, nn.Module):
            return held
        attributes = tuple(
            [(key, describe(item)) for key, item in vars(value).items() if key not in _IGNORED_ATTRIBUTES]
        )
        index = numbers.setdefault((type(value), held, attributes), len(groups))
        if index == len(groups):
            groups.append([])
        groups[index].append(value)
        return ("layer", index)

    describe(model)
    return groups


def settings_of(module: nn.Module) -> Hashable:
    """Return the numbers, booleans and texts that a layer holds, by name, in a hashable form."""
    return tuple(sorted((key, repr(value)) for key, value in plain_values(module).items()))


def plain_values(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, booleans and texts that a layer holds, by name."""
    return {key: value for key, value in {**module, **vars(module)}.items() if isinstance(value, _PLAIN)}


# --- stable across processes

# A layer with a larger array that is no weight has no signature
_MAX_ARRAY_SIZE = 4096


class NoSignature(Exception):  # noqa: N818 not an error
    """A layer holds something that has no name in another process."""


class SignatureBuilder:
    """Builds signatures of layers from their classes, settings and shapes, and those of inner layers.

    Together with the digest of `sources` a signature determines what a layer computes from its weights.

    Attributes:
        modules: names of the modules that define the classes and functions seen so far.
    """

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self._classes: dict[type, list[str]] = {}

    def signature(self, layer: nn.Module) -> str:
        """Return the signature of a layer.

        Raises:
            NoSignature: it holds something made at run time, such as a class that is not found by its name.
        """
        return repr(self._describe(layer, 0))

    def _describe(self, value: Any, depth: int) -> Any:
        if depth > 16:
            raise NoSignature
        inner = functools.partial(self._describe, depth=depth + 1)
        kind = type(value)
        if isinstance(value, mx.array):
            return list(value.shape), str(value.dtype)
        if kind in _PLAIN:
            return value
        if kind is mx.Dtype:
            return str(value)
        if kind in _COLLECTIONS:
            return _COLLECTIONS[kind](value, inner)
        if isinstance(value, type) or (callable(value) and not isinstance(value, nn.Module)):
            return self._named(value)
        return self._describe_object(value, inner)

    def _describe_object(self, value: Any, inner: Callable[[Any], Any]) -> Any:
        """Return the classes, items and attributes of a layer, or of a settings object."""
        if not hasattr(value, "__dict__"):
            raise NoSignature
        attributes = [(key, inner(item)) for key, item in vars(value).items() if key not in _IGNORED_ATTRIBUTES]
        items = value.items() if isinstance(value, nn.Module) else ()
        return self._class_names(type(value)), [(key, _held(key, item, inner)) for key, item in items], attributes

    def _class_names(self, kind: type) -> list[str]:
        """Return the names of a class and of those that it inherits from."""
        if kind not in self._classes:
            self._classes[kind] = [self._named(base) for base in kind.__mro__ if base.__module__ != "builtins"]
        return self._classes[kind]

    def _named(self, value: Any) -> str:
        """Return the full name of a class or a function, by which another process finds it."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if not isinstance(module, str) or not isinstance(name, str):
            raise NoSignature
        target: Any = sys.modules.get(module)
        if module not in self.modules and module != "mlx.core" and not _is_unchanged(target):
            raise NoSignature
        for part in name.split("."):
            target = getattr(target, part, None)
        if target is not value:
            raise NoSignature
        is_layer = isinstance(value, type) and issubclass(value, nn.Module)
        for function in vars(value).values() if is_layer else (value,):
            if isinstance(function, types.FunctionType):
                _require_source(function, module)
        self.modules.add(module)
        return f"{module}.{name}"


# By type: takes a collection and the function that describes an item.
_COLLECTIONS: dict[type, Callable[[Any, Callable[[Any], Any]], Any]] = {
    list: lambda value, inner: [inner(item) for item in value],
    tuple: lambda value, inner: [inner(item) for item in value],
    set: lambda value, inner: sorted(repr(inner(item)) for item in value),
    frozenset: lambda value, inner: sorted(repr(inner(item)) for item in value),
    dict: lambda value, inner: [(inner(key), inner(item)) for key, item in value.items()],
    functools.partial: lambda value, inner: ("partial", inner(value.func), inner(value.args), inner(value.keywords)),
}


def _held(key: str, value: Any, inner: Callable[[Any], Any]) -> Any:
    """Describe an item of a layer; an array whose name begins with "_" is no weight, so its values count too."""
    if not key.startswith("_") or not isinstance(value, mx.array):
        return inner(value)
    if value.size > _MAX_ARRAY_SIZE:
        raise NoSignature
    return inner(value), repr(value.tolist())


def _is_unchanged(module: types.ModuleType | None) -> bool:
    """Return whether a module has a source file that is older than this process."""
    file = getattr(module, "__file__", None) or ""
    try:
        return file.endswith(".py") and Path(file).stat().st_mtime < _process_start()
    except OSError:
        return False


@functools.cache
def _process_start() -> float:
    import psutil

    return float(psutil.Process().create_time()) - 2  # the system rounds it to a second


def _require_source(function: types.FunctionType, module: str) -> None:
    """Raise if a function of a module was replaced by one from elsewhere."""
    if function.__code__.co_filename != getattr(sys.modules.get(module), "__file__", None):
        raise NoSignature


def sources(modules: set[str]) -> str:
    """Return the digest of the source files of modules, and of those that these take functions and classes from.

    Args:
        modules: names of imported modules.

    Raises:
        NoSignature: a file changed since this process began.
        OSError: one cannot be read.
    """
    digest = hashlib.sha256(sys.version.encode())
    for name in sorted(_reached(modules)):
        path = getattr(sys.modules[name], "__file__", None) or ""
        digest.update(f"{name} ".encode())
        if not path.endswith(".py"):
            continue  # MLX itself, whose version counts, or compiled code that a Python module calls
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_mtime >= _process_start():
                raise NoSignature
            text = file.read()
        digest.update(f"{len(text)} ".encode() + text)
    return digest.hexdigest()


def _reached(modules: set[str]) -> set[str]:
    """Return modules and those that they import from, recursively within their packages."""
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
    names = [
        value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        for value in values
    ]
    return {name for name in names if isinstance(name, str)}
