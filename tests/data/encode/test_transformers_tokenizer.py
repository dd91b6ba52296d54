"""Tokenizer folders of every layout give the ids that transformers gives, and text stays text."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizer_folders import LAYOUTS, SPECIAL, fast, qwen2, write

from fm9g.data.encode.template import load_template
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError

TEXTS = [
    "plain text",
    " leading and  double spaces \n\n",
    "深度学习 模型🚀 é 123456",
    "def f(x):\n\treturn x  # code",
    "Yes",
    "",
]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "深度 q?"},
    {"role": "assistant", "content": "a\n\nb"},
]


def open_both(folder: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_transformers(tmp_path: Path, layout: str) -> None:
    folder = LAYOUTS[layout](tmp_path / "tokenizer")
    actual, reference = open_both(folder)
    assert actual.eos_id == reference.eos_token_id
    assert actual.special_tokens == reference.special_tokens_map
    assert actual.vocab_size == len(reference)
    for text in TEXTS:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert list(actual.encode(text)) == ids
        assert [list(found) for found in actual.encode_batch([text, text])] == [ids, ids]
        full = reference(text)["input_ids"]
        assert [*actual.prefix_ids, *ids, *actual.suffix_ids] in (full, [*full, actual.eos_id])
        assert actual.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    template = load_template("tokenizer", actual)
    text = reference.apply_chat_template(CHAT, tokenize=False)
    assert template.render(CHAT) == text
    assert actual.encode_chat(text)[0] == reference.apply_chat_template(CHAT, return_dict=False)
    copied = pickle.loads(pickle.dumps(actual))
    assert copied.encode_chat(text) == actual.encode_chat(text)
    # A copy of the files that it names is the same tokenizer.
    (tmp_path / "copy").mkdir()
    for file in actual.files:
        shutil.copyfile(file, tmp_path / "copy" / file.name)
    assert load_tokenizer(tmp_path / "copy").encode_chat(text) == actual.encode_chat(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_spelling_of_a_special_token_in_a_text_stays_text(tmp_path: Path, layout: str) -> None:
    actual, reference = open_both(LAYOUTS[layout](tmp_path / "tokenizer"))
    special = [text for text in SPECIAL if text in actual.special_ids]
    assert len(special) >= 1
    for text in special:
        plain = f"Price: {text}12 EUR{text}"
        ids = list(actual.encode(plain))
        if text in actual.unescapable_tokens:  # a unigram model has it as a word, whatever is done
            assert "unigram" in layout
            continue
        assert actual.special_ids[text] not in ids
        assert ids == reference(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # In a chat, where the others are tokens: the same letters in the same place.
        chat = f"{special[0]}user\na {text} b{special[0]}"
        start = chat.index(text, len(special[0]))
        ids, starts, _ = actual.encode_chat(chat, escaped=[(start, start + len(text))])
        special_ids = [i for i, token in enumerate(ids) if token in actual.special_ids.values()]
        assert [ids[i] for i in special_ids] == [actual.special_ids[special[0]]] * 2
        assert [starts[i] for i in special_ids] == [0, len(chat) - len(special[0])]
        assert text in reference.decode(ids[1:-1]).replace(" ", "")


def test_chat_templates_are_found_where_transformers_looks(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b{{ tools | length }}"}]
    in_config = fast(tmp_path / "in-config", chat_template=named)
    in_file = fast(tmp_path / "in-file", chat_template="not this one")
    write(in_file, chat_template__jinja="a")
    in_folder = fast(tmp_path / "in-folder")
    write(in_folder, chat_template__jinja="a")
    write(in_folder / "additional_chat_templates", tool_use__jinja="b{{ tools | length }}")
    for folder in (in_config, in_file, in_folder):
        actual, reference = open_both(folder)
        template = load_template("tokenizer", actual)
        for tools in (None, [{"name": "x"}]):
            assert template.render(CHAT, tools) == reference.apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert {file.name for file in actual.files} >= {"chat_template.jinja", "tool_use.jinja"}


def test_a_pad_token_that_a_class_adds_by_itself_is_no_part_of_the_vocabulary(tmp_path: Path) -> None:
    folder = qwen2(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    first, *others = sorted(config["added_tokens_decoder"], key=int)
    names = [config["added_tokens_decoder"][key] for key in others]
    del config["pad_token"]
    config["added_tokens_decoder"] = {str(int(first) + i): name for i, name in enumerate(names)}
    write(folder, tokenizer_config__json=config)
    actual, reference = open_both(folder)
    assert reference.pad_token == "<|endoftext|>"  # Qwen2Tokenizer's default, behind all others
    assert actual.vocab_size == reference.pad_token_id == len(reference) - 1
    assert max(actual.encode("a<|endoftext|>b")) < actual.vocab_size  # where a text spells it
    chat = "<|im_start|>a<|endoftext|>b"
    escaped = [match.span() for match in actual.special_pattern.finditer(chat)][1:]
    assert max(actual.encode_chat(chat, escaped=escaped)[0]) < actual.vocab_size


def test_code_that_lies_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "own",
        tokenizer_config__json={
            "tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]},
            "eos_token": "x",
        },
        code__py=f"open({str(tmp_path / 'was-run')!r}, 'w')",
        own__tiktoken="YQ== 0",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"its tokenizer is Python code in the folder \(OwnTokenizer\), which fm9g does not run"
    ):
        load_tokenizer(folder)
    assert not (tmp_path / "was-run").exists()


def test_a_tiktoken_file_opens_as_transformers_opens_it(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    import base64

    ranks = [bytes([byte]) for byte in range(256)] + [b"pl", b"ai", b"plai"]
    lines = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    added = {"259": {"content": "<|im_end|>", "special": True}}
    folder = write(tmp_path / "t", tokenizer_config__json={**settings, "added_tokens_decoder": added})
    (folder / "tokenizer.model").write_text(lines)
    actual, reference = open_both(folder)
    assert list(actual.encode("plain text")) == reference("plain text", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tokenizer_that_was_used_encodes_the_same_in_another_process(tmp_path: Path, layout: str) -> None:
    """What a text spells stays text there, too: workers get the tokenizer as it is after its first records."""
    actual = load_tokenizer(LAYOUTS[layout](tmp_path / "tokenizer"))
    spelling = actual.eos_token
    text = f"{spelling}what is {spelling}?{spelling}"
    start = text.index(spelling, 1)
    escaped = [(start, start + len(spelling))]
    before = actual.encode_chat(text, (), escaped)
    assert before[0].count(actual.eos_id) == 2
    assert pickle.loads(pickle.dumps(actual)).encode_chat(text, (), escaped) == before
