"""What is trained on of a conversation, compared with the masks of transformers, token by token."""

import functools
import logging
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from mlxflow.data.chat import ChatTemplate
from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.encoder import TokenSpans
from tests.data.talks import NAMES, TALKS, TEMPLATES, talk_for, tokenizer_for_all, without_marks

# Talks that a template of a model refuses, or of which it silently leaves out calls or answers of tools.
_NO_TOOLS = {"tools": "leaves out", "calls and words": "leaves out"}
_ALTERNATES = {**_NO_TOOLS, "system": "not supported", "unicode": "not supported", "successive": "must alternate"}
REFUSED: dict[str, dict[str, str]] = {
    "gemma2": _ALTERNATES | {"tools": "must alternate", "calls and words": "must alternate"},
    **dict.fromkeys(("gemma3", "phi3", "phi4", "cohere", "olmo", "smollm2", "smolvlm", "end_after_loop"), _NO_TOOLS),
}


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer_for_all(), **NAMES)


@pytest.fixture(autouse=True)
def _same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give transformers the day that our templates see."""
    import datetime

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Day":
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


def _theirs(source: str, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[int]]:
    encoded: Any = _tokenizer().apply_chat_template(
        messages, tools=tools, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def _ours(source: str, messages: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[int]]:
    rendered = _template(source).render_turns(messages, tools=tools)
    assert rendered.literals == ()
    ids = _tokenizer().backend_tokenizer.encode(rendered.text, add_special_tokens=False).ids
    mask = _token_spans().mask(rendered.text, np.array(ids, np.uint32), rendered.spans)
    return ids, mask.astype(int).tolist()


@functools.cache
def _template(source: str) -> ChatTemplate:
    return ChatTemplate(source, NAMES, _tokenizer().get_added_vocab())


@functools.cache
def _token_spans() -> TokenSpans:
    return TokenSpans(_tokenizer().backend_tokenizer.to_str())


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", sorted(TEMPLATES))
def test_a_template_without_marks_gives_the_same_mask(family: str, talk: str) -> None:
    messages, tools = talk_for(family, talk)
    source = TEMPLATES[family]
    if reason := REFUSED.get(family, {}).get(talk):
        for one in (source, without_marks(source)):
            with pytest.raises(TemplateProblem, match=reason):
                _ours(one, messages, tools)
        return
    expected = _theirs(source, messages, tools)
    assert any(expected[1])
    assert _ours(source, messages, tools) == expected
    assert _ours(without_marks(source), messages, tools) == expected
