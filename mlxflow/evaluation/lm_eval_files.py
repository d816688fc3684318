"""What a YAML file of an lm-eval task reads: other YAML files, local data, Python code; without running any of it.

lm-eval reads names of data files relative to the current folder; here they are relative to the task's own file.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Included files within included files
_MAX_DEPTH = 20


class TaskYaml(NamedTuple):
    """The content of a task's YAML file as far as it names other files.

    Attributes:
        name: of the task or group.
        included: YAML files, relative to the folder of the task's file, as are the others.
        data: data files.
        code: Python files whose functions the task names.
        problem: why it is no task; empty if it is one.
    """

    name: str
    included: list[str]
    data: list[str]
    code: list[str]
    problem: str


class _Function(str):
    """The name of a Python function, `module.function`."""


def read_task_yaml(path: Path) -> TaskYaml:
    """Return which files a task's YAML file names.

    Args:
        path: of the file.

    Raises:
        OSError: it, or a file that it includes, cannot be read.
    """
    found = TaskYaml("", [], [], [], "")
    try:
        table = _merged(path, path.parent, found, 0)
    except ValueError as error:
        return found._replace(problem=" ".join(str(error).split()))
    name = table.get("task", table.get("group"))
    if not isinstance(name, str) or not name:
        return found._replace(problem='has no "task", the name')
    named = table.get("dataset_kwargs")
    named = named if isinstance(named, dict) else {}
    for key, place in (("dataset_path", table.get("dataset_path")), ("data_dir", named.get("data_dir"))):
        if isinstance(place, str) and place and (path.parent / place).exists():  # changes in it would go unnoticed
            problem = f'{key} "{place}" is a local folder; write dataset_path: json, and its files as data_files'
            return found._replace(problem=problem)
    files = named.get("data_files")
    found.data.extend(one for one in _texts(files) if "://" not in one)
    return found._replace(name=name)


def _merged(path: Path, base: Path, found: TaskYaml, depth: int) -> dict[str, Any]:
    """Return the table of a YAML file with those that it includes; its own keys win."""
    if depth > _MAX_DEPTH:
        raise ValueError("includes itself")
    table = _load(path)
    for function in _functions(table):
        module = path.parent / f"{function.rpartition('.')[0].replace('.', '/')}.py"
        found.code.append(os.path.relpath(module, base))
    included = table.pop("include", [])
    merged: dict[str, Any] = {}
    for one in [included] if isinstance(included, str) else included:
        place = path.parent / str(one)
        found.included.append(os.path.relpath(place, base))
        if place.is_file():  # a missing one is reported as a file
            merged |= _merged(place, base, found, depth + 1)
    return merged | table


def _load(path: Path) -> dict[str, Any]:
    import yaml

    class NamingLoader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads the name of a function instead of importing it."""

    NamingLoader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))
    try:
        with path.open("rb") as file:
            table = yaml.load(file, Loader=NamingLoader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"is not valid YAML ({error})") from error
    if not isinstance(table, dict):
        raise ValueError("is no table")
    return table


def _functions(value: Any) -> Iterator[_Function]:
    if isinstance(value, _Function):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _functions(one)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
