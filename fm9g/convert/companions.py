"""What lies beside the weights in a Hugging Face folder: tokenizer, chat template, and the code of a reference."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from fm9g.checkpoint.folder import TOKENIZER
from fm9g.config.load import read_object
from fm9g.data.tokenizer import CHAT_TEMPLATE, SentencePieceTokenizer, load_tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
# What travels from a reference folder beside config.json, which is written anew.
_TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
)
# Of a reference whose configuration is kept: all but weights, what lists them, and what describes its own.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def copy_companions(reference: Path, folder: Path) -> None:
    """Copies what a folder holds beside its weights: configuration, code, tokenizer, licence."""
    for file in sorted(reference.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and not file.name.startswith((".", "README")):
            shutil.copyfile(file, folder / file.name)


def write_tokenizer(source: Path | None, checkpoint: Path | None, folder: Path) -> dict[str, int | None]:
    """Copies a tokenizer's files; a bare SentencePiece model gets the configuration transformers needs.

    checkpoint: the chat template that it was trained with goes before that of source.
    Returns bos_token_id and eos_token_id; None, with a line on the console, where the tokenizer cannot travel.
    """
    for name in _TOKENIZER_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    trained_with = checkpoint / TOKENIZER / CHAT_TEMPLATE if checkpoint else None
    if trained_with and trained_with.is_file():
        shutil.copyfile(trained_with, folder / CHAT_TEMPLATE)
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
    if source is None:
        return ids
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt")):
        print(
            f"note: {source}: holds no tokenizer that can be read without its code, so none is written; "
            "--keep-reference-config takes both",
            file=sys.stderr,
        )
        return ids
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, SentencePieceTokenizer) and not (folder / TOKENIZER_CONFIG).is_file():
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
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _write_template(text: str | None, folder: Path) -> None:
    """Puts a chat template where newer programs look for it, and into the configuration, where older ones do."""
    if not text:
        return
    (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    file = folder / TOKENIZER_CONFIG
    settings = read_object(file) if file.is_file() else {}
    if settings.get("chat_template") != text:
        _write(file, settings | {"chat_template": text})


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
