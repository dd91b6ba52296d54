"""What lies beside the weights in a Hugging Face folder: tokenizer, chat template, and the code of a reference."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from fm9g.checkpoint.folder import TOKENIZER
from fm9g.config.load import read_object
from fm9g.data.encode import stop_token_ids
from fm9g.data.template import Template
from fm9g.data.tokenizer import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    TOKENIZER_CONFIG,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer_files,
)
from fm9g.errors import UserError

# Of a reference whose configuration is kept: all but weights, what lists them, and what describes its own.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def copy_companions(reference: Path, folder: Path) -> None:
    """Copies what a folder holds beside its weights: configuration, code, tokenizer, licence."""
    for file in sorted(reference.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not file.name.startswith((".", "README")):
            shutil.copyfile(file, folder / file.name)


def write_tokenizer(source: Path | None, checkpoint: Path | None, folder: Path) -> Tokenizer | None:
    """Copies a tokenizer's files, so that transformers opens them without code of their own.

    A bare SentencePiece model gets the configuration that transformers needs. checkpoint: the chat template that it was
    trained with goes before that of source. Returns the tokenizer of the folder; None, with a line on the console,
    where it cannot travel.
    """
    if source is None:
        _copy_template(checkpoint, folder)
        return None
    for file in tokenizer_files(source):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    _copy_template(checkpoint, folder)
    _make_native(folder)
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        for file in tokenizer_files(folder):
            if file.name != CHAT_TEMPLATE:
                file.unlink()
        print(
            f"note: {source}: holds no tokenizer that can be read without its code, so none is written ({error}); "
            "--keep-reference-config takes both",
            file=sys.stderr,
        )
        return None
    if isinstance(tokenizer, SentencePieceTokenizer):
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": tokenizer.adds_prefix_space,
            "legacy": False,
        }
        _write(folder / TOKENIZER_CONFIG, settings)
    if isinstance(tokenizer.chat_template, str):  # several by name stay where they are
        _write_template(tokenizer.chat_template, folder)
    return tokenizer


def stop_ids(tokenizer: Tokenizer | None) -> list[int]:
    """The tokens that end what a model with this tokenizer generates, the template's end of a turn first."""
    if tokenizer is None:
        return []
    template = tokenizer.chat_template
    return stop_token_ids(tokenizer, Template("own", template, tokenizer.special_tokens) if template else None)


def _copy_template(checkpoint: Path | None, folder: Path) -> None:
    """Writes the chat template that a checkpoint was trained with, in place of all others."""
    trained_with = checkpoint / TOKENIZER / CHAT_TEMPLATE if checkpoint else None
    if trained_with and trained_with.is_file():
        shutil.rmtree(folder / CHAT_TEMPLATES, ignore_errors=True)
        shutil.copyfile(trained_with, folder / CHAT_TEMPLATE)


def _make_native(folder: Path) -> None:
    """Has transformers open the tokenizer by a class of its own, if that can be: its files say enough."""
    file = folder / TOKENIZER_CONFIG
    if not file.is_file():
        return
    settings = read_object(file)
    own = settings.pop("auto_map", None) is not None
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    name = settings.get("tokenizer_class")
    if name and tokenizer_class_from_name(name) is None and tokenizer_class_from_name(f"{name}Fast") is None:
        if (folder / "tokenizer.json").is_file():
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        elif (folder / "tokenizer.model").is_file():
            settings["tokenizer_class"] = "LlamaTokenizer"
        own = True
    if own:
        _write(file, settings)


def _write_template(text: str, folder: Path) -> None:
    """Puts a chat template where newer programs look for it, and into the configuration, where older ones do."""
    (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    if settings.get("chat_template") != text:
        _write(file, settings | {"chat_template": text})


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
