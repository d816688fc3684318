"""The one place that replaces attributes of MLX, mlx-lm and model layers, undoes it, and lists what is replaced.

MLX has no hooks: to compute an operation differently, an attribute of its modules, a method of its classes or the
class of a layer is replaced for a while. Every replacement of the package is made here, so that `active()` shows all of
them together and each one is undone when its block ends, normally or by an exception.

Blocks may be nested and may end in any order: a replacement that ends below another leaves the upper one in place, and
after the last one the original is back.
"""

import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

_ABSENT: Any = object()


class Replacement(NamedTuple):
    """One replacement that is in force.

    Attributes:
        target: what is replaced, such as `mlx.core.fast.scaled_dot_product_attention`, `class of mlx.nn.Linear` for one
            layer of that class, or `sys.modules[huggingface_hub]`.
        by: the module that made it.
        is_permanent: it stays until `uninstall`, not until a block ends.
    """

    target: str
    by: str
    is_permanent: bool


class _Attribute(NamedTuple):
    """An attribute of a module or a class; its own, not an inherited one."""

    owner: Any
    name: str

    def key(self) -> tuple[Any, ...]:
        return ("attribute", id(self.owner), self.name)

    def read(self) -> Any:
        return vars(self.owner).get(self.name, _ABSENT)

    def write(self, value: Any) -> None:
        if value is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)

    def describe(self, _: Any) -> str:
        is_class = isinstance(self.owner, type)
        return f"{_dotted(self.owner) if is_class else self.owner.__name__}.{self.name}"


class _LayerClass(NamedTuple):
    """The class of one layer."""

    layer: Any

    def key(self) -> tuple[Any, ...]:
        return ("class", id(self.layer))

    def read(self) -> Any:
        return type(self.layer)

    def write(self, value: Any) -> None:
        self.layer.__class__ = value

    def describe(self, before: Any) -> str:
        return f"class of {_dotted(before)}"


class _ImportedModule(NamedTuple):
    """An entry of `sys.modules`."""

    name: str

    def key(self) -> tuple[Any, ...]:
        return ("module", self.name)

    def read(self) -> Any:
        return sys.modules.get(self.name, _ABSENT)

    def write(self, value: Any) -> None:
        if value is _ABSENT:
            sys.modules.pop(self.name, None)
        else:
            sys.modules[self.name] = value

    def describe(self, _: Any) -> str:
        return f"sys.modules[{self.name}]"


_Slot = _Attribute | _LayerClass | _ImportedModule


class _Undoable:
    """A replacement in force: its location and the value to restore."""

    def __init__(self, slot: _Slot, value: Any, by: str, *, is_permanent: bool) -> None:
        self.slot = slot
        self.number = next(_NUMBERS)
        self.before = slot.read()
        self.replacement = Replacement(slot.describe(self.before), by, is_permanent)
        slot.write(value)
        _STACKS.setdefault(slot.key(), []).append(self)

    def undo(self) -> None:
        """Put the value before back, or hand it to the replacement above this one; does nothing a second time."""
        stack = _STACKS.get(self.slot.key(), [])
        if self not in stack:
            return
        place = stack.index(self)
        del stack[place]
        if place < len(stack):
            stack[place].before = self.before
        else:
            self.slot.write(self.before)
        if not stack:
            del _STACKS[self.slot.key()]


_NUMBERS = itertools.count()
_STACKS: dict[tuple[Any, ...], list[_Undoable]] = {}  # for each place its replacements, the oldest first


def active() -> list[Replacement]:
    """Return the replacements that are in force in this process, the oldest first."""
    entries = [entry for stack in _STACKS.values() for entry in stack]
    return [entry.replacement for entry in sorted(entries, key=lambda entry: entry.number)]


@contextmanager
def attributes(*changes: tuple[Any, str, Any], by: str) -> Iterator[None]:
    """Replace attributes of modules or classes until the block ends.

    Args:
        changes: owner, the attribute's name and its new value.
        by: the calling module's `__name__`, for `active`.
    """
    with _replaced([(_Attribute(owner, name), value) for owner, name, value in changes], by):
        yield


@contextmanager
def layer_classes(changes: Iterable[tuple[Any, type]], *, by: str) -> Iterator[None]:
    """Give single layers other classes until the block ends; other layers of their classes are not touched.

    Enter the block before a step is compiled: a compiled function does not see a change of classes.

    Args:
        changes: a layer and its new class, a subclass of its own class with the same memory layout.
        by: the calling module's `__name__`, for `active`.
    """
    with _replaced([(_LayerClass(layer), kind) for layer, kind in changes], by):
        yield


@contextmanager
def layer_method(
    layer: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]], *, by: str
) -> Iterator[None]:
    """Replace a method of one layer until the block ends.

    Python looks special methods up in the class, so the layer gets a class of its own. That class is part of a
    reference cycle: objects that its method closes over live until the next garbage collection, so keep no arrays
    there.

    Args:
        layer: the layer; others of its class keep their method.
        name: of the method, such as `__call__`.
        make: takes the method and returns its replacement; both take the layer as their first argument.
        by: the calling module's `__name__`, for `active`.
    """
    kind: Any = type(layer)
    with layer_classes([(layer, type(kind.__name__, (kind,), {name: make(getattr(kind, name))}))], by=by):
        yield


@contextmanager
def imported_modules(stand_ins: Mapping[str, types.ModuleType], *, by: str) -> Iterator[None]:
    """Let `import` find other modules under these names until the block ends.

    Args:
        stand_ins: full name to the module.
        by: the calling module's `__name__`, for `active`.
    """
    with _replaced([(_ImportedModule(name), module) for name, module in stand_ins.items()], by):
        yield


def restore_class(layer: Any) -> None:
    """End the newest change of a layer's class before its block does; the block's end then leaves it alone."""
    stack = _STACKS.get(_LayerClass(layer).key())
    if stack:
        stack[-1].undo()


def install(owner: Any, name: str, value: Any, *, by: str) -> None:
    """Replace an attribute of a module or class for the rest of the process, or until `uninstall`; once for a caller.

    Args:
        owner: the module or class.
        name: of its attribute.
        value: the new one.
        by: the calling module's `__name__`, for `active`.
    """
    _install(_Attribute(owner, name), value, by)


def install_module(name: str, module: types.ModuleType, *, by: str) -> None:
    """Let `import` find a module under a name for the rest of the process; once for a caller.

    Args:
        name: full name.
        module: the one to find.
        by: the calling module's `__name__`, for `active`.
    """
    _install(_ImportedModule(name), module, by)


def _install(slot: _Slot, value: Any, by: str) -> None:
    if _installed(slot, by) is None:
        _Undoable(slot, value, by, is_permanent=True)


def uninstall(owner: Any, name: str, *, by: str) -> None:
    """Undo an `install`; does nothing without one."""
    entry = _installed(_Attribute(owner, name), by)
    if entry is not None:
        entry.undo()


def _installed(slot: _Slot, by: str) -> _Undoable | None:
    stack = _STACKS.get(slot.key(), [])
    return next((entry for entry in stack if entry.replacement == (entry.replacement.target, by, True)), None)


@contextmanager
def _replaced(changes: list[tuple[_Slot, Any]], by: str) -> Iterator[None]:
    with ExitStack() as undoing:
        for slot, value in changes:
            undoing.callback(_Undoable(slot, value, by, is_permanent=False).undo)
        yield


def _dotted(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
