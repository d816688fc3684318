"""List the source files of a corpus with the split ("side") of each, and report unusable records."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import NamedTuple

from mlxflow.data import sources, splits
from mlxflow.data.corpus_names import CorpusNames
from mlxflow.data.records import Shape
from mlxflow.data.shard import Shard
from mlxflow.data.shard_builder import SourceFile
from mlxflow.data.sources import Corpus
from mlxflow.data.split_slices import parse_slices
from mlxflow.messages.errors import SourceError
from mlxflow.messages.os_errors import advise_on
from mlxflow.storage.digests import digest_json, digest_text
from mlxflow.storage.observed_inputs import ObservedInputs
from mlxflow.storage.paths import as_text, locate, printable

#: The most lines of one kind that a message or a report has.
MOST_TOLD = 20


class SourceSettings(NamedTuple):
    """One entry of the sources.

    Attributes:
        key: of the entry, for messages.
        path: as written.
        weight: how often an epoch contains its documents.
        format_: of its records.
        text_key: of a text.
        config: of a data set, its configuration.
        split: of a data set, the selected rows.
        is_validation: whether its documents are for validation.
        root: the workflow's folder.
    """

    key: str
    path: str
    weight: float
    format_: str
    text_key: str
    config: str
    split: str
    is_validation: bool
    root: Path

    @property
    def place(self) -> Path:
        """The path that it names: a file or a folder; it does not exist for a glob or a name on the hub."""
        return locate(self.path.removeprefix(sources.HF), self.root)


def list_files(
    inputs: Sequence[Path | Corpus],
    owners: Sequence[int],
    settings: Sequence[SourceSettings],
    *,
    digests: ObservedInputs,
) -> list[SourceFile]:
    """Return the files to read, in the order of the corpus, each with the side in its name.

    Args:
        inputs: files and corpora.
        owners: for each input the number of its entry.
        settings: the entries.
        digests: of the files, as this run first read them.

    Raises:
        SourceError: a file or a data set cannot be read.
    """
    files: list[SourceFile] = []
    for number, entry in enumerate(settings):
        members = [one for one, owner in zip(inputs, owners, strict=True) if owner == number]
        paths = [member for member in members if isinstance(member, Path)]
        if entry.path in sources.BUILTINS:
            files += _builtin(entry, number, digests) if members else []
        elif entry.path.startswith(sources.HF):
            files += _data_set(entry, number, paths, digests) if members else []
        else:
            files += _files(entry, number, paths, digests)
    digests.save()
    return _owned(files, settings)


def _owned(files: Sequence[SourceFile], settings: Sequence[SourceSettings]) -> list[SourceFile]:
    """Return each file once for each way of reading it, in the order of the corpus.

    A file of several entries belongs to those that name it directly, else to those for validation, else to the first.
    """

    def rank(one: SourceFile) -> tuple[bool, bool]:
        return not one.is_named, not settings[one.source].is_validation

    groups: dict[str | Path, list[SourceFile]] = {}
    for file in files:
        groups.setdefault(file.digest if file.read else Path(os.path.abspath(file.path)), []).append(file)  # noqa: PTH100
    owned = set()
    for group in groups.values():
        best = sorted(group, key=rank)
        named = [one for one in best if one.is_named] or best[:1]
        owned |= {id(one) for one in {(one.format_, one.text_key): one for one in reversed(named)}.values()}
    return [file for file in files if id(file) in owned]


def _builtin(entry: SourceSettings, owner: int, cache: ObservedInputs) -> Iterator[SourceFile]:
    library = Path(os.__file__).parent
    side = "validation" if entry.is_validation else ""
    for path in sources.builtin_files(entry.path):
        name = f"{entry.path}/{path.relative_to(library).as_posix()}"
        yield _file(path, name, owner, side, entry, cache, is_named=False)


def _files(entry: SourceSettings, owner: int, paths: list[Path], cache: ObservedInputs) -> Iterator[SourceFile]:
    place = Path(os.path.abspath(entry.place))  # noqa: PTH100 - links stay as they are named
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100
    named = [""] * len(paths)
    if named_side(entry) not in ("test", "validation"):  # a file named by the entry itself is used as configured
        folder = _folder(entry)
        named = splits.sides_of([PurePath(os.path.relpath(path, folder)) for path in absolute])
    for path, at, side in zip(paths, absolute, _sides(named, is_validation=entry.is_validation), strict=True):
        if side is not None:
            yield _file(path, _shown(path, entry.root), owner, side, entry, cache, is_named=place == at)


def _folder(entry: SourceSettings) -> Path:
    """Return the folder that an entry names; for a file or a glob the nearest parent folder."""
    place = Path(os.path.abspath(entry.place))  # noqa: PTH100 - links stay as they are named
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def named_side(entry: SourceSettings) -> str:
    """Return the side in the name of an entry's file, folder or split; "" for none."""
    if entry.path.startswith(sources.HF):
        named = [splits.side_of(one.split) for one in parse_slices(entry.split)] if entry.split else []
        return next((side for side in ("test", "validation") if side in named), "")
    place, folder = Path(os.path.abspath(entry.place)), _folder(entry)  # noqa: PTH100
    if place == folder:
        return splits.side_of_folder(place.name)
    return splits.side_of(str(place.relative_to(folder)))


def _sides(named: Sequence[str], *, is_validation: bool) -> list[str | None]:
    """Return the side on which each part of an entry is used; None if it is not read.

    A file named as a test is never trained on. If there is a validation part, all others are trained on; else the
    hashes of the documents decide. From an entry for validation only validation or test parts are read; all of it if
    it has none.

    Args:
        named: the side in each name, or "".
        is_validation: whether the entry is one of `validation_sources`.
    """
    if is_validation:
        chosen = next((side for side in ("validation", "test") if side in named), None)
        return ["validation" if chosen in (None, side) else None for side in named]
    rest = "train" if "validation" in named else ""
    return [side if side in ("validation", "test") else rest for side in named]


def _shown(path: Path, root: Path) -> str:
    """Return a file's name as the user would write it, on one line."""
    return printable(as_text(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()))


def _file(
    path: Path, name: str, owner: int, side: str, entry: SourceSettings, cache: ObservedInputs, *, is_named: bool
) -> SourceFile:
    try:
        digest, size = cache.digests(path).content, path.stat().st_size
    except FileNotFoundError as error:
        raise SourceError(f"{name}: vanished before it was read. Run the stage again.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(
            f"{name}: cannot be read ({reason}). {advise_on(error, f'Fix it or leave it out of {entry.key}')}."
        ) from error
    return SourceFile(
        name,
        path,
        Shape.of(path),
        digest,
        size,
        owner,
        side,
        is_named,
        entry.format_,
        entry.text_key,
        is_unchanged=partial(cache.is_unchanged, path),
        key=entry.key,
    )


def _data_set(entry: SourceSettings, owner: int, paths: list[Path], cache: ObservedInputs) -> Iterator[SourceFile]:
    """Yield parts of a data set of the `datasets` library, each with the side in its split's name."""
    from mlxflow.data import data_sets

    digest = digest_json([cache.digests(path).content for path in paths]) if paths else digest_text(entry.path)
    loaded = data_sets.load(entry.path, entry.place if paths else None, config=entry.config, key=entry.key)
    named = [] if entry.split else list(loaded)  # a split named by the entry is used as configured
    sides = dict(
        zip(named, _sides([splits.side_of(one) for one in named], is_validation=entry.is_validation), strict=True)
    )
    for part in data_sets.parts_of(loaded, entry.split, key=entry.key):
        side = sides.get(part.split, "validation" if entry.is_validation else "")
        if side is None:
            continue
        yield SourceFile(
            f"{printable(entry.path)}/{part.split}[{part.begin}:{part.end}]",
            entry.place,
            Shape("hf", ""),
            digest_json([digest, entry.config, part.split, part.begin, part.end]),
            0,
            owner,
            side,
            bool(entry.split),
            entry.format_,
            entry.text_key,
            part.read,
        )


def check(
    files: Sequence[SourceFile], shards: Sequence[Shard], *, skips: bool, max_share: float, names: CorpusNames
) -> None:
    """Refuse a corpus with unusable records, or with too many of them.

    Args:
        files: in the order of the corpus.
        shards: of each.
        skips: skip bad records as long as they are few.
        max_share: of all records that may be skipped.
        names: of the settings, for messages.

    Raises:
        SourceError: one line for each of the first bad records.
    """
    bad = [(file, line) for file, shard in zip(files, shards, strict=True) for line in problems_of(file, shard)]
    if not bad:
        return
    count = sum(shard.num_bad or 1 for file, shard in zip(files, shards, strict=True) if problems_of(file, shard))
    shown = min(len(bad), MOST_TOLD)
    more = [f"and {count - shown:,} more"] if count > shown else []
    if not skips:
        how = f', or set {names.of("on_bad_record")} = "skip".'
        raise SourceError(*(f"{line}{how}" for _, line in bad[:MOST_TOLD]), *more)
    total = count + sum(shard.num_documents for shard in shards)
    if count > max_share * total:
        raise SourceError(
            f"{names.of('max_bad_records')} = {max_share}: {count:,} of {total:,} records cannot be used, "
            f"a share of {count / total:.4f}. Fix them or raise it.",
            *(f"{line}." for _, line in bad[:MOST_TOLD]),
            *more,
        )


def problems_of(file: SourceFile, shard: Shard) -> list[str]:
    """Return the problems of a file with their positions; a binary file in a folder is no problem."""
    if shard.problem:
        is_skipped = (shard.is_binary and not file.is_named) or file.name.startswith("builtin:")
        return [] if is_skipped else [f"{file.name}: {shard.problem}"]
    return [f"{file.name}:{place}: {reason}" if place else f"{file.name}: {reason}" for place, reason in shard.bad]
