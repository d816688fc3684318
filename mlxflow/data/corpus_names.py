"""The names of a corpus's settings for messages: workflow keys, or argument names of a call from Python."""

from typing import NamedTuple


class CorpusNames(NamedTuple):
    """Names of the settings of a corpus.

    Attributes:
        table: of the settings, such as "pretokenize"; empty for a call from Python.
    """

    table: str = ""

    def of(self, setting: str) -> str:
        """Return the name of a setting, such as "pretokenize.sources"."""
        return f"{self.table}.{setting}" if self.table else setting
