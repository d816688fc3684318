"""Chat templates that a workflow may name: ChatML, and those of Llama 3 and Gemma 3 for conversations of text.

The texts of Llama 3 and Gemma 3 are rendered as by the templates of these models. Other than those, the templates do
without a beginning-of-sequence token if the tokenizer has none.
"""

from mlxflow.data.chatml import CHATML, TURN_END

LLAMA3 = """\
{%- set begin = bos_token if bos_token is defined else '' %}
{%- for message in messages %}
    {{- begin if loop.first else '' }}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

#: A system message is the beginning of the first user's turn; user and assistant alternate.
GEMMA = """\
{{- bos_token if bos_token is defined else '' }}
{%- if messages[0]['role'] == 'system' %}
    {%- set prefix = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set prefix = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- prefix if loop.first else '' }}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

#: By name, each template and the token that ends a turn in it.
NAMED_TEMPLATES = {
    "chatml": (CHATML, TURN_END),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
}


def turn_end_of(template: str) -> str:
    """Return the token that ends a turn in one of these templates; empty for another one.

    Args:
        template: its text.
    """
    return next((end for text, end in NAMED_TEMPLATES.values() if text == template), "")
