"""The records of a JSON file that is read whole."""

from collections.abc import Callable, Iterator, Set
from typing import Any

from mlxflow.data.streams import FileProblem

# Objects that are looked at to tell a list of records from any other list
_SEEN = 100


def find_records(value: Any, record_keys: Set[str], is_record: Callable[[Any], bool]) -> list[Any] | None:
    """Return the records of a JSON value; None where it holds none of a known form.

    That is a list of objects of which one has a known key, an object that is a record, or an object with one such
    list under a key of any name, such as {"version": 1, "data": [...]}.

    Args:
        value: the whole of a file.
        record_keys: the keys of which a record has one.
        is_record: whether an object has all the keys of a known form.

    Raises:
        FileProblem: it holds several lists of records.
    """
    if isinstance(value, list):
        has_keys = any(isinstance(one, dict) and record_keys & one.keys() for one in value[:_SEEN])
        return value if has_keys else None
    if not isinstance(value, dict):
        return None
    if is_record(value):
        return [value]
    lists = {
        key: one for key, one in value.items() if isinstance(one, list) and any(is_record(item) for item in one[:_SEEN])
    }
    if len(lists) > 1:
        names = " and ".join(f'"{key}"' for key in lists)
        raise FileProblem(f"holds several lists of records, {names}. Write each to a file of its own")
    return next(iter(lists.values()), None)


def first_line_is_object(data: bytes, decode: Callable[[bytes], Any]) -> bool:
    """Return whether a file that is no JSON value holds an object a line, as the datasets library writes `.json`."""
    line, _, rest = data.lstrip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        return isinstance(decode(line), dict)
    except ValueError:
        return False


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in parts of a size."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
