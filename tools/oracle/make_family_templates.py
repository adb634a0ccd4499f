#!/usr/bin/env python3
"""Write family_templates.json: chat templates of the Qwen3 and Llama families rendered by transformers itself.

    python tools/oracle/make_family_templates.py --smollm2 smollm2 --out tests/fixtures/text/family_templates.json

`smollm2` is the released template of SmolLM2-135M-Instruct (Apache-2.0), read from a folder that tools/smollm2/convert.py
made. The others are our own texts, in the manner of released ones: they ask for the same variables, methods and tests, in
the same way, and write the same control tokens.

Needs transformers (5.23.0) and jinja2 (3.1.6).
"""
import argparse
import datetime
import json
import pathlib

import jinja2
import transformers
from transformers.utils import chat_template_utils

DATE = "2025-06-28"

QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{#- Reasoning is kept only in answers after the last question. #}
{%- set ns = namespace(searching=true, last_question=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- set is_result = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if ns.searching and message.role == "user" and message.content is string and not(is_result) %}
        {%- set ns.searching = false %}
        {%- set ns.last_question = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_question and (loop.last or (not loop.last and thoughts)) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {{- 'tools' }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

HEADERS = (
    "{% for message in messages %}{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{{ bos_token }}{% endif %}{{ turn }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

DATED = r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- The system message comes first, with the date. #}
{%- set instructions = "" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set instructions = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Tools: " + builtin_tools | default([]) | reject('equalto', 'none') | join(", ") + "\n" }}
{%- endif %}
{{- "Today: " + date_string + "\n\n" + instructions + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or (message.content is iterable and message.content is not string) %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


def say(role, content, thinking=None):
    return {"role": role, "content": content} | ({"reasoning_content": thinking} if thinking is not None else {})


QUESTION = say("user", "What is 2 + 2?")
CONVERSATIONS = {
    "one question": [say("user", " Hi <b>there</b> & \"you\"\n")],
    "system first": [say("system", "  Be brief. \n"), QUESTION],
    "earlier thinking in the text": [QUESTION, say("assistant", "<think>\nA sum.\n</think>\n\nVier — 四"), say("user", "And 9/2?")],
    "earlier thinking apart": [QUESTION, say("assistant", "4", "A sum."), say("user", "And 9/2?")],
    "ends with an answer": [say("system", "S"), QUESTION, say("assistant", "\n4", "\nA sum.\n")],
    "ends with thinking in the text": [QUESTION, say("assistant", "<think>A sum.</think>4")],
    "a tool's answers": [say("user", "Oslo?"), say("assistant", "Asking.", "The tool knows."), say("tool", "7"),
                         say("tool", "8"), say("assistant", "7 or 8")],
    "a system message later": [QUESTION, say("system", "Now in French."), say("user", "<tool_response>4</tool_response>")],
}
OPTIONS = [{"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": True},
           {"add_generation_prompt": True, "enable_thinking": False}, {"add_generation_prompt": False}]


class Today(datetime.datetime):
    """What transformers' strftime_now asks."""

    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(DATE)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--smollm2", type=pathlib.Path, required=True, help="folder of tools/smollm2/convert.py")
    a.add_argument("--out", type=pathlib.Path, required=True, help="file to write")
    a = a.parse_args()
    chat_template_utils.datetime = Today
    smollm2 = json.loads((a.smollm2 / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    templates = {"smollm2": smollm2, "qwen3": QWEN3, "llama headers": HEADERS, "llama headers, dated": DATED}
    bos, eos = "<|begin_of_text|>", "<|eot_id|>"
    out = []
    for name, source in templates.items():
        cases = []
        for what, messages in CONVERSATIONS.items():
            for options in OPTIONS if name == "qwen3" else OPTIONS[::3]:
                [text], _ = chat_template_utils.render_jinja_template(
                    [messages], chat_template=source, bos_token=bos, eos_token=eos, **options)
                cases.append({"what": what, "messages": messages, **options, "text": text})
        out.append({"name": name, "template": source, "cases": cases})
    made_with = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    a.out.write_text(json.dumps({"made_with": made_with, "date": DATE, "bos_token": bos, "eos_token": eos,
                                 "templates": out}, indent=1) + "\n", encoding="utf-8")
    print(sum(len(t["cases"]) for t in out), "renderings")


if __name__ == "__main__":
    main()
