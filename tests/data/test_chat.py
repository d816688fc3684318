"""Loss masks of conversations, in small templates of the families that models use."""

import json
import re
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mlxflow.data.chat import ChatTemplate
from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.chatml import CHATML
from mlxflow.data.documents import Document, Formatter
from mlxflow.data.encoder import TokenSpans
from mlxflow.data.records import Bad, Record
from mlxflow.data.tokenizer import train_tokenizer
from tests.data.talks import without_marks

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

# What is advised on a record without any known key
_NAME_KEYS = 'Name its keys "messages", "prompt" and "completion", or "text", or set text_key'
# Thoughts of earlier turns are dropped, the last turn gets a block of thoughts, empty if it has none, as Qwen3 does.
THINKING = (
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% set thoughts = '' %}{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thoughts + '\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt begins the thoughts, which no finished turn shows, as DeepSeek-R1 does.
PREFILL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    "{% if m['content'] %}{{ '\n' + m['content'] }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _talk(*contents: str, system: str | None = "Be short.") -> list[dict[str, Any]]:
    """Return a conversation of contents by user and assistant in turns."""
    told = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return told + [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


TALKS = {
    "two turns": _talk("Hello there", "Hi!", "And now?", "Now we go on."),
    "no system": _talk("Hello", "Hi", system=None),
    "ends with a user": _talk("Hello", "Hi", "Bye"),
    "equal turns": _talk("Same", "Same", "Same", "Same", "Same", "Same"),
    "awkward": _talk("é🙂", "<b>bold</b>🙂é", "a\nb", "<thin lines\nof text"),
    "headers inside": _talk("user", "assistant", "Assistant: ", "assistant\nAssistant: x"),
    "empty": _talk("Hello", "", "Again", "x"),
}

# What is learnt of a turn with a given content, by family: what follows the prompt, the turn's end included.
FAMILIES: dict[str, tuple[str, str]] = {
    "chatml": (CHATML, "{}<|im_end|>\n"),
    "llama3": (LLAMA3, "{}<|eot_id|>"),
    "mistral": (MISTRAL, "{}</s>"),
    "gemma": (GEMMA, "{}<end_of_turn>\n"),
    "phi3": (PHI3, "{}<|end|>\n"),
    "plain": (PLAIN, "{}\n"),
    "prefill": (PREFILL, "{}</s>"),
}


def _learnt(source: str, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    rendered = ChatTemplate(source, NAMES).render_turns(messages, tools=tools)
    return [rendered.text[begin:end] for begin, end in rendered.spans]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_is_trained_on_from_its_prompt_to_its_end(family: str, talk: str) -> None:
    source, expected = FAMILIES[family]
    messages = TALKS[talk]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    learnt = _learnt(without_marks(source), messages)
    if family == "mistral":  # its prompt ends before the blank, which the model says itself
        learnt = [text.removeprefix(" ") for text in learnt]
    assert learnt == [expected.format(answer) for answer in answers]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", [*FAMILIES, "thinking"])
def test_the_rendered_text_matches_transformers(family: str, talk: str) -> None:
    source = THINKING if family == "thinking" else FAMILIES[family][0]
    expected = render_jinja_template([TALKS[talk]], chat_template=source, **NAMES)[0][0]
    template = ChatTemplate(source, NAMES)
    assert template.render(TALKS[talk]) == template.render_turns(TALKS[talk]).text == expected
    prompt = render_jinja_template([TALKS[talk]], chat_template=source, add_generation_prompt=True, **NAMES)[0][0]
    assert template.render(TALKS[talk], prompt=True) == prompt


def test_whitespace_that_a_template_strips_is_not_searched_for() -> None:
    messages = _talk("  Hello \n", "\n\n  Hi  \n", " x ", "\ty")
    for source, end in ((LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>\n")):
        assert _learnt(source, messages) == [f"Hi{end}", f"y{end}"]


def test_reasoning_is_trained_on_where_the_template_renders_it() -> None:
    messages = _talk("One?", "<think>\nhm\n</think>\n\nYes.", "Two?", "<think>\nwell\n</think>\n\nNo.")
    assert _learnt(THINKING, messages) == ["Yes.<|im_end|>\n", "<think>\nwell\n</think>\n\nNo.<|im_end|>\n"]
    empty = _learnt(THINKING, _talk("One?", "Yes.", "Two?", "No."))
    assert empty == ["Yes.<|im_end|>\n", "<think>\n\n</think>\n\nNo.<|im_end|>\n"]
    assert _learnt(PREFILL, messages) == ["\n\nYes.</s>", "\n\nNo.</s>"]


def test_tool_calls_are_trained_on_and_tool_results_are_not() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1 and 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three.", "tool_calls": [call, call]},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    said = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert _learnt(TOOLS, messages, tools) == [f"{said}<|im_end|>\n", f"Three.\n{said}\n{said}<|im_end|>\n"]


MARKED = {
    "chatml": CHATML,
    "llama3": LLAMA3.replace(
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{{ m['content'] | trim + '<|eot_id|>' }}",
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}",
    ),
    "mistral": MISTRAL.replace(
        "{{ ' ' + m['content'] | trim + eos_token }}",
        "{% generation %}{{ ' ' + m['content'] | trim + eos_token }}{% endgeneration %}",
    ),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("family", MARKED)
def test_generation_marks_of_a_template_match_the_detected_turns(family: str, talk: str) -> None:
    source = MARKED[family]
    assert source != without_marks(source)
    told = ChatTemplate(source, NAMES).render_turns(TALKS[talk])
    found = ChatTemplate(without_marks(source), NAMES).render_turns(TALKS[talk])
    assert told == found
    _, theirs = render_jinja_template([TALKS[talk]], chat_template=source, return_assistant_tokens_mask=True, **NAMES)
    assert list(told.spans) == theirs[0]


# --- tokens


def _byte_level() -> Tokenizer:
    texts = [ChatTemplate(CHATML, {}).render(talk) for talk in TALKS.values()] * 3
    return train_tokenizer(texts, vocab_size=330, special_tokens=["<|im_start|>", "<|im_end|>"])


def _word_level() -> Tokenizer:
    words = sorted(
        {word for talk in TALKS.values() for m in talk for word in re.findall(r"\w+|[^\w\s]+", m["content"])}
    )
    names = ["[UNK]", "system", *words]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


@pytest.mark.parametrize("talk", TALKS)
def test_the_token_mask_matches_transformers(talk: str) -> None:
    tokenizer = _byte_level()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    expected = whole.apply_chat_template(
        TALKS[talk], chat_template=CHATML, return_assistant_tokens_mask=True, return_dict=True
    )
    rendered = ChatTemplate(without_marks(CHATML), {}).render_turns(TALKS[talk])
    ids = np.array(tokenizer.encode(rendered.text, add_special_tokens=False).ids, np.uint32)
    assert ids.tolist() == expected["input_ids"]
    mask = TokenSpans(tokenizer.to_str()).mask(rendered.text, ids, rendered.spans)
    assert mask.astype(int).tolist() == expected["assistant_masks"]
    assert 0 < mask.sum() < len(mask)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("make", [_byte_level, _word_level])
def test_a_token_with_a_character_of_a_turn_is_trained_on(make: Any, talk: str) -> None:
    tokenizer = make()
    rendered = ChatTemplate(CHATML, {}).render_turns(TALKS[talk])
    encoding = tokenizer.encode(rendered.text, add_special_tokens=False)
    expected = [any(b < end and e > begin for begin, end in rendered.spans) for b, e in encoding.offsets]
    found = TokenSpans(tokenizer.to_str()).mask(rendered.text, np.array(encoding.ids, np.uint32), rendered.spans)
    assert found.tolist() == expected
    assert any(expected)


# --- records


def _format(
    value: object, *, template: str | None = CHATML, masks: bool = True, format_: Any = "auto"
) -> Document | Bad:
    compiled = ChatTemplate(template, NAMES) if template else None
    formatter = Formatter(
        format_=format_, text_key="text", template=compiled, train_on="completion" if masks else "all"
    )
    return next(formatter.documents([Record(7, value)]))


def test_record_keys_have_the_priority_of_mlx_lm() -> None:
    everything = {"text": "t", "messages": _talk("q", "a"), "prompt": "p", "completion": "c"}
    texts = []
    for _ in range(3):
        document = _format(everything)
        assert isinstance(document, Document)
        texts.append(document.text)
        everything.pop("completion" if "completion" in everything else "messages", None)
    assert texts[0].startswith("<|im_start|>user\np<|im_end|>")
    assert texts[1].startswith("<|im_start|>system")
    assert texts[2] == "t"


def test_a_completion_without_a_template_is_trained_on_after_its_prompt() -> None:
    document = _format({"prompt": "Q: ", "completion": "A"}, template=None)
    assert isinstance(document, Document)
    assert (document.text, document.spans, document.is_templated) == ("Q: A", ((3, 4),), False)
    everything = _format({"prompt": "Q: ", "completion": "A"}, template=None, masks=False)
    assert isinstance(everything, Document)
    assert everything.spans is None


def test_a_documents_digest_does_not_depend_on_the_template() -> None:
    record = {"messages": _talk("q", "a")}
    first, second = _format(record), _format(record, template=PHI3)
    assert isinstance(first, Document)
    assert isinstance(second, Document)
    assert first.text != second.text
    assert first.digest == second.digest


def test_tools_may_be_json_text() -> None:
    tools = [{"function": {"name": "f"}}]
    record = {"messages": _talk("q", "a"), "tools": tools}
    assert _format(record, template=TOOLS) == _format({**record, "tools": json.dumps(tools)}, template=TOOLS)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": "hello"}, r'its "messages" are not valid JSON \(.*\)\. Fix the record'),
        ({"messages": {}}, 'expected "messages", a list that is not empty. Fix the record'),
        ({"messages": [{"content": "a"}]}, 'message 1: expected an object with a "role". Fix the record'),
        ({"messages": [{"role": "user"}]}, 'message 1: expected a "content". Fix the record'),
        ({"messages": _talk("a")}, "has no assistant turn. Fix the record"),
        (
            {"messages": _talk("a\ufdd0", "b", system=None)},
            "holds one of U+FDD0 to U+FDD7, which are no characters. Fix the record",
        ),
        ({"messages": _talk("a", "b"), "tools": "{"}, r"its \"tools\" are not valid JSON \(.*\)\. Fix the record"),
        ({"prompt": "a", "completion": 3}, '"completion" is a number: expected text. Fix the record'),
        ({}, 'has no "text". ' + _NAME_KEYS),
        (3, "expected an object. Fix the record"),
    ],
)
def test_an_unusable_record_is_an_error(record: object, reason: str) -> None:
    bad = _format(record)
    assert isinstance(bad, Bad)
    assert bad.place == 7
    assert bad.reason == reason or re.fullmatch(reason, bad.reason)


def test_a_conversation_that_the_template_refuses_is_an_error() -> None:
    bad = _format({"messages": _talk("a", "b", "c", "d")[:-2] + _talk("x", "y", system=None)[1:]}, template=MISTRAL)
    assert bad == Bad(7, "the template refuses it (roles must alternate). Fix the record")


def test_a_template_without_tools_is_to_be_replaced_and_not_the_record() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    asked = {"role": "user", "content": "a"}
    bad = _format({"messages": [asked, {"role": "assistant", "content": "b", "tool_calls": [call]}]}, template=template)
    advice = 'Use a chat_template that renders tools, such as "chatml"'
    assert bad == Bad(7, f'the template refuses it (it leaves out the call of "weather" in message 2). {advice}')


def test_a_turn_that_the_template_leaves_out_is_not_trained_on() -> None:
    assert _learnt("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", _talk("a", "b")) == []


def test_a_template_cannot_leave_its_sandbox() -> None:
    with pytest.raises(TemplateProblem):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render(_talk("a", "b"))


def test_the_date_seen_by_a_template_is_fixed() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert template.render(_talk("a", "b")) == "26 Jul 2024"
