"""The chat template of newly trained tokenizers: OpenAI's ChatML, with tool calls in the format of Hermes."""

#: The token that ends a turn.
TURN_END = "<|im_end|>"

#: Jinja. Reasoning comes before the answer, tools in the system message, tool calls and results each in tags.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more of these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nWrite each call as JSON with the name and the arguments of the function:\\n<tool_call>\\n' }}
    {{- '{"name": "NAME", "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if 'reasoning_content' in message %}
            {{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- if 'tool_calls' in message %}
            {{- message['content'] or '' }}
            {%- for call in message['tool_calls'] %}
                {{- '\\n' if message['content'] or not loop.first else '' }}
                {{- '<tool_call>\\n{"name": ' + call['function']['name'] | tojson }}
                {{- ', "arguments": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>\\n' }}
        {%- else %}
            {{- message['content'] + '<|im_end|>\\n' }}
        {%- endif %}
        {%- endgeneration %}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
