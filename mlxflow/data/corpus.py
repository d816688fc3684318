"""From the inputs of a stage to files to read, and what is told of them afterwards."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxflow.data import sources
from mlxflow.data.records import Record, Shape
from mlxflow.data.selection import DUPLICATE, TRAIN, VALIDATION, Selection
from mlxflow.data.shards import Shard
from mlxflow.data.tokenization import SourceFile
from mlxflow.errors import SourceError
from mlxflow.identity import DigestCache, digest_json, digest_text
from mlxflow.paths import locate
from mlxflow.stage import Corpus

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_TOLD = 20
_ROWS_PER_SHARD = 20_000


class SourceSettings(NamedTuple):
    """One entry of the sources.

    Attributes:
        path: as written.
        weight: how often an epoch shows its documents.
        format_: of its records.
        text_key: of a text.
        is_validation: its documents are for validation.
        root: the workflow's folder.
    """

    path: str
    weight: float
    format_: str
    text_key: str
    is_validation: bool
    root: Path


def list_files(
    inputs: Sequence[Path | Corpus], owners: Sequence[int], settings: Sequence[SourceSettings], *, state: Path
) -> list[SourceFile]:
    """Return what there is to read, in the order of the corpus.

    Args:
        inputs: files and corpora.
        owners: for each the number of the entry that named it.
        settings: the entries.
        state: the folder in which digests are remembered.

    Raises:
        SourceError: a file cannot be read.
    """
    cache = DigestCache(state / "digests.json")
    files: list[SourceFile] = []
    data_sets: dict[int, list[Path]] = {}
    for one, owner in zip(inputs, owners, strict=True):
        entry = settings[owner]
        if isinstance(one, Corpus) and one.name in sources.BUILTINS:
            library = Path(os.__file__).parent
            for path in sources.builtin_files(one.name):
                name = f"{one.name}/{path.relative_to(library).as_posix()}"
                files.append(_file(path, name, owner, entry, cache, is_named=False))
        elif entry.path.startswith(sources.HF):
            data_sets.setdefault(owner, []).extend([] if isinstance(one, Corpus) else [one])
        elif isinstance(one, Path):
            named = os.path.abspath(locate(entry.path, entry.root)) == os.path.abspath(one)  # noqa: PTH100
            files.append(_file(one, _shown(one, entry.root), owner, entry, cache, is_named=named))
    for owner, paths in data_sets.items():
        files += _data_set(settings[owner], owner, paths, cache)
    cache.save()
    return files


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _file(
    path: Path, name: str, owner: int, entry: SourceSettings, cache: DigestCache, *, is_named: bool
) -> SourceFile:
    try:
        digest, size = cache.digests(path).content, path.stat().st_size
    except FileNotFoundError as error:
        raise SourceError(f"{name}: vanished before it was read. Run the stage again.") from error
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(
            f"{name}: cannot be read ({said}). Mend it or leave it out of pretokenize.sources."
        ) from error
    side = "validation" if entry.is_validation else ""
    if not side and sources.is_split(locate(entry.path, entry.root)):
        side = sources.SPLIT_FILES[path.name]
    return SourceFile(name, path, Shape.of(path), digest, size, owner, side, is_named, entry.format_, entry.text_key)


def _data_set(entry: SourceSettings, owner: int, paths: list[Path], cache: DigestCache) -> Iterator[SourceFile]:
    """Yield parts of a data set of the `datasets` library, each with a side where the data set has splits."""
    sides = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}
    digest = digest_json([cache.digests(path).content for path in paths]) if paths else digest_text(entry.path)
    splits = _load_data_set(entry, is_local=bool(paths))
    for split, data in splits.items():
        side = "validation" if entry.is_validation else sides.get(split, "") if len(splits) > 1 else ""
        for begin in range(0, len(data), _ROWS_PER_SHARD):
            end = min(begin + _ROWS_PER_SHARD, len(data))
            yield SourceFile(
                f"{entry.path}/{split}[{begin}:{end}]",
                locate(entry.path.removeprefix(sources.HF), entry.root),
                Shape("hf", ""),
                digest_json([digest, split, begin, end]),
                0,
                owner,
                side,
                False,
                entry.format_,
                entry.text_key,
                _row_reader(data, begin, end),
            )


def _row_reader(data: Any, begin: int, end: int) -> Any:
    def read() -> Iterator[list[Record]]:
        for first in range(begin, end, 1000):
            columns = data[first : min(first + 1000, end)]
            names = list(columns)
            yield [
                Record(first + i + 1, dict(zip(names, values, strict=True)))
                for i, values in enumerate(zip(*columns.values(), strict=True))
            ]

    return read


def _load_data_set(entry: SourceSettings, *, is_local: bool) -> dict[str, Any]:
    """Return the splits of a data set by name."""
    try:
        import datasets
    except ImportError as error:
        raise SourceError(f"{entry.path}: needs datasets. Run: pip install 'mlxflow[hf]'") from error
    name, _, revision = entry.path.removeprefix(sources.HF).partition("@")
    try:
        if is_local:
            folder = locate(entry.path.removeprefix(sources.HF), entry.root)
            saved = any((folder / file).exists() for file in ("state.json", "dataset_dict.json"))
            loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
        else:
            loaded = datasets.load_dataset(name, revision=revision or None)
    except Exception as error:  # of many kinds: no such data set, no network, a file of another form
        said = " ".join(str(error).split())[:200]
        raise SourceError(f"{entry.path}: cannot be loaded ({said}). Name a folder, or fetch it first.") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def check(files: Sequence[SourceFile], shards: Sequence[Shard], *, skips: bool, max_share: float) -> None:
    """Refuse a corpus with records that cannot be used, or with too many of them.

    Args:
        files: in the order of the corpus.
        shards: of each.
        skips: leave bad records out as long as they are few.
        max_share: of all records, that may be left out.

    Raises:
        SourceError: one line for each of the first bad records.
    """
    bad = [(file, line) for file, shard in zip(files, shards, strict=True) for line in _problems(file, shard)]
    if not bad:
        return
    count = sum(shard.num_bad or 1 for file, shard in zip(files, shards, strict=True) if _problems(file, shard))
    more = [f"and {count - _MOST_TOLD:,} more"] if count > _MOST_TOLD else []
    if not skips:
        how = ', or set pretokenize.on_bad_record = "skip".'
        raise SourceError(*(f"{line}{how}" for _, line in bad[:_MOST_TOLD]), *more)
    total = count + sum(shard.num_documents for shard in shards)
    if count > max_share * total:
        raise SourceError(
            f"pretokenize.max_bad_records = {max_share}: {count:,} of {total:,} records cannot be used, "
            f"a share of {count / total:.4f}. Mend them or raise it.",
            *(f"{line}." for _, line in bad[:_MOST_TOLD]),
            *more,
        )


def _problems(file: SourceFile, shard: Shard) -> list[str]:
    """Return what is wrong with a file, each with its place; a file of a folder that is no text is no problem."""
    if shard.problem:
        is_skipped = (shard.is_binary and not file.is_named) or file.name.startswith("builtin:")
        return [] if is_skipped else [f"{file.name}: {shard.problem}"]
    return [f"{file.name}:{place}: {reason}" if place else f"{file.name}: {reason}" for place, reason in shard.bad]


def accounts(
    files: Sequence[SourceFile],
    shards: Sequence[Shard],
    selection: Selection,
    settings: Sequence[SourceSettings],
    *,
    capacity: int,
) -> dict[str, Any]:
    """Return what is told of the corpus: of each source, and of what was left out.

    Args:
        files: in the order of the corpus.
        shards: of each.
        selection: what became of the documents.
        settings: the sources.
        capacity: tokens that a row holds.
    """
    bad = [line for file, shard in zip(files, shards, strict=True) for line in _problems(file, shard)]
    return {
        "sources": [
            _account(
                one, [i for i, file in enumerate(files) if file.source == number], files, shards, selection, capacity
            )
            for number, one in enumerate(settings)
        ],
        "bad_records": bad[: 5 * _MOST_TOLD],
    }


def _account(
    entry: SourceSettings,
    members: list[int],
    files: Sequence[SourceFile],
    shards: Sequence[Shard],
    selection: Selection,
    capacity: int,
) -> dict[str, Any]:
    mine = [shards[i] for i in members]
    found = sources.find(entry.path, entry.root) if not entry.path.startswith("builtin:") else sources.Found([])
    parts, text_bytes = [np.zeros(0, np.int64)], 0
    for shard in mine:
        documents = shard.documents()
        parts.append(documents.lengths)
        text_bytes += int(documents.sizes.sum())
    lengths = np.concatenate(parts)
    return {
        "path": entry.path,
        "weight": entry.weight,
        "files": len(members),
        "documents": len(lengths),
        "train_documents": _count(members, selection, TRAIN),
        "validation_documents": _count(members, selection, VALIDATION),
        "duplicates": _count(members, selection, DUPLICATE),
        "tokens": int(lengths.sum()),
        "text_bytes": text_bytes,
        "bytes_per_token": round(text_bytes / max(1, int(lengths.sum())), 4),
        "tokens_per_document": _quantiles(lengths),
        "longer_than_a_row": int((lengths > capacity).sum()),
        "blank_documents": sum(shard.blank for shard in mine),
        "bad_records": sum(shard.num_bad for shard in mine),
        "binary_files": found.binary + sum(shard.is_binary for shard in mine),
        "empty_files": sum(files[i].size == 0 and files[i].read is None for i in members),
        "hidden_files": found.hidden,
        "broken_links": found.broken_links,
    }


def _count(members: list[int], selection: Selection, side: int) -> int:
    return sum(int((selection.sides[i] == side).sum()) for i in members)


def _quantiles(lengths: "NDArray[np.int64]") -> dict[str, int]:
    if not len(lengths):
        return {}
    shares = {"smallest": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "largest": 1.0}
    return {
        name: int(value)
        for name, value in zip(shares, np.quantile(lengths, list(shares.values()), method="lower"), strict=True)
    }
