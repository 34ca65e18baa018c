"""Chat templates with tools, each written after the documented format of a family, in short."""

from __future__ import annotations

QWEN = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif -%}
# Tools
<tools>{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}

</tools>
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}{% for message in messages %}{% if message.role == 'user' %}<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}{% for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

LLAMA = """{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' and 'tool_calls' in message %}\
{% if message.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}\
{% endif %}{% set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>\
{% elif message.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>{% else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if message.role == 'user' and loop.last and tools is not none %}Respond in the format {"name": function name, \
"parameters": dictionary of argument name and its value}.
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}{{ message.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{% if loop.last and tools %}\
[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ message.content }}[/INST]\
{% elif message.role == 'assistant' and message.tool_calls is defined %}[TOOL_CALLS][\
{% for call in message.tool_calls %}\
{% if call.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}\
{% endif %}{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}, \
"id": "{{ call.id }}"}{{ '' if loop.last else ', ' }}{% endfor %}]{{ eos_token }}{% elif message.role == 'tool' %}\
[TOOL_RESULTS]{"content": {{ message.content | tojson }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]\
{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""

PHI4 = """{% for message in messages %}\
{% if message.role == 'system' and tools %}<|system|>{{ message.content }}<|tool|>\
{{ tools | tojson }}<|/tool|><|end|>{% else %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""

GEMMA = """{% for message in messages %}{% if message.role == 'developer' %}<start_of_turn>developer
{{ message.content }}{% for tool in tools or [] %}\
<start_function_declaration>{{ tool.function.name }}<end_function_declaration>{% endfor %}<end_of_turn>
{% elif message.role == 'tool' %}\
<start_function_response>response:{{ message.name }}{value:<escape>{{ message.content }}<escape>}\
<end_function_response>\
{% else %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}\
<start_function_call>call:{{ call.function.name }}{{ '{' }}{% for key, value in call.function.arguments | dictsort %}\
{{ key }}:{{ value }}{% endfor %}}<end_function_call>{% endfor %}<end_of_turn>
{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

HARMONY = """<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>\
{% for message in messages %}{% if message.role == 'developer' %}<|start|>developer<|message|># Instructions

{{ message.content }}{% for tool in tools or [] %}type {{ tool.function.name }} = (_: any) => any;{% endfor %}<|end|>\
{% elif message.role == 'tool' %}<|start|>functions.{{ message.name }} to=assistant<|channel|>commentary<|message|>\
{{ message.content | tojson }}<|end|>{% elif message.tool_calls %}{% if message.thinking %}\
<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}\
{% set call = message.tool_calls[0].function %}<|start|>assistant to=functions.{{ call.name }}\
<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>{% else %}\
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""

# Knows no tools and refuses system messages and two messages of one role in a row.
PLAIN = """{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}[{{ message.role }}]{{ message.content | trim }}\
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""

# Its answers begin inside reasoning.
REASONING = """{% for message in messages %}<{{ message.role }}>{{ message.content.split('</think>')[-1] }}{% endfor %}\
{% if add_generation_prompt %}<assistant><think>
{% endif %}"""
