"""Type and range checks of a model's `config.json` against the fields of mlx-lm's classes, before layers are made.

mlx-lm's classes accept any value of a config: a list for a width, null, ten million layers. Here each value is
compared with the type that its field declares, and with bounds, so that a mistake becomes one line with file and key.
"""

import dataclasses
import math
import re
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from mlxflow.messages.errors import ArtifactError
from mlxflow.ops import patching
from mlxflow.storage.toml_tables import MAX_LAYERS, toml_value

#: What mlx-lm's classes raise for values that contradict each other.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)

_ADVICE = "Fix the file, or name another model."
_MOST, _MOST_ITEMS, _MOST_SHOWN = 2**31 - 1, 100_000, 60

_LAYERS = re.compile(r"(num|n)_(hidden_|transformer_|decoder_|encoder_)?layers?")
_FRACTIONS = re.compile(r"factor|ratio|scal(e|ing)|theta|eps(ilon)?$")
_AT_LEAST_ONE = {"hidden_size", "vocab_size", "num_attention_heads", "n_head", "n_heads", "n_embd", "d_model", "dim"}


def kind_and_reason(error: BaseException) -> str:
    """Return the class of an error of another library and its message, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class Guarded:
    """A stand-in for mlx-lm's two classes of an architecture that checks the settings first.

    Use it as the class of settings (`from_dict`) and as the class of models (call it).

    Args:
        model_class: called with settings, makes a model.
        args_class: its class method `from_dict` makes settings from a `config.json`.
        file: that `config.json`, for the messages.
    """

    def __init__(self, model_class: Any, args_class: Any, file: str) -> None:
        self._model_class = model_class
        self._args_class = args_class
        self._file = file
        self._root: dict[str, Any] = {}
        self._suspects: list[str] = []

    def from_dict(self, config: dict[str, Any]) -> Any:
        """Return the settings.

        Raises:
            ArtifactError: one line for each wrong value; or mlx-lm's error, with the values that may have caused it.
        """
        self._root = config
        with self._checking():
            return self._args_class.from_dict(config)

    def __call__(self, settings: Any) -> Any:
        """Return the model; raises as `from_dict` does."""
        with self._checking():
            return self._model_class(settings)

    @contextmanager
    def _checking(self) -> Iterator[None]:
        """Check every table, nested ones included, from which mlx-lm makes settings until the block ends."""
        from mlx_lm.models.base import BaseModelArgs

        plain = vars(BaseModelArgs)["from_dict"]

        def from_dict(cls: Any, params: Any) -> Any:
            self._check(cls, params)
            return plain.__func__(cls, params)

        try:
            with patching.attributes((BaseModelArgs, "from_dict", classmethod(from_dict)), by=__name__):
                yield
        except BUILD_ERRORS as error:
            odd = "".join(f"{suspect}, " for suspect in self._suspects[:4])
            kind, reason = toml_value(self._root.get("model_type")), kind_and_reason(error)
            raise ArtifactError(
                f"{self._file}: {odd}model_type = {kind}: mlx-lm cannot build that ({reason}). {_ADVICE}"
            ) from error

    def _check(self, cls: Any, params: Any) -> None:
        prefix = next((f"{key}." for key, value in self._root.items() if value is params), "")
        if not isinstance(params, dict):
            raise ArtifactError(f"{self._file}: {prefix[:-1]} = {_shown(params)}: expected a table. {_ADVICE}")
        if lines := [f"{self._file}: {prefix}{line}. {_ADVICE}" for line in mistakes(cls, params)]:
            raise ArtifactError(*lines)
        self._suspects += [f"{prefix}{one}" for one in _suspects(cls, params)]


def mistakes(cls: Any, params: Mapping[str, Any]) -> list[str]:
    """Return `key = value: expected ...` for each wrong value of a table.

    Args:
        cls: one of mlx-lm's dataclasses of settings; for other classes nothing is checked.
        params: the table from which it is made.
    """
    lines = []
    for name, (hint, has_default) in _fields(cls).items():
        if name not in params or (params[name] is None and has_default):
            continue
        value = params[name]
        expected = _bounds(name, value) or _mismatch(value, hint)
        if expected and not _is_taken_nevertheless(name, value, hint):
            lines.append(f"{name} = {_shown(value)}: expected {expected}")
    return lines


def _is_taken_nevertheless(name: str, value: Any, hint: Any) -> bool:
    """Return whether mlx-lm's class takes a value that its annotation excludes.

    Real configs have a pattern of layers as text (`hybrid_override_pattern` of nemotron_h, declared as a list) and
    fractions of what is declared a whole number (`partial_rotary_factor` of mimo_v2_flash).
    """
    if isinstance(value, str):
        return not _mismatch([value], hint)
    return isinstance(value, float) and math.isfinite(value) and _FRACTIONS.search(name) is not None


def _suspects(cls: Any, params: Mapping[str, Any]) -> list[str]:
    """Return the values that most often cause errors elsewhere: null, empty, zero or negative."""
    given = {name: params[name] for name in _fields(cls) if name in params and not isinstance(params[name], bool)}
    return [f"{name} = {_shown(value)}" for name, value in given.items() if _is_odd(value)]


def _is_odd(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value <= 0) or value in ([], {}, "")


@cache
def _fields(cls: Any) -> dict[str, tuple[Any, bool]]:
    """Return the type of each field of a class, and whether it has a default."""
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        hints = get_type_hints(cls)
    except (NameError, TypeError):  # annotations in third-party code
        return {}
    without = dataclasses.MISSING
    return {
        one.name: (hints[one.name], one.default is not without or one.default_factory is not without)
        for one in dataclasses.fields(cls)
        if one.init
    }


def _bounds(name: str, value: Any) -> str:
    """Return what was expected of a number whose bounds follow from its name; empty if it is within them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    least = 1 if name in _AT_LEAST_ONE or _LAYERS.fullmatch(name) else -_MOST
    most = MAX_LAYERS if _LAYERS.fullmatch(name) else _MOST
    if isinstance(value, int) and not least <= value <= most:
        return f"a number from {least} to {most}"
    return ""


#: The name in messages of types that need no further check.
_NOUNS: dict[Any, str] = {type(None): "null", str: "text", dict: "a table"}


def _mismatch(value: Any, hint: Any) -> str:
    """Return what was expected of a value by its declared type; empty if it matches or the type is not checked."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union_mismatch(value, arguments)
    kind = origin or hint
    if kind in (int, float):
        return _number_mismatch(value, kind)
    if kind is bool:
        return "" if isinstance(value, bool) or value in (0, 1) else "true or false"
    if kind in (list, tuple):
        return _list_mismatch(value, [argument for argument in arguments if argument is not Ellipsis])
    noun = _NOUNS.get(kind)
    return "" if noun is None or isinstance(value, kind) else noun


def _union_mismatch(value: Any, hints: tuple[Any, ...]) -> str:
    expected = [_mismatch(value, hint) for hint in hints]
    return "" if not all(expected) else " or ".join(dict.fromkeys(one for one in expected if one != "null"))


def _number_mismatch(value: Any, kind: type) -> str:
    noun = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return noun
    return noun if kind is int and value != int(value) else ""


def _list_mismatch(value: Any, kinds: list[Any]) -> str:
    if not isinstance(value, list | tuple):
        return "a list"
    if len(value) > _MOST_ITEMS:
        return f"a list of at most {_MOST_ITEMS:,}"
    infinite = (math.inf, -math.inf)  # such as of a time step
    items = [one for one in value if not (isinstance(one, float) and one in infinite)]
    expected_item = next((expected for item in items if kinds and (expected := _mismatch(item, kinds[0]))), "")
    return f"a list, each {expected_item}" if expected_item else ""


def _shown(value: Any) -> str:
    """Return a value as JSON, shortened."""
    text = "null" if value is None else toml_value(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
