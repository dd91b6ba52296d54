"""The common interface of all tokenizers: text to token ids and back.

Text is text: the spelling of a special token inside a text (`</s>` in HTML) stays letters. Only a chat template, or a
transform script, writes special tokens.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fm9g.data.encode.escaping import Span


class Tokenizer(ABC):
    """Text to token ids and back.

    Args:
        prefix_ids, suffix_ids: tokens before and after a plain text, such as bos and eos; a suffix is required.
        special_ids: spelling of a special token -> its id.
        special_tokens: bos_token, eos_token, ... as a chat template sees them.
        chat_template: the tokenizer's own, or several by name.
        vocab_size: the largest token id + 1.
        files: what another program needs to open the same tokenizer, apart from new tokens.
        new_tokens: tokens that the user asked for in addition to the files'.
        new_ids: the ids of those that the files do not have, behind all others.
    """

    _has_exact_starts = False  # whether offsets include the spaces that are part of a token

    bos_id: int
    eos_id: int
    prefix_ids: list[int]
    suffix_ids: list[int]
    special_ids: dict[str, int]
    special_tokens: dict[str, Any]
    chat_template: str | dict[str, str] | None = None
    vocab_size: int
    files: list[Path]
    new_tokens: tuple[str, ...] = ()
    new_ids: range = range(0)

    @property
    def bos_token(self) -> str:
        """The token that begins a text; empty if the tokenizer has none."""
        return str(self.special_tokens.get("bos_token", ""))

    @property
    def eos_token(self) -> str:
        return str(self.special_tokens["eos_token"])

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text; no bos, no eos."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Token ids of each plain text."""
        return [self.encode(text) for text in texts]

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the spelling of a special token."""
        spellings = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings)) or "(?!)")  # (?!) matches nothing

    @cached_property
    def unescapable_tokens(self) -> frozenset[str]:
        """The special tokens that cannot be encoded as plain text."""
        return frozenset(text for text, token in self.special_ids.items() if token in self.encode(text))

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """The id of the token with this spelling; None if there is none."""

    def encode_chat(
        self, text: str, generation_starts: Sequence[int] = (), escaped: Sequence[Span] = ()
    ) -> tuple[list[int], list[int], list[int]]:
        """Encodes a rendered chat, in which special tokens stand for themselves.

        The ids before a border, where generation begins, are those of the text before it alone, because generation
        continues from these. If a token of the text lies across a border, the text is encoded anew on either side:

            text         assistant: | Yes          a border after "assistant: "
            in one go    [assistant][:][ Yes]      no prompt ends before " Yes"
            result       [assistant][:][ ][Yes]

        Args:
            generation_starts: the borders, as offsets in characters, in order.
            escaped: spans of spellings of special tokens that are plain text.

        Returns the ids, the character that each token starts at, and for each border the index of the token after it.
        """
        ids, starts = self._encode_chat(text, escaped)
        done: tuple[list[int], list[int]] = [], []  # ids and starts of text that is encoded for good
        indices: list[int] = []
        origin = 0  # offset in the text at which `ids` begin
        while len(indices) < len(generation_starts):
            border = generation_starts[len(indices)]
            index = bisect_left(starts, border)
            exact = self._has_exact_starts and index < len(starts) and starts[index] == border
            # A special token isolates the text on either side, so only the text since the last one can differ.
            special = next((i for i in range(index - 1, -1, -1) if ids[i] in self._control_ids), None)
            first, begin = (0, origin) if special is None else (special, starts[special])
            before = (
                self._encode_part(text, begin, border, escaped, special is None and origin > 0) if not exact else None
            )
            if before is None or before[0] == ids[first:index]:
                indices.append(len(done[0]) + index)
                continue
            done[0].extend(ids[:first] + before[0])
            done[1].extend(starts[:first] + [begin + start for start in before[1]])
            # Up to the next special token, the text is encoded from border to border.
            after = next((i for i in range(index, len(ids)) if ids[i] in self._control_ids), len(ids))
            end = starts[after] if after < len(ids) else len(text)
            indices.append(len(done[0]))
            while len(indices) < len(generation_starts) and generation_starts[len(indices)] <= end:
                part_ids, part_starts = self._encode_part(text, border, generation_starts[len(indices)], escaped, True)
                done[0].extend(part_ids)
                done[1].extend(border + start for start in part_starts)
                border = generation_starts[len(indices)]
                indices.append(len(done[0]))
            part_ids, part_starts = self._encode_part(text, border, end, escaped, True)
            ids, starts = part_ids + ids[after:], [border + start for start in part_starts] + starts[after:]
            origin = border
        return done[0] + ids, done[1] + starts, indices

    def _encode_part(
        self, text: str, start: int, end: int, escaped: Sequence[Span], continues: bool
    ) -> tuple[list[int], list[int]]:
        """The ids of text[start:end], and the character in it that each starts at. continues: text precedes it."""
        anchor, anchor_ids = self._anchor if continues else ("", [])
        part = anchor + text[start:end]
        shift = len(anchor) - start
        inside = [(a + shift, b + shift) for a, b in escaped if start <= a and b <= end]
        if not inside and len(part) <= 64:
            if len(self._part_cache) > 4096:
                self._part_cache.clear()
            if part not in self._part_cache:  # the same few parts stand before every answer
                self._part_cache[part] = self._encode_chat(part, ())
            ids, starts = self._part_cache[part]
        else:
            ids, starts = self._encode_chat(part, inside)
        if ids[: len(anchor_ids)] != anchor_ids:  # the anchor became part of a token with the text
            return self._encode_part(text, start, end, escaped, False)
        return ids[len(anchor_ids) :], [max(0, offset - len(anchor)) for offset in starts[len(anchor_ids) :]]

    @cached_property
    def _part_cache(self) -> dict[str, tuple[list[int], list[int]]]:
        return {}

    @cached_property
    def _anchor(self) -> tuple[str, list[int]]:
        """A text, and its ids, that keeps the encoder from adding its leading space to the text after it."""
        for anchor in ("", "\ue000", "\n"):
            ids, anchor_ids = self._encode_chat(f"{anchor}Yes", ())[0], self._encode_chat(anchor, ())[0]
            joined = self.decode([*self._encode_chat("x", ())[0], *ids[len(anchor_ids) :]])
            if ids[: len(anchor_ids)] == anchor_ids and joined.strip() == "xYes":
                return anchor, anchor_ids
        return "", []

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        unknown = self.special_ids.get(self.special_tokens.get("unk_token", ""))  # plain text gives it, too
        return frozenset(self.special_ids.values()) - {unknown}

    def _encode_chat(self, text: str, escaped: Sequence[Span]) -> tuple[list[int], list[int]]:
        """The token ids of a rendered chat, and the character that each token starts at."""
        ids: list[int] = []
        starts: list[int] = []
        position = 0
        for start, end in [*self._special_spans(text, escaped), (len(text), len(text))]:
            if position < start:
                text_ids, offsets = self._encode_with_starts(text[position:start])
                ids += text_ids
                starts += [position + offset for offset in offsets]
            if start < end:
                ids.append(self.special_ids[text[start:end]])
                starts.append(start)
            position = end
        return ids, starts

    def _special_spans(self, text: str, escaped: Sequence[Span]) -> list[Span]:
        """The spans of special tokens in a text, without the escaped ones."""
        starts = {start for start, _ in escaped}
        return [match.span() for match in self.special_pattern.finditer(text) if match.start() not in starts]

    @abstractmethod
    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """The token ids of a plain text, and the character that each starts at."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""

    def is_control_token(self, token: int) -> bool:
        """Whether a token is special, and no plain text gives it."""
        return token in self._control_ids

    def special_token(self, token: int) -> str:
        """The spelling of a token that stands for no text, such as bos and eos; empty for others."""
        return self._special_names.get(int(token), "")

    @cached_property
    def _special_names(self) -> dict[int, str]:
        return {token: text for text, token in self.special_ids.items()}


def as_id_list(value: int | list[int] | None) -> list[int]:
    """A configuration's token ids for one purpose, such as eos_token_id, which may be one, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]
