"""The chat formats of the three generations as templates for transformers.

Their text becomes the tokens that the published tokenizers make of a conversation
(`build_chat_input`, `build_prompt`); the tests compare them.
"""

from __future__ import annotations

from lorakit.models.layouts.chatglm.original import Generation

# Sentencepiece puts a space before each text that it is given, and the original code gives it the
# role's line and the message one by one: hence the space before the message, where there is one.
_CHATGLM3 = """\
{%- set roles = {'system': 'system', 'user': 'user', 'assistant': 'assistant',
                 'observation': 'observation', 'tool': 'observation'} %}
{%- macro described(tools) %}
    {%- set ns = namespace(bare=[]) %}
    {%- for tool in tools %}
        {%- set ns.bare = ns.bare + [tool['function'] or tool] %}
    {%- endfor %}
    {{- '\\n' + (ns.bare | tojson(indent=4)) }}
{%- endmacro %}
{{- '[gMASK]sop' }}
{%- if tools and messages[0]['role'] != 'system' %}
    {{- '<|system|>\\n Answer the following questions as best as you can. You have access to the' }}
    {{- ' following tools:' + described(tools) }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] not in roles %}
        {{- raise_exception('ChatGLM3 has no role ' + message['role']) }}
    {%- endif %}
    {%- if message['tool_calls'] %}
        {{- raise_exception('ChatGLM3 writes tool calls as text: give the name of the tool as '
                            'metadata of the message, and the call as its content') }}
    {%- endif %}
    {{- '<|' + roles[message['role']] + '|>' + (message['metadata'] or '') + '\\n' }}
    {{- ' ' + message['content'] if message['content'] else '' }}
    {%- if message['role'] == 'system' and (message['tools'] or (tools and loop.first)) %}
        {{- described(message['tools'] or tools) }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt else '' }}"""

_CHATGLM2 = """\
{{- '[gMASK]sop' }}
{%- for message in messages %}
    {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('ChatGLM2 has questions and answers in turn, and no other roles') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '\\n\\n' if not loop.first else '' }}
        {{- '[Round ' + (loop.index0 // 2 + 1) | string + ']\\n\\n问：' + message['content'] }}
        {{- '\\n\\n答：' if add_generation_prompt or not loop.last else '' }}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}"""

_GLM4 = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {{- raise_exception('this chat template of GLM-4 has no place for tools') }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'observation'] %}
        {{- raise_exception('GLM-4 has no role ' + message['role']) }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\\n' }}
    {{- message['content'] or '' }}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt else '' }}"""

TEMPLATES = {
    Generation.CHATGLM2: _CHATGLM2,
    Generation.CHATGLM3: _CHATGLM3,
    Generation.GLM4: _GLM4,
}
