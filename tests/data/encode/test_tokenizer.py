"""Encoding a rendered chat: tokens before a border are those of the text before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizer_folders import SPECIAL, bpe, fast, llama

from fm9g.data.encode.encoder import Encoder
from fm9g.data.encode.template import Template
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_loading import load_tokenizer


def test_borders_cost_no_more_than_the_text_is_long(chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    text = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, Template("x", text, tokenizer.special_tokens))
    encoded, encode_chat = 0, type(tokenizer)._encode_chat

    def counted(self: Tokenizer, text: str, escaped: Any) -> Any:
        nonlocal encoded
        encoded += len(text)
        return encode_chat(self, text, escaped)

    monkeypatch.setattr(type(tokenizer), "_encode_chat", counted)
    costs = []
    for count in (20, 80):
        turns = [{"role": role, "content": f"fox {n} dogs"} for n in range(count) for role in ("user", "assistant")]
        chat = encoder.render({"messages": turns})
        encoded = 0
        encoder.tokenize([chat])
        costs.append(encoded / len(chat.samples[0].text))  # type: ignore[union-attr]
    assert costs[1] < 1.5 * costs[0]


@pytest.mark.parametrize("trim", [False, True])
def test_the_ids_before_a_border_are_those_of_the_text_before_it(tmp_path: Path, trim: bool) -> None:
    """A token across the border of prompt and answer would be one that the prompt does not end with."""
    from tokenizers import Tokenizer as Model

    folder = fast(tmp_path / "tokenizer")
    model = bpe(trim)
    model.add_special_tokens(SPECIAL)
    model.save(str(folder / "tokenizer.json"))
    assert Model.from_file(str(folder / "tokenizer.json")).encode("Yes Yes").tokens[-1].endswith("Yes")
    actual = load_tokenizer(folder)
    text = "x  # code Yes<|im_end|># code Yes there"
    borders = [text.index("Yes"), text.rindex("Yes")]
    in_one_go = actual.encode_chat(text)[0]
    ids, starts, indices = actual.encode_chat(text, borders)
    assert ids != in_one_go
    for border, index in zip(borders, indices):
        assert starts[index] == border
    assert ids[: indices[0]] == actual.encode_chat(text[: borders[0]])[0]
    assert ids[ids.index(actual.special_ids["<|im_end|>"]) : indices[1]] == actual.encode_chat("<|im_end|># code ")[0]
    assert actual.decode(ids) == actual.decode(in_one_go)
    # Where no token lies across it, nothing changes.
    text = "<|im_start|>assistant\nYes<|im_end|>"
    border = text.index("Yes")
    ids, _, (index,) = actual.encode_chat(text, [border])
    assert ids == actual.encode_chat(text)[0]
    assert index == 1 + len(actual.encode("assistant\n"))


@pytest.mark.parametrize("kind", ["2b", "llama"])
def test_an_answer_after_a_space_begins_without_another(shared: Path, tmp_path: Path, kind: str) -> None:
    """SentencePiece puts a space in front of a text; an answer goes on in a text, and has none."""
    folder = shared / "tokenizers" / "9g-2b" if kind == "2b" else llama(tmp_path / "tokenizer")
    actual = load_tokenizer(folder)
    text = "User: hi\nAssistant: Yes"
    ids, _, (index,) = actual.encode_chat(text, [text.index("Yes")])
    assert ids[:index] == actual.encode_chat("User: hi\nAssistant: ")[0]
    assert actual.decode(ids) == actual.decode(actual.encode_chat(text)[0])
    assert actual.decode(ids[index:]).strip() == "Yes"
    assert not actual.decode([*ids[:1], *ids[index:]]).endswith(" Yes")
