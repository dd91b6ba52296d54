"""From records to training samples: token ids, which of them are trained on, and what becomes of long records."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from fm9g.data.conversation import Rendered, render_samples
from fm9g.data.findings import PLACEHOLDERS
from fm9g.data.literal import Span, Unprotected, protect, without_marks
from fm9g.data.shapes import BadRecord, canonical
from fm9g.data.template import Template
from fm9g.data.tokenizer import Tokenizer
from fm9g.data.tokens import join_samples, mark, split_samples
from fm9g.errors import UserError

IGNORED = -100  # a target that counts for no loss
EMPTY, LONG_INPUT, OVERSIZE = "no output", "input longer than max_length", "longer than max_length"
REMEDIES = {  # for a run in which no record gives a sample
    EMPTY: "look at them with `fm9g data show`; what names their answers, a transform, or loss?",
    LONG_INPUT: "raise max_length, or leave these records out; `fm9g data check` shows their lengths",
    OVERSIZE: "raise max_length, or set the dataset's oversize_rule to head or segment",
}

# What a user should know of a record, see Encoder.findings.
LOST_THOUGHT = "a thought that the template does not write"
LOST_SYSTEM = "a system message that the template does not write"
LOST_TOOLS = "tools that the template does not write"
DOUBLED = "the template's own markers inside a message"
PLACEHOLDER = "a placeholder such as {{name}}"
NOT_TEXT = "the spelling of a special token, which this tokenizer cannot read as text"
SPLIT = "several samples, since the template rewrites earlier turns"

_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """A record without a template: what is only read, and what is trained on. weight: of the latter in the loss.

    literal: of each, the spans that spell a special token and are text; None: all such spellings are.
    """

    input: str
    output: str
    weight: float = 1.0
    literal: tuple[list[Span], list[Span]] | None = None


@dataclass(frozen=True)
class Chat:
    """A record under a template: its texts. literal: of each, the spans that spell a special token and are text."""

    samples: list[Rendered]
    literal: list[list[Span]]


Texts = Pair | Chat


@dataclass(frozen=True)
class Encoder:
    """How records become tokens.

    template: of pairs and conversations; None leaves pairs as they are. chat_template: of conversations, where there is
    no template. loss, turns: see fm9g.data.conversation.
    """

    tokenizer: Tokenizer
    template: Template | None = None
    loss: str = "assistant"
    turns: str = "auto"
    chat_template: Template | None = None

    def texts(self, record: dict[str, Any], scripted: bool = False, with_contents: bool = False) -> Texts:
        """What is to be encoded of a record. Raises BadRecord.

        scripted: a transform made the record from a protected one (fm9g.data.literal); special tokens that it wrote
        around the texts of a pair stand for themselves. with_contents: of chats, the spans of contents, too.
        """
        record = canonical(record)[1]
        if "chosen" in record or "label" in record:
            raise BadRecord("a preference, which supervised training does not use; a transform can choose an answer")
        if "messages" in record:
            return self._chat(record["messages"], record.get("tools"), scripted, with_contents)
        read, trained = record.get("input", ""), record["output"]
        if self.template and read and trained:
            answer = {"role": "assistant", "content": trained}
            if "weight" in record:
                answer["weight"] = record["weight"]
            return self._chat([{"role": "user", "content": read}, answer], None, scripted, with_contents)
        weight = float(record.get("weight", 1))
        if not scripted:
            return Pair(read, trained, weight)
        pattern = self.tokenizer.special_pattern
        one, other = Unprotected(read, pattern), Unprotected(trained, pattern)
        if all(len(pattern.findall(part.text)) == len(part.literal) for part in (one, other)):
            return Pair(one.text, other.text, weight)  # the script wrote no special token
        return Pair(one.text, other.text, weight, (one.literal, other.literal))

    def _chat(self, messages: list[dict[str, Any]], tools: Any, scripted: bool, with_contents: bool) -> Chat:
        template = self.template or self.chat_template
        if template is None:
            raise BadRecord("a conversation needs a template; give --template, chatml for example")
        calls = any(message.get("tool_calls") for message in messages)
        drops = template.drops(tools)
        if calls and "calls" in drops:
            raise BadRecord(f"it calls tools, for which the template {template.name} has no form; chatml has")
        if tools and "tools" in drops and "calls" in drops:
            raise BadRecord(f"it has tools, for which the template {template.name} has no form; chatml has")
        if "results" in drops and any(message["role"] == "tool" for message in messages):
            raise BadRecord(f"it has results of tools, for which the template {template.name} has no form; chatml has")
        pattern = self.tokenizer.special_pattern
        protected = (
            [_protected(message, pattern, not scripted) for message in messages],
            protect(tools, pattern, not scripted),
        )
        try:
            found = render_samples(template, *protected, self.loss, self.turns, with_contents)
        except UserError as error:
            raise BadRecord(str(error)) from None
        clean = [Unprotected(sample.text, pattern) for sample in found]
        samples = [
            replace(
                sample,
                text=text.text,
                targets=text.moved(sample.targets),
                starts=[text.place(start) for start in sample.starts],
                contents=text.moved(sample.contents),
            )
            for sample, text in zip(found, clean)
        ]
        return Chat(samples, [text.literal for text in clean])

    def findings(self, record: dict[str, Any], texts: Texts) -> list[str]:
        """What of a record is lost or likely not meant, of the constants above."""
        found = []
        if isinstance(texts, Pair):
            contents, markers = [texts.input, texts.output], []
        else:
            record = canonical(without_marks(record))[1]
            messages = record.get("messages") or [
                {"role": "user", "content": record["input"]},
                {"role": "assistant", "content": record["output"]},
            ]
            contents = [message["content"] for message in messages]
            template = self.template or self.chat_template
            assert template is not None
            markers = template.markers
            written = "\0".join(sample.text for sample in texts.samples)
            thoughts = [message.get("reasoning_content", "") for message in messages]
            thoughts += [
                thought for m in messages if m["role"] == "assistant" for thought in _THOUGHT.findall(m["content"])
            ]
            if any(thought.strip() not in written for thought in thoughts):
                found.append(LOST_THOUGHT)
            if any(m["role"] == "system" and m["content"].strip() not in written for m in messages):
                found.append(LOST_SYSTEM)
            if record.get("tools") and "tools" in template.drops(record["tools"]):
                found.append(LOST_TOOLS)
            if len(texts.samples) > 1:
                found.append(SPLIT)
        if any(marker in content for content in contents for marker in markers):
            found.append(DOUBLED)
        if any("{{" in content and PLACEHOLDERS.search(content) for content in contents):
            found.append(PLACEHOLDER)
        if any(self._not_text(content) for content in contents):
            found.append(NOT_TEXT)
        return found

    def _not_text(self, content: str) -> bool:
        spelt = set(self.tokenizer.special_pattern.findall(content))
        return bool(spelt) and not spelt.isdisjoint(self.tokenizer.unavoidable)

    def tokens(self, texts: list[Texts]) -> list[np.ndarray]:
        """The marked tokens of each record, see fm9g.data.tokens; none for a record that has nothing to train on."""
        plain = [p for p in texts if isinstance(p, Pair) and p.output and p.weight and p.literal is None]
        ids = iter(self.tokenizer.encode_batch([text for pair in plain for text in (pair.input, pair.output) if text]))
        tokens = []
        for item in texts:
            if isinstance(item, Chat):
                samples = (self._chat_tokens(*sample) for sample in zip(item.samples, item.literal))
                tokens.append(join_samples([sample for sample in samples if len(sample)]))
            elif not item.output or not item.weight:
                tokens.append(np.empty(0, np.int32))
            elif item.literal is None:
                tokens.append(self._pair_tokens(next(ids) if item.input else (), next(ids), item.weight))
            else:
                parts = zip((item.input, item.output), item.literal)
                read, trained = (self.tokenizer.encode_chat(text, (), literal)[0] for text, literal in parts)
                tokens.append(self._pair_tokens(read, trained, item.weight))
        return tokens

    def _pair_tokens(self, read: Any, trained: Any, weight: float) -> np.ndarray:
        """What begins a text + input + output + what ends it; input and output are encoded apart."""
        before, after = self.tokenizer.prefix_ids, self.tokenizer.suffix_ids
        border = len(before) + len(read)
        tokens = np.empty(border + len(trained) + len(after), np.int32)
        tokens[: len(before)], tokens[len(before) : border] = before, read
        tokens[border : len(tokens) - len(after)], tokens[len(tokens) - len(after) :] = trained, after
        # Plain text is trained on as a whole; nothing comes before its first token to learn it from.
        masked = 0 if self.loss == "all" else border if len(read) else min(1, border)
        if weight != 1:
            return mark(tokens, np.where(np.arange(len(tokens)) < masked, 0.0, weight))
        np.invert(tokens[:masked], out=tokens[:masked])
        return tokens

    def _chat_tokens(self, chat: Rendered, literal: list[Span]) -> np.ndarray:
        """The template's own tokens up to the end of the last turn, and the eos token where no special one is there."""
        text = chat.text[: max([len(chat.text.rstrip()), *chat.ends])]
        ids, starts, indices = self.tokenizer.encode_chat(text, chat.starts, literal)
        first = dict(zip(chat.starts, indices))
        weights = np.zeros(len(ids) + 1, np.float32)
        for (start, stop), weight in zip(chat.targets, chat.weights):
            end = bisect_left(starts, stop)
            if stop in chat.ends:
                end = self._end_of_turn(ids, starts, text, end)
            weights[first.get(start, bisect_left(starts, start)) : end] = weight
        if not weights[1:].any():  # nothing comes before the first token to learn it from
            return np.empty(0, np.int32)
        if not self.tokenizer.is_marker(ids[-1]):
            ids = [*ids, self.tokenizer.eos_id]
            weights[-1] = weights[-2]
        return mark(np.array(ids), weights[: len(ids)])

    def _end_of_turn(self, ids: list[int], starts: list[int], text: str, end: int) -> int:
        """The end of a turn of ids[:end]; where it has no end marker, with the token that begins the next turn."""
        is_marker = self.tokenizer.is_marker
        if not 0 < end < len(ids) or is_marker(ids[end - 1]):
            return end
        following = next((i for i in range(end, len(ids)) if is_marker(ids[i])), len(ids))
        if following == len(ids) or text[starts[end] : starts[following]].strip():
            return end
        if self.tokenizer.bos_token and ids[following] == self.tokenizer.bos_id:
            return end
        return following + 1


def _protected(message: dict[str, Any], pattern: re.Pattern[str], is_new: bool) -> dict[str, Any]:
    """A protected message; the marks are counted as part of the weighted parts that they stand in."""
    parts = message.get("content_weights")
    marks = [match.start() + 1 for match in pattern.finditer(message["content"])] if parts else []
    message = protect(message, pattern, is_new)
    if not parts or not marks:
        return message
    ends = list(accumulate(length for length, _ in parts))
    ends = [end + bisect_right(marks, end) for end in ends]
    lengths = [end - start for start, end in zip([0, *ends], ends)]
    return message | {"content_weights": [[length, weight] for length, (_, weight) in zip(lengths, parts)]}


def stop_token_ids(tokenizer: Tokenizer, template: Template | None) -> list[int]:
    """The tokens that end what a model generates: the template's end of a turn, and the tokenizer's eos.

    The first is the one that training has put at the end of an answer.
    """
    stops = [tokenizer.eos_id]
    if template is None:
        return stops
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "qxanswer"},
        {"role": "user", "content": "q"},
    ]

    def after_answer(messages: list[dict[str, Any]]) -> int | None:
        try:
            text = template.render(messages)
        except UserError:
            return None
        end = text.rfind("qxanswer") + len("qxanswer")
        found = tokenizer.special_pattern.match(text[end:].lstrip())
        token = tokenizer.special_ids[found[0]] if found else None
        return None if tokenizer.bos_token and token == tokenizer.bos_id else token

    if (end_of_turn := after_answer(turns[:2])) is not None:
        return list(dict.fromkeys([end_of_turn, *stops]))
    next_turn = after_answer(turns)  # of a format that has no end marker
    return stops if next_turn is None else [*stops, next_turn]


@dataclass(frozen=True)
class Encoded:
    """The samples of one record, each an array of marked tokens, or why it has none."""

    pieces: list[np.ndarray]
    skipped: str = ""


def cut(tokens: np.ndarray, max_length: int, oversize_rule: str, capacity: int) -> Encoded:
    """The samples, of at most max_length ids each, that the marked tokens of a record give.

    oversize_rule: `drop` discards a long sample, `head` keeps its first max_length tokens, `segment` cuts plain text
    (nothing is only read) into consecutive pieces and treats other records as `head`, `whole` keeps a sample of up to
    `capacity` tokens, a row, in one piece and discards a longer one.
    """
    samples = split_samples(tokens)
    if len(samples) == 1:
        return _cut_sample(tokens, max_length, oversize_rule, capacity)
    cuts = [_cut_sample(sample, max_length, oversize_rule, capacity) for sample in samples]
    pieces = [piece for one in cuts for piece in one.pieces]
    return Encoded(pieces, "" if pieces else cuts[-1].skipped)


def _cut_sample(tokens: np.ndarray, max_length: int, oversize_rule: str, capacity: int) -> Encoded:
    length = len(tokens) - 1
    if 0 < length < max_length - 2:  # the usual case, and no rule below applies to it
        return Encoded([tokens])
    if length < 1:
        return Encoded([], EMPTY)
    limit = capacity if oversize_rule == "whole" else max_length
    read = int(np.argmax(tokens[1:] >= 0))  # before the first token that is trained on
    if read >= limit - 2:
        return Encoded([], LONG_INPUT)
    if length <= limit:
        return Encoded([tokens])
    if oversize_rule in ("drop", "whole"):
        return Encoded([], OVERSIZE)
    if oversize_rule == "segment" and read == 0:
        return Encoded([tokens[i : i + max_length + 1] for i in range(0, length, max_length)])
    return Encoded([tokens[: max_length + 1]])
