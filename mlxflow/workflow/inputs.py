"""Resolve the inputs of a stage: references to other stages, sources, files, tokenizers and model folders."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Literal

import msgspec

from mlxflow.data import sources
from mlxflow.data.sources import Corpus
from mlxflow.storage import gguf_header, layout
from mlxflow.storage.model_files import ADVICE_LEADING_OUT, CONFIG, HUB_MODEL, ModelFolderFiles, leading_out_problem
from mlxflow.storage.toml_tables import Problem, problem_message, toml_value
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.stage import names_stage
from mlxflow.workflow.stage_references import Known, kind_made

_NO_MAKER = "no stage before this one makes it"
_NAME_TEXT = "Name a file, a folder or a glob with text in it."


class StageReferences:
    """Resolves the references of one stage to others, and reports those that are invalid.

    Args:
        disk: all queries of the disk go through it.
        known: the stages and variants that the stage may read from.
        written: keys of the stage's table with other values than the default.
        broken: names of stages with a variant that could not be read.
        left_out: names of stages that the file does not mention and that were left out.
        shown: the workflow file's name, for the messages.
        table: the stage's table, for the messages.
        lines: messages are appended here.

    Attributes:
        spellings: expanded leading parts of file names, with the text as written.
    """

    def __init__(
        self,
        disk: Disk,
        known: Known,
        written: Set[str],
        broken: Set[str],
        left_out: Set[str],
        shown: str,
        table: str,
        lines: list[str],
    ) -> None:
        self._disk = disk
        self.spellings: dict[str, str] = {}
        self._known = known
        self._written = written
        self._broken = broken
        self._left_out = left_out
        self._asked: list[tuple[str, str]] = []
        self._list_keys: set[str] = set()
        self._shown = shown
        self._table = table
        self._lines = lines

    def folder(self, reference: str, key: str) -> Path:
        """Return the artifact folder of `stage` or `stage:variant`."""
        self._asked.append((reference, key))
        return layout.stage_folder(self._resolved(reference))

    def stage_of(self, name: str, key: str) -> Path | None:
        """Return the artifact folder of the stage that a text names; None if it names a folder or one of the hub."""
        if not names_stage(name):
            return None
        if self._is_folder(name):
            advice = f'Write "./{name}" for the folder, or rename it to read from the stage.'
            self._note(key, name, "names a stage and a folder beside the workflow file", advice)
        return self.folder(name, key)

    def table(self, reference: str) -> msgspec.Struct | None:
        """Return the resolved table of an earlier stage or variant; None if there is none."""
        return self._known.tables.get(self._resolved(reference))

    def is_planned(self, stage: str) -> bool:
        """Return whether the workflow builds a stage, or a variant of it."""
        return self._known.is_planned(stage)

    def first(self, reference: str) -> str:
        """Return the first variant for the name of a stage with several; else the reference itself."""
        return self._known.first(reference)

    def _resolved(self, reference: str) -> str:
        """Return the stage or variant of a reference; a stage's name may stand for its only variant."""
        return reference if reference in self._broken else self._known.resolved(reference)

    def check_makers(self, files: Iterable[Path]) -> None:
        """Report every reference whose stage does not exist or does not make the files.

        If several keys name an artifact, the written ones are reported.

        Args:
            files: all files that the stage reads.
        """
        made_in: dict[Path, set[str]] = {}
        for file in files:
            made_in.setdefault(file.parent, set()).add(file.name)
        to_blame = {reference for reference, key in self._asked if key in self._written}
        for reference, key in dict.fromkeys(self._asked):
            if reference in to_blame and key not in self._written:
                continue
            stage = self._resolved(reference)
            lacking = made_in.get(layout.stage_folder(stage), set()) - self._known.makers.get(stage, set())
            if stage in self._known.makers and not lacking:
                continue
            makers = [maker for maker, made in self._known.nameable.items() if lacking <= made]
            if stage in makers or reference.partition(":")[0] in self._broken:
                continue
            if variants := self._known.variants(reference):
                self._note(
                    key,
                    reference,
                    "expected one of its variants",
                    _advise_variants(variants, takes_all=key in self._list_keys),
                )
                continue
            expected = f"makes no {min(lacking)}" if stage in self._known.makers else _NO_MAKER
            self._note(key, reference, expected, _list(makers))

    def expand(self, references: tuple[str, ...], key: str) -> tuple[str, ...]:
        """Return references with each `stage:*` replaced by all of that stage's variants."""
        self._list_keys.add(key)
        expanded: list[str] = []
        for reference in references:
            name, _, variant = reference.partition(":")
            matching = self._known.matching(name)
            expects = key in self._written and name not in {*self._broken, *self._left_out}
            if variant == "*" and not matching and expects:
                self._note(key, reference, _NO_MAKER, _list(self._known.nameable))
            expanded += matching if variant == "*" else [self._resolved(reference)]
        return tuple(dict.fromkeys(expanded))

    def makers(self) -> Mapping[str, Set[str]]:
        """Return every earlier stage and variant, with the names of the files it makes."""
        return self._known.makers

    def note(self, problem: Problem) -> None:
        """Report a mistake in the stage's table."""
        self._lines.append(problem_message(problem, self._shown, self._table))

    def _note(self, key: str, value: str, expected: str, advice: str) -> None:
        self.note(Problem(key, value, expected, advice))

    def _expand(self, written: str) -> str:
        """Return a path with everything expanded, and record its spelling."""
        place = self._disk.expand(written)
        if place != written and (leading := self._disk.spelling(written)):
            self.spellings[leading[0]] = leading[1]
        return place

    def _is_folder(self, written: str) -> bool:
        return self._disk.is_dir(self._expand(written))


class References(StageReferences):
    """Resolves the inputs of one stage; the argument of `Inputs.of`, see `mlxflow.workflow.stage.Artifacts`."""

    def sources(self, patterns: tuple[str, ...], key: str) -> tuple[Path | Corpus, ...]:
        """Return the files that sources name, in a fixed order."""
        files: list[Path | Corpus] = []
        for pattern in patterns:
            if pattern.startswith("builtin:"):
                files += self._builtin(pattern, key)
            elif pattern.startswith(sources.HF) and not self._is_folder(pattern.removeprefix(sources.HF)):
                files += self._data_set(pattern, key)
            else:
                files += self._files(pattern, key)
        return tuple(dict.fromkeys(files))

    def files(self, names: tuple[str, ...], key: str) -> tuple[Path, ...]:
        """Return single files."""
        places = {name: self._expand(name) for name in names}
        for name, place in places.items():
            if not self._disk.is_file(place):
                self._note_missing(key, name, "names no file", "Name one, relative to the workflow file.")
        return tuple(Path(place) for place in places.values())

    def checked_file(self, name: str, key: str, mistakes: Callable[[Path, str], Iterable[str]]) -> Path | None:
        """Return a file whose mistakes, if it has some, are reported in its own name and not in the table's."""
        place = self._expand(name)
        try:
            if self._disk.is_file(place) and self._disk.stamp(place):
                self._lines += mistakes(self._disk.root / place, name)
        except OSError as error:
            self._note_unreadable(key, name, error, "Name a file that can be read.")
        return next(iter(self.files((name,), key)), None)

    def tokenizer(self, name: str, key: str, *, trusts_code: bool) -> tuple[Path, ...]:
        """Return the tokenizer files of a folder."""
        if gguf_header.is_named(name):
            return self._gguf_file(name, key)
        hub_id, advice = r"[\w.-]+(/[\w.-]+)?(@[\w.-]+)?", "Name a folder with a tokenizer.json, or a hub id."
        folder = self._folder_or_hub(name, key, hub_id, advice)
        if folder is None:
            return ()
        try:
            files, (file, code) = self._disk.tokenizer_files(folder), self._disk.tokenizer_code(folder)
        except OSError as error:
            return self._note_unreadable(key, name, error, advice)
        if out := self._disk.link_leading_out(folder):
            self._note(key, name, leading_out_problem(out), ADVICE_LEADING_OUT)
        elif "tokenizer.json" not in files:
            if code and not trusts_code:
                self._note_untrusted(key, name, file, code)
            elif not code:
                self._note(key, name, "has no tokenizer.json", "Name a folder that has one.")
        return tuple(Path(folder, file) for file in files)

    def model(self, name: str, key: str, *, trusts_code: bool, needs_tokenizer: bool = False) -> tuple[Path, ...]:
        """Return the files of a model folder, its configuration first."""
        if gguf_header.is_named(name):
            return self._gguf_file(name, key)
        advice = "Name a folder with a config.json, or a hub id."
        folder = self._folder_or_hub(name, key, HUB_MODEL, advice)
        if folder is None:
            return ()
        try:
            files = ModelFolderFiles(*self._disk.model_folder(folder))
        except OSError as error:
            return self._note_unreadable(key, name, error, advice)
        if files.problem:
            self._note(key, name, files.problem, files.advice)
        elif files.code and not trusts_code:
            self._note_untrusted(key, name, CONFIG, files.code)
        elif needs_tokenizer and not trusts_code and any(code := self._disk.tokenizer_code(folder)):
            self._note_untrusted(key, name, *code)
        return tuple(Path(folder, file) for file in files.read)

    def _gguf_file(self, name: str, key: str) -> tuple[Path, ...]:
        """Return a GGUF file; one that is missing, or cannot be read as a model, is reported."""
        place, advice = self._expand(name), "Name a GGUF file, a model folder, or a hub id."
        if not self._disk.is_file(place):
            self._note_missing(key, name, "no such file", advice)
            return ()
        try:
            header = gguf_header.GgufHeader(*self._disk.gguf_header(place))
        except OSError as error:
            return self._note_unreadable(key, name, error, advice)
        if header.problem:
            self._note(key, name, header.problem, f"Known: {', '.join(gguf_header.READABLE)}.")
        self.require_package("gguf", key, name)
        return (Path(place),)

    def _folder_or_hub(self, name: str, key: str, hub_id: str, advice: str) -> str | None:
        """Return the folder of a name; None for a name of the hub, and for a missing folder, which is reported."""
        place = self._expand(name)
        if self._disk.is_dir(place):
            return place.rstrip("/") or "/"
        if not _is_hub_id(name, hub_id):
            self._note_missing(key, name, "no such folder", advice)
        return None

    def _note_missing(self, key: str, name: str, expected: str, advice: str) -> None:
        """Report a missing path, with the unset environment variables in it."""
        unset = self._disk.unset_variables(name)
        because = f"{expected} ({', '.join(unset)} is not set)" if unset else expected
        self._note(key, name, because, advice)

    def _note_unreadable(self, key: str, name: str, error: OSError, advice: str) -> tuple[Path, ...]:
        self._note(key, name, f"cannot be looked up ({error.strerror})", advice)
        return ()

    def _note_untrusted(self, key: str, name: str, file: str, code: str) -> None:
        trust = ".".join([self._table, *key.split(".")[:-1], "trust_remote_code"])
        advice = f"Read it, then set {trust} = true to run it."
        self._note(key, name, f"its {file} names Python code of its own, {code}", advice)

    def kind_of_model(self, name: str) -> Literal["dense", "quantized", "hub", "unknown"]:
        """Return the kind of weights of a stage's model or of a folder; "hub" for a name of the hub."""
        if names_stage(name):
            return kind_made(self.table(name), self)
        place = self._expand(name)
        if gguf_header.is_named(name):
            return "dense"  # its codes are dequantized
        if not self._disk.is_dir(place):
            return "hub" if _is_hub_id(name) else "unknown"
        quantized = self._disk.is_quantized(place)
        return "unknown" if quantized is None else "quantized" if quantized else "dense"

    def model_type(self, name: str) -> str:
        """Return the `model_type` of a model folder; empty for one of the hub, or without a valid `config.json`."""
        place = self._expand(name)
        return self._disk.model_type(place) if self._disk.is_dir(place) else ""

    def require_package(self, package: str, key: str, value: str) -> None:
        """Report an optional package that is not installed."""
        if not self._disk.has_package(package):
            self._note(key, value, f"needs {package}", f"Run: pip install 'mlxflow[{package}]'.")

    def _files(self, pattern: str, key: str) -> list[Path]:
        try:
            self._expand(pattern)
            files = self._disk.source(pattern) if pattern else []
            has_text = bool(files) and self._disk.has_text(pattern)
        except OSError as error:
            folder = os.path.relpath(error.filename, self._disk.root) if error.filename else pattern
            where = f": {folder}" if folder != pattern else ""
            self._note(key, pattern, f"cannot be looked up ({error.strerror}{where})", _NAME_TEXT)
            return []
        if not files:
            is_folder = bool(pattern) and self._is_folder(pattern)
            expected = _without_files(self._disk, pattern) if is_folder else "names no file"
            self._note_missing(key, pattern, expected, _NAME_TEXT)
        elif not has_text:
            self._note(key, pattern, "all its files are empty" if self._is_folder(pattern) else "is empty", _NAME_TEXT)
        return [Path(file) for file in files]

    def _data_set(self, name: str, key: str) -> list[Corpus]:
        if re.fullmatch(r"hf:[\w.-]+(/[\w.-]+)?(@[\w.-]+)?", name):
            return [Corpus(name)]
        self._note(key, name, "no such folder and no data set's name", 'Write "hf:FOLDER" or "hf:OWNER/NAME@REVISION".')
        return []

    def _builtin(self, name: str, key: str) -> list[Corpus]:
        if name in sources.BUILTINS:
            return [Corpus(name)]
        self._note(key, name, "no such built-in corpus", _list(sources.BUILTINS))
        return []


def _without_files(disk: Disk, folder: str) -> str:
    """Return why a folder has no readable file."""
    counts = disk.left_out(folder)
    kinds = ("hidden", "binary by suffix", "links to nothing", "beside records")
    reasons = [f"{count} {kind}" for count, kind in zip(counts, kinds, strict=True) if count]
    return f"is a folder without text ({', '.join(reasons)})" if reasons else "is an empty folder"


def _advise_variants(variants: list[str], *, takes_all: bool) -> str:
    """Return the advice for a reference to a stage with several variants."""
    every = [f"{variants[0].partition(':')[0]}:*"] if takes_all else []
    return f"Write {' or '.join(toml_value(one) for one in [*variants, *every])}."


def _is_hub_id(name: str, pattern: str = HUB_MODEL) -> bool:
    return bool(re.fullmatch(pattern, name)) and not name.startswith(".")


def _list(known: Iterable[str]) -> str:
    return f"Known: {', '.join(known) or 'none'}."
