"""The files beside the weights of a Hugging Face folder: tokenizer, chat template, and a reference's own code."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fm9g.checkpoint.layout import TOKENIZER
from fm9g.convert.native_tokenizer import AUTO_TOKENIZER, make_native_tokenizer, write_json
from fm9g.data.encode.stop_tokens import stop_token_ids
from fm9g.data.encode.template import Template
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_files import CHAT_TEMPLATE, CHAT_TEMPLATES, TOKENIZER_CONFIG, tokenizer_files
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.encode.vocab_tokenizer import VocabTokenizer
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.json_file import read_object

logger = logging.getLogger(__name__)

# Files that are not copied from a reference: weights and their index.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True)
class WrittenTokenizer:
    """A tokenizer in an exported folder.

    Args:
        tokenizer: as fm9g reads it; None: it cannot.
        opener: the transformers class that opens it; empty: none.
    """

    tokenizer: Tokenizer | None = None
    opener: str = ""


def copy_aux_files(reference: Path, checkpoint: Path | None, folder: Path) -> None:
    """Copies a folder's files other than weights: configuration, code, tokenizer, licence.

    Args:
        checkpoint: whose chat template replaces the reference's.
    """
    aux_files = [
        file
        for file in sorted(reference.iterdir())
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and not file.name.startswith((".", "README"))
    ]
    _copy([*aux_files, *sorted(reference.glob(f"{CHAT_TEMPLATES}/*.jinja"))], reference, folder)
    _copy_template(checkpoint, folder)


def write_tokenizer(source: Path | None, checkpoint: Path | None, folder: Path) -> WrittenTokenizer:
    """Copies a tokenizer's files, changed so that transformers opens them without code that came with them.

    Logs a warning if the tokenizer cannot be written, or AutoTokenizer does not open it.

    Args:
        source: folder of the tokenizer; None: unknown.
        checkpoint: whose chat template replaces the source's.
        folder: to write to; holds the model's config.json already.
    """
    if source is None:
        _copy_template(checkpoint, folder)
        return WrittenTokenizer()
    _copy([*tokenizer_files(source), *sorted(source.glob("tokenizer.model.v*"))], source, folder)
    _copy_template(checkpoint, folder)
    try:
        tokenizer: Tokenizer | None = load_tokenizer(source)
    except UserError:  # only its own code reads it, or no token ends a text
        tokenizer = None
    if isinstance(tokenizer, VocabTokenizer):
        logger.warning(f"{source}: only fm9g reads its vocab.txt; transformers has no such tokenizer")
        return WrittenTokenizer(tokenizer)
    opener, problem = make_native_tokenizer(source, folder)
    if not opener:
        _remove_tokenizer(folder)
        logger.warning(
            f"{source}: its tokenizer cannot be read without its code, so the folder gets none ({problem}); "
            "--keep-reference-config takes both"
        )
        return WrittenTokenizer(tokenizer)
    if opener != AUTO_TOKENIZER:
        logger.warning(
            f"{source}: {problem}; {opener}.from_pretrained opens it as it was trained with, AutoTokenizer does not"
        )
    try:
        tokenizer = load_tokenizer(folder)
    except UserError:
        return WrittenTokenizer(None, opener)
    if isinstance(tokenizer.chat_template, str):  # several named templates stay where they are
        _write_template(tokenizer.chat_template, folder)
    return WrittenTokenizer(tokenizer, opener)


def _remove_tokenizer(folder: Path) -> None:
    for file in [*tokenizer_files(folder), *folder.glob("tokenizer.model.v*")]:
        if file.name != CHAT_TEMPLATE:
            file.unlink()


def stop_ids(tokenizer: Tokenizer | None, source: Path | None) -> list[int]:
    """The tokens that end a generation, the chat template's end of a turn first.

    Args:
        source: the tokenizer's folder, for messages.
    """
    if tokenizer is None:
        return []
    template = tokenizer.chat_template
    own = Template(f"of {source}", template, tokenizer.special_tokens) if template else None
    return stop_token_ids(tokenizer, own)


def _copy(files: Iterable[Path], source: Path, folder: Path) -> None:
    for file in files:
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        register_input(file)
        shutil.copyfile(file, copy)


def _copy_template(checkpoint: Path | None, folder: Path) -> None:
    """Replaces a folder's chat templates by the one that a checkpoint was trained with, if it has one."""
    own = checkpoint / TOKENIZER if checkpoint else None
    if own is None:
        return
    files = [file for file in (own / CHAT_TEMPLATE, *sorted(own.glob(f"{CHAT_TEMPLATES}/*.jinja"))) if file.is_file()]
    in_config = read_object(own / TOKENIZER_CONFIG).get("chat_template") if (own / TOKENIZER_CONFIG).is_file() else None
    if not files and not in_config:
        return
    shutil.rmtree(folder / CHAT_TEMPLATES, ignore_errors=True)
    for name in (CHAT_TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    _copy(files, own, folder)
    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    if len(files) == 1 and files[0].name == CHAT_TEMPLATE:
        in_config = files[0].read_text(encoding="utf-8-sig")
    if file.is_file() and settings.get("chat_template") != in_config:
        settings = {key: value for key, value in settings.items() if key != "chat_template"}
        write_json(file, settings | ({"chat_template": in_config} if in_config else {}))


def _write_template(text: str, folder: Path) -> None:
    """Writes a chat template to its own file, for newer programs, and to the configuration, for older ones."""
    (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    if settings.get("chat_template") != text:
        write_json(file, settings | {"chat_template": text})
