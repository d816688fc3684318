"""Parse slices of data set splits in the notation of the `datasets` library.

Examples: `train`, `train[:1%]`, `train[10:20]+validation`. Reading a workflow imports this module, so it imports
    nothing heavy.
"""

import re
from typing import NamedTuple

_PART = re.compile(r"(?P<split>\w+(?:[.-]\w+)*)(?:\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?", re.ASCII)
_MOST_ROWS = 10**12


class Slice(NamedTuple):
    """Some rows of a split.

    Attributes:
        split: its name.
        begin: the first row, counted from the end if negative; None for the beginning.
        end: one past the last, likewise.
        is_percent: whether both are percentages of the split's rows.
    """

    split: str
    begin: int | None
    end: int | None
    is_percent: bool

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """Return the first row and one past the last of a split with a number of rows.

        Raises:
            ValueError: they lie beyond the split, or there is no row between them; the message is for the user.
        """
        ends = [self._row(one, num_rows) for one in (self.begin, self.end)]
        if any(one is not None and abs(one) > num_rows for one in ends):
            raise ValueError(f"{self.split} has {num_rows:,} rows")
        begin, end = (one + num_rows if one is not None and one < 0 else one for one in ends)
        begin, end = begin or 0, num_rows if end is None else end
        if begin >= end:
            raise ValueError(f"no row is left of the {num_rows:,} of {self.split}")
        return begin, end

    def _row(self, bound: int | None, num_rows: int) -> int | None:
        return round(bound * num_rows / 100) if bound is not None and self.is_percent else bound


def parse_slices(text: str) -> list[Slice]:
    """Parse a text such as `train[:1%]+validation`.

    Raises:
        ValueError: it is invalid, or a slice is empty for any split; the message is for the user.
    """
    return [_parse(part.strip()) for part in text.split("+")]


def _parse(text: str) -> Slice:
    match = _PART.fullmatch(text)
    if not match:
        raise ValueError('expected splits such as "train", "train[:1%]" or "train[10:20]+validation"')
    units = {bound.endswith("%") for bound in match.group("begin", "end") if bound}
    if len(units) == 2:
        raise ValueError(f"{text} mixes rows and percentages")
    is_percent = True in units
    begin, end = map(_number, match.group("begin", "end"))
    most = 100 if is_percent else _MOST_ROWS
    if any(bound is not None and abs(bound) > most for bound in (begin, end)):
        raise ValueError(f"{text} goes beyond {'100%' if is_percent else 'any split'}")
    if end == 0 or (is_percent and begin == 100) or _is_reversed(begin, end):
        raise ValueError(f"{text} is empty")
    return Slice(match["split"], begin, end, is_percent)


def _number(bound: str | None) -> int | None:
    return int(bound.rstrip("%")) if bound else None


def _is_reversed(begin: int | None, end: int | None) -> bool:
    """Return whether the end is not after the begin, if both count from the same end."""
    return begin is not None and end is not None and (begin < 0) == (end < 0) and begin >= end
