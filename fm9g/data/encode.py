"""From records to training samples: token ids, which of them are learnt, and what becomes of long records.

Tokens travel as one array of int32: a token that is learnt is its id, one that is only read is the id's complement
(~id, below 0). A sample of n + 1 tokens has the first n as its ids and the last n as their targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fm9g.data.shapes import BadRecord, canonical
from fm9g.data.template import Rendered, Template
from fm9g.data.tokenizer import Tokenizer
from fm9g.errors import UserError

IGNORED = -100  # a target that counts for no loss
EMPTY, LONG_INPUT, OVERSIZE = "no output", "input longer than max_length", "longer than max_length"

Texts = tuple[str, str]  # what is read, and what is learnt


@dataclass(frozen=True)
class Encoder:
    """How records become tokens. loss: assistant, last or all (fm9g.data.template)."""

    tokenizer: Tokenizer
    template: Template | None = None
    loss: str = "assistant"

    def texts(self, record: dict[str, Any], with_contents: bool = False) -> Texts | Rendered:
        """What is to be encoded of a record. with_contents: as in Template.render_spans. Raises BadRecord."""
        record = canonical(record)[1]
        if "chosen" in record or "label" in record:
            raise BadRecord("a preference, which supervised training does not use; a transform can choose an answer")
        if "messages" in record:
            messages = record["messages"]
        elif self.template is None or not record.get("input"):
            return record.get("input", ""), record["output"]
        elif not record["output"]:
            return "", ""
        else:
            contents = (("user", record["input"]), ("assistant", record["output"]))
            messages = [{"role": role, "content": content} for role, content in contents]
        if self.template is None:
            raise BadRecord("a conversation needs a template; give --template, chatml for example")
        try:
            return self.template.render_spans(messages, record.get("tools"), self.loss, with_contents)
        except UserError as error:
            raise BadRecord(str(error)) from None

    def tokens(self, texts: list[Texts | Rendered]) -> list[np.ndarray]:
        """The marked tokens of each record; none for a record that has nothing to learn."""
        plain = [pair for pair in texts if isinstance(pair, tuple) and pair[1]]
        ids = iter(self.tokenizer.encode_batch([text for pair in plain for text in pair if text]))
        tokens = []
        for item in texts:
            if isinstance(item, Rendered):
                tokens.append(self._chat_tokens(item))
            elif item[1]:
                tokens.append(self._pair_tokens(next(ids) if item[0] else (), next(ids)))
            else:
                tokens.append(np.empty(0, np.int32))
        return tokens

    def _pair_tokens(self, read: Any, learnt: Any) -> np.ndarray:
        """[bos] + input + output + [eos]; encoded apart, so that the border of input and output is a token border."""
        border = 1 + len(read)
        tokens = np.empty(border + len(learnt) + 1, np.int32)
        tokens[0], tokens[1:border] = self.tokenizer.bos_id, read
        if self.loss != "all":
            np.invert(tokens[:border], out=tokens[:border])
        tokens[border:-1], tokens[-1] = learnt, self.tokenizer.eos_id
        return tokens

    def _chat_tokens(self, chat: Rendered) -> np.ndarray:
        """The template's own tokens, in one encoding, up to the end of the last turn; eos where that is not there."""
        text = chat.text.rstrip()
        ids, starts = self.tokenizer.encode_chat(text)
        borders = np.array(chat.targets).ravel()
        learnt = np.searchsorted(borders, starts, side="right") % 2 == 1
        if not learnt[1:].any():  # nothing comes before the first token to learn it from
            return np.empty(0, np.int32)
        if ids[-1] != self.tokenizer.eos_id:
            ids, learnt = [*ids, self.tokenizer.eos_id], np.append(learnt, learnt[-1])
        tokens = np.array(ids, np.int32)
        return np.where(learnt, tokens, ~tokens)


@dataclass(frozen=True)
class Encoded:
    """The samples of one record, each an array of marked tokens, or why it has none."""

    pieces: list[np.ndarray]
    skipped: str = ""


def cut(tokens: np.ndarray, max_length: int, oversize_rule: str, capacity: int) -> Encoded:
    """The samples, of at most max_length ids each, that the marked tokens of a record give.

    oversize_rule: `drop` discards a long record, `head` keeps its first max_length tokens, `segment` cuts plain text
    (nothing is only read) into consecutive pieces and treats other records as `head`, `whole` keeps a record of up to
    `capacity` tokens, a row, in one piece and discards a longer one.
    """
    length = len(tokens) - 1
    if 0 < length < max_length - 2:  # the usual case, and no rule below applies to it
        return Encoded([tokens])
    if length < 1:
        return Encoded([], EMPTY)
    limit = capacity if oversize_rule == "whole" else max_length
    read = int(np.argmax(tokens[1:] >= 0))  # before the first token that is learnt
    if read >= limit - 2:
        return Encoded([], LONG_INPUT)
    if length <= limit:
        return Encoded([tokens])
    if oversize_rule in ("drop", "whole"):
        return Encoded([], OVERSIZE)
    if oversize_rule == "segment" and read == 0:
        return Encoded([tokens[i : i + max_length + 1] for i in range(0, length, max_length)])
    return Encoded([tokens[: max_length + 1]])
