"""A 9G word list that is matched greedily, such as that of the 8b model."""

from __future__ import annotations

import json
from pathlib import Path

from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.errors import UserError

_LONGEST_WORD = 1024  # characters; the search at each character of a text tries all lengths up to the longest word
_SPECIAL_WORDS = ("<s>", "</s>", "<unk>", "<pad>")  # of a vocab.txt


class VocabTokenizer(Tokenizer):
    """A vocab.txt with one JSON string per line. The longest word from the left wins; other characters are <0xHH>."""

    _has_exact_starts = True

    def __init__(self, file: Path) -> None:
        self._words = []
        # Not splitlines(): some words contain characters that it treats as line ends.
        for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
            try:
                self._words.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {number}: not a JSON string: {error.msg}") from None
        self._ids = {word: number for number, word in enumerate(self._words)}
        missing = [word for word in ["<s>", "</s>", *map(_byte_word, range(256))] if word not in self._ids]
        if missing:
            raise UserError(f"{file}: not a 9G vocabulary: {missing[0]!r} is missing")
        # The spelling of a special word, or of <0xHH>, inside a text is plain text.
        bytes_and_specials = {*_SPECIAL_WORDS, *map(_byte_word, range(256))}
        if too_long := next((number for number, word in enumerate(self._words, 1) if len(word) > _LONGEST_WORD), 0):
            raise UserError(f"{file}, line {too_long}: a word of more than {_LONGEST_WORD} characters")
        self._longest: dict[str, int] = {}  # first character -> length of the longest word that starts with it
        self._text_ids = {word: i for word, i in self._ids.items() if word and word not in bytes_and_specials}
        for word in self._text_ids:
            self._longest[word[0]] = max(self._longest.get(word[0], 0), len(word))
        self.bos_id, self.eos_id = self._ids["<s>"], self._ids["</s>"]
        self.prefix_ids, self.suffix_ids = [self.bos_id], [self.eos_id]
        self.special_ids = {"<s>": self.bos_id, "</s>": self.eos_id}
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        self.vocab_size, self.files = len(self._words), [file]

    def encode(self, text: str) -> list[int]:
        return self._encode_with_starts(text)[0]

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        starts: list[int] = []
        start = 0
        while start < len(text):
            for length in range(min(self._longest.get(text[start], 0), len(text) - start), 0, -1):
                token = self._text_ids.get(text[start : start + length])
                if token is not None:
                    ids.append(token)
                    break
            else:
                length = 1
                ids += [self._ids[_byte_word(byte)] for byte in text[start].encode("utf-8", "surrogatepass")]
            starts += [start] * (len(ids) - len(starts))
            start += length
        return ids, starts

    def token_id(self, text: str) -> int | None:
        return self._ids.get(text)

    def decode(self, ids: list[int]) -> str:
        out = bytearray()
        for i in ids:
            word = self._words[i]
            is_byte = len(word) == 6 and word.startswith("<0x") and word.endswith(">")
            out += bytes([int(word[3:5], 16)]) if is_byte else word.encode()
        return out.decode("utf-8", "replace")

    def special_token(self, token: int) -> str:
        word = self._words[token]
        return word if word in _SPECIAL_WORDS else ""


def _byte_word(byte: int) -> str:
    return f"<0x{byte:02X}>"
