"""Training a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.errors import UserError

TEXT = "九格大模型 makes\n  code: x = 1\t深度🚀"


def test_a_trained_tokenizer_gives_back_every_text(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.bos_id not in tokenizer.encode(TEXT)
    assert tokenizer.vocab_size == 320
    assert {file.name for file in tokenizer.files} == {"tokenizer.json", "tokenizer_config.json"}


def test_transformers_reads_a_trained_tokenizer_and_begins_with_bos(tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tokenizer_path)(TEXT)["input_ids"]
    assert ids == [0, *load_tokenizer(tokenizer_path).encode(TEXT)]


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    assert train_tokenizer(["aaaa"], 10_000, tmp_path) < 300


def test_a_vocabulary_that_cannot_be_and_no_text_are_refused(tmp_path: Path) -> None:
    for size in (0, 257, -5, 10**23):
        with pytest.raises(UserError, match="vocab_size: found"):
            train_tokenizer(["text"], size, tmp_path / "t")
    with pytest.raises(UserError, match="there is no text"):
        train_tokenizer([], 300, tmp_path / "t")
    train_tokenizer(["text"], 300, tmp_path / "t")
    with pytest.raises(UserError, match="the folder is not empty"):
        train_tokenizer(["text"], 300, tmp_path / "t")


@pytest.mark.parametrize("word", ["[", "a", "汉", "7", " ", "_"])
def test_a_tokenizer_is_trained_on_words_without_an_end(tmp_path: Path, word: str) -> None:
    """Its time would grow with the square of their length: 100,000 letters took minutes."""
    count = train_tokenizer([word * 100_000, f"some text {word * 5000} more"], 300, tmp_path / "t")
    assert 258 <= count <= 300
    assert load_tokenizer(tmp_path / "t").encode(word * 3)


def test_ordinary_texts_train_the_tokenizer_that_they_did(tmp_path: Path, tokenizer_path: Path) -> None:
    from fm9g.data.encode.tokenizer_training import split_long_runs

    assert list(split_long_runs("")) == [""]
    assert list(split_long_runs("a b 汉字 __ 12\n" * 1000)) == ["a b 汉字 __ 12\n" * 1000]
    assert "".join(split_long_runs("x" * 10_000 + "y z")) == "x" * 10_000 + "y z"
