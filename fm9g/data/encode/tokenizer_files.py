"""The files that make up a tokenizer in a folder."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = "chat_template.jinja"  # the file in which transformers stores a tokenizer's template
CHAT_TEMPLATES = "additional_chat_templates"  # the folder of further templates, NAME.jinja
TOKENIZER_CONFIG = "tokenizer_config.json"
# The files from which transformers, and the families' own code, read a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    CHAT_TEMPLATE,
    f"{CHAT_TEMPLATES}/*.jinja",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder."""
    return [file for pattern in TOKENIZER_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
