"""A tokenizer for conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.chat_mixtures import OWN


@pytest.fixture(scope="session")
def chat_tokenizer(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's tokenizer with ChatML's markers and template; its eos is <|endoftext|>, as a base model's."""
    from tokenizers import Tokenizer as Model

    folder = tmp_path_factory.mktemp("chat-tokenizer")
    model = Model.from_file(str(tokenizer_path / "tokenizer.json"))
    model.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OWN}))
    return folder
