"""The templates of Llama 3 and Gemma by name, against the originals as transformers renders them."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mlxflow.data.chat import ChatTemplate
from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.named_templates import NAMED_TEMPLATES, turn_end_of

NAMES = {"bos_token": "<bos>", "eos_token": "<eos>"}

# As in the tokenizer_config.json of Llama-3-8B-Instruct
LLAMA3_ORIGINAL = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# As in the tokenizer_config.json of gemma-2-2b-it, which knows no system message
GEMMA2_ORIGINAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

# As in the chat_template.json of gemma-3-270m-it
GEMMA3_ORIGINAL = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""


def _talk(*contents: str, system: str = "") -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


TALKS = {
    "two turns": _talk("Hello there", "Hi!", "And now?", "Now we go on."),
    "system": _talk("Hello", "Hi", system="  Be short.\n"),
    "ends with a user": _talk("Hello", "Hi", "Bye"),
    "white space": _talk("  a \n", "\n\n b\n", "\tc", " d "),
    "other scripts": _talk("é🙂", "<b>bold</b>🙂é", "a\nb", "{{ x }} {% y %}"),
    "one question": _talk("Hello"),
}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("name", "original"), [("llama3", LLAMA3_ORIGINAL), ("gemma", GEMMA2_ORIGINAL), ("gemma", GEMMA3_ORIGINAL)]
)
def test_a_named_template_renders_as_the_original_in_transformers(
    name: str, original: str, talk: str, prompt: bool
) -> None:
    if original == GEMMA2_ORIGINAL and talk == "system":
        with pytest.raises(jinja2.TemplateError, match="System role not supported"):
            render_jinja_template([TALKS[talk]], chat_template=original, **NAMES)
        return
    how: dict[str, Any] = {"add_generation_prompt": prompt, **NAMES}
    expected = render_jinja_template([TALKS[talk]], chat_template=original, **how)[0][0]
    template = ChatTemplate(NAMED_TEMPLATES[name][0], NAMES)
    assert template.render(TALKS[talk], prompt=prompt) == expected
    if not prompt:
        assert template.render_turns(TALKS[talk]).text == expected
    own = render_jinja_template([TALKS[talk]], chat_template=NAMED_TEMPLATES[name][0], **how)[0][0]
    assert own == expected


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
@pytest.mark.parametrize("talk", TALKS)
def test_answers_are_trained_on_with_the_token_that_ends_a_turn(name: str, talk: str) -> None:
    template = ChatTemplate(NAMED_TEMPLATES[name][0], NAMES)
    rendered = template.render_turns(TALKS[talk])
    answers = [message["content"] for message in TALKS[talk] if message["role"] == "assistant"]
    end = turn_end_of(NAMED_TEMPLATES[name][0])
    learned = [rendered.text[begin:stop].rstrip("\n") for begin, stop in rendered.spans]
    trimmed = answers if name == "chatml" else [answer.strip() for answer in answers]
    assert learned == [answer + end for answer in trimmed]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_tokenizer_without_a_first_token_needs_none(name: str) -> None:
    text = ChatTemplate(NAMED_TEMPLATES[name][0], {}).render(TALKS["two turns"])
    assert text.startswith(("<|im_start|>", "<|start_header_id|>", "<start_of_turn>"))


def test_gemma_refuses_turns_that_do_not_alternate() -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(TemplateProblem, match="Conversation roles must alternate"):
        ChatTemplate(NAMED_TEMPLATES["gemma"][0], NAMES).render(talk)


def test_another_template_has_no_known_end() -> None:
    assert turn_end_of((Path(__file__).parent / "templates/phi3.jinja").read_text()) == ""
