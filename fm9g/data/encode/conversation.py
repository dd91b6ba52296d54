"""From a conversation to the samples that are trained on, each a text with its trained spans.

An answer is trained on exactly as generation has to produce it: from the prompt that the template writes for it, up to
its end marker. Many templates rewrite earlier answers once others follow (Qwen3 and DeepSeek remove their reasoning).
Then one text cannot contain all answers, and a conversation becomes several samples:

    messages            user 1   assistant 1   user 2   assistant 2
    one sample          user 1  «assistant 1»  user 2  «assistant 2»     the template rewrites nothing
    several samples     user 1  «assistant 1»
                        user 1   assistant 1'  user 2  «assistant 2»     «trained on»; 1': the template's rewritten 1
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from fm9g.config.mixture import LOSS_MODES, TURNS
from fm9g.data.encode.escaping import Span
from fm9g.data.encode.jinja_environment import MARK_END, MARK_START
from fm9g.data.encode.template import Messages, Template
from fm9g.errors import UserError

_THINK_START, _THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class RenderedSample:
    """A conversation as text. All spans are in order and disjoint.

    Args:
        targets: the spans that are trained on.
        weights: of each target in the loss.
        starts: the offsets at which generation begins.
        ends: the ends of trained turns, unless the template's generation blocks mark them.
        content_spans: spans of the messages' contents; the template writes the rest.
    """

    text: str
    targets: list[Span]
    weights: list[float]
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    content_spans: list[Span] = field(default_factory=list)


def render_samples(
    template: Template,
    messages: Messages,
    tools: list[dict[str, Any]] | None = None,
    loss: str = "assistant",
    turns: str = "auto",
    with_content_spans: bool = False,
) -> list[RenderedSample]:
    """Renders the samples of a conversation; each answer is trained on in exactly one of them.

    A turn is the text inside the template's generation blocks. Without such blocks, it is the text from the end of its
    prompt to its end marker. A turn's weight and content_weights are its weights in the loss; 0 is not trained on.

    Args:
        loss: `assistant` trains on every turn of the assistant, `last` only on its last one, `all` on the full text.
        turns: `auto` gives as few samples as the template allows, `split` one per turn.

    Raises UserError if the template raises, or its turns cannot be located.
    """
    assert loss in LOSS_MODES, loss
    assert turns in TURNS, turns
    chat = _ConversationRenderer(template, messages, tools)
    if loss == "all":
        return [chat.render_full(with_content_spans)]
    trained = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    trained = [n for n in (trained[-1:] if loss == "last" else trained) if messages[n].get("weight", 1) != 0]
    if not trained:
        return [RenderedSample(chat.text(len(messages)), [], [])]
    if template.has_generation_blocks(tools):
        return chat.render_generation_blocks(trained, turns, loss == "last", with_content_spans)
    samples: list[tuple[int, RenderedSample]] = []
    end = len(messages)
    while trained:
        if turns == "split":
            end = trained[-1] + 1
        text, located = chat.locate(end, trained if turns == "auto" else trained[-1:])
        if located:
            samples.append((min(located), chat.make_sample(text, located, end, with_content_spans)))
            trained = [number for number in trained if number not in located]
        # If the last turn was not located, a later message makes the template rewrite it.
        end = trained[-1] + 1 if trained else 0
    return [sample for _, sample in sorted(samples, key=lambda sample: sample[0])]


class _ConversationRenderer:
    """Renders one conversation with one template."""

    def __init__(self, template: Template, messages: Messages, tools: list[dict[str, Any]] | None) -> None:
        self._template, self._messages, self._tools = template, messages, tools
        self._rendered_answers: dict[int, tuple[str, int]] = {}

    def text(self, end: int, prompt: bool = False, with_marks: bool = False) -> str:
        """The text of the first `end` messages."""
        return self._template.render(self._messages[:end], self._tools, prompt, with_marks)

    def render_full(self, with_content_spans: bool) -> RenderedSample:
        """A sample whose full text is trained on, with the loss weights of turns that have some."""
        text = self.text(len(self._messages))
        weighted = [
            n for n, message in enumerate(self._messages) if "weight" in message or "content_weights" in message
        ]
        targets, weights, offset = [], [], 0
        if weighted:
            _, located = self.locate(len(self._messages), weighted)
            if missing := [n + 1 for n in weighted if n not in located]:
                raise UserError(
                    f"chat template {self._template.name}: it rewrites message {missing[0]}, so its weight "
                    "cannot be applied to the full text; use --train_on assistant"
                )
            for number in weighted:
                for (start, stop), weight in self._weighted_spans(text, number, located[number]):
                    targets += [(offset, start), (start, stop)]
                    weights += [1.0, weight]
                    offset = stop
        pairs = zip([*targets, (offset, len(text))], [*weights, 1.0])
        trained = [(span, weight) for span, weight in pairs if weight and span[0] < span[1]]
        content_spans = self._content_spans(text, len(self._messages)) if with_content_spans else []
        return RenderedSample(
            text, [span for span, _ in trained], [weight for _, weight in trained], content_spans=content_spans
        )

    def locate(self, end: int, candidates: list[int]) -> tuple[str, dict[int, Span]]:
        """The text of the first `end` messages, and the span of each candidate that it contains as generated."""
        text = self._rendered_answer(end - 1)[0] if end - 1 in candidates else self.text(end)
        located = {}
        for number in candidates:
            written, start = self._rendered_answer(number)
            content = self._messages[number].get("content") or ""
            # White space after an end marker is not part of the answer; without a marker it is.
            stop = len(written) if content and written.endswith(content) else len(written.rstrip())
            if text.startswith(written[:stop]):
                located[number] = start, stop
        return text, located

    def make_sample(self, text: str, located: dict[int, Span], end: int, with_content_spans: bool) -> RenderedSample:
        """A sample with these turns trained on. end: number of its messages."""
        by_turn = [self._weighted_spans(text, number, span) for number, span in sorted(located.items())]
        ends = [parts[-1][0][1] for parts in by_turn if parts[-1][1]]
        spans = [pair for parts in by_turn for pair in parts if pair[1] and pair[0][0] < pair[0][1]]
        starts = [start for _, (start, _) in sorted(located.items())]
        content_spans = self._content_spans(text, end) if with_content_spans else []
        return RenderedSample(
            text, [span for span, _ in spans], [weight for _, weight in spans], starts, ends, content_spans
        )

    def render_generation_blocks(
        self, trained: list[int], turns: str, last: bool, with_content_spans: bool
    ) -> list[RenderedSample]:
        """The samples; their trained spans are the insides of the template's generation blocks."""
        if turns == "split" and len(trained) > 1:
            chats = [_ConversationRenderer(self._template, self._messages[: n + 1], self._tools) for n in trained]
            return [
                chat.render_generation_blocks([n], turns, True, with_content_spans)[0]
                for chat, n in zip(chats, trained)
            ]
        text = self.text(len(self._messages))
        spans = _spans_between_marks(self.text(len(self._messages), with_marks=True), text)
        if spans is None:
            raise UserError(
                f"chat template {self._template.name}: the output of its generation blocks is changed afterwards; "
                "do not nest the blocks, and apply no filter to their text"
            )
        answers = [n for n, message in enumerate(self._messages) if message.get("role") == "assistant"]
        if len(spans) == len(answers):
            located = {n: span for n, span in zip(answers, spans) if n in trained}
            return [replace(self.make_sample(text, located, len(self._messages), with_content_spans), ends=[])]
        if any("weight" in message or "content_weights" in message for message in self._messages):
            raise UserError(
                f"chat template {self._template.name}: it has {len(spans)} generation blocks for {len(answers)} turns "
                "of the assistant, so their weights cannot be applied; let it write one block for each turn"
            )
        spans = [span for span in (spans[-1:] if last else spans) if span[0] < span[1]]
        content_spans = self._content_spans(text, len(self._messages)) if with_content_spans else []
        return [RenderedSample(text, spans, [1.0] * len(spans), [start for start, _ in spans], [], content_spans)]

    def _rendered_answer(self, number: int) -> tuple[str, int]:
        """The text up to the end of an answer, as generation produces it from its prompt, and the prompt's length."""
        if number not in self._rendered_answers:
            self._rendered_answers[number] = self._render_answer(number)
        return self._rendered_answers[number]

    def _render_answer(self, number: int) -> tuple[str, int]:
        text = self.text(number + 1)
        try:
            prompt = self.text(number, prompt=True)
        except UserError as error:
            # Not every template renders a conversation without messages; then the prompt is what precedes the content.
            content_spans = self._content_spans(text, 1) if number == 0 else []
            if not content_spans:
                raise UserError(
                    f"chat template {self._template.name}: it has no prompt for message {number + 1}, so the turn "
                    f"cannot be located ({error})"
                ) from None
            return text, content_spans[0][0]
        if text.startswith(prompt):
            self._check_prompt(number, text, prompt)
            return text, len(prompt)
        if opened := self._render_opened_reasoning(number, text, prompt):
            return opened, len(prompt)
        if moved := self._render_rewritten(number, text, prompt):
            return moved, len(prompt)
        same = next((i for i, (a, b) in enumerate(zip(text, prompt)) if a != b), min(len(text), len(prompt)))
        raise UserError(
            f"chat template {self._template.name}: its prompt for message {number + 1} ends with {prompt[same:]!r:.60}"
            f", but it writes the message as {text[same:]!r:.60}, which no generation from that prompt gives; put "
            "{% generation %} and {% endgeneration %} around the assistant's answer in the template"
        )

    def _check_prompt(self, number: int, text: str, prompt: str) -> None:
        """Raises UserError if the template writes a question only together with its answer."""
        before = self._messages[number - 1] if number else {}
        question = (before.get("content") or "").strip() if before.get("role") != "assistant" else ""
        if question and question not in prompt and question in text[len(prompt) :]:
            raise UserError(
                f"chat template {self._template.name}: its prompt for message {number + 1} does not contain message "
                f"{number}, which would be trained on; it must write each message separately"
            )

    def _render_opened_reasoning(self, number: int, text: str, prompt: str) -> str:
        """The text up to an answer whose prompt opens reasoning that the template then removes (DeepSeek-R1).

        The reasoning is the record's, or empty. Returns an empty text if the prompt opens none.
        """
        before = prompt.rstrip().removesuffix(_THINK_START)
        if len(before) == len(prompt.rstrip()) or not text.startswith(before):
            return ""
        written, message = text[len(before) :], self._messages[number]
        content = message.get("content") or ""
        if written.lstrip().startswith(_THINK_START):  # present, but with other white space around it
            written = written.lstrip().removeprefix(_THINK_START)
            return prompt + (written.removeprefix("\n") if prompt.endswith("\n") else written)
        if written.lstrip().startswith(_THINK_END):
            return f"{prompt}\n{written.lstrip()}"
        space = "\n\n"
        if _THINK_END in content:
            end = content.rindex(_THINK_END) + len(_THINK_END)
            reasoning, answer = content[:end].lstrip().removeprefix(_THINK_START), content[end:]
            space = answer[: len(answer) - len(answer.lstrip())]
            reasoning = reasoning.removeprefix("\n") if prompt.endswith("\n") else reasoning
        else:
            reasoning = f"{(message.get('reasoning_content') or '').strip()}\n{_THINK_END}"
        return prompt + reasoning + (written if written[:1].isspace() else space + written)

    def _render_rewritten(self, number: int, text: str, prompt: str) -> str:
        """The text up to an answer that makes the template rewrite the text before it (gpt-oss, after a call).

        In the result, the answer follows its prompt. Returns an empty text if the start of the answer is not found.
        """
        header = prompt.removeprefix(self.text(number))
        if not header.strip() or header == prompt:
            return ""
        other = [*self._messages[:number], {"role": "assistant", "content": "qxother"}]
        try:
            other_text = self._template.render(other, self._tools)
        except UserError:
            return ""
        same = next((i for i, (a, b) in enumerate(zip(text, other_text)) if a != b), min(len(text), len(other_text)))
        start = text.rfind(header, 0, same)
        return prompt + text[start + len(header) :] if start >= 0 else ""

    def _weighted_spans(self, text: str, number: int, span: Span) -> list[tuple[Span, float]]:
        """The parts of a turn's span, with the weight of each."""
        message = self._messages[number]
        weight, parts = float(message.get("weight", 1)), message.get("content_weights")
        if not parts:
            return [(span, weight)]
        start, stop = span
        offset = self._content_start(text, number, span)
        ends = [offset + end for end in accumulate(length for length, _ in parts)]
        # Text before and after the content has the weight of the part next to it.
        borders = [start, *(min(max(end, start), stop) for end in ends[:-1]), stop]
        return [((a, b), weight * float(part)) for a, b, (_, part) in zip(borders, borders[1:], parts)]

    def _content_start(self, text: str, number: int, span: Span) -> int:
        """The offset of a turn's content in the text. Raises UserError if the template changes the content."""
        content = self._messages[number]["content"]
        inner = content.strip()
        marked_message = {**self._messages[number], "content": _add_marks(content, str.strip)}
        try:
            written = self._template.render([*self._messages[:number], marked_message], self._tools)
        except UserError:
            written = ""
        spans = _spans_between_marks(written, self.text(number + 1))
        if spans and len(spans) == 1 and text[slice(*spans[0])] == inner and spans[0][0] >= span[0]:
            offset = spans[0][0]
        elif text.count(inner, *span) == 1:  # the template parses the content, which marks disturb
            offset = text.index(inner, *span)
        else:
            raise UserError(
                f"chat template {self._template.name}: it changes the content of message {number + 1}, so the weights "
                "of its parts cannot be applied"
            )
        return offset - (len(content) - len(content.lstrip()))

    def _content_spans(self, text: str, end: int) -> list[Span]:
        """The spans of the messages' contents, unchanged or stripped; contents that the template changes have none."""
        messages = self._messages[:end]
        own = [m["content"] if isinstance(m.get("content"), str) else "" for m in messages]
        # Marks find a content even if the template itself writes the same word ("user").
        for part in (str, str.strip):
            marked_messages = [
                {**m, "content": _add_marks(content, part)} if content else m for m, content in zip(messages, own)
            ]
            try:
                spans = _spans_between_marks(self._template.render(marked_messages, self._tools), text)
            except UserError:
                spans = None
            if spans is not None:
                return spans
        # The template parses contents, for example to remove earlier reasoning, and marks disturb it.
        spans, offset = [], 0
        for content in own:
            full, stripped = text.find(content, offset), text.find(content.strip(), offset)
            start, length = (full, len(content)) if full >= 0 else (stripped, len(content.strip()))
            if start >= 0 and length:
                offset = start + length
                spans.append((start, offset))
        return spans


def _add_marks(text: str, part: Any) -> str:
    """The text with marks around a part of it. part: str for all of it, str.strip to exclude white space around it."""
    inner = part(text)
    return text.replace(inner, f"{MARK_START}{inner}{MARK_END}", 1) if inner else text


def _spans_between_marks(marked: str, full: str) -> list[Span] | None:
    """The spans between marks; None if marks are unpaired, or the text without them is not `full`."""
    parts = re.split(f"({MARK_START}|{MARK_END})", marked)
    texts, marks = parts[::2], parts[1::2]
    if marks != [MARK_START, MARK_END] * (len(marks) // 2) or "".join(texts) != full:
        return None
    ends = list(accumulate(map(len, texts)))  # texts: outside, inside, outside, ...
    return list(zip(ends[::2], ends[1::2]))
