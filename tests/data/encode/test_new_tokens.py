"""New tokens: what a file of them may hold, and tokenizers of every layout that get them."""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import make_records
from helpers.tokenizer_folders import LAYOUTS

from fm9g.config.mixture import load_mixture
from fm9g.data.encode.new_tokens import fresh_tokens, new_token_files, read_new_tokens
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError

TOKENS = ("<new>", "新词", "a b")
TEXT = "x<new>y 新词z a bc <new>"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_are_read_as_transformers_reads_them_and_so_are_the_written_files(tmp_path: Path, layout: str) -> None:
    from transformers import AutoTokenizer

    folder = LAYOUTS[layout](tmp_path / "t")
    before, tokenizer = load_tokenizer(folder), load_tokenizer(folder, TOKENS)
    reference = AutoTokenizer.from_pretrained(folder)
    reference.add_tokens(list(TOKENS))
    assert list(tokenizer.encode(TEXT)) == reference.encode(TEXT, add_special_tokens=False)
    first = before.vocab_size
    assert fresh_tokens(tokenizer) == {token: first + i for i, token in enumerate(TOKENS)}
    assert (tokenizer.new_ids, tokenizer.vocab_size) == (range(first, first + 3), first + 3)
    assert set(tokenizer.new_ids) <= set(tokenizer.encode(TEXT))
    assert tokenizer.special_ids == before.special_ids
    assert list(tokenizer.encode("plain text, no more")) == list(before.encode("plain text, no more"))
    in_worker = pickle.loads(pickle.dumps(tokenizer))
    assert list(in_worker.encode(TEXT)) == list(tokenizer.encode(TEXT))

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    files = new_token_files(tokenizer)
    for name, text in files.items():
        (copy / name).write_text(text, encoding="utf-8")
    assert read_new_tokens(copy / "new_tokens.txt") == TOKENS
    for again in (load_tokenizer(copy), load_tokenizer(copy, TOKENS)):
        assert list(again.encode(TEXT)) == list(tokenizer.encode(TEXT))
        assert again.vocab_size == tokenizer.vocab_size
        assert again.new_ids == range(0)


def test_tokens_that_are_known_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = LAYOUTS["tokenizer.json"](tmp_path / "t")
    size = load_tokenizer(folder).vocab_size
    tokenizer = load_tokenizer(folder, ["<think>", "<new>", "</s>"])
    assert fresh_tokens(tokenizer) == {"<new>": size}
    assert f"new_tokens: '<think>', '</s>' in the vocabulary of {folder} already" in caplog.text
    tokenizer = load_tokenizer(folder, ["<think>"])
    assert (tokenizer.vocab_size, fresh_tokens(tokenizer)) == (size, {})
    assert list(new_token_files(tokenizer)) == ["new_tokens.txt"]
    assert "all of them are in the vocabulary" in caplog.text


def test_a_file_is_one_token_per_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens.txt"
    file.write_bytes("\ufeff<a>\r\n\n  新 词 \n<b>\u2028\n<a>\n".encode())
    assert read_new_tokens(file) == ("<a>", "新 词", "<b>")
    assert "'<a>' is there more than once" in caplog.text
    for content, message in ((b" \n\n", "holds no token"), (b"ok\n\xff", "not UTF-8, at byte 3")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"new_tokens: .*tokens.txt: {message}"):
            read_new_tokens(file)
    with pytest.raises(UserError, match="no such file; expected a text file with one token per line"):
        read_new_tokens(tmp_path)


def test_token_caches_and_resumed_runs_know_them(make_mixture: Callable[..., Path], tokenizer_path: Path) -> None:
    configs = load_mixture(make_mixture({"a": make_records(5)}))
    keys = [
        Mixture(configs, load_tokenizer(tokenizer_path, tokens), 64, 0).cache_key(0)["tokenizer"]
        for tokens in ((), TOKENS, TOKENS[::-1], ["</s>"])
    ]
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]  # a known token changes nothing


def test_vocabularies_without_a_configuration_take_none(shared: Path) -> None:
    for name, message in (("9g-8b", "vocab.txt is a vocabulary alone.*no class of transformers"), ("9g-2b", "convert")):
        with pytest.raises(UserError, match=message):
            load_tokenizer(shared / "tokenizers" / name, ["<new>"])
