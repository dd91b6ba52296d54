"""The three kinds of tokenizer that 9G models come with, behind one small class each.

A SentencePiece model (2b), a word list that is matched greedily (8b), and a Hugging Face tokenizer.json (4b, 7b,
70b and whatever `fm9g data tokenizer` trains).
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.files import new_folder

CHAT_TEMPLATE = "chat_template.jinja"  # the file that transformers looks for beside a tokenizer


class Tokenizer(ABC):
    """Text to token ids and back, without special tokens.

    bos_token, eos_token: as a chat template spells them; empty where there is none. chat_template: the tokenizer's own.
    files: what has to be copied for another program to have the same tokenizer.
    """

    bos_id: int
    eos_id: int
    bos_token: str = "<s>"
    eos_token: str = "</s>"
    chat_template: str | None = None
    vocab_size: int
    files: list[Path]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no bos, no eos."""

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        """Token ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_chat(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a rendered chat, in which bos_token and eos_token stand for themselves, and the character
        that each token starts at."""
        ids: list[int] = []
        starts: list[int] = []
        place = 0
        for part in re.split(f"({re.escape(self.bos_token)}|{re.escape(self.eos_token)})", text):
            if part in (self.bos_token, self.eos_token):
                ids.append(self.bos_id if part == self.bos_token else self.eos_id)
                starts.append(place)
            elif part:
                some, offsets = self._encode_with_starts(part)
                ids += some
                starts += [place + offset for offset in offsets]
            place += len(part)
        return ids, starts

    @abstractmethod
    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of the text and the character that each starts at."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""

    def special(self, token: int) -> str:
        """The name of a token that stands for no text, such as bos and eos; empty for others."""
        return {self.bos_id: self.bos_token, self.eos_id: self.eos_token}.get(token, "")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model file."""

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        self.bos_token, self.eos_token = (self._model.id_to_piece(i) for i in (self.bos_id, self.eos_id))
        self.vocab_size, self.files = self._model.get_piece_size(), [file]
        self.adds_prefix_space: bool = self._model.encode("a", out_type=str)[0].startswith("\u2581")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        return self._model.encode(texts, return_type="numpy")

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        found = self._model.encode(text, return_type="offset_mapping")
        return found["ids"], [start for start, _ in found["offsets"]]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def special(self, token: int) -> str:
        token = int(token)
        return self._model.id_to_piece(token) if self._model.is_control(token) or self._model.is_unknown(token) else ""


_SPECIAL_WORDS = ("<s>", "</s>", "<unk>", "<pad>")  # of a vocab.txt


class VocabTokenizer(Tokenizer):
    """A vocab.txt, one JSON string a line: the longest word from the left, other characters as bytes <0xHH>."""

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
        self._longest: dict[str, int] = {}  # first character -> length of the longest word that starts with it
        self._text_ids = {word: i for word, i in self._ids.items() if word and word not in bytes_and_specials}
        for word in self._text_ids:
            self._longest[word[0]] = max(self._longest.get(word[0], 0), len(word))
        self.bos_id, self.eos_id = self._ids["<s>"], self._ids["</s>"]
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

    def decode(self, ids: list[int]) -> str:
        out = bytearray()
        for i in ids:
            word = self._words[i]
            is_byte = len(word) == 6 and word.startswith("<0x") and word.endswith(">")
            out += bytes([int(word[3:5], 16)]) if is_byte else word.encode()
        return out.decode("utf-8", "replace")

    def special(self, token: int) -> str:
        word = self._words[token]
        return word if word in _SPECIAL_WORDS else ""


def _byte_word(byte: int) -> str:
    return f"<0x{byte:02X}>"


class HuggingFaceTokenizer(Tokenizer):
    """A folder with tokenizer.json; which tokens begin and end a text is read from tokenizer_config.json."""

    def __init__(self, folder: Path) -> None:
        import tokenizers

        self._model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._model.no_padding()
        self._model.no_truncation()
        config: dict[str, Any] = {}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).is_file():
                config = {**_read(folder / name), **config}
        eos = _token(config, "eos_token")
        if eos is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: eos_token: missing; samples have to end with a token")
        self.eos_id = self._id(eos, folder)
        bos = _token(config, "bos_token")
        # Some families (Qwen) have no bos token; their texts start with the token that ends the one before.
        self.bos_id = self._id(bos or eos, folder)
        self.bos_token, self.eos_token = bos or "", eos
        self.chat_template = _chat_template(folder, config)
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)
        added = self._model.get_added_tokens_decoder()
        self._special = {number: token.content for number, token in added.items() if token.special}
        names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE]
        self.files = [folder / name for name in names if (folder / name).is_file()]

    def _id(self, token: str, folder: Path) -> int:
        number = self._model.token_to_id(token)
        if number is None:
            raise UserError(f"{folder}: tokenizer_config.json names {token!r}, which tokenizer.json does not hold")
        return number

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        return [found.ids for found in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_chat(self, text: str) -> tuple[list[int], list[int]]:
        return self._encode_with_starts(text)  # special tokens are recognised as it is

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        found = self._model.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def special(self, token: int) -> str:
        return self._special.get(int(token), "")


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template beside the tokenizer, or the one in its configuration; of several, the one called default."""
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8-sig")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((item.get("template") for item in found if item.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _token(config: dict[str, Any], key: str) -> str | None:
    token = config.get(key)
    return token["content"] if isinstance(token, dict) else token


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that a file or folder holds: tokenizer.json, a SentencePiece .model, or a 9G vocab.txt.

    Raises UserError where there is none, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model", "vocab.txt")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path}: no tokenizer here; expected one of {', '.join(names)}")
        path = found
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer; set tokenizer_path to a file or to a folder that holds one")
    try:
        if path.suffix == ".json":
            return HuggingFaceTokenizer(path.parent)
        tokenizer = VocabTokenizer(path) if path.suffix == ".txt" else SentencePieceTokenizer(path)
        if (template := path.parent / CHAT_TEMPLATE).is_file():
            tokenizer.chat_template = template.read_text(encoding="utf-8-sig")
            tokenizer.files.append(template)
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # the tokenizer libraries raise bare Exception
        raise UserError(f"{path}: not a tokenizer that can be read: {error}") from None


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output: Path, overwrite: bool = False, sources: tuple[Path, ...] = ()
) -> int:
    """Trains a byte-level BPE tokenizer (bos <s>, eos </s>) and writes it as a Hugging Face folder.

    Returns how many tokens it has: vocab_size, or fewer where the texts do not give so many. sources:
    the files behind the texts, which are never replaced. Raises UserError where
    vocab_size does not hold the bytes, there is no text, or the output folder holds something (unless overwrite).
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    least = 2 + 256
    if not least <= vocab_size < 2**31:
        raise UserError(f"vocab_size: found {vocab_size}, expected at least {least}: <s>, </s> and the 256 bytes")
    first = next(texts := iter(texts), None)
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
    with new_folder(output, overwrite, sources) as folder:
        model.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return model.get_vocab_size()
