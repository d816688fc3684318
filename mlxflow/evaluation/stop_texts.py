"""Ends an answer at a text, wherever the tokens begin and end.

mlx-lm's server compares the tokens of a stop text with those of the answer: it removes a stop text that begins or ends
within a token from the answer, and generates on.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any


def until_stop(responses: Iterable[Any], stops: Sequence[str], end: Callable[[], object]) -> Iterator[Any]:
    """Yield the responses of a generation until its text contains a stop text.

    The last response has the finish reason "stop". The stop text itself is still in the texts: the server removes it.
    Each response is held back until the next one, because a finished one may have no text.

    Args:
        responses: dataclasses with the fields `text` and `finish_reason`, one of each token.
        stops: the texts; empty for none.
        end: called when a stop text was found.
    """
    if not any(stops):
        yield from responses
        return
    longest = max(map(len, stops))
    tail, held = "", None
    for response in responses:
        text = tail + response.text
        place = _first(text, stops)
        if response.finish_reason != "stop" and place is not None:
            begin, stop_end = place
            used = response.text[: stop_end - len(tail)]
            end()
            if held is not None:
                yield dataclasses.replace(held, text=held.text + used)
            elif begin:
                yield dataclasses.replace(response, text=used, finish_reason=None)
            yield dataclasses.replace(response, text="", finish_reason="stop")
            return
        if held is not None:
            yield held
        tail, held = text[len(text) - min(len(text), longest - 1) :], response
    if held is not None:
        yield held


def _first(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Return begin and end of the first stop text in a text; None without one."""
    found = [(begin, begin + len(stop)) for stop in stops if stop and (begin := text.find(stop)) >= 0]
    return min(found, default=None)
