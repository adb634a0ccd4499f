#!/usr/bin/env python3
"""Write template_vectors.json: chat templates rendered by Jinja2, set up as transformers does it
(transformers/utils/chat_template_utils.py: sandbox, trim_blocks, lstrip_blocks, loop controls, tojson, strftime_now).

    pip install jinja2==3.1.6
    python make_template_vectors.py template_vectors.json
"""
import datetime
import json
import sys

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

DATE = datetime.datetime(2025, 6, 28)

# Each in the manner of a family of released templates; the texts are our own.
TEMPLATES = {
    "chatml": """\
{%- if messages[0]['role'] != 'system' -%}
    {{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
""",
    "alternating": """\
{{ bos_token }}
{%- if messages[0].role == "system" %}
    {%- set system_message = messages[0].content | trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0, text='') %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("Roles must alternate: " ~ message.role ~ " at " ~ ns.index) }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- set ns.text = ns.text ~ message.role[0] | upper %}
    {%- if message.role == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"].strip() + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message.content.split('</think>')[-1].lstrip('\\n') + eos_token }}
    {%- endif %}
{%- endfor %}
{#- a comment with {{ braces }} #}
{{- "\\n" ~ ns.text ~ "*" * (3 - 1) }}
""",
    "macros": """\
{%- macro system_text(effort="medium") -%}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n" }}
    {{- "Today: " + strftime_now("%d %b %Y") + ", " ~ strftime_now("%A %B %-d") ~ "\\n" }}
    {{- "Reasoning: " + effort + "\\n\\n" }}
    {{- "# Valid channels: analysis, commentary, final." }}
{%- endmacro -%}
{%- macro kind(schema) -%}
    {%- if schema.type is string and schema.type in ['integer', 'number'] -%}
        number
    {%- elif schema.type == 'array' -%}
        {{- kind(schema['items']) }}[]
    {%- else -%}
        {{- schema.type | default('any', true) }}
    {%- endif -%}
{%- endmacro -%}
<|start|>system<|message|>
{{- system_text(reasoning_effort) if reasoning_effort is defined else system_text() }}<|end|>
{%- set tool_list = tools if tools is not none and tools else [] %}
{%- if tool_list | length > 0 %}tools{% endif %}
{{- kind({'type': 'array', 'items': {'type': 'integer'}}) }}{{ kind({}) }}
{%- set ns = namespace(last=none, seen={}) %}
{%- for message in messages -%}
    {%- if message.role in ['system', 'developer'] and loop.first -%}
        <|start|>developer<|message|># Instructions

{{ message.content }}<|end|>
    {%- elif message.role == 'assistant' -%}
        {%- if 'thinking' in message and loop.last %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' ~ message.thinking ~ '<|end|>' }}
        {%- endif %}
        {%- if message.content.startswith('skip') %}{% continue %}{% endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" }}{% generation %}{{ message.content }}{% endgeneration %}{{- "<|end|>" }}
    {%- else -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content | tojson + "<|end|>" }}
    {%- endif -%}
    {%- set ns.last = message.role -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.last != 'assistant' -%}
<|start|>assistant
{%- endif -%}
""",
    "corners": """\
{% set names = messages | map(attribute='role') | list %}
{{ names | join(', ') }} {{ names[::-1] | join('/') }} {{ 'user' in names and 'tool' not in names }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ (messages | last).content | length }}
{% for m in messages | rejectattr('role', 'eq', 'system') if m.content %}
  {{ loop.index0 }}:{{ loop.index }}/{{ loop.length }} {{ m.content | replace('a', 'b') }}
  {%- if not loop.last %};{% endif %}
{% else %}
  none
{% endfor %}
{{ [1, 'two', 3.5, none, true, {'k': ['v', "it's"]}] | tojson }}
{{ {'text': 'é"\\\\\\n<&>\\'', 'list': []} | tojson(indent=2) }}
{{ {'x': [1, 2]} | tojson(separators=(',', ':')) }} {{ 'é\\u0001' | tojson(ensure_ascii=true) }}
{{ none }} {{ true }} {{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 2 ** 5 }} {{ 1.0 }} {{ missing }}|{{ missing is defined }}
{{ 'Title Case'.title() }} {{ 'x,y,,z'.split(',') | join('+') }} {{ '  s '.strip() ~ '|' ~ ' l'.lstrip() ~ 'r '.rstrip() }}
{{ 'abc'[1:] }} {{ 'abc'[-1] }} {{ 'a-b'.replace('-', '+') }} {{ 'hello'.find('l') }} {{ 'Ab'.lower() }}{{ 'Ab'.upper() }}
{% set n = namespace(count=0) %}{% for i in range(10) %}{% if i == 7 %}{% break %}{% endif %}{% set n.count = n.count + i * 2 %}{% endfor %}{{ n.count }}
{% raw %}{{ raw + text }}{% endraw %} {{ "}}" ~ '{%' }} {{ 'yes' if messages else 'no' }} {{ messages[0].missing or 'fallback' }}
{% set captured %}in {{ names[0] }}{% endset %}{{ captured | upper }} {{ messages[0].get('content', 'x') }}{{ messages[0].get('none', 'x') }}
{% for key, value in {'only': 1}.items() %}{{ key }}={{ value }}{% endfor %} {{ ['b', 'a'] | sort | first }} {{ '%s-%s' | format('a', 1) }} {{ 'a\\nb' | indent(width=2) }}{{ 'a\\nb' | indent(3, true) }}
    {%- filter upper %} filtered {{ 'a' + 'b' }}{% endfilter %}

    {% if true %}
  indented
    {% endif %}
""",
}


def say(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "one question": [say("user", "Hi <b>there</b> & \"you\"")],
    "system first": [say("system", "  Be brief. \n"), say("user", "What is 2 + 2?")],
    "two turns": [say("system", "S"), say("user", " a b "), say("assistant", "x</think>\n\nvier — 四", thinking="sum"),
                  say("user", "und\n9/2?")],
    "ends with assistant": [say("user", "q"), say("assistant", "a", thinking="because")],
    "not alternating": [say("user", "one"), say("user", "two")],
    "skipped": [say("user", ""), say("assistant", "skip me"), say("user", "z")],
}


class Generation(jinja2.ext.Extension):
    """transformers' {% generation %}: here it only writes its body."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = DATE.strftime
    return env


def main(path):
    env = environment()
    out = []
    for name, source in TEMPLATES.items():
        template = env.from_string(source)
        cases = []
        for what, messages in CONVERSATIONS.items():
            for more in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "reasoning_effort": "high"}):
                case = {"what": what, "messages": messages, **more}
                try:
                    case["text"] = template.render(messages=messages, tools=None, documents=None, bos_token="<s>",
                                                   eos_token="</s>", **more)
                except jinja2.exceptions.TemplateError as error:
                    case["error"] = str(error)
                cases.append(case)
        out.append({"name": name, "template": source, "cases": cases})
    with open(path, "w") as file:
        json.dump({"jinja2": jinja2.__version__, "date": str(DATE.date()), "bos_token": "<s>", "eos_token": "</s>",
                   "templates": out}, file, indent=1)
        file.write("\n")
    print(sum(len(t["cases"]) for t in out), "renderings")


if __name__ == "__main__":
    main(*sys.argv[1:])
