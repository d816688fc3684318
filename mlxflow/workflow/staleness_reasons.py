"""The reasons why a stage is stale, in words, each of bounded length: hundreds of files or variants are counted."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlxflow.storage import layout
from mlxflow.storage.paths import printable

#: Files or stages that a reason names before it counts the others.
MOST_NAMED = 3

# Characters of a setting's value that a reason shows, and how many of them before the first difference
_MOST_SHOWN, _SHOWN_BEFORE = 100, 30


def names_text(names: Sequence[str]) -> str:
    """Return `a, b, c and 297 more`."""
    named, more = ", ".join(names[:MOST_NAMED]), len(names) - MOST_NAMED
    return f"{named} and {more:,} more" if more > 0 else named


def upstream_reasons(tasks: Sequence[str]) -> Iterator[str]:
    """Yield the reasons of a stage that reads from stages that will run."""
    if len(tasks) > MOST_NAMED:
        yield f"because {len(tasks):,} stages run: {names_text(tasks)}"
    else:
        yield from (f"because {task} runs" for task in tasks)


def damage_reasons(lines: Iterable[str]) -> Iterator[str]:
    """Yield the first of the lines about a stage's outputs, and how many there are besides."""
    read = list(lines)
    yield from read[:MOST_NAMED]
    if len(read) > MOST_NAMED:
        yield f"{len(read) - MOST_NAMED:,} more of its files differ"


def input_reasons(before: Mapping[str, str], now: Mapping[str, str | None]) -> Iterator[str]:
    """Yield the differences between the inputs of the last run and those of now.

    Args:
        before: identities by name.
        now: the same; None for a file that is missing or damaged.
    """
    kinds: dict[str, list[str]] = defaultdict(list)  # in the order of the first name of each
    for name in sorted({*before, *now}):
        if name not in now or name not in before or now[name] != before[name]:
            kinds[_kind(name, before, now)].append(name)
    for kind, names in kinds.items():
        if len(names) > MOST_NAMED:
            yield f"{len(names):,} files {_PLURALS.get(kind, kind)}: {names_text([printable(name) for name in names])}"
        else:
            yield from (f"{_shown(name, kind)} {kind}" for name in names)


_MISSING = "is missing or damaged"
_PLURALS = {"is gone": "are gone", "is new": "are new", _MISSING: "are missing or damaged"}


def _kind(name: str, before: Mapping[str, str], now: Mapping[str, str | None]) -> str:
    if name not in now:
        return "is gone"
    if name not in before:
        return "is new"
    return "changed" if now[name] else _MISSING


def _shown(name: str, kind: str) -> str:
    is_plain = kind == _MISSING or name.startswith(f"{layout.ARTIFACTS}/")
    return printable(name if is_plain else f"source {name}")


def setting_reasons(task: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield the differences between the settings of a stage's last run and those of now, by their keys."""
    names = {"version": "the stage's code", "seed": "workflow.seed", "mlx": "mlx", "device": "the device"}
    names["name"] = "workflow.name"
    for key in sorted({*before, *now}):
        if before.get(key) == now.get(key):
            continue
        if key == "config":
            yield from _changed_values(task.partition(":")[0], before.get(key), now.get(key))
        else:
            yield _value_change(names.get(key, key), before.get(key), now.get(key))


def _changed_values(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*now, *(name for name in before if name not in now)]:
            if before.get(name) != now.get(name):
                yield from _changed_values(f"{key}.{name}", before.get(name), now.get(name))
    else:
        yield _value_change(key, before, now)


def _value_change(key: str, before: Any, now: Any) -> str:
    """Return `key: before -> now`; of long values, the part around their first difference."""
    texts = [_toml(before), _toml(now)]
    start = 0
    if max(map(len, texts)) > _MOST_SHOWN:
        shorter = min(map(len, texts))
        equal = next((at for at, (one, two) in enumerate(zip(*texts, strict=False)) if one != two), shorter)
        start = max(0, equal - _SHOWN_BEFORE)
    return f"{key}: {' -> '.join(_part(text, start) for text in texts)}"


def _part(text: str, start: int) -> str:
    end = start + _MOST_SHOWN
    return f"{'...' if start else ''}{text[start:end]}{'...' if len(text) > end else ''}"


def _toml(value: Any) -> str:
    from mlxflow.storage.toml_tables import toml_value

    return "nothing" if value is None else toml_value(value)
