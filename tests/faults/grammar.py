"""Grammars of damaged and hostile state: JSON values, and changes of valid ones."""

import copy
from typing import Any

from hypothesis import strategies as st

_NUMBERS = st.one_of(
    st.integers(), st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, -(10**30)]), st.floats(), st.booleans()
)
_TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "a/b", "../x", "/etc/passwd", "\0", "\x1b]0;x\x07", "9" * 5000, "\ud800"]),
)

#: A value of JSON, of those too that only Python's reader takes.
VALUES = st.recursive(
    st.one_of(st.none(), _NUMBERS, _TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXTS, inner, max_size=4)),
    max_leaves=12,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every part of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, part in inner for place in _places(part, (*path, key))]


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """Return a JSON value of which some parts were replaced, removed or put in twice."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in _places(value) if place]
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder = value
        for key in way:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                holder[last] = draw(VALUES)
            case "remove":
                del holder[last]
            case _ if isinstance(holder, dict):
                holder[draw(_TEXTS)] = draw(VALUES)
            case _:
                holder.append(draw(VALUES))
    return value


@st.composite
def spoilt(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return bytes of which some were replaced, removed or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, 100_000)) % (len(data) + 1)  # the same draws whatever the length
        end = min(len(data), begin + draw(st.sampled_from([0, 1, 1, 8, 600])))
        data[begin:end] = draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"", b"[" * 1500, b"\0" * 512, b"\n"]))
        )
    return bytes(data)
