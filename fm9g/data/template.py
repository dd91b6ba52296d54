"""Chat templates: messages to text as transformers writes them, and which part of that text is learnt.

A template is Jinja text by the convention of Hugging Face's chat_template; what trains a model is exported with it.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.config.fields import nearest
from fm9g.errors import UserError

if TYPE_CHECKING:
    import jinja2
    from jinja2.parser import Parser

BUILT_IN = ("chatml", "add_template", "llama", "llama2")
LOSSES = ("assistant", "last", "all")

Messages = list[dict[str, Any]]
Span = tuple[int, int]

# Put around a part of a text to find it again: Unicode noncharacters, in pairs, so that no text holds them by accident.
START, END = "\ufdd0\ufdd2", "\ufdd1\ufdd2"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; spans are (start, end) in characters, in order, disjoint.

    targets: what is learnt. contents: what comes from the messages' contents; the rest is the template's.
    """

    text: str
    targets: list[Span]
    contents: list[Span]


class Template:
    """A chat template: its Jinja source in `text`, what messages call it in `name`.

    Raises UserError that names the line where the source is not Jinja.
    """

    def __init__(self, name: str, text: str, bos_token: str = "", eos_token: str = "") -> None:
        self.name, self.text = name, text
        # A tokenizer without one leaves the name undefined, as in transformers: templates ask for it.
        self._tokens = {key: token for key, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token}
        self._has_generation_tags = _compile(name, text, marked=True)[1]

    def render(self, messages: Messages, tools: list[dict] | None = None, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises UserError with whatever the template raises."""
        return self._text(list(map(_cleaned, messages)), tools, add_generation_prompt)

    def render_spans(
        self,
        messages: Messages,
        tools: list[dict] | None = None,
        loss: str = "assistant",
        with_contents: bool = False,
    ) -> Rendered:
        """The conversation as text, with the spans that are learnt and, where asked for, those of the contents.

        loss: `assistant` learns every turn of the assistant, `last` only its last one, `all` the whole text. A turn
        is what the template's generation blocks enclose; without any, what follows the prompt that asks for the turn,
        up to the turn's end marker. Raises UserError where the template raises, or its turns cannot be located.
        """
        assert loss in LOSSES, loss
        messages = list(map(_cleaned, messages))
        full = self._text(messages, tools)
        contents = self._contents(full, messages, tools) if with_contents else []
        if loss == "all":
            return Rendered(full, [(0, len(full))], contents)
        if self._has_generation_tags:
            targets = _without_marks(self._text(messages, tools, marked=True), full)
            if targets is None:
                raise UserError(
                    f"chat template {self.name}: what its generation blocks write does not come out as they write it; "
                    "do not nest them, and use no filter on their text"
                )
            targets = targets[-1:] if loss == "last" else targets
        else:
            turns = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
            turns = turns[-1:] if loss == "last" else turns
            targets = [self._turn(full, messages, tools, number, loss) for number in turns]
        return Rendered(full, [(start, end) for start, end in targets if start < end], contents)

    def _text(self, messages: Messages, tools: Any, prompt: bool = False, marked: bool = False) -> str:
        template, _ = _compile(self.name, self.text, marked)
        try:
            return template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self._tokens
            )
        except Exception as error:  # a template is a program: it can raise anything
            lines = [step.lineno for step in traceback.extract_tb(error.__traceback__) if step.filename == "<template>"]
            line = f", line {lines[-1]}" if lines else ""
            raise UserError(f"chat template {self.name}{line}: {error or type(error).__name__}") from None

    def _turn(self, full: str, messages: Messages, tools: Any, number: int, loss: str) -> Span:
        """The span of messages[number], an assistant's: after its prompt, without the space after its end marker."""
        try:
            start = self._prefix(full, messages[:number], tools, True, loss)
        except UserError:
            # Not every template takes a conversation without messages; what it writes before the content is the prompt.
            contents = self._contents(full, messages, tools) if number == 0 and messages[0].get("content") else []
            if not contents:
                raise
            start = contents[0][0]
        is_last = number == len(messages) - 1
        end = len(full) if is_last else self._prefix(full, messages[: number + 1], tools, False, loss)
        return start, start + len(full[start:end].rstrip())

    def _prefix(self, full: str, messages: Messages, tools: Any, prompt: bool, loss: str) -> int:
        """The length of the text of the first messages. Raises UserError if the full text does not begin with it."""
        try:
            text, reason = self._text(messages, tools, prompt), ""
        except UserError as error:
            text, reason = None, f" ({error})"
        if text is not None and full.startswith(text):
            return len(text)
        what = f"the conversation up to message {len(messages)}{' and the prompt for an answer' if prompt else ''}"
        raise UserError(
            f"chat template {self.name}: it writes {what} differently once others follow{reason}, so the turns to "
            "learn cannot be located; put {% generation %} and {% endgeneration %} around them in the template"
            + ("" if loss == "last" else ", or learn only the last turn: --loss last")
        )

    def _contents(self, full: str, messages: Messages, tools: Any) -> list[Span]:
        """The spans of the messages' contents, as they are or stripped; what the template changes has none."""
        own = [m["content"] if isinstance(m.get("content"), str) else "" for m in messages]
        # Marks find a content even if the template writes the same word elsewhere ("user").
        for part in (str, str.strip):
            marked = [{**m, "content": _mark(text, part)} if text else m for m, text in zip(messages, own)]
            try:
                spans = _without_marks(self._text(marked, tools), full)
            except UserError:
                spans = None
            if spans is not None:
                return spans
        # The template looks into contents (it cuts away earlier thoughts, say), and marks disturb it.
        spans, end = [], 0
        for text in own:
            whole, stripped = full.find(text, end), full.find(text.strip(), end)
            start, length = (whole, len(text)) if whole >= 0 else (stripped, len(text.strip()))
            if start >= 0 and length:
                end = start + length
                spans.append((start, end))
        return spans


def load_template(spec: str, tokenizer: Any) -> Template:
    """The template that spec names: one of BUILT_IN, `tokenizer` for the tokenizer's own, or a file with Jinja text.

    tokenizer: has bos_token and eos_token ("" for none) and chat_template (None for none).
    Raises UserError where there is no such template.
    """
    if spec == "tokenizer":
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template of its own; choose another, as in --template chatml")
        text = tokenizer.chat_template
    else:
        file = Path(__file__).with_name("templates") / f"{spec}.jinja" if spec in BUILT_IN else Path(spec)
        if not file.is_file():
            known = [*BUILT_IN, "tokenizer"]
            hint = nearest(spec, known) or f"; give a file, or one of {', '.join(known)}"
            raise UserError(f"{spec}: no such chat template{hint}")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{spec}: not UTF-8: {error.reason}; a chat template is Jinja text") from None
    return Template(spec, text, tokenizer.bos_token, tokenizer.eos_token)


def _cleaned(message: dict[str, Any]) -> dict[str, Any]:
    """The message as transformers shows it to a template: no key with None, a thought under each name for it."""
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in message:
            return {"thinking": message[key], **message, "reasoning_content": message[key]}
    return message


def _mark(text: str, part: Callable[[str], str]) -> str:
    inner = part(text)
    return text.replace(inner, f"{START}{inner}{END}", 1) if inner else text


def _without_marks(marked: str, full: str) -> list[Span] | None:
    """The spans between the marks; None if they are not in pairs, or the text without them is not the full one."""
    pieces = re.split(f"({START}|{END})", marked)
    texts, marks = pieces[::2], pieces[1::2]
    if marks != [START, END] * (len(marks) // 2) or "".join(texts) != full:
        return None
    ends = list(accumulate(map(len, texts)))  # texts: outside, inside, outside, ...
    return list(zip(ends[::2], ends[1::2]))


@lru_cache(maxsize=64)  # kept here, not in Template, which thereby can be sent to another process
def _compile(name: str, text: str, marked: bool) -> tuple[jinja2.Template, bool]:
    """The compiled template, and whether it holds generation blocks."""
    import jinja2

    try:
        environment = _environment(marked)
        literals = environment.parse(text).find_all(jinja2.nodes.TemplateData)
        template = environment.from_string(text)
        template.globals = dict(template.globals)  # Jinja's ChainMap takes half the time of a short rendering
        return template, any(literal.data == START for literal in literals)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template {name}, line {error.lineno}: {error.message}") from None
    except (SyntaxError, RecursionError) as error:  # Jinja writes Python, which has rules of its own
        raise UserError(f"chat template {name}: {error}") from None


@lru_cache(maxsize=2)
def _environment(marked: bool) -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates. marked: marks surround what generation blocks write."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marked:
                start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (START, END))
                body = [start, *body, end]
            return nodes.Scope(body, lineno=line)  # names that are set inside end with the block

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    # Jinja's own tojson escapes HTML. The order of the arguments is part of the convention.
    def tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
