"""Tokenizers, each kind behind one small class: text to token ids, as the tokenizer's owner meant it.

A bare SentencePiece model (2b), a word list that is matched greedily (8b), and every folder that transformers opens
(4b, 7b, 70b, other families, and what `fm9g data tokenizer` trains).

Text is text: the spelling of a special token inside a text (`</s>` in HTML) stays letters. Only a chat template, or a
transform script, writes special tokens.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from fm9g.data.encode.escaping import Span
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir
from fm9g.io.inputs import register_input
from fm9g.io.path_kind import TOKENIZER, check_kind
from fm9g.io.regular_file import check_regular

CHAT_TEMPLATE = "chat_template.jinja"  # the file that transformers looks for beside a tokenizer
CHAT_TEMPLATES = "additional_chat_templates"  # the folder of further templates, NAME.jinja
TOKENIZER_CONFIG = "tokenizer_config.json"
_MAX_FILE_BYTES = 512 << 20  # bytes of a file; the largest published ones have some 35 MB
# The files that transformers and the families' own code read a tokenizer from.
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    CHAT_TEMPLATE,
    f"{CHAT_TEMPLATES}/*.jinja",
)


class Tokenizer(ABC):
    """Text to token ids and back.

    prefix_ids, suffix_ids: what the tokenizer puts around a plain text; a text always ends with a token.
    special_ids: the special tokens by their spelling. special_tokens: bos_token, eos_token, ... as a chat template sees
    them. chat_template: the tokenizer's own, or several by name. vocab_size: the largest token id + 1. files: what has
    to be copied for another program to have the same tokenizer.
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

    @property
    def bos_token(self) -> str:
        """The token that begins a text; empty where the tokenizer has none."""
        return self.special_tokens.get("bos_token", "")

    @property
    def eos_token(self) -> str:
        return self.special_tokens["eos_token"]

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
        """The id of the token that is spelled so; None where there is none."""

    def encode_chat(
        self, text: str, generation_starts: Sequence[int] = (), literal: Sequence[Span] = ()
    ) -> tuple[list[int], list[int], list[int]]:
        """Token ids of a rendered chat, in which special tokens stand for themselves.

        generation_starts: places in the text, in order, at which generation begins. The ids before a border are those
        of the text before it, as generation meets it, even where the whole text has a token across the border. literal:
        spans of the spellings of special tokens that are text. Returns the ids, the character that each token starts
        at, and for each border the index of the token after it.
        """
        ids, starts = self._encode_chat(text, literal)
        done: tuple[list[int], list[int]] = [], []
        indices: list[int] = []
        origin = 0  # in the text, of `ids`
        while len(indices) < len(generation_starts):
            border = generation_starts[len(indices)]
            index = bisect_left(starts, border)
            exact = self._has_exact_starts and index < len(starts) and starts[index] == border
            # Special tokens isolate the text on either side, so that the piece after the last one is enough to look at.
            special = next((i for i in range(index - 1, -1, -1) if ids[i] in self._control_ids), None)
            kept, begin = (0, origin) if special is None else (special, starts[special])
            before = (
                self._encode_part(text, begin, border, literal, special is None and origin > 0) if not exact else None
            )
            if before is None or before[0] == ids[kept:index]:
                indices.append(len(done[0]) + index)
                continue
            done[0].extend(ids[:kept] + before[0])
            done[1].extend(starts[:kept] + [begin + start for start in before[1]])
            # Up to the next special token, the text is encoded from border to border.
            after = next((i for i in range(index, len(ids)) if ids[i] in self._control_ids), len(ids))
            end = starts[after] if after < len(ids) else len(text)
            indices.append(len(done[0]))
            while len(indices) < len(generation_starts) and generation_starts[len(indices)] <= end:
                more, at = self._encode_part(text, border, generation_starts[len(indices)], literal, True)
                done[0].extend(more)
                done[1].extend(border + start for start in at)
                border = generation_starts[len(indices)]
                indices.append(len(done[0]))
            more, at = self._encode_part(text, border, end, literal, True)
            ids, starts = more + ids[after:], [border + start for start in at] + starts[after:]
            origin = border
        return done[0] + ids, done[1] + starts, indices

    def _encode_part(
        self, text: str, start: int, end: int, literal: Sequence[Span], continues: bool
    ) -> tuple[list[int], list[int]]:
        """Ids of a piece of a chat, and the characters that they start at in it. continues: other text is before it."""
        anchor, first = self._anchor if continues else ("", [])
        piece = anchor + text[start:end]
        move = len(anchor) - start
        inside = [(a + move, b + move) for a, b in literal if start <= a and b <= end]
        if not inside and len(piece) <= 64:
            if len(self._part_cache) > 4096:
                self._part_cache.clear()
            if piece not in self._part_cache:  # the same few pieces stand before every answer
                self._part_cache[piece] = self._encode_chat(piece, ())
            ids, starts = self._part_cache[piece]
        else:
            ids, starts = self._encode_chat(piece, inside)
        if ids[: len(first)] != first:  # the anchor went into a token with the text
            return self._encode_part(text, start, end, literal, False)
        return ids[len(first) :], [max(0, offset - len(anchor)) for offset in starts[len(first) :]]

    @cached_property
    def _part_cache(self) -> dict[str, tuple[list[int], list[int]]]:
        return {}

    @cached_property
    def _anchor(self) -> tuple[str, list[int]]:
        """What goes before a text to keep an encoder from adding the space that begins a text, and its ids."""
        for anchor in ("", "\ue000", "\n"):
            ids, first = self._encode_chat(f"{anchor}Yes", ())[0], self._encode_chat(anchor, ())[0]
            whole = self.decode([*self._encode_chat("x", ())[0], *ids[len(first) :]])
            if ids[: len(first)] == first and whole.strip() == "xYes":
                return anchor, first
        return "", []

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        unknown = self.special_ids.get(self.special_tokens.get("unk_token", ""))  # text gives it, too
        return frozenset(self.special_ids.values()) - {unknown}

    def _encode_chat(self, text: str, literal: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Token ids of a rendered chat, and the character that each token starts at."""
        ids: list[int] = []
        starts: list[int] = []
        position = 0
        for start, end in [*self._special_spans(text, literal), (len(text), len(text))]:
            if position < start:
                some, offsets = self._encode_with_starts(text[position:start])
                ids += some
                starts += [position + offset for offset in offsets]
            if start < end:
                ids.append(self.special_ids[text[start:end]])
                starts.append(start)
            position = end
        return ids, starts

    def _special_spans(self, text: str, literal: Sequence[Span]) -> list[Span]:
        """Where special tokens stand in a text, without the spellings that are text."""
        starts = {start for start, _ in literal}
        return [match.span() for match in self.special_pattern.finditer(text) if match.start() not in starts]

    @abstractmethod
    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a plain text, and the character that each starts at."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""

    def is_control_token(self, token: int) -> bool:
        """Whether a token is special, and never made of text."""
        return token in self._control_ids

    def special_token(self, token: int) -> str:
        """The name of a token that stands for no text, such as bos and eos; empty for others."""
        return self._special_names.get(int(token), "")

    @cached_property
    def _special_names(self) -> dict[int, str]:
        return {token: text for text, token in self.special_ids.items()}


class SentencePieceTokenizer(Tokenizer):
    """A bare SentencePiece .model file."""

    _has_exact_starts = True

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{file}: has no eos token; samples have to end with a token")
        has_bos = self._model.bos_id() >= 0
        self.bos_id = self._model.bos_id() if has_bos else self.eos_id
        self.prefix_ids, self.suffix_ids = [self.bos_id] if has_bos else [], [self.eos_id]
        self.special_tokens = {"eos_token": self._model.id_to_piece(self.eos_id)}
        if has_bos:
            self.special_tokens["bos_token"] = self._model.id_to_piece(self.bos_id)
        self.special_ids = {text: self._model.piece_to_id(text) for text in self.special_tokens.values()}
        self.vocab_size, self.files = self._model.get_piece_size(), [file]
        self.adds_prefix_space: bool = self._model.encode("a", out_type=str)[0].startswith("\u2581")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        return self._model.encode(texts, return_type="numpy")

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        found = self._model.encode(text, return_type="offset_mapping")
        return found["ids"], [start for start, _ in found["offsets"]]

    def token_id(self, text: str) -> int | None:
        token = self._model.piece_to_id(text)
        return None if token == self._model.unk_id() else token

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def special_token(self, token: int) -> str:
        token = int(token)
        return self._model.id_to_piece(token) if self._model.is_control(token) or self._model.is_unknown(token) else ""


_LONGEST_WORD = 1024  # characters; each of a text is looked up with all lengths up to the longest
_SPECIAL_WORDS = ("<s>", "</s>", "<unk>", "<pad>")  # of a vocab.txt


class VocabTokenizer(Tokenizer):
    """A vocab.txt, one JSON string a line: the longest word from the left, other characters as bytes <0xHH>."""

    _has_exact_starts = True

    def __init__(self, file: Path) -> None:
        self._words = []
        # Not splitlines(): some words hold characters that it takes for line ends.
        for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
            try:
                self._words.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, line {number}: not a JSON string: {error.msg}") from None
        self._ids = {word: number for number, word in enumerate(self._words)}
        missing = [word for word in ["<s>", "</s>", *map(_byte_word, range(256))] if word not in self._ids]
        if missing:
            raise UserError(f"{file}: not a 9G vocabulary: {missing[0]!r} is missing")
        # Special words and <0xHH> stand for themselves only as ids, never for the same letters in a text.
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
                found = self._text_ids.get(text[start : start + length])
                if found is not None:
                    ids.append(found)
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


def as_id_list(value: int | list[int] | None) -> list[int]:
    """The token ids that a configuration names for one purpose (eos_token_id): one, several, or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder."""
    return [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file or folder: a 9G vocab.txt, a bare SentencePiece .model, or what transformers opens.

    No code that lies in the folder is run. Raises UserError where there is no tokenizer, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such tokenizer; set tokenizer_path to a file or to a folder that holds one")
    folder = path if path.is_dir() else path.parent
    if path != folder:
        check_regular(path)
    for file in (file for pattern in (*TOKENIZER_FILES, "config.json") for file in folder.glob(pattern)):
        if not file.is_dir():
            check_regular(file, _MAX_FILE_BYTES)
    for file in (path, *tokenizer_files(folder)) if path.is_file() else tokenizer_files(folder):
        register_input(file)
    if path.is_dir() and not tokenizer_files(path):
        check_kind(path, TOKENIZER)
        expected = ", ".join(name for name in TOKENIZER_FILES if name.startswith(("tokenizer.", "vocab")))
        raise UserError(f"{path}: no tokenizer here; expected one of {expected}")
    try:
        if bare_file := _bare_file(path):
            tokenizer: Tokenizer = (
                VocabTokenizer(bare_file) if bare_file.suffix == ".txt" else SentencePieceTokenizer(bare_file)
            )
            if (template := folder / CHAT_TEMPLATE).is_file():
                tokenizer.chat_template = template.read_text(encoding="utf-8-sig")
                tokenizer.files.append(template)
            return tokenizer
        from fm9g.data.encode.transformers_tokenizer import open_with_transformers

        return open_with_transformers(folder)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the tokenizer libraries raise bare Exception
        raise UserError(f"{path}: not a tokenizer that can be read: {error}") from None


def _bare_file(path: Path) -> Path | None:
    """The SentencePiece model or 9G vocabulary that is a tokenizer by itself; None where transformers knows more."""
    if path.is_file() and path.name not in ("tokenizer.model", "vocab.txt"):
        return path if path.suffix in (".model", ".txt") else None
    folder = path if path.is_dir() else path.parent
    if (folder / "tokenizer.json").is_file():
        return None
    vocabulary, model = folder / "vocab.txt", folder / "tokenizer.model"
    if vocabulary.is_file():
        with vocabulary.open("rb") as file:
            if file.read(1) == b'"' or not (folder / TOKENIZER_CONFIG).is_file():
                return vocabulary
    described = (TOKENIZER_CONFIG, "added_tokens.json", "special_tokens_map.json")
    return model if model.is_file() and not any((folder / name).is_file() for name in described) else None


# Letters, marks, blanks or digits in a row are one word to the trainer, whose time grows with the square of its length.
_LONG_RUN = re.compile(r"[^\W\d_]{4096}|(?:[^\w\s]|_){4096}|\s{4096}|\d{4096}")


def _split_long_runs(text: str) -> Iterator[str]:
    """A text, cut where a word of it is endless."""
    start = 0
    for match in _LONG_RUN.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text) or not text:
        yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path, overwrite: bool = False) -> int:
    """Trains a byte-level BPE tokenizer (bos <s>, eos </s>) and writes it as a Hugging Face folder.

    Returns how many tokens it has: vocab_size, or fewer where the texts do not give so many. Raises UserError where
    vocab_size does not hold the bytes, there is no text, or the output folder holds something (unless overwrite).
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    min_size = 2 + 256
    if not min_size <= vocab_size < 2**31:
        raise UserError(f"vocab_size: found {vocab_size}, expected at least {min_size}: <s>, </s> and the 256 bytes")
    first = next(texts := (piece for text in texts for piece in _split_long_runs(text)), None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on")
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(chain([first], texts), trainer)
    # Other programs ask for special tokens: what they generate from starts with <s>, as in training.
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", model.token_to_id("<s>"))]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    with atomic_dir(output, overwrite) as folder:
        model.save(str(folder / "tokenizer.json"))
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return model.get_vocab_size()
