"""Training a byte-level BPE tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from fm9g.data.encode.tokenizer_files import TOKENIZER_CONFIG
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir

# A run of letters, of symbols, of white space or of digits is one word to the trainer, whose time grows with the square
# of its length.
_LONG_RUN = re.compile(r"[^\W\d_]{4096}|(?:[^\w\s]|_){4096}|\s{4096}|\d{4096}")


def split_long_runs(text: str) -> Iterator[str]:
    """Splits a text inside overlong words."""
    start = 0
    for match in _LONG_RUN.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text) or not text:
        yield text[start:]


def train_tokenizer(texts: Iterable[str], vocab_size: int, output: Path, overwrite: bool = False) -> int:
    """Trains a byte-level BPE tokenizer (bos <s>, eos </s>) and writes it as a Hugging Face folder.

    Returns the number of tokens: vocab_size, or fewer if the texts are too short for more. Raises UserError if
    vocab_size is too small for the 256 bytes, there is no text, or the output folder is not empty (unless overwrite).
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    min_size = 2 + 256
    if not min_size <= vocab_size < 2**31:
        raise UserError(f"vocab_size: found {vocab_size}, expected at least {min_size}: <s>, </s> and the 256 bytes")
    first = next(texts := (part for text in texts for part in split_long_runs(text)), None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on")
    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(chain([first], texts), trainer)
    # Other programs encode with special tokens: their prompts then start with <s>, as in training.
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", model.token_to_id("<s>"))]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    with atomic_dir(output, overwrite) as folder:
        model.save(str(folder / "tokenizer.json"))
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return model.get_vocab_size()
