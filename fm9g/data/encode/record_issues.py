"""Issues of single records: text that a template loses, and content that is likely not intended."""

from __future__ import annotations

import re
from typing import Any

from fm9g.data.encode.encoder import Encoder, RenderedChat, RenderedPair, RenderedRecord
from fm9g.data.encode.escaping import unescape
from fm9g.data.encode.template import Template
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.prepare.findings import PLACEHOLDERS

LOST_REASONING = "a thought that the template does not write"
LOST_SYSTEM = "a system message that the template does not write"
LOST_TOOLS = "tools that the template does not write"
REPEATED_MARKER = "the template's own markers inside a message"
PLACEHOLDER = "a placeholder such as {{name}}"
UNESCAPABLE_TOKEN = "the spelling of a special token, which this tokenizer cannot read as text"
SEVERAL_SAMPLES = "several samples, since the template rewrites earlier turns"

_THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def find_issues(encoder: Encoder, record: dict[str, Any], rendered: RenderedRecord) -> list[str]:
    """The issues of a canonical record, of the constants above. rendered: what `encoder` rendered of it."""
    issues: list[str] = []
    markers: list[str] = []
    if isinstance(rendered, RenderedPair):
        contents = [rendered.input, rendered.output]
    else:
        record = unescape(record)
        messages = record.get("messages") or [
            {"role": "user", "content": record["input"]},
            {"role": "assistant", "content": record["output"]},
        ]
        contents = [message["content"] for message in messages]
        template = encoder.template or encoder.chat_template
        assert template is not None
        markers = template.markers
        issues = _lost_parts(template, messages, record.get("tools"), rendered)
        if len(rendered.samples) > 1:
            issues.append(SEVERAL_SAMPLES)
    if any(marker in content for content in contents for marker in markers):
        issues.append(REPEATED_MARKER)
    if any("{{" in content and PLACEHOLDERS.search(content) for content in contents):
        issues.append(PLACEHOLDER)
    if any(_has_unescapable_token(encoder.tokenizer, content) for content in contents):
        issues.append(UNESCAPABLE_TOKEN)
    return issues


def _lost_parts(template: Template, messages: list[dict[str, Any]], tools: Any, rendered: RenderedChat) -> list[str]:
    """The issues of a conversation whose parts the template leaves out."""
    issues = []
    written = "\0".join(sample.text for sample in rendered.samples)
    reasoning_texts = [message.get("reasoning_content", "") for message in messages]
    reasoning_texts += [
        reasoning
        for message in messages
        if message["role"] == "assistant"
        for reasoning in _THINK_BLOCK.findall(message["content"])
    ]
    if any(reasoning.strip() not in written for reasoning in reasoning_texts):
        issues.append(LOST_REASONING)
    if any(message["role"] == "system" and message["content"].strip() not in written for message in messages):
        issues.append(LOST_SYSTEM)
    if tools and "tools" in template.ignored_features(tools):
        issues.append(LOST_TOOLS)
    return issues


def _has_unescapable_token(tokenizer: Tokenizer, content: str) -> bool:
    spelt = set(tokenizer.special_pattern.findall(content))
    return bool(spelt) and not spelt.isdisjoint(tokenizer.unescapable_tokens)
