"""Tokenizers that transformers opens: folders of every layout and family, to the same ids."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from fm9g.config.model import check_sizes
from fm9g.data.encode.encoding_limits import bounded_encoding, panics_as_user_error
from fm9g.data.encode.escaping import Span
from fm9g.data.encode.tokenizer import TOKENIZER_CONFIG, Tokenizer, tokenizer_files
from fm9g.errors import UserError


def open_with_transformers(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, as AutoTokenizer reads it, without code that lies there. Raises UserError."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            _read(folder / name)  # a file that is not JSON is named with its line
    if (model := folder / "config.json").is_file():  # AutoTokenizer makes the configuration of the model from it
        check_sizes(_read(model), str(model))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with panics_as_user_error(folder):
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            return FastTokenizer(loaded, folder) if loaded.is_fast else PythonTokenizer(loaded, folder)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        config = _read(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
        if "auto_map" in config:
            raise UserError(
                f"{folder}: its tokenizer is code of its own ({config.get('tokenizer_class')}), which is not run; save "
                "it as tokenizer.json (a fast tokenizer's save_pretrained), or take it from a folder that has one"
            ) from None
        raise UserError(f"{folder}: not a tokenizer that can be read: {_first_lines(error)}") from None
    finally:
        logging.set_verbosity(verbosity)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: found a JSON {type(content).__name__}, expected an object")
    return content


class _TransformersTokenizer(Tokenizer):
    """What tokenizers that transformers opened have in common. `loaded` is what AutoTokenizer returned."""

    def __init__(self, loaded: Any, folder: Path) -> None:
        self.special_tokens = dict(loaded.special_tokens_map)
        if not loaded.eos_token or loaded.eos_token_id is None:
            raise UserError(f"{folder / TOKENIZER_CONFIG}: eos_token: missing; samples have to end with a token")
        self.eos_id = loaded.eos_token_id
        # Some families (Qwen) have no bos token; their texts start with the token that ends the one before.
        self.bos_id = self.eos_id if loaded.bos_token is None else loaded.bos_token_id
        self.files = tokenizer_files(folder)
        special = {number: token.content for number, token in loaded.added_tokens_decoder.items() if token.special}
        # A class adds tokens of its own (a pad token) where a folder has none: behind the vocabulary, where a model has
        # no embedding for them.
        added = {number for number in special if number >= loaded.vocab_size}
        behind = added - {self.eos_id, self.bos_id}
        named = _tokens_named_in(self.files) if behind else set()
        defaults = {number for number in behind if special[number] not in named}
        self.special_ids = {text: number for number, text in special.items()}
        self.special_ids |= {self.eos_token: self.eos_id}
        self.chat_template = loaded.chat_template
        texts = self.chat_template.values() if isinstance(self.chat_template, dict) else [self.chat_template or ""]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{folder / TOKENIZER_CONFIG}: chat_template: expected a text, or a list of named ones")
        self.vocab_size = 1 + max(number for number in loaded.get_vocab().values() if number not in defaults)
        around, text = loaded("a")["input_ids"], loaded("a", add_special_tokens=False)["input_ids"]
        start = next(i for i in range(len(around)) if around[i : i + len(text)] == text)
        self.prefix_ids = around[:start]
        self.suffix_ids = around[start + len(text) :] or [self.eos_id]


def _tokens_named_in(files: list[Path]) -> set[str]:
    """The tokens that the files of a folder name beside the vocabulary."""
    names: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, str):
            names.add(value)
        elif isinstance(value, dict):
            names.update(value)
            for key, item in value.items():
                if key != "chat_template":
                    collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    for file in files:
        if file.name == "tokenizer.json":
            collect(_read(file).get("added_tokens"))
        elif file.suffix == ".json" and file.name != "vocab.json":
            collect(_read(file))
    return names


class FastTokenizer(_TransformersTokenizer):
    """A tokenizer of transformers that works with the `tokenizers` library."""

    def __init__(self, loaded: Any, folder: Path) -> None:
        super().__init__(loaded, folder)
        self._folder = folder
        self._model = loaded.backend_tokenizer
        self._model.no_padding()
        self._model.no_truncation()

    def encode(self, text: str) -> list[int]:
        return [*self.encode_batch([text])[0]]

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        self._model.encode_special_tokens = True  # as text, that is
        with bounded_encoding(self._folder, sum(map(len, texts))):
            return [found.ids for found in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_chat(self, text: str, literal: Sequence[Span]) -> tuple[list[int], list[int]]:
        if not literal:
            self._model.encode_special_tokens = False
            return self._ids_and_starts(self._model, text)
        pieces, end = [], 0
        for start, stop in self._special_spans(text, literal):
            pieces += [text[end:start], self._placeholders[text[start:stop]]]
            end = stop
        ids, starts = self._ids_and_starts(self._placeholder_model, "".join([*pieces, text[end:]]))
        return [self._placeholder_ids.get(token, token) for token in ids], starts

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        self._model.encode_special_tokens = True
        return self._ids_and_starts(self._model, text)

    def _ids_and_starts(self, model: Any, text: str) -> tuple[list[int], list[int]]:
        with bounded_encoding(self._folder, len(text)):
            (found,) = model.encode_batch([text], add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    @cached_property
    def _placeholders(self) -> dict[str, str]:
        """Special token -> a text of the same length, in private-use characters."""
        return {text: chr(0x100000 + i) * len(text) for i, text in enumerate(self.special_ids)}

    @cached_property
    def _placeholder_model(self) -> Any:
        """A tokenizer that takes special tokens for text, and in their place the stand-ins for special tokens.

        So a chat that holds both is encoded in one go, as one without such text is.
        """
        from tokenizers import AddedToken

        known = {token.content: token for token in self._model.get_added_tokens_decoder().values()}
        model = copy.deepcopy(self._model)
        for text, placeholder in self._placeholders.items():
            how = known.get(text) or AddedToken(text)
            sides = {key: getattr(how, key) for key in ("lstrip", "rstrip", "single_word")}
            model.add_tokens([AddedToken(placeholder, normalized=False, special=False, **sides)])
        model.encode_special_tokens = True
        return model

    @cached_property
    def _placeholder_ids(self) -> dict[int, int]:
        return {
            self._placeholder_model.token_to_id(self._placeholders[t]): number for t, number in self.special_ids.items()
        }

    def token_id(self, text: str) -> int | None:
        return self._model.token_to_id(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)


class PythonTokenizer(_TransformersTokenizer):
    """A tokenizer of transformers that is written in Python."""

    def __init__(self, loaded: Any, folder: Path) -> None:
        super().__init__(loaded, folder)
        self._loaded = loaded

    def encode(self, text: str) -> list[int]:
        # split_special_tokens takes other added tokens for text, too; so it is for spellings of special ones alone.
        ids: list[int] = []
        offset = 0
        for start, end in [*self._special_spans(text, ()), (len(text), len(text))]:
            for piece, is_special in ((text[offset:start], False), (text[start:end], True)):
                if piece:
                    ids += self._loaded.encode(piece, add_special_tokens=False, split_special_tokens=is_special)
            offset = end
        return ids

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        ends = list(accumulate(len(self.decode([token])) for token in ids))
        known = bool(ends) and ends[-1] == len(text)  # else a character is several tokens
        return ids, [0, *ends[:-1]] if known else [0] * len(ids)

    def token_id(self, text: str) -> int | None:
        return self._loaded.get_vocab().get(text)

    def decode(self, ids: list[int]) -> str:
        return self._loaded.decode(ids)
