"""What lies beside the weights in a Hugging Face folder: tokenizer, chat template, and the code of a reference."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import TOKENIZER
from fm9g.config.load import read_object
from fm9g.convert.native_tokenizer import AUTO_TOKENIZER, make_native_tokenizer
from fm9g.data.encode.encoder import stop_token_ids
from fm9g.data.encode.template import Template
from fm9g.data.encode.tokenizer import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    TOKENIZER_CONFIG,
    Tokenizer,
    VocabTokenizer,
    load_tokenizer,
    tokenizer_files,
)
from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.printable import printable

# Of a reference whose configuration is kept: all but weights, what lists them, and what describes its own.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@dataclass(frozen=True)
class WrittenTokenizer:
    """A tokenizer that was written. tokenizer: as we read it, None where we do not. opener: the class of transformers
    that opens it, empty where none does."""

    tokenizer: Tokenizer | None = None
    opener: str = ""


def copy_aux_files(reference: Path, checkpoint: Path | None, folder: Path) -> None:
    """Copies what a folder holds beside its weights: configuration, code, tokenizer, licence.

    checkpoint: the chat template that it was trained with goes before that of the reference.
    """
    aux_files = [
        file
        for file in sorted(reference.iterdir())
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not file.name.startswith((".", "README"))
    ]
    _copy([*aux_files, *sorted(reference.glob(f"{CHAT_TEMPLATES}/*.jinja"))], reference, folder)
    _copy_template(checkpoint, folder)


def write_tokenizer(source: Path | None, checkpoint: Path | None, folder: Path) -> WrittenTokenizer:
    """Copies a tokenizer's files, so that transformers opens them without code that came with them.

    folder: it holds the model's config.json. checkpoint: the chat template that it was trained with goes before that of
    source. A line on the console says where the tokenizer cannot travel, or AutoTokenizer does not open it.
    """
    if source is None:
        _copy_template(checkpoint, folder)
        return WrittenTokenizer()
    _copy([*tokenizer_files(source), *sorted(source.glob("tokenizer.model.v*"))], source, folder)
    _copy_template(checkpoint, folder)
    try:
        tokenizer: Tokenizer | None = load_tokenizer(source)
    except UserError:  # only its own code reads it, or it has no token that ends a text
        tokenizer = None
    if isinstance(tokenizer, VocabTokenizer):
        _note(f"{source}: fm9g alone reads its vocab.txt; transformers has no such tokenizer")
        return WrittenTokenizer(tokenizer)
    opener, problem = make_native_tokenizer(source, folder)
    if not opener:
        for file in [*tokenizer_files(folder), *folder.glob("tokenizer.model.v*")]:
            if file.name != CHAT_TEMPLATE:
                file.unlink()
        _note(
            f"{source}: holds no tokenizer that can be read without its code, so none is written ({problem}); "
            "--keep-reference-config takes both"
        )
        return WrittenTokenizer(tokenizer)
    if opener != AUTO_TOKENIZER:
        _note(f"{source}: {problem}; {opener}.from_pretrained opens it as it was trained with, AutoTokenizer does not")
    try:
        tokenizer = load_tokenizer(folder)
    except UserError:
        return WrittenTokenizer(None, opener)
    if isinstance(tokenizer.chat_template, str):  # several by name stay where they are
        _write_template(tokenizer.chat_template, folder)
    return WrittenTokenizer(tokenizer, opener)


def stop_ids(tokenizer: Tokenizer | None, source: Path | None) -> list[int]:
    """The tokens that end what a model with this tokenizer generates, the template's end of a turn first.

    source: where the tokenizer is from, for messages.
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
    """Writes the chat template that a checkpoint was trained with, in place of all others."""
    own = checkpoint / TOKENIZER if checkpoint else None
    if own is None:
        return
    files = [file for file in (own / CHAT_TEMPLATE, *sorted(own.glob(f"{CHAT_TEMPLATES}/*.jinja"))) if file.is_file()]
    inside = read_object(own / TOKENIZER_CONFIG).get("chat_template") if (own / TOKENIZER_CONFIG).is_file() else None
    if not files and not inside:
        return
    shutil.rmtree(folder / CHAT_TEMPLATES, ignore_errors=True)
    for name in (CHAT_TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    _copy(files, own, folder)
    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    if len(files) == 1 and files[0].name == CHAT_TEMPLATE:
        inside = files[0].read_text(encoding="utf-8-sig")
    if file.is_file() and settings.get("chat_template") != inside:
        settings = {key: value for key, value in settings.items() if key != "chat_template"}
        _write(file, settings | ({"chat_template": inside} if inside else {}))


def _write_template(text: str, folder: Path) -> None:
    """Puts a chat template where newer programs look for it, and into the configuration, where older ones do."""
    (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    if settings.get("chat_template") != text:
        _write(file, settings | {"chat_template": text})


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr)
