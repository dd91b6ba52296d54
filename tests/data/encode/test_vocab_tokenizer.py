"""A 9G word list, matched greedily."""

from __future__ import annotations

import json
from pathlib import Path

from fm9g.data.encode.tokenizer_loading import load_tokenizer

TEXT = "九格大模型 makes\n  code: x = 1\t深度🚀"


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
