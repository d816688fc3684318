"""Answers one stage's questions about the artifacts of the others and about sources, and notes what is not there."""

from pathlib import Path

from mlxflow.config import Problem, word
from mlxflow.data import sources
from mlxflow.stage import Corpus, reference_folder

_NO_MAKER = "no stage before this one makes it"


class References:
    """What `Inputs.of` may ask of the workflow; see `mlxflow.stage.Artifacts`.

    Args:
        root: the workflow's folder.
        known: the stages and variants that the asking stage may read from.
        shown: the workflow file's name, for the messages.
        table: the asking stage's table, for the messages.
        lines: where the messages go.

    Attributes:
        source_patterns: the sources that were asked for, as written.
    """

    def __init__(self, root: Path, known: list[str], shown: str, table: str, lines: list[str]) -> None:
        self._root = root
        self._known = known
        self._shown = shown
        self._table = table
        self._lines = lines
        self.source_patterns: list[str] = []

    def folder(self, reference: str, key: str) -> Path:
        """Return the artifact folder of `stage` or `stage:variant`."""
        if reference not in self._known:
            self._note(key, reference, _NO_MAKER, self._known)
        return reference_folder(reference)

    def expand(self, references: tuple[str, ...], key: str) -> tuple[str, ...]:
        """Return references with each `stage:*` replaced by all of that stage's variants."""
        expanded: list[str] = []
        for reference in references:
            name, _, variant = reference.partition(":")
            matching = [one for one in self._known if one.partition(":")[0] == name]
            if variant == "*" and not matching:
                self._note(key, reference, _NO_MAKER, self._known)
            expanded += matching if variant == "*" else [reference]
        return tuple(dict.fromkeys(expanded))

    def sources(self, patterns: tuple[str, ...], key: str) -> tuple[Path | Corpus, ...]:
        """Return the files that sources name, in a fixed order."""
        self.source_patterns += patterns
        found: list[Path | Corpus] = []
        for pattern in patterns:
            found += self._builtin(pattern, key) if pattern.startswith("builtin:") else self._files(pattern, key)
        return tuple(dict.fromkeys(found))

    def _files(self, pattern: str, key: str) -> list[Path]:
        files = sources.source_files(pattern, self._root)
        if not files:
            self._note(key, pattern, "is an empty folder" if (self._root / pattern).is_dir() else "names no file", [])
        elif not any((self._root / path).stat().st_size for path in files):
            self._note(key, pattern, "holds no text", [])
        return files

    def _builtin(self, name: str, key: str) -> list[Corpus]:
        if name in sources.BUILTINS:
            return [Corpus(name)]
        self._note(key, name, "no such built-in corpus", list(sources.BUILTINS))
        return []

    def _note(self, key: str, value: str, expected: str, known: list[str]) -> None:
        advice = f"Known: {', '.join(known)}." if known else "Name a file, a folder or a glob with text in it."
        self._lines.append(word(Problem(key, value, expected, advice), self._shown, self._table))
