from dataclasses import dataclass

import pytest

from mlxflow.evaluation.stop_texts import until_stop


@dataclass
class _Response:
    text: str
    token: int
    finish_reason: str | None = None


def _responses(*texts: str) -> list[_Response]:
    return [_Response(text, place, "length" if place == len(texts) - 1 else None) for place, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("stops", "kept", "tokens"),
    [
        ((), "a cat sat on it", 5),
        (("x",), "a cat sat on it", 5),
        (("sat",), "a cat ", 3),
        (("at s",), "a c", 3),  # within one token and the next
        (("t sat on",), "a ca", 4),
        (("on", "at"), "a c", 2),
        (("", "cat"), "a ", 2),
        (("a",), "", 1),
    ],
)
def test_an_answer_ends_at_the_first_stop_text(stops: tuple[str, ...], kept: str, tokens: int) -> None:
    ended: list[bool] = []
    found = list(until_stop(_responses("a", " cat", " sat", " on", " it"), stops, lambda: ended.append(True)))
    text = "".join(one.text for one in found)
    cut = min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))
    assert text[:cut] == kept
    assert len({one.token for one in found}) == len(found) == tokens
    is_cut = kept != "a cat sat on it"
    assert found[-1].finish_reason == ("stop" if is_cut else "length")
    assert bool(ended) == is_cut
    assert all(one.finish_reason is None for one in found[:-1])


def test_text_after_a_stop_text_is_not_in_the_answer() -> None:
    found = list(until_stop(_responses("one", ". two", " three"), ["."], lambda: None))
    assert [one.text for one in found] == ["one.", ""]
    first = list(until_stop(_responses("one. two", " three"), ["."], lambda: None))
    assert [(one.text, one.finish_reason) for one in first] == [("one.", None), ("", "stop")]


def test_an_end_token_is_passed_on() -> None:
    responses = [_Response("a", 0), _Response("", 1, "stop")]
    assert list(until_stop(responses, ["z"], lambda: None)) == responses
