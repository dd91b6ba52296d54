"""Makes a copied tokenizer open with a class of transformers, and checks that it gives the ids of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fm9g.data.encode.encoding_limits import panics_as_user_error
from fm9g.data.encode.tokenizer_files import TOKENIZER_CONFIG
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError
from fm9g.io.json_file import read_object

AUTO_TOKENIZER = "AutoTokenizer"
# Where tokenizers of different families differ: spaces, line ends, digits, letters of several code points.
TEXTS = (
    "a",
    "Four score and seven years ago, in 1863: it's 3.14 or 1234567.",
    "九格大模型在 2024 年。 日本語 русский",
    "def f(x):\n    return x ** 2  # two\n\n\n",
    "  two spaces,\ttabs and  more \n\nat the end ",
    "🙂 e\u0301 \u00e9 \u200b \ufb01",
)

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class TokenizerReader:
    """How a tokenizer converts plain text to ids.

    Args:
        token_id: of a token by its text; None: only the tokenizer's settings say it.
    """

    encode: Encode
    token_id: Callable[[str], int | None] | None = None


def make_native_tokenizer(source: Path, folder: Path) -> tuple[str, str]:
    """Changes a copied tokenizer's configuration until transformers opens it, without its code, to the ids of training.

    Args:
        source: folder of the original.
        folder: holds the copy, and the model's config.json, by which AutoTokenizer chooses its class.

    Returns:
        The class that opens the copy, empty if none gives the right ids; and why AutoTokenizer does not.
    """
    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    reference = _reference_reader(source)
    if reference is None:
        return "", "only its own code reads it"
    own_code = settings.pop("auto_map", None) is not None
    first_problem = ""
    direct = None  # settings whose class gives the right ids, though AutoTokenizer takes another class; and the problem
    for changes in _candidates(folder, settings, own_code):
        changed = settings | changes
        if file.is_file() or changed:
            write_json(file, changed)
        if not (problem := _problem(folder, reference, AUTO_TOKENIZER)):
            return AUTO_TOKENIZER, ""
        first_problem = first_problem or problem
        name = changed.get("tokenizer_class")
        if direct is None and name and not _problem(folder, reference, name):
            direct = changed, problem
    if direct is None:
        return "", first_problem or "transformers has no class for its files"
    write_json(file, direct[0])
    return str(direct[0]["tokenizer_class"]), direct[1]


def _reference_reader(source: Path) -> TokenizerReader | None:
    """A folder's tokenizer as training reads it, else as its model file alone does; None: only its code reads it."""
    try:
        known = load_tokenizer(source)
        return TokenizerReader(known.encode, known.token_id)
    except UserError:
        pass
    try:
        if (source / "tokenizer.json").is_file():
            import tokenizers

            model = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
            return TokenizerReader(lambda text: _ids(model, source, text), model.token_to_id)
        if (source / "tokenizer.model").is_file():
            import sentencepiece

            return TokenizerReader(
                sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model")).encode
            )
    except Exception:  # these libraries raise bare exceptions for broken files
        pass
    return None


def _ids(model: Any, source: Path, text: str) -> Sequence[int]:
    with panics_as_user_error(source):
        ids: list[int] = model.encode(text, add_special_tokens=False).ids
        return ids


def _candidates(folder: Path, settings: dict[str, Any], own_code: bool) -> Iterator[dict[str, Any]]:
    """Changes to the settings, the smallest first."""
    import transformers

    name = settings.get("tokenizer_class")
    if hasattr(transformers, name) if name else not own_code and not (folder / "tokenizer.model").is_file():
        yield {}
    if (folder / "tokenizer.json").is_file():
        yield {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif (folder / "tokenizer.model").is_file():
        special = _sentencepiece_settings(folder / "tokenizer.model")
        special = {key: value for key, value in special.items() if key not in settings}
        for prefix, legacy in product((False, True), (False, True)):
            yield {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": prefix, "legacy": legacy, **special}


def _sentencepiece_settings(file: Path) -> dict[str, Any]:
    """Settings for the special tokens of a SentencePiece model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    tokens = {key: model.id_to_piece(token_id) for key, token_id in ids.items() if token_id >= 0}
    return tokens | {"add_bos_token": model.bos_id() >= 0, "add_eos_token": False}


def _problem(folder: Path, reference: TokenizerReader, name: str) -> str:
    """Why a class of transformers does not give the reference's ids for a folder's tokenizer; empty: it does."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        kind = getattr(transformers, name)
        with panics_as_user_error(folder):
            tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            texts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
        tokens = {text: tokenizer.convert_tokens_to_ids(text) for text in _added_tokens(folder)}
    except Exception as error:  # transformers raises many kinds
        return f"transformers cannot open it: {' '.join(str(error).split())[:200]}"
    finally:
        transformers.logging.set_verbosity(verbosity)
    for text, ids in zip(TEXTS, texts):
        if list(ids) != list(map(int, reference.encode(text))):
            return f"transformers opens it as {type(tokenizer).__name__}, which reads {text!r} to other ids"
    for text, token_id in _added_tokens(folder).items():
        expected = reference.token_id(text) if reference.token_id else token_id
        if tokens[text] != expected:
            kind = type(tokenizer).__name__
            return f"transformers opens it as {kind}, where {text} is {tokens[text]} and not {expected}"
    return ""


def _added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that a tokenizer's settings add to its vocabulary, with their ids."""
    tokens = {}
    if (file := folder / TOKENIZER_CONFIG).is_file():
        for token_id, token in (read_object(file).get("added_tokens_decoder") or {}).items():
            tokens[token["content"] if isinstance(token, dict) else str(token)] = int(token_id)
    if (file := folder / "added_tokens.json").is_file():
        tokens |= read_object(file)
    return tokens


def write_json(file: Path, content: dict[str, Any]) -> None:
    """In the format that transformers writes."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
