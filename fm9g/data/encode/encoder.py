"""From records to training samples: token ids, which of them are trained on, and what becomes of long records."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from fm9g.data.encode.conversation import RenderedSample, render_samples
from fm9g.data.encode.escaping import Span, Unescaped, escape_special_tokens, unescape
from fm9g.data.encode.template import Template
from fm9g.data.encode.token_array import join_samples, make_token_array, split_samples
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.prepare.findings import PLACEHOLDERS
from fm9g.data.prepare.record_formats import BadRecord, canonicalize
from fm9g.errors import UserError

IGNORE_INDEX = -100  # a target that counts for no loss
EMPTY, LONG_INPUT, OVERSIZE = "no output", "input longer than max_length", "longer than max_length"
REMEDIES = {  # for a run in which no record gives a sample
    EMPTY: "look at them with `fm9g data show`; what names their answers, a transform, or loss?",
    LONG_INPUT: "raise max_length, or leave these records out; `fm9g data check` shows their lengths",
    OVERSIZE: "raise max_length, or set the dataset's oversize_rule to head or segment",
}

# What a user should know of a record, see Encoder.find_issues.
LOST_REASONING = "a thought that the template does not write"
LOST_SYSTEM = "a system message that the template does not write"
LOST_TOOLS = "tools that the template does not write"
REPEATED_MARKER = "the template's own markers inside a message"
PLACEHOLDER = "a placeholder such as {{name}}"
UNESCAPABLE_TOKEN = "the spelling of a special token, which this tokenizer cannot read as text"
SEVERAL_SAMPLES = "several samples, since the template rewrites earlier turns"

_THINK_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True)
class RenderedPair:
    """A record without a template: what is only read, and what is trained on. weight: of the latter in the loss.

    literal: of each, the spans that spell a special token and are text; None: all such spellings are.
    """

    input: str
    output: str
    weight: float = 1.0
    literal: tuple[list[Span], list[Span]] | None = None


@dataclass(frozen=True)
class RenderedChat:
    """A record under a template: its texts. literal: of each, the spans that spell a special token and are text."""

    samples: list[RenderedSample]
    literal: list[list[Span]]


RenderedRecord = RenderedPair | RenderedChat


@dataclass(frozen=True)
class Encoder:
    """How records become tokens.

    template: of pairs and conversations; None leaves pairs as they are. chat_template: of conversations, where there is
    no template. loss, turns: see fm9g.data.encode.conversation.
    """

    tokenizer: Tokenizer
    template: Template | None = None
    loss: str = "assistant"
    turns: str = "auto"
    chat_template: Template | None = None

    def render(
        self, record: dict[str, Any], from_transform: bool = False, with_content_spans: bool = False
    ) -> RenderedRecord:
        """What is to be encoded of a record. Raises BadRecord.

        from_transform: a transform made the record from a protected one (fm9g.data.encode.escaping); special tokens
        that it wrote around the texts of a pair stand for themselves. with_content_spans: of chats, the spans of
        contents, too.
        """
        record = canonicalize(record)[1]
        if "chosen" in record or "label" in record:
            raise BadRecord("a preference, which supervised training does not use; a transform can choose an answer")
        if "messages" in record:
            return self._chat(record["messages"], record.get("tools"), from_transform, with_content_spans)
        prompt, completion = record.get("input", ""), record["output"]
        if self.template and prompt and completion:
            answer = {"role": "assistant", "content": completion}
            if "weight" in record:
                answer["weight"] = record["weight"]
            return self._chat([{"role": "user", "content": prompt}, answer], None, from_transform, with_content_spans)
        weight = float(record.get("weight", 1))
        if not from_transform:
            return RenderedPair(prompt, completion, weight)
        pattern = self.tokenizer.special_pattern
        one, other = Unescaped(prompt, pattern), Unescaped(completion, pattern)
        if all(len(pattern.findall(part.text)) == len(part.literal) for part in (one, other)):
            return RenderedPair(one.text, other.text, weight)  # the script wrote no special token
        return RenderedPair(one.text, other.text, weight, (one.literal, other.literal))

    def _chat(
        self, messages: list[dict[str, Any]], tools: Any, from_transform: bool, with_content_spans: bool
    ) -> RenderedChat:
        template = self.template or self.chat_template
        if template is None:
            raise BadRecord("a conversation needs a template; give --chat_template, chatml for example")
        calls = any(message.get("tool_calls") for message in messages)
        ignored_features = template.ignored_features(tools)
        if calls and "calls" in ignored_features:
            raise BadRecord(f"it calls tools, for which the template {template.name} has no form; chatml has")
        if tools and "tools" in ignored_features and "calls" in ignored_features:
            raise BadRecord(f"it has tools, for which the template {template.name} has no form; chatml has")
        if "results" in ignored_features and any(message["role"] == "tool" for message in messages):
            raise BadRecord(f"it has results of tools, for which the template {template.name} has no form; chatml has")
        pattern = self.tokenizer.special_pattern
        escaped = (
            [_escape_message(message, pattern, not from_transform) for message in messages],
            escape_special_tokens(tools, pattern, not from_transform),
        )
        try:
            found = render_samples(template, *escaped, self.loss, self.turns, with_content_spans)
        except UserError as error:
            raise BadRecord(str(error)) from None
        clean = [Unescaped(sample.text, pattern) for sample in found]
        samples = [
            replace(
                sample,
                text=text.text,
                targets=text.map_spans(sample.targets),
                starts=[text.map_offset(start) for start in sample.starts],
                content_spans=text.map_spans(sample.content_spans),
            )
            for sample, text in zip(found, clean)
        ]
        return RenderedChat(samples, [text.literal for text in clean])

    def find_issues(self, record: dict[str, Any], rendered: RenderedRecord) -> list[str]:
        """What of a record is lost or likely not meant, of the constants above."""
        issues = []
        if isinstance(rendered, RenderedPair):
            contents, markers = [rendered.input, rendered.output], []
        else:
            record = canonicalize(unescape(record))[1]
            messages = record.get("messages") or [
                {"role": "user", "content": record["input"]},
                {"role": "assistant", "content": record["output"]},
            ]
            contents = [message["content"] for message in messages]
            template = self.template or self.chat_template
            assert template is not None
            markers = template.markers
            written = "\0".join(sample.text for sample in rendered.samples)
            reasoning_texts = [message.get("reasoning_content", "") for message in messages]
            reasoning_texts += [
                reasoning
                for m in messages
                if m["role"] == "assistant"
                for reasoning in _THINK_BLOCK.findall(m["content"])
            ]
            if any(reasoning.strip() not in written for reasoning in reasoning_texts):
                issues.append(LOST_REASONING)
            if any(m["role"] == "system" and m["content"].strip() not in written for m in messages):
                issues.append(LOST_SYSTEM)
            if record.get("tools") and "tools" in template.ignored_features(record["tools"]):
                issues.append(LOST_TOOLS)
            if len(rendered.samples) > 1:
                issues.append(SEVERAL_SAMPLES)
        if any(marker in content for content in contents for marker in markers):
            issues.append(REPEATED_MARKER)
        if any("{{" in content and PLACEHOLDERS.search(content) for content in contents):
            issues.append(PLACEHOLDER)
        if any(self._has_unescapable_token(content) for content in contents):
            issues.append(UNESCAPABLE_TOKEN)
        return issues

    def _has_unescapable_token(self, content: str) -> bool:
        spelt = set(self.tokenizer.special_pattern.findall(content))
        return bool(spelt) and not spelt.isdisjoint(self.tokenizer.unescapable_tokens)

    def tokenize(self, rendered: list[RenderedRecord]) -> list[np.ndarray]:
        """The marked tokens of each record, see fm9g.data.encode.token_array; none for a record that has nothing to
        train on."""
        plain = [p for p in rendered if isinstance(p, RenderedPair) and p.output and p.weight and p.literal is None]
        ids = iter(self.tokenizer.encode_batch([text for pair in plain for text in (pair.input, pair.output) if text]))
        tokens = []
        for item in rendered:
            if isinstance(item, RenderedChat):
                samples = (self._chat_tokens(*sample) for sample in zip(item.samples, item.literal))
                tokens.append(join_samples([sample for sample in samples if len(sample)]))
            elif not item.output or not item.weight:
                tokens.append(np.empty(0, np.int32))
            elif item.literal is None:
                tokens.append(self._pair_tokens(next(ids) if item.input else (), next(ids), item.weight))
            else:
                parts = zip((item.input, item.output), item.literal)
                prompt_ids, completion_ids = (
                    self.tokenizer.encode_chat(text, (), literal)[0] for text, literal in parts
                )
                tokens.append(self._pair_tokens(prompt_ids, completion_ids, item.weight))
        return tokens

    def _pair_tokens(self, prompt_ids: Any, completion_ids: Any, weight: float) -> np.ndarray:
        """What begins a text + input + output + what ends it; input and output are encoded apart."""
        before, after = self.tokenizer.prefix_ids, self.tokenizer.suffix_ids
        border = len(before) + len(prompt_ids)
        tokens = np.empty(border + len(completion_ids) + len(after), np.int32)
        tokens[: len(before)], tokens[len(before) : border] = before, prompt_ids
        tokens[border : len(tokens) - len(after)], tokens[len(tokens) - len(after) :] = completion_ids, after
        # Plain text is trained on as a whole; nothing comes before its first token to learn it from.
        masked = 0 if self.loss == "all" else border if len(prompt_ids) else min(1, border)
        if weight != 1:
            return make_token_array(tokens, np.where(np.arange(len(tokens)) < masked, 0.0, weight))
        np.invert(tokens[:masked], out=tokens[:masked])
        return tokens

    def _chat_tokens(self, chat: RenderedSample, literal: list[Span]) -> np.ndarray:
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
        if not self.tokenizer.is_control_token(ids[-1]):
            ids = [*ids, self.tokenizer.eos_id]
            weights[-1] = weights[-2]
        return make_token_array(np.array(ids), weights[: len(ids)])

    def _end_of_turn(self, ids: list[int], starts: list[int], text: str, end: int) -> int:
        """The end of a turn of ids[:end]; where it has no end marker, with the token that begins the next turn."""
        is_control_token = self.tokenizer.is_control_token
        if not 0 < end < len(ids) or is_control_token(ids[end - 1]):
            return end
        following = next((i for i in range(end, len(ids)) if is_control_token(ids[i])), len(ids))
        if following == len(ids) or text[starts[end] : starts[following]].strip():
            return end
        if self.tokenizer.bos_token and ids[following] == self.tokenizer.bos_id:
            return end
        return following + 1


def _escape_message(message: dict[str, Any], pattern: re.Pattern[str], is_raw: bool) -> dict[str, Any]:
    """A protected message; the marks are counted as part of the weighted parts that they stand in."""
    parts = message.get("content_weights")
    escapes = [match.start() + 1 for match in pattern.finditer(message["content"])] if parts else []
    message = escape_special_tokens(message, pattern, is_raw)
    if not parts or not escapes:
        return message
    ends = list(accumulate(length for length, _ in parts))
    ends = [end + bisect_right(escapes, end) for end in ends]
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
class EncodedRecord:
    """The samples of one record, each an array of marked tokens, or why it has none."""

    segments: list[np.ndarray]
    skipped: str = ""


def split_or_truncate(tokens: np.ndarray, max_length: int, oversize_rule: str, row_length: int) -> EncodedRecord:
    """The samples, of at most max_length ids each, that the marked tokens of a record give.

    oversize_rule: `drop` discards a long sample, `head` keeps its first max_length tokens, `segment` cuts plain text
    (nothing is only read) into consecutive pieces and treats other records as `head`, `whole` keeps a sample of up to
    `row_length` tokens, a row, in one piece and discards a longer one.
    """
    samples = split_samples(tokens)
    if len(samples) == 1:
        return _split_or_truncate_sample(tokens, max_length, oversize_rule, row_length)
    encoded_samples = [_split_or_truncate_sample(sample, max_length, oversize_rule, row_length) for sample in samples]
    segments = [segment for one in encoded_samples for segment in one.segments]
    return EncodedRecord(segments, "" if segments else encoded_samples[-1].skipped)


def _split_or_truncate_sample(
    tokens: np.ndarray, max_length: int, oversize_rule: str, row_length: int
) -> EncodedRecord:
    length = len(tokens) - 1
    if 0 < length < max_length - 2:  # the usual case, and no rule below applies to it
        return EncodedRecord([tokens])
    if length < 1:
        return EncodedRecord([], EMPTY)
    limit = row_length if oversize_rule == "whole" else max_length
    prompt_length = int(np.argmax(tokens[1:] >= 0))  # before the first token that is trained on
    if prompt_length >= limit - 2:
        return EncodedRecord([], LONG_INPUT)
    if length <= limit:
        return EncodedRecord([tokens])
    if oversize_rule in ("drop", "whole"):
        return EncodedRecord([], OVERSIZE)
    if oversize_rule == "segment" and prompt_length == 0:
        return EncodedRecord([tokens[i : i + max_length + 1] for i in range(0, length, max_length)])
    return EncodedRecord([tokens[: max_length + 1]])
