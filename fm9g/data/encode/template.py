"""Chat templates: messages to text as transformers renders them.

A template is Jinja text by the convention of Hugging Face's chat_template. The template that trains a model is exported
with it.
"""

from __future__ import annotations

import json
import re
import traceback
import zlib
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from fm9g.config.mixture import (
    BUILTIN_TEMPLATES,
    NO_TEMPLATE,
    TEMPLATE_FOLDER,
    TOKENIZER_TEMPLATE,
    check_template,
    is_file_name,
)
from fm9g.config.registry import find_template
from fm9g.data.encode.jinja_environment import compile_template, literal_text, make_strftime_now
from fm9g.data.encode.transform import GuardError, guard_user_code
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.regular_file import check_regular

Messages = list[dict[str, Any]]

# Limits of one rendering; a conversation of a million tokens takes about a second and some 10 MB.
MAX_SECONDS, MAX_MEMORY = 20.0, 1 << 30
_MAX_FILE_BYTES = 16 << 20  # of a template's file

# Spellings that chat templates use for tokens of their own: <|im_end|>, also with DeepSeek's wide bars, <|turn>,
# <turn|>, <start_of_turn>, <reserved_106>.
_BAR = "[|\uff5c]"
_MARKER = re.compile(rf"<{_BAR}[^<>\s]+>|<[^<>\s]+{_BAR}>|<(?:start|end)_of_\w+>|<reserved_\d+>")


class TemplateLimitError(UserError):
    """A template took too much time or memory; it is not tried again with other messages."""


class Template:
    """A compiled chat template.

    Args:
        name: what messages to the user call it.
        sources: the Jinja source, or several by name. As in transformers, `tool_use` renders conversations with tools,
            and `default` all others.
        special_tokens: the tokenizer's bos_token, eos_token, ...
        date: what strftime_now writes, YYYY-MM-DD; empty: now.

    Raises UserError that names the line of a syntax error.
    """

    def __init__(
        self,
        name: str,
        sources: str | Mapping[str, str],
        special_tokens: Mapping[str, Any] | None = None,
        date: str = "",
    ) -> None:
        self.name, self.date = name, date
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        # As in transformers, a token that the tokenizer lacks is undefined, for which templates test.
        self._json_arguments: dict[bool, bool] = {}
        self._ignored_features: dict[bool, frozenset[str]] = {}
        self._special_tokens = {key: token for key, token in (special_tokens or {}).items() if token}
        for kind, text in self.sources.items():
            compile_template(self._title(kind), text, True)

    @property
    def uses_date(self) -> bool:
        """Whether the text of a conversation depends on the date."""
        return any("strftime_now" in text for text in self.sources.values())

    @property
    def checksum(self) -> str:
        """A checksum of the source, and the date if the text depends on it."""
        value = zlib.crc32("\0".join(chain.from_iterable(sorted(self.sources.items()))).encode())
        return f"{value:08x}" + (f" of {self.date or 'today'}" if self.uses_date else "")

    def has_generation_blocks(self, tools: Any = None) -> bool:
        """Whether the template marks what is generated, with {% generation %}."""
        kind = self._select_source(tools)
        return compile_template(self._title(kind), self.sources[kind], True)[1]

    def render(
        self,
        messages: Messages,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        with_marks: bool = False,
    ) -> str:
        """Renders a conversation. with_marks: with marks around generation blocks.

        Raises UserError for any error that the template raises.
        """
        if any(message.get("tool_calls") for message in messages) and self._wants_json_arguments(tools is not None):
            messages = [_with_json_arguments(message) for message in messages]
        return self._render(messages, tools, add_generation_prompt, with_marks)

    def _render(self, messages: Messages, tools: Any, add_generation_prompt: bool, with_marks: bool = False) -> str:
        kind = self._select_source(tools)
        where = f"chat template {self._title(kind)}"
        template, _ = compile_template(self._title(kind), self.sources[kind], with_marks)
        try:
            with guard_user_code(where, MAX_SECONDS, "does it loop forever?", MAX_MEMORY):
                return template.render(
                    messages=[_template_message(message) for message in messages],
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    strftime_now=make_strftime_now(self.date),
                    **self._special_tokens,
                )
        except UserError as error:  # a template is a program and can raise anything
            from fm9g.data.encode.jinja_bounds import TooLargeError

            cause = error.__cause__ or error
            lines = [step.lineno for step in traceback.extract_tb(cause.__traceback__) if step.filename == "<template>"]
            if isinstance(cause, GuardError):  # for other errors, Jinja itself translates the lines of its code
                lines = [template.get_corresponding_lineno(line or 0) for line in lines]
            line = f", line {lines[-1]}" if lines else ""
            kind_of_error = TemplateLimitError if isinstance(cause, (GuardError, TooLargeError)) else UserError
            raise kind_of_error(f"{where}{line}: {str(cause) or type(cause).__name__}") from None

    def _select_source(self, tools: Any) -> str:
        if tools is not None and "tool_use" in self.sources:
            return "tool_use"
        if "default" not in self.sources:
            raise UserError(
                f"chat template {self.name}: the tokenizer has {', '.join(sorted(self.sources))}, and none of them is "
                "called default; choose another template, for example --chat_template chatml"
            )
        return "default"

    def _title(self, kind: str) -> str:
        return self.name if len(self.sources) == 1 else f"{self.name} ({kind})"

    @cached_property
    def markers(self) -> list[str]:
        """The special tokens that the template itself writes, such as <|im_end|>, in their order."""
        markers = (marker for text in self.sources.values() for marker in _MARKER.findall(literal_text(text)))
        return list(dict.fromkeys(markers))

    def _wants_json_arguments(self, with_tools: bool) -> bool:
        """Whether the template expects a call's arguments as JSON text (DeepSeek-V3), not as an object.

        Such a template raises for an object, or writes its Python repr.
        """
        if with_tools not in self._json_arguments:
            probe, tools = _probe_messages()[:2], _PROBE_TOOLS if with_tools else None
            sources = []
            for messages in (probe, list(map(_with_json_arguments, probe))):
                try:
                    sources.append(self._render(messages, tools, False))
                except TemplateLimitError:
                    raise
                except UserError:
                    sources.append("")
            by_object, by_text = sources
            self._json_arguments[with_tools] = bool(by_text) and (not by_object or "{'qxkey'" in by_object)
        return self._json_arguments[with_tools]

    def ignored_features(self, tools: Any = None) -> frozenset[str]:
        """Which of "tools", "calls" and "results" the template silently ignores.

        It renders a conversation with unusual words and looks for them. tools: those of the conversation.
        """
        with_tools = bool(tools)
        if with_tools not in self._ignored_features:
            turns, given = _probe_messages(), _PROBE_TOOLS if with_tools else None
            ignored = set()
            for what, word, messages in (
                ("tools", "qxtool", turns[:1]),
                ("calls", "qxfunction", turns[:2]),
                ("results", "qxresult", turns),
            ):
                try:
                    text = self.render(messages, given, add_generation_prompt=messages[-1]["role"] != "assistant")
                except TemplateLimitError:
                    raise
                except UserError:
                    continue  # not silently: it raises
                if word not in text and (with_tools or what != "tools"):
                    ignored.add(what)
            self._ignored_features[with_tools] = frozenset(ignored)
        return self._ignored_features[with_tools]


_PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "qxtool",
            "description": "four",
            "parameters": {"type": "object", "properties": {"qxkey": {"type": "string", "description": "three"}}},
        },
    }
]


def _probe_messages() -> Messages:
    """A call and its result, with words that no template writes itself."""
    function = {"name": "qxfunction", "arguments": {"qxkey": "qxargument"}}
    call: dict[str, Any] = {"id": "qxcall001", "type": "function", "function": function}
    return [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "qxresult", "tool_call_id": call["id"], "name": "qxfunction"},
        {"role": "assistant", "content": "two"},
    ]


def _with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [call["function"] for call in calls]
    texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
    new = [call | {"function": call["function"] | {"arguments": text}} for call, text in zip(calls, texts)]
    return message | {"tool_calls": new}


def load_template(spec: str, tokenizer: Any, date: str = "") -> Template:
    """Loads the template that `spec` names: a built-in or registered one, `tokenizer` for the tokenizer's own, or a
    Jinja file.

    tokenizer: an object with special_tokens and chat_template (a text, several by name, or None). Raises UserError if
    there is no such template.
    """
    if spec == TOKENIZER_TEMPLATE:
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template of its own; choose another, for example --chat_template chatml"
            )
        return Template(spec, tokenizer.chat_template, tokenizer.special_tokens, date)
    if spec not in BUILTIN_TEMPLATES and not is_file_name(spec) and (source := find_template(spec)):
        return Template(spec, source, tokenizer.special_tokens, date)
    file = TEMPLATE_FOLDER / f"{spec}.jinja" if spec in BUILTIN_TEMPLATES else Path(spec)
    if not file.is_dir():
        check_regular(file, _MAX_FILE_BYTES)
    if not file.is_file():
        check_template(spec)
        raise UserError(
            f"chat_template: {spec}: no such file; give a file, or one of "
            f"{', '.join([*BUILTIN_TEMPLATES, TOKENIZER_TEMPLATE, NO_TEMPLATE])}"
        )
    register_input(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{spec}: not UTF-8: {error.reason}; a chat template is Jinja text") from None
    return Template(spec, text, tokenizer.special_tokens, date)


def _template_message(message: dict[str, Any]) -> dict[str, Any]:
    """The message as transformers passes it to a template: no key with None, reasoning under each usual key."""
    message = {key: value for key, value in message.items() if value is not None and key not in _TRAINING_KEYS}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in message:
            return {"thinking": message[key], **message, "reasoning_content": message[key]}
    return message


_TRAINING_KEYS = frozenset({"weight", "content_weights"})  # used by training only
