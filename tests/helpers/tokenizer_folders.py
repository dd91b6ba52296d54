"""Tokenizer folders of every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


CORPUS = [
    "plain text, double spaces",
    "深度学习 模型",
    "def f(x): return x  # code Yes",
    "assistant\nuser\nsystem",
] * 20


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def bpe(trim: bool = True, merges: int = 100) -> Any:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    model.post_processor = processors.ByteLevel(trim_offsets=trim)
    return model


def fast(folder: Path, **config: Any) -> Path:
    from tokenizers import AddedToken

    model = bpe()
    model.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    model.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    return write(folder, tokenizer_config__json=settings | config)


def qwen2(folder: Path) -> Path:
    """vocab.json and merges.txt, as Qwen2's and GPT-2's folders have, with added tokens in the configuration."""
    folder.mkdir()
    bpe().model.save(str(folder))
    first = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    added = {
        str(first + i): {"content": text, "special": True} for i, text in enumerate(["<|endoftext|>", *SPECIAL[2:]])
    }
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return write(folder, tokenizer_config__json={**settings, "added_tokens_decoder": added, "chat_template": CHATML})


def sentencepiece_model(folder: Path, kind: str, **options: Any) -> Path:
    import sentencepiece

    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=400 if kind == "bpe" else 340,
            model_type=kind, byte_fallback=True, minloglevel=2, hard_vocab_limit=False, **options,
        )  # fmt: skip
    return folder


def llama(folder: Path, kind: str = "bpe") -> Path:
    """A SentencePiece model with tokens beside it (InternLM2, Yi, Llama with ChatML)."""
    import sentencepiece

    sentencepiece_model(folder, kind)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = {text: size + i for i, text in enumerate(SPECIAL[2:])}
    settings = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
        "add_bos_token": True, "additional_special_tokens": SPECIAL[2:], "chat_template": CHATML,
    }  # fmt: skip
    return write(folder, tokenizer_config__json=settings, added_tokens__json=added)


def byt5(folder: Path) -> Path:
    """A class of transformers that is written in Python, and has no file for its vocabulary."""
    settings = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "extra_ids": 0, "chat_template": CHATML}
    return write(folder, tokenizer_config__json=settings)


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json": fast,
    "tokenizer.json, bos in front": lambda folder: with_post_processor(fast(folder, bos_token="<s>")),
    "tokenizer.json, bos that is not put in front": lambda folder: fast(folder, bos_token="<s>", add_bos_token=False),
    "vocab.json and merges.txt": qwen2,
    "tokenizer.model (BPE) and added_tokens.json": llama,
    "tokenizer.model (unigram) and added_tokens.json": lambda folder: llama(folder, "unigram"),
    "a class in Python": byt5,
}


def with_post_processor(folder: Path) -> Path:
    from tokenizers import Tokenizer as Model
    from tokenizers import processors

    model = Model.from_file(str(folder / "tokenizer.json"))
    pairs = [("<s>", model.token_to_id("<s>"))]
    model.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=pairs)
    model.save(str(folder / "tokenizer.json"))
    return folder
