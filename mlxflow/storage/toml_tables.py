"""Convert a TOML table to a frozen struct, and report every mistake in it at once.

Keys, types, ranges, defaults and one-line help are written once, in the fields of a `msgspec.Struct`:

    num_steps: Annotated[int, Meta(ge=1, description="optimizer updates")] = 300

A struct may also have a method `problems(self)` that yields a `Problem` for values that contradict each other; it is
called only if every value is valid by itself.
"""

import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

# Key in `Meta.extra` of a number for which infinity means no limit; its value is the number that means the same
_UNLIMITED = "unlimited"

#: Key in the JSON schema of such a number.
UNLIMITED_MARK = "x-unlimited"

S = TypeVar("S", bound=msgspec.Struct)

#: Upper bounds of numbers in tables: optimizer updates, rows of a batch or of a file, positions and other dimensions.
MAX_STEPS, MAX_ROWS, MAX_SIZE = 10**9, 2**20, 2**20

#: Upper bound of a model's blocks; more than ten times as many as published models have.
MAX_LAYERS = 1000

#: Upper bound of a new model's weights: in bf16 they take 2 TB.
MAX_WEIGHTS = 10**12

# Length up to which a message shows a value or a key in full
_MAX_SHOWN = 1000

# Similar names are suggested for names up to this length, and for this many mistakes
_MAX_GUESSED, _MAX_GUESSES = 64, 100

# A user name and a password in an address, which messages do not repeat
_USER_INFO = re.compile(r"(?<=//)[^/\s\"'@]+@")


def limit(most: float, description: str, *, least: float = 0, unlimited: float = 0) -> Meta:
    """Return the rule for a number that may be `inf`, which means no limit.

    Args:
        most: the largest value.
        description: the help.
        least: the smallest value.
        unlimited: the value that means the same as `inf`.
    """
    extra, mark = {_UNLIMITED: unlimited}, {UNLIMITED_MARK: True}
    return Meta(ge=least, le=most, description=description, extra=extra, extra_json_schema=mark)


class Problem(NamedTuple):
    """A mistake: the key relative to its table, the value as written, what was expected, and what to do."""

    key: str
    value: object
    expected: str
    advice: str


class Checks(Protocol):
    """A struct that checks whether its values contradict each other."""

    def problems(self) -> Iterator[Problem]:
        """Yield the contradictions; keys are relative to the struct."""
        ...


def toml_value(value: object) -> str:
    """Return a value in TOML's notation, on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return '"' + "".join(_toml_character(character) for character in value) + '"'
        case list() | tuple():
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
        case dict():
            return "{ " + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + " }" if value else "{}"
        case float() if math.isinf(value) or math.isnan(value):
            return repr(value)
        case int() if value.bit_length() > 1024:  # Python refuses to convert integers of very many decimal digits
            return hex(value)
        case msgspec.Struct():
            return toml_value(msgspec.to_builtins(value))
        case _:
            return str(value)


def _toml_character(character: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    if character in short or character.isprintable():
        return short.get(character, character)
    return f"\\u{ord(character):04X}" if ord(character) < 0x10000 else f"\\U{ord(character):08X}"


def problem_message(problem: Problem, file: str, table: str) -> str:
    """Return the message for a problem in a table of a file, one line."""
    key = ".".join(part for part in (table, problem.key) if part)
    written = "" if problem.value is msgspec.UNSET else _USER_INFO.sub("***@", toml_value(problem.value))
    value = f" = {_shortened(written)}" if written else ""
    return f"{file}: {key}{value}: {problem.expected}. {problem.advice}"


def _shortened(text: str) -> str:
    """Return a text, without its middle if it is very long."""
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN // 2]} ... {text[-_MAX_SHOWN // 4 :]}"


@cache
def _fields_of(struct: type[msgspec.Struct]) -> tuple[dict[str, msgspec.structs.FieldInfo], dict[str, Any]]:
    """Return a struct's fields by their keys, and their types by their names."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    return fields, get_type_hints(struct, include_extras=True)


def read_struct(table: object, struct: type[S], *, file: str, key: str, lines: list[str]) -> S | None:
    """Convert a TOML table to a struct, or append a line for each mistake and return None.

    Args:
        table: the table as parsed by `tomllib`.
        struct: the struct to make; it may contain structs and tuples of structs.
        file: the file's name, for the messages.
        key: the table's dotted key, for the messages.
        lines: messages are appended here, in the order of the file.
    """
    if not isinstance(table, dict):
        problem = Problem("", table, "expected a table", f"Write [{key}] on a line of its own and its keys below it.")
        lines.append(problem_message(problem, file, key))
        return None
    before = len(lines)
    fields, types = _fields_of(struct)
    values: dict[str, Any] = {}
    for name, value in table.items():
        dotted = f"{key}.{name}" if key else name
        if name not in fields:
            lines.append(unknown_key(dotted, list(fields), file=file, guesses=len(lines) < _MAX_GUESSES))
            continue
        values[fields[name].name] = _read_value(value, fields[name], types[fields[name].name], file, dotted, lines)
    for name, field in fields.items():
        if name not in table and field.required:
            where = key if key.endswith("]") else f"[{key}]"
            problem = Problem(name, msgspec.UNSET, "missing", f"Add {name} to {where}.")
            lines.append(problem_message(problem, file, key))
    if len(lines) > before:
        return None
    made_struct = struct(**values)
    checks: Callable[[], Iterator[Problem]] | None = getattr(made_struct, "problems", None)
    if checks is not None:
        lines.extend(problem_message(problem, file, key) for problem in checks())
    return made_struct if len(lines) == before else None


def unknown_key(dotted: str, known: list[str], *, file: str, guesses: bool = True) -> str:
    """Return the message for an unknown key, with the most similar valid one.

    Args:
        dotted: the key.
        known: the valid keys.
        file: the file's name.
        guesses: whether a similar key is searched for, which takes a millisecond.
    """
    parent, _, name = dotted.rpartition(".")
    near = _nearest(name, known) if guesses and len(name) <= _MAX_GUESSED else ""
    if near:
        return f"{file}: {dotted}: unknown key. Did you mean {parent + '.' if parent else ''}{near}?"
    return f"{file}: {_shortened(dotted)}: unknown key. Known here: {', '.join(sorted(known))}."


def take_variants(
    table: dict[str, Any], struct: type[msgspec.Struct], *, file: str, key: str, lines: list[str]
) -> None:
    """Remove the tables that were meant as variants, such as [quantize.q4], and append a line for each.

    These are the ones that the struct has no field for, nor one with a similar name.

    Args:
        table: of a stage, as parsed; changed.
        struct: of the stage.
        file: the file's name.
        key: of the table; its first name is that of the stage, which may have an index behind it.
        lines: messages are appended here.
    """
    known = list(_fields_of(struct)[0])
    tables = [one for one, value in table.items() if isinstance(value, dict) and one not in known]
    for one in (one for one in tables if len(one) <= _MAX_GUESSED and not _nearest(one, known)):
        del table[one]
        lines.append(_variant_line(key, one, file))


def _variant_line(table: str, key: str, file: str) -> str:
    stage = table.partition("[")[0]
    return f"{file}: {table}.{key}: unknown key. A variant is written as [[{stage}]] with name = {toml_value(key)}."


def _nearest(name: str, known: list[str]) -> str:
    """Return the known name that is most similar to a name; empty if none is similar."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    squeezed = {candidate.replace("_", ""): candidate for candidate in known}
    return near[0] if near else squeezed.get(name.replace("_", ""), "")


def _read_value(
    value: object, field: msgspec.structs.FieldInfo, type_: Any, file: str, dotted: str, lines: list[str]
) -> object:
    bare = get_args(type_)[0] if get_origin(type_) is Annotated else type_
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        return read_struct(value, bare, file=file, key=dotted, lines=lines)
    item = struct_in(bare)
    if (
        item is not None
        and isinstance(value, list)
        and (get_args(bare)[0] is item or any(isinstance(one, dict) for one in value))
    ):
        return _read_items(value, item, field, type_, file, dotted, lines)
    try:
        return msgspec.convert(_without_limit(type_) if value == math.inf else value, type_)
    except msgspec.ValidationError:
        if wrong := list(_wrong_names(value, bare)):
            lines.extend(problem_message(problem, file, f"{dotted}[{number}]") for number, problem in wrong)
            return None
        advice = f"Set {dotted} to one." if field.required else _advise_default(dotted, field)
        lines.append(problem_message(Problem("", value, f"expected {describe(type_)}", advice), file, dotted))
        return None


def _wrong_names(value: object, bare: Any) -> Iterator[tuple[int, Problem]]:
    """Yield number and problem of each entry of a list that is none of the names that its entries may be."""
    item = get_args(bare)[0] if get_origin(bare) is tuple else None
    names = get_args(item) if get_origin(item) is Literal else ()
    if isinstance(value, list) and names and all(isinstance(name, str) for name in names):
        for number, entry in enumerate(value):
            if entry not in names:
                near = _nearest(entry, list(names)) if isinstance(entry, str) and len(entry) <= _MAX_GUESSED else ""
                advice = f"Did you mean {toml_value(near)}?" if near else "Use one of them, or remove it."
                yield number, Problem("", entry, f"expected {describe(item)}", advice)


def _without_limit(type_: Any) -> float:
    """Return the value of a key that means no limit; infinity if the key has none."""
    metas = get_args(type_)[1:] if get_origin(type_) is Annotated else ()
    return next((meta.extra[_UNLIMITED] for meta in metas if meta.extra and _UNLIMITED in meta.extra), math.inf)


def struct_in(type_: Any) -> type[msgspec.Struct] | None:
    """Return the struct type of the entries of a tuple type, or None."""
    if get_origin(type_) is not tuple:
        return None
    item = get_args(type_)[0]
    for one in (item, *get_args(item)):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return one
    return None


def _read_items(
    value: list[object],
    item: type[msgspec.Struct],
    field: msgspec.structs.FieldInfo,
    type_: Any,
    file: str,
    dotted: str,
    lines: list[str],
) -> tuple[object, ...]:
    """Read a list of tables, or of tables and plain values."""
    bare = get_args(type_)[0] if get_origin(type_) is Annotated else type_
    takes_tables_only = get_args(bare)[0] is item
    read: list[object] = []
    for index, one in enumerate(value):
        if isinstance(one, dict) or takes_tables_only:
            read.append(read_struct(one, item, file=file, key=f"{dotted}[{index}]", lines=lines))
        else:
            found = _read_value([one], field, type_, file, f"{dotted}[{index}]", lines)
            read += found if isinstance(found, tuple) else [None]
    return tuple(read)


def _advise_default(dotted: str, field: msgspec.structs.FieldInfo) -> str:
    default = default_of(field)
    if default is None:
        return f"Change it or remove {dotted}."
    return f"Use {dotted} = {toml_value(default)} (the default) or remove the key."


def default_of(field: msgspec.structs.FieldInfo) -> object:
    """Return a field's default, or None."""
    if field.default is not msgspec.NODEFAULT:
        return field.default
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return None


def describe(type_: Any) -> str:
    """Return a type with its range in words, such as `a whole number from 1 to 64`."""
    metas = [m for m in get_args(type_)[1:] if isinstance(m, msgspec.Meta)] if get_origin(type_) is Annotated else []
    bare = get_args(type_)[0] if get_origin(type_) is Annotated else type_
    if get_origin(bare) is Literal:
        choices = [toml_value(choice) for choice in get_args(bare)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if get_origin(bare) is tuple:
        return _describe_list(bare, metas)
    if get_origin(bare) is dict:
        return "a table"
    if get_args(bare):
        return " or ".join(describe(arg) for arg in get_args(bare) if arg is not type(None))
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    noun = nouns.get(bare, "a table")
    return " ".join([noun, *(_describe_range(meta) for meta in metas)]).rstrip()


def _describe_list(bare: Any, metas: list[msgspec.Meta]) -> str:
    least = next((m.min_length for m in metas if m.min_length), 0)
    exactly = "" if Ellipsis in get_args(bare) else f" of {len(get_args(bare))}"
    return f"a list{f' of at least {least}' if least else exactly}, each {describe(get_args(bare)[0])}"


def _describe_range(meta: msgspec.Meta) -> str:
    if meta.pattern is not None:
        return f"such as {meta.examples[0]!r}" if meta.examples else f"of the form {meta.pattern}"
    if meta.min_length is not None:
        return "that is not empty"
    if meta.ge is not None and meta.le is not None:
        return f"from {_bound(meta.ge)} to {_bound(meta.le)}"
    words = [
        (meta.ge, "of at least"),
        (meta.gt, "over"),
        (meta.le, "of at most"),
        (meta.lt, "under"),
    ]
    return " and ".join(f"{phrase} {_bound(bound)}" for bound, phrase in words if bound is not None)


def _bound(value: float) -> str:
    """Return a bound in TOML's notation, large ones with digit separators."""
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else f"{value:g}"
