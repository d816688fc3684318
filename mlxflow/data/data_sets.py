"""Data sets of the `datasets` library: on the hub, saved to a folder, or a folder of plain files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.data.records import Record
from mlxflow.data.split_slices import parse_slices
from mlxflow.messages.errors import SourceError, reason_of
from mlxflow.storage.toml_tables import toml_value

# Rows that are tokenized as one shard
_ROWS_PER_PART = 20_000
_ROWS_PER_READ = 1000


class DataSetPart(NamedTuple):
    """Some rows of a split, tokenized as one shard.

    Attributes:
        split: its name.
        begin: the first row.
        end: one past the last.
        rows: the whole split, a `datasets.Dataset`.
    """

    split: str
    begin: int
    end: int
    rows: Any

    def read(self) -> Iterator[list[Record]]:
        """Yield the rows as records, numbered from 1 within the split."""
        for first in range(self.begin, self.end, _ROWS_PER_READ):
            columns = self.rows[first : min(first + _ROWS_PER_READ, self.end)]
            names = list(columns)
            yield [
                Record(first + i + 1, dict(zip(names, values, strict=True)))
                for i, values in enumerate(zip(*columns.values(), strict=True))
            ]


def parts_of(splits: Mapping[str, Any], split: str, *, key: str) -> Iterator[DataSetPart]:
    """Yield the requested parts of a data set, in the requested order.

    Args:
        splits: by name.
        split: the requested rows, such as `train[:1%]+validation`; empty for all.
        key: the entry's key, for messages.

    Raises:
        SourceError: there is no such split, or no such row in it.
    """
    requested = [(name, 0, len(rows)) for name, rows in splits.items()] if not split else []
    for one in parse_slices(split) if split else []:
        if one.split not in splits:
            known = ", ".join(splits)
            raise SourceError(
                f"{key}.split = {toml_value(split)}: has no split {toml_value(one.split)}. Known: {known}."
            )
        try:
            requested.append((one.split, *one.bounds(len(splits[one.split]))))
        except ValueError as error:
            raise SourceError(f"{key}.split = {toml_value(split)}: {error}. Name existing rows.") from error
    for name, begin, end in requested:
        while begin < end:  # parts end at fixed rows for any request, so that shards can be reused
            until = min(end, begin - begin % _ROWS_PER_PART + _ROWS_PER_PART)
            yield DataSetPart(name, begin, until, splits[name])
            begin = until


def load(source: str, folder: Path | None, *, config: str, key: str) -> dict[str, Any]:
    """Return the splits of a data set by name.

    Args:
        source: as written, for messages.
        folder: its folder; None for a data set on the hub.
        config: the name of a configuration; empty for the only one.
        key: the entry's key, for messages.

    Raises:
        SourceError: it cannot be loaded, lacks the configuration, or has several and none is named.
    """
    try:
        import datasets
    except ImportError as error:
        raise SourceError(f"{source}: needs datasets. Run: pip install 'mlxflow[hf]'") from error
    name, _, revision = source.partition(":")[2].partition("@")
    path, revision = (str(folder), "") if folder is not None else (name, revision)
    is_saved = folder is not None and any((folder / file).exists() for file in ("state.json", "dataset_dict.json"))
    if is_saved and config:
        raise SourceError(_no_config(key, config, []))
    try:
        if is_saved:
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, config or None, revision=revision or None)
    except Exception as error:  # any exception: no such data set, no network, an invalid file
        known = _configurations(path, revision)
        raise SourceError(_load_problem(source, config, known, key, error)) from error
    if isinstance(loaded, dict):
        return {str(split): rows for split, rows in loaded.items()}
    return {str(loaded.split or "train"): loaded}


def _load_problem(source: str, config: str, known: Sequence[str], key: str, error: Exception) -> str:
    """Return why a data set with these configurations cannot be loaded."""
    if config and known and config not in known:
        return _no_config(key, config, known)
    if not config and len(known) > 1:
        table = f"{{ path = {toml_value(source)}, config = {toml_value(known[0])} }}"
        return f"{source}: has the configurations {', '.join(known)}. Name one: {table}."
    reason = reason_of(error)
    return f"{source}: cannot be loaded ({reason}). Name a folder, or fetch it first."


def _no_config(key: str, config: str, known: Sequence[str]) -> str:
    advice = f"Known: {', '.join(known)}." if known else "Remove the key."
    return f"{key}.config = {toml_value(config)}: has no such configuration. {advice}"


def _configurations(name: str, revision: str) -> list[str]:
    """Return the names of a data set's configurations; empty if they cannot be looked up."""
    import datasets

    try:
        return [str(one) for one in datasets.get_dataset_config_names(name, revision=revision or None)]
    except Exception:  # any exception; the first error is more informative
        return []
