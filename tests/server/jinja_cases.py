#!/usr/bin/python3
"""Renders chat templates with python3-jinja2, set up as transformers does, one JSON case a line:
{"template", "variables", "expected"} or, where Jinja refuses, {"template", "variables", "error"}.

Usage: jinja_cases.py [FOLDER]    FOLDER: more templates (*.jinja), each rendered with every chat
"""
import json
import pathlib
import sys

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def environment():
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Wetter in \u00fc & <b>", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 2}},
        "required": ["city"], "limits": [1, 2.5, 1e-7, True, None, "a\"b\\c\n\u0001"]}}}]
CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " two\n\nlines <|user|> \u4f60\u597d \U0001f600"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
     {"role": "user", "content": "c/nothink"}, {"role": "assistant", "content": "d", "reasoning_content": " why "}],
    [{"role": "user", "content": [{"type": "text", "text": "part one"}, {"type": "image"}, "part two"]}],
    [{"role": "user", "content": "weather?"},
     {"role": "assistant", "content": None, "tool_calls": [
         {"type": "function", "function": {"name": "weather", "arguments": {"city": "K\u00f6ln", "days": 3, "x": [1, {"y": None}]}}},
         {"type": "function", "function": {"name": "weather", "arguments": {}}}]},
     {"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"},
     {"role": "assistant", "content": "Both."}, {"role": "user", "content": "thanks"}],
    [{"role": "user", "content": "weather?"},
     {"role": "assistant", "content": "let me see", "tool_calls": [
         {"type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]},
     {"role": "tool", "content": "sun"}],
    [{"role": "tool", "content": [{"output": "first"}, "second"]}],
    [{"role": "assistant", "content": ""}],
    [],
]

TEMPLATES = {
    "plain": "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
             "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    # The constructs of the GLM 4.5 to 5 templates.
    "glm": """[gMASK]<sop>
{%- if tools -%}
<|system|>
Tools between <tools></tools>:
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>{%- endif -%}
{%- macro shown(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}
                {{- item.text }}
            {%- elif item is string -%}
                {{- item }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- content }}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {% set ns.last = loop.index0 -%}
    {%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ shown(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not shown(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set thought = '' %}
{%- set content = shown(m.content) %}
{%- if m.reasoning_content is string %}
    {%- set thought = m.reasoning_content %}
{%- else %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
{%- endif %}
{%- if ((clear_thinking is defined and not clear_thinking) or loop.index0 > ns.last) and thought -%}
{{ '\\n<think>' + thought.strip() +  '</think>'}}
{%- else -%}
{{ '\\n<think></think>' }}
{%- endif -%}
{%- if content.strip() -%}
{{ '\\n' + content.strip() }}
{%- endif -%}
{% if m.tool_calls %}
{% for tc in m.tool_calls %}
{%- if tc.function %}
    {%- set tc = tc.function %}
{%- endif %}
{{ '\\n<tool_call>' + tc.name }}
{% set _args = tc.arguments or {} %}
{% for k, v in _args.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}
{% endif %}
{%- elif m.role == 'tool' -%}
{%- if m.content is string -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
    {{- '<|observation|>' }}
{%- endif %}
{{- '\\n<tool_response>\\n' }}
{{- m.content }}
{{- '\\n</tool_response>' }}
{%- else -%}
<|observation|>{% for tr in m.content %}

<tool_response>
{{ tr.output if tr.output is defined else tr }}
</tool_response>{% endfor -%}
{% endif -%}
{%- elif m.role == 'system' -%}
<|system|>
{{ shown(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}
""",
    # The constructs of the DeepSeek V3 to V3.2 templates.
    "deepseek": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- if not thinking is defined -%}
  {%- set thinking = enable_thinking | default(false) -%}
{%- endif -%}
{%- set ns = namespace(first=true, tool=false, system='', user=false) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- if ns.first -%}{% set ns.system = ns.system + message['content'] %}{% set ns.first = false %}
    {%- else -%}{% set ns.system = ns.system + '

' + message['content'] %}{%- endif -%}
  {%- endif -%}
{%- endfor -%}{{ bos_token }}{{ ns.system }}
{#- a comment -#}
{%- macro arguments_of(call) -%}
{%- set arguments = call.function.arguments -%}
{%- if arguments is mapping -%}
  {%- for key, value in arguments.items() -%}
    {%- if not loop.first -%}{{ "\\n" }}{%- endif -%}
    <p name="{{ key }}" string="{{ 'true' if value is string else 'false' }}">{{ value if value is string else (value | tojson(ensure_ascii=False)) }}</p>
  {%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set start = 1 if messages|length > 0 and messages[0].role == "system" else 0 -%}
{%- for message in messages[start:] -%}
  {%- if message['role'] in ['user', 'developer'] -%}
    {%- set ns.tool = false -%}{%- set ns.user = true -%}{{ '<\uff5cUser\uff5c>' ~ message['content'] }}
  {%- endif -%}
  {%- if message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] is not none -%}
    {%- if ns.user -%}{{ '<\uff5cAssistant\uff5c></think>' }}{%- endif -%}
    {%- for call in message.get('tool_calls', []) -%}
      {{ message['content'] if message['content'] is not none }}<call {{ call.function.name }}>{{- arguments_of(call) -}}</call>
    {%- endfor -%}{{ '<\uff5cend\u2581of\u2581sentence\uff5c>' }}
    {%- set ns.user = false -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- set content = message['content'] -%}
    {%- if '</think>' in content -%}{%- set content = content.split('</think>', 1)[1] -%}{%- endif -%}
    {{ content + '<\uff5cend\u2581of\u2581sentence\uff5c>' }}
    {%- set ns.user = false -%}
  {%- endif -%}
  {%- if message['role'] == 'tool' -%}
    {%- set before = namespace(value=-1) -%}
    {%- for i in range(loop.index0 + start - 1, -1, -1) -%}
      {%- if messages[i].role != "tool" and before.value == -1 -%}{%- set before.value = i -%}{%- endif -%}
    {%- endfor -%}
    <out {{ loop.index0 + start - before.value }}>{{ message['content'] }}</out>
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.user and not ns.tool -%}{{ '<\uff5cAssistant\uff5c>' }}
  {%- if not thinking -%}{{ '</think>' }}{%- else -%}{{ '<think>' }}{%- endif -%}
{%- endif %}""",
}

SNIPPETS = [
    "{{ 1 }}{{ 1.0 }}{{ 1e20 }}{{ 1e-5 }}{{ 0.1 + 0.2 }}{{ 1e16 }}{{ 123456789012345.0 }}{{ -0.0 }}",
    "{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % -3 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }} {{ 2 ** -1 }}",
    "{{ -2 ** 2 }} {{ 2 ** 3 ** 2 }} {{ 1 + 2 * 3 }} {{ (1 + 2) * 3 }} {{ 10 - 2 - 3 }} {{ 'a' ~ 1 + 2 ~ 'b' }}",
    "{{ true and 0 or 'x' }} {{ not true }} {{ none }} {{ True }} {{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ 1 == 1.0 }} {{ true == 1 }}",
    "{{ [1, 'a', none, {'k': (1,)}] }} {{ (1, 2) }} {{ 'it\\'s' }} {{ ['it\\'s', \"q\\\"\", 'both\\'\"', 'n\\n\\t\\\\', '\\x07\\u00e9\\u200b'] }}",
    "{{ 'h\u00e9llo'[1] }} {{ 'h\u00e9llo'[-1] }} {{ 'h\u00e9llo'[1:3] }} {{ 'h\u00e9llo'[::-1] }} {{ [1,2,3,4][::2] }} {{ [1,2,3][-2:] }} {{ [1,2,3][5:] }} {{ 'abc'[5] }}",
    "{{ 'a b  c'.split() }} {{ 'a,b,c'.split(',', 1) }} {{ 'a,b,c'.rsplit(',', 1) }} {{ ' x '.strip() }}| {{ 'xxaxx'.strip('x') }} {{ 'a\\nb\\r\\nc'.splitlines() }}",
    "{{ 'Hello World'.upper() }} {{ 'Hello'.lower() }} {{ 'hello wORLD'.title() }} {{ 'hello World'.capitalize() }} {{ 'aXbX'.replace('X', '-') }} {{ 'aXbX'.replace('X', '-', 1) }} {{ 'abc'.replace('', '.') }}",
    "{{ 'abcabc'.find('c') }} {{ 'abcabc'.rfind('c') }} {{ 'abc'.find('z') }} {{ 'banana'.count('an') }} {{ ', '.join(['a', 'b']) }} {{ '12'.isdigit() }} {{ 'abc'.startswith(('x', 'a')) }} {{ 'a.txt'.endswith('.txt') }}",
    "{{ {'a': 1, 'b': [1, 2.0, true, none]} | tojson }} {{ {'b': 1, 'a': {'c': []}} | tojson(indent=2) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }} {{ '\u00e9</x>\u007f' | tojson }} {{ '\u00e9\U0001f600\u007f' | tojson(ensure_ascii=true) }} {{ [1, 2] | tojson(separators=(',', ':')) }}",
    "{{ x is defined }} {{ x is undefined }} {{ x }} {{ x | default('d') }} {{ '' | default('d', true) }} {{ none | default('d') }} {{ x | length }} {% for i in x %}no{% else %}else{% endfor %}",
    "{% for i in [1, 2, 3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }};{% endfor %}",
    "{% for i in range(10) if i % 2 %}{{ i }}{{ loop.index }}{% if i == 7 %}{% break %}{% endif %}{% if i == 3 %}{% continue %}{% endif %},{% endfor %}",
    "{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = i + 10 %}{{ x }} {% endfor %}{{ x }}{% if true %}{% set x = 5 %}{% endif %}{{ x }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c %}block {{ a }}{% endset %}{{ c }}{% set d | upper %}up{% endset %}{{ d }}{% filter upper %}in {{ a }} here{% endfilter %}",
    "{% macro m(a, b='x', c=b) %}[{{ a }}|{{ b }}|{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(a=3, c=4) }}{{ m() }}",
    "{% macro fact(n) %}{{ n if n <= 1 else n * (fact(n - 1) | int) }}{% endmacro %}{{ fact(6) }}",
    "{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{% for i in [1, 2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c }}",
    "{% raw %}{{ no }} {% not %}{% endraw %}|{%- raw -%} x {%- endraw -%} |",
    "a  {%- if true -%}  b  {%- endif -%}  c\n  {% if true %}\n  d\n  {% endif %}\n  e {% if true %} f\n{% endif %}\n  {#- gone -#}  g\n  {# line #}\n  h\n",
    "  {%+ if true %} kept{% endif +%}\n  x\n\t{{ 'v' }}\n  {{- 'w' -}}  \n y\n\n",
    "{{ [3, 1, 2] | sort }} {{ ['b', 'A', 'c'] | sort }} {{ ['b', 'A'] | sort(case_sensitive=true) }} {{ [3, 1] | sort(reverse=true) }} {{ [1, 2, 1] | unique | list }} {{ [1, 2] | reverse | list }} {{ 'abc' | reverse }}",
    "{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | list }} {{ ['x', 'y'] | map('upper') | join('-') }} {{ [1, 2, 3] | select('odd') | list }} {{ [1, 2, 3] | reject('>', 1) | list }} {{ [{'a': 1}, {'a': 0}] | selectattr('a') | list }} {{ [{'a': 1}, {'a': 2}] | selectattr('a', 'equalto', 2) | list }} {{ [{'a': 1}, {}] | rejectattr('a', 'defined') | list }}",
    "{{ [1, 2] | first }} {{ [1, 2] | last }} {{ [] | first }} {{ [1, 2] | join(', ') }} {{ 'abc' | length }} {{ {'a': 1} | items | list }} {{ {'b': 1, 'a': 2} | dictsort }} {{ [1, 2] | sum }} {{ [1, 5, 2] | max }} {{ [4, 1] | min }} {{ -3 | abs }} {{ 2.5 | round }} {{ 2.567 | round(2) }} {{ 2.1 | round(0, 'ceil') }}",
    "{{ '42' | int }} {{ 'x' | int }} {{ '4.7' | int }} {{ ' 5 ' | int }} {{ '1.5' | float }} {{ 3 | float }} {{ 5 | string ~ 'x' }} {{ 'a\\nb\\n\\nc' | indent }} {{ 'a\\nb' | indent(2, true) }} {{ ' x ' | trim }} {{ '<a>' | e }} {{ 'abc' | replace('b', 'x') }} {{ 'abc' | list }}",
    "{{ 1 is number }} {{ true is number }} {{ true is integer }} {{ 1 is integer }} {{ 1.0 is float }} {{ 'a' is string }} {{ {} is mapping }} {{ [] is sequence }} {{ 'a' is iterable }} {{ 1 is iterable }} {{ none is none }} {{ 3 is odd }} {{ 4 is divisibleby 2 }} {{ 1 is in [1] }} {{ 1 is eq 1 }} {{ 'a' is not string }} {{ true is true }} {{ 'A' is upper }} {{ 1 is sameas 1 }}",
    "{{ 'a' in 'abc' }} {{ 1 in [1, 2] }} {{ 'k' in {'k': 1} }} {{ 1 not in [1] }} {{ 'x' if false }}|{{ 'a' * 3 }} {{ [1] * 2 }} {{ [1] + [2] }} {{ (1,) + (2,) }}",
    "{{ {'a': {'b': [10, 20]}}.a.b[1] }} {{ {'a': 1}['a'] }} {{ {'items': 5}['items'] }} {{ {'a': 1}.get('z', 'none') }} {{ {'a': 1}.keys() | list }} {{ {'a': 1}.values() | list }} {% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}={{ v }} {% endfor %}{{ [[1, 2], [3]].1.0 }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}",
    "{{ \"adjacent\" 'strings' }} {{ 1_000 }} {{ {'a':{'b':1}}['a']['b'] }} {{ 'x' is defined and 'y' }} {{ ((1)) }} {{ [1, 2,] }} {{ {'a': 1,} }} {{ () }}",
    "{% if 0 %}a{% elif [] %}b{% elif 'x' %}c{% else %}d{% endif %}{% if not x %}e{% endif %}",
    "{% generation %}gen{% endgeneration %}{% for a, b in [(1, 2), (3, 4)] %}{{ a }}{{ b }}{% endfor %}{% for c in 'ab' %}{{ c }}-{% endfor %}{% for k in {'a': 1} %}{{ k }}{% endfor %}",
    "line\r\nbreak\rend\n\n",
    "{{ 'tab\\there' }}{{ \"d\\\"q\" }}{{ 'u\\u00e9\\x41' }}{{ 'keep\\d' }}",
    # Refused by both.
    "{{ x.y }}", "{{ 1 + 'a' }}", "{{ x + 1 }}", "{% for %}", "{{ 1", "{% if %}{% endif %}", "{{ raise_exception('no ' + 'way') }}",
    "{{ [1].append(2) }}", "{{ 1 / 0 }}", "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", "{% include 'x' %}", "{{ 1 | nofilter }}",
    "{{ 1 is notest }}", "{% endif %}", "{{ range(10 ** 9) }}", "{{ 1 < 'a' }}", "{% set x = %}", "{{ a b }}", "{{ [1, 2 }}",
    "{{ {}.update({'a': 1}) }}", "{{ x() }}", "{{ 'a'() }}", "{{ none | tojson | int | upper | nothing }}", "{% for a, b in [1] %}{% endfor %}",
]


def main():
    env = environment()
    base = {"bos_token": "<s>", "eos_token": "</s>"}

    def case(template, variables):
        row = {"template": template, "variables": variables}
        try:
            row["expected"] = env.from_string(template).render(**variables)
        except Exception as error:  # whatever Python raises, the template is refused
            row["error"] = str(error)
        print(json.dumps(row))

    templates = dict(TEMPLATES)
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja")) if len(sys.argv) > 1 else []:
        templates[path.name] = path.read_text()
    for template in templates.values():
        for messages in CHATS:
            for tools in (None, TOOLS):
                for prompt in (True, False):
                    for extra in ({}, {"enable_thinking": False}, {"enable_thinking": True, "clear_thinking": False}):
                        case(template, {**base, **extra, "messages": messages, "tools": tools,
                                        "documents": None, "add_generation_prompt": prompt})
    for snippet in SNIPPETS:
        case(snippet, {"messages": [], "tools": None, "documents": None, "add_generation_prompt": False})


main()
