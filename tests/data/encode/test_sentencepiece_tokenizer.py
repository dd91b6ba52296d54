"""A bare SentencePiece model."""

from __future__ import annotations

from pathlib import Path

from fm9g.data.encode.tokenizer_loading import load_tokenizer

TEXT = "九格大模型 makes\n  code: x = 1\t深度🚀"


def test_the_2b_model_is_read(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "9g-2b" / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (122753, 1, 2)
    assert tokenizer.decode(tokenizer.encode("九格大模型")) == "九格大模型"
    assert max(tokenizer.encode(TEXT)) < 122753
