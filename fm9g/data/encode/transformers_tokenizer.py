"""Tokenizers that transformers opens: folders of every layout and family give the ids that transformers gives."""

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
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_files import TOKENIZER_CONFIG, tokenizer_files
from fm9g.errors import UserError


def open_with_transformers(folder: Path) -> Tokenizer:
    """Opens a folder as AutoTokenizer does, but runs no code from the folder. Raises UserError."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            _read(folder / name)  # to name a file that is not JSON, with its line
    if (model := folder / "config.json").is_file():  # AutoTokenizer builds the model configuration from it
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
                f"{folder}: its tokenizer is Python code in the folder ({config.get('tokenizer_class')}), which fm9g "
                "does not run; save it as tokenizer.json (save_pretrained of a fast tokenizer), or use another folder"
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
    """The attributes of a tokenizer, read from what AutoTokenizer returned."""

    def __init__(self, loaded: Any, folder: Path) -> None:
        self.special_tokens = dict(loaded.special_tokens_map)
        if not loaded.eos_token or loaded.eos_token_id is None:
            raise UserError(f"{folder / TOKENIZER_CONFIG}: eos_token: missing; samples must end with a token")
        self.eos_id = loaded.eos_token_id
        # Some families (Qwen) have no bos token; their texts start with the token that ends the previous one.
        self.bos_id = self.eos_id if loaded.bos_token is None else loaded.bos_token_id
        self.files = tokenizer_files(folder)
        special = {number: token.content for number, token in loaded.added_tokens_decoder.items() if token.special}
        # Some classes add a default pad token that the folder does not name. It lies behind the vocabulary, where a
        # model has no embedding for it.
        added = {number for number in special if number >= loaded.vocab_size} - {self.eos_id, self.bos_id}
        named = _tokens_named_in(self.files) if added else set()
        defaults = {number for number in added if special[number] not in named}
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
    """The tokens that a folder's files name besides the vocabulary."""
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
    """A tokenizer of transformers that uses the `tokenizers` library."""

    def __init__(self, loaded: Any, folder: Path) -> None:
        super().__init__(loaded, folder)
        self._folder = folder
        self._model = loaded.backend_tokenizer
        self._model.no_padding()
        self._model.no_truncation()

    def encode(self, text: str) -> list[int]:
        return [*self.encode_batch([text])[0]]

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        self._model.encode_special_tokens = True
        with bounded_encoding(self._folder, sum(map(len, texts))):
            return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_chat(self, text: str, escaped: Sequence[Span]) -> tuple[list[int], list[int]]:
        if not escaped:
            return self._ids_and_starts(self._model, text, special_as_text=False)
        parts, end = [], 0
        for start, stop in self._special_spans(text, escaped):
            parts += [text[end:start], self._placeholders[text[start:stop]]]
            end = stop
        with_placeholders = "".join([*parts, text[end:]])
        ids, starts = self._ids_and_starts(self._placeholder_model, with_placeholders, special_as_text=True)
        return [self._placeholder_ids.get(token, token) for token in ids], starts

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        return self._ids_and_starts(self._model, text, special_as_text=True)

    def _ids_and_starts(self, model: Any, text: str, special_as_text: bool) -> tuple[list[int], list[int]]:
        model.encode_special_tokens = special_as_text  # each time: a copy in another process has lost the setting
        with bounded_encoding(self._folder, len(text)):
            (encoding,) = model.encode_batch([text], add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    @cached_property
    def _placeholders(self) -> dict[str, str]:
        """Special token -> a text of the same length, of one private-use character."""
        return {text: chr(0x100000 + i) * len(text) for i, text in enumerate(self.special_ids)}

    @cached_property
    def _placeholder_model(self) -> Any:
        """A tokenizer that encodes special tokens as text, and their placeholders as special tokens.

        With it, a chat that holds both is encoded in one call, like any other:

            text             <s>what is </s>?</s>      the first </s> is escaped
            placeholders     XXXwhat is </s>?YYYY      X, Y: a private-use character for <s>, for </s>
        """
        from tokenizers import AddedToken

        known = {token.content: token for token in self._model.get_added_tokens_decoder().values()}
        model = copy.deepcopy(self._model)
        for text, placeholder in self._placeholders.items():
            token = known.get(text) or AddedToken(text)
            options = {key: getattr(token, key) for key in ("lstrip", "rstrip", "single_word")}
            model.add_tokens([AddedToken(placeholder, normalized=False, special=False, **options)])
        return model

    @cached_property
    def _placeholder_ids(self) -> dict[int, int]:
        """Id of a placeholder -> id of its special token."""
        to_id = self._placeholder_model.token_to_id
        return {to_id(self._placeholders[text]): token for text, token in self.special_ids.items()}

    def token_id(self, text: str) -> int | None:
        token: int | None = self._model.token_to_id(text)
        return token

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode(ids))


class PythonTokenizer(_TransformersTokenizer):
    """A tokenizer of transformers that is written in Python."""

    def __init__(self, loaded: Any, folder: Path) -> None:
        super().__init__(loaded, folder)
        self._loaded = loaded

    def encode(self, text: str) -> list[int]:
        # split_special_tokens also encodes other added tokens as text, so it is set only for spellings of special ones.
        ids: list[int] = []
        offset = 0
        for start, end in [*self._special_spans(text, ()), (len(text), len(text))]:
            for part, is_special in ((text[offset:start], False), (text[start:end], True)):
                if part:
                    ids += self._loaded.encode(part, add_special_tokens=False, split_special_tokens=is_special)
            offset = end
        return ids

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        ends = list(accumulate(len(self.decode([token])) for token in ids))
        known = bool(ends) and ends[-1] == len(text)  # otherwise a character is several tokens
        return ids, [0, *ends[:-1]] if known else [0] * len(ids)

    def token_id(self, text: str) -> int | None:
        token: int | None = self._loaded.get_vocab().get(text)
        return token

    def decode(self, ids: list[int]) -> str:
        return str(self._loaded.decode(ids))
