"""Tokens that a user adds to a tokenizer: the file of `new_tokens`, and the tokenizer that knows them.

The tokens get the ids behind the tokenizer's own, as by add_tokens of transformers. The tokenizer is opened from copies
of its files with the tokens in them: what encodes the training data is what a checkpoint stores.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_files import TOKENIZER_CONFIG
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.regular_file import check_regular

logger = logging.getLogger(__name__)

NEW_TOKENS = "new_tokens.txt"  # beside the tokenizer of a checkpoint: the tokens, one per line
_MAX_FILE_BYTES = 64 << 20
_SAMPLE = "a 1, b."  # encodes as before


def read_new_tokens(file: str | Path) -> tuple[str, ...]:
    """The tokens of a file, one per line in UTF-8. Blank lines, and spaces around a token, are not part of them.

    Raises UserError if the file cannot be read, or holds no token.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"new_tokens: {path}: no such file; expected a text file with one token per line")
    check_regular(path, _MAX_FILE_BYTES)
    register_input(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # some tokens contain other line ends
    except UnicodeDecodeError as error:
        raise UserError(f"new_tokens: {path}: not UTF-8, at byte {error.start}; save it as UTF-8") from None
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens:
        raise UserError(f"new_tokens: {path}: holds no token; write one per line")
    unique = tuple(dict.fromkeys(tokens))
    if len(unique) < len(tokens):
        repeated = next(token for token in unique if tokens.count(token) > 1)
        logger.warning(f"new_tokens: {path}: {repeated!r} is there more than once; repeated lines change nothing")
    return unique


def check_same_tokens(given: str, saved: Path, owner: str) -> None:
    """Raises UserError if a file of new tokens has not those of a saved one. owner: of the saved one, for the message.

    Args:
        saved: may be missing, if there are none.
    """
    if not saved.is_file() or read_new_tokens(given) != read_new_tokens(saved):
        raise UserError(
            f"new_tokens: {given}: these are not the tokens of {owner}, in that order; leave out new_tokens, or start "
            "another run"
        )


def with_new_tokens(tokenizer: Tokenizer, path: Path, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer with tokens that it has not yet, behind its vocabulary. Logs which of them it has.

    Args:
        tokenizer: opened from `path`.

    Raises:
        UserError: the tokenizer's class takes no tokens.
    """
    known = [token for token in tokens if tokenizer.token_id(token) is not None]
    if known:
        logger.info(f"new_tokens: {_some(known)} in the vocabulary of {path} already")
    tokenizer.new_tokens = tuple(tokens)
    fresh = {token: tokenizer.vocab_size + i for i, token in enumerate(t for t in tokens if t not in set(known))}
    if not fresh:
        logger.warning(f"new_tokens: all of them are in the vocabulary of {path}, so nothing is added")
        return tokenizer
    folder = path if path.is_dir() else path.parent
    if not (folder / TOKENIZER_CONFIG).is_file() and not (folder / "tokenizer.json").is_file():
        hint = "no class of transformers reads it with more"
        if tokenizer.files[0].suffix == ".model":
            hint = f"give it as a Hugging Face folder with a {TOKENIZER_CONFIG}, which `fm9g convert` writes"
        raise UserError(f"new_tokens: {tokenizer.files[0]} is a vocabulary alone, which takes no tokens; {hint}")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for file in [*tokenizer.files, *folder.glob("config.json")]:  # the latter decides the tokenizer's class
            target = copy / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        for name, text in _with_tokens(tokenizer.files, fresh).items():
            (copy / name).write_text(text, encoding="utf-8")
        grown = _open(copy, path, fresh)
    _check_grown(tokenizer, grown, path, fresh)
    grown.files, grown.new_tokens = tokenizer.files, tuple(tokens)
    grown.new_ids = range(tokenizer.vocab_size, grown.vocab_size)
    return grown


def new_token_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Names and texts of the files that new tokens change in, or add to, the folder of a tokenizer."""
    if not tokenizer.new_tokens:
        return {}
    tokens = {NEW_TOKENS: "".join(f"{token}\n" for token in tokenizer.new_tokens)}
    fresh = fresh_tokens(tokenizer)
    return {**tokens, **_with_tokens(tokenizer.files, fresh)} if fresh else tokens


def fresh_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The new tokens that the tokenizer's own files do not have, and their ids."""
    ids = {token: tokenizer.token_id(token) for token in tokenizer.new_tokens}
    return {token: number for token, number in ids.items() if number in tokenizer.new_ids and number is not None}


def _open(folder: Path, path: Path, fresh: Mapping[str, int]) -> Tokenizer:
    from fm9g.data.encode.transformers_tokenizer import open_with_transformers

    try:
        return open_with_transformers(folder)
    except UserError as error:
        problem = str(error).replace(str(folder), str(path))
        raise UserError(f"new_tokens: {path} cannot be opened with {_some(list(fresh))}: {problem}") from None


def _check_grown(tokenizer: Tokenizer, grown: Tokenizer, path: Path, fresh: Mapping[str, int]) -> None:
    for token, number in fresh.items():
        if number not in grown.encode(f"{_SAMPLE}{token}{_SAMPLE}"):
            raise UserError(
                f"new_tokens: {token!r} cannot be added to {path}: its tokenizer does not read it as the token "
                f"{number}; give a tokenizer with a tokenizer.json (save_pretrained of transformers writes one)"
            )
    if list(grown.encode(_SAMPLE)) != list(tokenizer.encode(_SAMPLE)):
        raise UserError(f"new_tokens: {path} reads other text differently with {_some(list(fresh))}")


def _with_tokens(files: Sequence[Path], fresh: Mapping[str, int]) -> dict[str, str]:
    """The texts of the files that name added tokens, with further ones. They are in transformers' formats."""
    by_name = {file.name: file for file in files}
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added = {number: {"content": token, **options} for token, number in fresh.items()}
    config = _read(by_name[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in by_name else {}
    changed: dict[str, Any] = {}
    if "tokenizer.json" in by_name:
        model = _read(by_name["tokenizer.json"])
        tokens = [*(model.get("added_tokens") or []), *({"id": number, **token} for number, token in added.items())]
        changed["tokenizer.json"] = model | {"added_tokens": tokens}
    elif "added_tokens_decoder" not in config:
        before = _read(by_name["added_tokens.json"]) if "added_tokens.json" in by_name else {}
        changed["added_tokens.json"] = {**before, **fresh}
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"] | {str(number): token for number, token in added.items()}
        changed[TOKENIZER_CONFIG] = config | {"added_tokens_decoder": decoder}
    return {name: json.dumps(content, ensure_ascii=False, indent=2) for name, content in changed.items()}


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _some(tokens: Sequence[str]) -> str:
    named = ", ".join(map(repr, tokens[:5]))
    return named if len(tokens) <= 5 else f"{named} and {len(tokens) - 5} more"
