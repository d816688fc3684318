"""Chat templates as Go templates for Ollama."""

import re
from typing import Any

import pytest

from mlxflow.data.chatml import CHATML
from mlxflow.data.ollama_template import TurnTexts, modelfile, turn_texts

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUMBERED = "{% for message in messages %}{{ loop.index }}: {{ message['content'] }}\n{% endfor %}"


def _execute(go_template: str, messages: list[dict[str, Any]]) -> str:
    """Return what Go's text/template makes of the few actions that are used."""
    has_system = any(message["role"] == "system" for message in messages)
    found = re.fullmatch(
        r"{{ if not \.System }}(.*?){{ end }}{{ range \.Messages }}"
        r'{{ if eq \.Role "system" }}(.*?){{ else if eq \.Role "user" }}(.*?){{ else if eq \.Role "assistant" }}(.*?)'
        r"{{ end }}{{ end }}(.*)",
        go_template,
        re.DOTALL,
    )
    assert found
    begin, *turns, answer = found.groups()
    by_role = dict(zip(("system", "user", "assistant"), turns, strict=True))
    texts = [by_role[message["role"]].replace("{{ .Content }}", message["content"]) for message in messages]
    return ("" if has_system else begin) + "".join(texts) + answer


@pytest.mark.parametrize("source", [CHATML, LLAMA3, SMOLLM], ids=["chatml", "llama3", "smollm"])
def test_the_go_template_writes_what_the_chat_template_writes(source: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    texts = turn_texts(source, {"bos_token": "<s>"}, subject="the template", bos="<s>")
    assert texts
    plain = source.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    template = ImmutableSandboxedEnvironment().from_string(plain)
    for roles in (
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user"),
    ):
        messages = [{"role": role, "content": f"a {role} {number}?"} for number, role in enumerate(roles)]
        expected = template.render(messages=messages, add_generation_prompt=True, bos_token="<s>").removeprefix("<s>")
        assert _execute(texts.go_template(), messages) == expected


@pytest.mark.parametrize(
    "source", [NUMBERED, "{{ raise_exception('no') }}", "{% if", "{{ messages[0]['content'] * 2 }}"]
)
def test_a_template_of_another_form_has_no_go_template(source: str) -> None:
    assert turn_texts(source, {}, subject="the template", bos="") is None


def test_braces_are_quoted_and_the_end_of_a_modelfiles_text_is_refused() -> None:
    texts = TurnTexts("", ("", ""), "{{x", ("", ""), "a")
    assert '{{ "{{" }}x{{ .Content }}' in texts.go_template()
    assert texts._replace(answer='a"""').go_template() == ""


def test_a_modelfile_names_the_file_the_ends_and_the_template() -> None:
    texts = TurnTexts("", ("S", "s"), "U", ("A", "a"), "A")
    lines = modelfile("model.gguf", "jinja", texts=texts, stops=["<end>", '"', "\n"], context_length=64).splitlines()
    assert lines[1:4] == ["FROM ./model.gguf", "PARAMETER num_ctx 64", 'PARAMETER stop "<end>"']
    assert lines[4] == f'TEMPLATE """{texts.go_template()}"""'
    assert modelfile("m", "", texts=None, stops=[], context_length=1).endswith('TEMPLATE """{{ .Prompt }}"""\n')
    assert "has no form as a Go template" in modelfile("m", "jinja", texts=None, stops=[], context_length=1)
