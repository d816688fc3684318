"""What the settings of a corpus are called where the user wrote them, for messages."""

from typing import NamedTuple


class CorpusNames(NamedTuple):
    """Names of the settings of a corpus.

    Attributes:
        table: that holds them, such as "pretokenize"; empty for a call from Python.
    """

    table: str = ""

    def of(self, setting: str) -> str:
        """Return the name of a setting, such as "pretokenize.sources"."""
        return f"{self.table}.{setting}" if self.table else setting
