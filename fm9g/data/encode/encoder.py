"""From records to token arrays: the ids of a record's text, and which of them are trained on."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from fm9g.data.encode.conversation import RenderedSample, render_samples
from fm9g.data.encode.escaping import Span, Unescaped, escape_special_tokens
from fm9g.data.encode.template import Template
from fm9g.data.encode.token_array import join_samples, make_token_array
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.prepare.values import BadRecord
from fm9g.errors import UserError


@dataclass(frozen=True)
class RenderedPair:
    """A pair without a template.

    Args:
        input: text that is not trained on.
        output: text that is trained on.
        weight: of the output's tokens in the loss.
        escaped: for input and output, the spans that spell a special token and are plain text; None if all such
            spellings are plain text.
    """

    input: str
    output: str
    weight: float = 1.0
    escaped: tuple[list[Span], list[Span]] | None = None


@dataclass(frozen=True)
class RenderedChat:
    """A record under a template: its samples, and the spans of each that spell a special token and are plain text."""

    samples: list[RenderedSample]
    escaped: list[list[Span]]


RenderedRecord = RenderedPair | RenderedChat


@dataclass(frozen=True)
class Encoder:
    """Renders and tokenizes the canonical records of one dataset (see fm9g.data.prepare.record_formats).

    Args:
        template: of pairs and conversations; None leaves pairs as they are.
        chat_template: of conversations only, if `template` is None.
        system: the system message of conversations and pairs that have none; empty: none. It needs `template`.
        loss, turns: see fm9g.data.encode.conversation.
    """

    tokenizer: Tokenizer
    template: Template | None = None
    loss: str = "assistant"
    turns: str = "auto"
    chat_template: Template | None = None
    system: str = ""

    def render(
        self, record: dict[str, Any], is_transformed: bool = False, with_content_spans: bool = False
    ) -> RenderedRecord:
        """The text of a record.

        Args:
            is_transformed: a transform returned the record, with special tokens escaped that came from the data (see
                fm9g.data.encode.escaping). Those that it wrote itself around the texts of a pair become tokens.
            with_content_spans: for a chat, also the spans of the messages' contents.

        Raises BadRecord.
        """
        if "chosen" in record or "label" in record:
            raise BadRecord(
                "a preference or a KTO label, for which there is no training here; for supervised training a transform "
                "can choose an answer"
            )
        if "messages" in record:
            return self._render_chat(record["messages"], record.get("tools"), is_transformed, with_content_spans)
        prompt, completion = record.get("input", ""), record["output"]
        if self.template and prompt and completion:
            answer = {"role": "assistant", "content": completion}
            if "weight" in record:
                answer["weight"] = record["weight"]
            messages = [{"role": "user", "content": prompt}, answer]
            return self._render_chat(messages, None, is_transformed, with_content_spans)
        weight = float(record.get("weight", 1))
        if not is_transformed:
            return RenderedPair(prompt, completion, weight)
        pattern = self.tokenizer.special_pattern
        texts = Unescaped(prompt, pattern), Unescaped(completion, pattern)
        if all(len(pattern.findall(part.text)) == len(part.escaped) for part in texts):
            return RenderedPair(texts[0].text, texts[1].text, weight)  # the transform wrote no special token
        return RenderedPair(texts[0].text, texts[1].text, weight, (texts[0].escaped, texts[1].escaped))

    def _render_chat(
        self, messages: list[dict[str, Any]], tools: Any, is_transformed: bool, with_content_spans: bool
    ) -> RenderedChat:
        template = self.template or self.chat_template
        if template is None:
            raise BadRecord("a conversation needs a template; give --chat_template, chatml for example")
        if self.system and not any(message["role"] == "system" for message in messages[:1]):
            messages = [{"role": "system", "content": self.system}, *messages]
        _require_features(template, messages, tools)
        pattern = self.tokenizer.special_pattern
        escaped_messages = [_escape_message(message, pattern, not is_transformed) for message in messages]
        escaped_tools = escape_special_tokens(tools, pattern, not is_transformed)
        try:
            rendered = render_samples(
                template, escaped_messages, escaped_tools, self.loss, self.turns, with_content_spans
            )
        except UserError as error:
            raise BadRecord(str(error)) from None
        texts = [Unescaped(sample.text, pattern) for sample in rendered]
        samples = [
            replace(
                sample,
                text=text.text,
                targets=text.map_spans(sample.targets),
                starts=[text.map_offset(start) for start in sample.starts],
                content_spans=text.map_spans(sample.content_spans),
            )
            for sample, text in zip(rendered, texts)
        ]
        return RenderedChat(samples, [text.escaped for text in texts])

    def tokenize(self, rendered: list[RenderedRecord]) -> list[np.ndarray]:
        """The token array of each record (see fm9g.data.encode.token_array); empty if nothing of it is trained on."""
        # Texts without special tokens go to the tokenizer in one batch, which is several times faster.
        plain = [p for p in rendered if isinstance(p, RenderedPair) and p.output and p.weight and p.escaped is None]
        ids = iter(self.tokenizer.encode_batch([text for pair in plain for text in (pair.input, pair.output) if text]))
        tokens = []
        for item in rendered:
            if isinstance(item, RenderedChat):
                samples = (self._chat_tokens(*sample) for sample in zip(item.samples, item.escaped))
                tokens.append(join_samples([sample for sample in samples if len(sample)]))
            elif not item.output or not item.weight:
                tokens.append(np.empty(0, np.int32))
            elif item.escaped is None:
                tokens.append(self._pair_tokens(next(ids) if item.input else (), next(ids), item.weight))
            else:
                parts = zip((item.input, item.output), item.escaped)
                prompt_ids, completion_ids = (self.tokenizer.encode_chat(text, (), spans)[0] for text, spans in parts)
                tokens.append(self._pair_tokens(prompt_ids, completion_ids, item.weight))
        return tokens

    def _pair_tokens(self, prompt_ids: Any, completion_ids: Any, weight: float) -> np.ndarray:
        """prefix + input + output + suffix of a text; input and output are tokenized apart."""
        before, after = self.tokenizer.prefix_ids, self.tokenizer.suffix_ids
        border = len(before) + len(prompt_ids)
        tokens = np.empty(border + len(completion_ids) + len(after), np.int32)
        tokens[: len(before)], tokens[len(before) : border] = before, prompt_ids
        tokens[border : len(tokens) - len(after)], tokens[len(tokens) - len(after) :] = completion_ids, after
        # Plain text is trained on from its second token: nothing comes before its first to predict it from.
        masked = 0 if self.loss == "all" else border if len(prompt_ids) else min(1, border)
        if weight != 1:
            return make_token_array(tokens, np.where(np.arange(len(tokens)) < masked, 0.0, weight))
        np.invert(tokens[:masked], out=tokens[:masked])
        return tokens

    def _chat_tokens(self, chat: RenderedSample, escaped: list[Span]) -> np.ndarray:
        """The tokens of a chat up to the end of its last turn, and eos if that does not end with a special token."""
        text = chat.text[: max([len(chat.text.rstrip()), *chat.ends])]
        ids, starts, indices = self.tokenizer.encode_chat(text, chat.starts, escaped)
        first = dict(zip(chat.starts, indices))
        weights = np.zeros(len(ids) + 1, np.float32)
        for (start, stop), weight in zip(chat.targets, chat.weights):
            end = bisect_left(starts, stop)
            if stop in chat.ends:
                end = self._end_of_turn(ids, starts, text, end)
            weights[first.get(start, bisect_left(starts, start)) : end] = weight
        if not weights[1:].any():  # nothing comes before the first token to predict it from
            return np.empty(0, np.int32)
        if not self.tokenizer.is_control_token(ids[-1]):
            ids = [*ids, self.tokenizer.eos_id]
            weights[-1] = weights[-2]
        return make_token_array(np.array(ids), weights[: len(ids)])

    def _end_of_turn(self, ids: list[int], starts: list[int], text: str, end: int) -> int:
        """The end of the turn ids[:end]. Without an end marker, it includes the token that begins the next turn."""
        is_control_token = self.tokenizer.is_control_token
        if not 0 < end < len(ids) or is_control_token(ids[end - 1]):
            return end
        following = next((i for i in range(end, len(ids)) if is_control_token(ids[i])), len(ids))
        if following == len(ids) or text[starts[end] : starts[following]].strip():
            return end
        if self.tokenizer.bos_token and ids[following] == self.tokenizer.bos_id:
            return end
        return following + 1


def _require_features(template: Template, messages: list[dict[str, Any]], tools: Any) -> None:
    """Raises BadRecord if the template would silently leave out calls, tools or results of a conversation."""
    ignored = template.ignored_features(tools)
    problem = ""
    if "calls" in ignored and any(message.get("tool_calls") for message in messages):
        problem = "calls tools"
    elif tools and "tools" in ignored and "calls" in ignored:
        problem = "has tools"
    elif "results" in ignored and any(message["role"] == "tool" for message in messages):
        problem = "has results of tools"
    if problem:
        raise BadRecord(f"it {problem}, for which the template {template.name} has no form; chatml has")


def _escape_message(message: dict[str, Any], pattern: re.Pattern[str], is_raw: bool) -> dict[str, Any]:
    """A message with its special tokens escaped; the lengths of its weighted parts count the escapes inside."""
    parts = message.get("content_weights")
    escapes = [match.start() + 1 for match in pattern.finditer(message["content"])] if parts else []
    message = escape_special_tokens(message, pattern, is_raw)
    if not parts or not escapes:
        return message
    ends = list(accumulate(length for length, _ in parts))
    ends = [end + bisect_right(escapes, end) for end in ends]
    lengths = [end - start for start, end in zip([0, *ends], ends)]
    return message | {"content_weights": [[length, weight] for length, (_, weight) in zip(lengths, parts)]}
