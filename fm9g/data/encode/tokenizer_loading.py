"""Opening a tokenizer: a word list, a bare SentencePiece model, or any folder that transformers opens.

Folders are used by the 4b, 7b and 70b models, other model families, and tokenizers of `fm9g data tokenizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fm9g.data.encode.new_tokens import with_new_tokens
from fm9g.data.encode.sentencepiece_tokenizer import SentencePieceTokenizer
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_files import CHAT_TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_FILES, tokenizer_files
from fm9g.data.encode.vocab_tokenizer import VocabTokenizer
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.regular_file import check_regular
from fm9g.path_kind import TOKENIZER, check_kind

_MAX_FILE_BYTES = 512 << 20  # bytes of a file; the largest published ones have some 35 MB


def load_tokenizer(path: str | Path, new_tokens: Sequence[str] = ()) -> Tokenizer:
    """Opens a file or folder: a 9G vocab.txt, a bare SentencePiece .model, or what transformers opens.

    Args:
        new_tokens: added to it, as far as it does not have them.

    Runs no code from the folder. Raises UserError if there is no tokenizer, it cannot be read, or it takes no tokens.
    """
    path = Path(path)
    tokenizer = _open(path)
    return with_new_tokens(tokenizer, path, new_tokens) if new_tokens else tokenizer


def _open(path: Path) -> Tokenizer:
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
    """The SentencePiece model or 9G vocabulary that is a complete tokenizer; None if transformers reads more."""
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
