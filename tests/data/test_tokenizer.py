"""The three kinds of tokenizer, on the real ones where they are at hand."""

import json
from pathlib import Path

import pytest

from fm9g.data.encode.tokenizer import load_tokenizer, train_tokenizer
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


def test_the_2b_model_is_read(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / "9g-2b" / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (122753, 1, 2)
    assert tokenizer.decode(tokenizer.encode("九格大模型")) == "九格大模型"
    assert max(tokenizer.encode(TEXT)) < 122753


def test_the_8b_vocabulary_matches_the_longest_word_first(shared: Path) -> None:
    file = shared / "tokenizers" / "9g-8b" / "vocab.txt"
    tokenizer = load_tokenizer(file.parent)
    words = [json.loads(line) for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert tokenizer.vocab_size == 119696
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert words[tokenizer.encode("<!---x")[0]] == "<!---"
    rocket = [words[i] for i in tokenizer.encode("🚀")]
    assert rocket in (["🚀"], ["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>"])
    # Letters that spell a special token or a byte are letters.
    assert tokenizer.bos_id not in tokenizer.encode("<s>")
    assert tokenizer.decode(tokenizer.encode("<0x41></s>")) == "<0x41></s>"


def test_greedy_matching_and_bytes_on_a_small_vocabulary(tmp_path: Path) -> None:
    words = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "a", "ab", "abcd"]
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(json.dumps(word) for word in words))
    tokenizer = load_tokenizer(file)
    spelt = [words[i] for i in tokenizer.encode("abcabcdé")]
    assert spelt == ["ab", "<0x63>", "abcd", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("vocab.txt", '"a"\noops', "vocab.txt, line 2: not a JSON string"),
        ("vocab.txt", '"a"', "'<s>' is missing"),
        ("tokenizer.model", "junk", "not a tokenizer that can be read"),
        ("tokenizer.json", "junk", "not a tokenizer that can be read"),
        ("other.txt", "", "no tokenizer here"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=expected):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_and_a_missing_end_token_are_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    with pytest.raises(UserError, match="set tokenizer_path"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_path / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="eos_token: missing"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_that_cannot_be_and_no_text_are_refused(tmp_path: Path) -> None:
    for size in (0, 257, -5, 10**23):
        with pytest.raises(UserError, match="vocab_size: found"):
            train_tokenizer(["text"], size, tmp_path / "t")
    with pytest.raises(UserError, match="there is no text"):
        train_tokenizer([], 300, tmp_path / "t")
    train_tokenizer(["text"], 300, tmp_path / "t")
    with pytest.raises(UserError, match="the folder holds something"):
        train_tokenizer(["text"], 300, tmp_path / "t")


@pytest.mark.parametrize("word", ["[", "a", "汉", "7", " ", "_"])
def test_a_tokenizer_is_trained_on_words_without_an_end(tmp_path: Path, word: str) -> None:
    """Its time would grow with the square of their length: 100,000 letters took minutes."""
    count = train_tokenizer([word * 100_000, f"some text {word * 5000} more"], 300, tmp_path / "t")
    assert 258 <= count <= 300
    assert load_tokenizer(tmp_path / "t").encode(word * 3)


def test_ordinary_texts_train_the_tokenizer_that_they_did(tmp_path: Path, tokenizer_path: Path) -> None:
    from fm9g.data.encode.tokenizer import _split_long_runs

    assert list(_split_long_runs("")) == [""]
    assert list(_split_long_runs("a b 汉字 __ 12\n" * 1000)) == ["a b 汉字 __ 12\n" * 1000]
    assert "".join(_split_long_runs("x" * 10_000 + "y z")) == "x" * 10_000 + "y z"
