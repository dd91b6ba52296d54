"""Conversations and templates for tests."""

from __future__ import annotations

from types import SimpleNamespace

from fm9g.data.encode.conversation import RenderedSample, render_samples
from fm9g.data.encode.template import Template

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


TOKENIZER = SimpleNamespace(special_tokens=TOKENS, chat_template=None)


BUILT_IN = ("chatml", "add_template", "llama", "llama2")  # the others are in test_builtin_templates.py


def chat(*turns: tuple[str, str]) -> list[dict]:
    """chat(("user", "q"), ...)"""
    return [{"role": role, "content": content} for role, content in turns]


TWO_TURNS = chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2\n"))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> & 'here' 天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"name": "time", "parameters": {}},
]


CALLS = [
    {"role": "system", "content": "Help."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}},
            {"name": "time", "arguments": '{"zone": 8}'},
        ],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "One more.", "tool_calls": [{"function": {"name": "time"}}]},
    {"role": "tool", "content": "one"},
    {"role": "assistant", "content": "Sunny."},
]


# In the manner of templates that show only the newest thoughts.
FORGETFUL = """
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and not loop.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<' + m.role + '>' + content + '</>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


TAGGED = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<assistant>\\n' }}
        {%- generation %}
            {%- set inner = m.content | trim %}
            {{- inner + '</>' }}
        {%- endgeneration %}
        {{- '\\n' + (inner or '') }}
    {%- else %}
        {{- '<' + m.role + '>\\n' + m.content + '</>\\n' }}
    {%- endif %}
{%- endfor %}"""


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"


PLAIN_TEXT = "<user>q1</>\n<assistant>a1</>\n<user>q2</>\n<assistant>a2\n</>\n"


def cut(rendered: RenderedSample) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.targets]


def one(template: Template, messages: list[dict], tools: list[dict] | None = None, **options) -> RenderedSample:
    """The only text of a conversation."""
    (rendered,) = render_samples(template, messages, tools, **options)
    return rendered


def shown(rendered: RenderedSample) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.content_spans]
