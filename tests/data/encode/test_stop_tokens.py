"""The tokens that end what a model generates."""

from __future__ import annotations

from pathlib import Path

from helpers.chat_mixtures import CHAT, words

from fm9g.data.encode.encoder import Encoder
from fm9g.data.encode.stop_tokens import stop_token_ids
from fm9g.data.encode.template import Template, load_template
from fm9g.data.encode.tokenizer_loading import load_tokenizer


def test_the_end_of_a_turn_ends_an_answer_and_eos_a_text(chat_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    own, llama2 = load_template("tokenizer", tokenizer), load_template("llama2", tokenizer)
    end, eos = tokenizer.special_ids["<|im_end|>"], tokenizer.eos_id
    for template, last in ((own, end), (llama2, eos), (load_template("llama", tokenizer), eos)):
        encoder = Encoder(tokenizer, template)
        assert encoder.tokenize([encoder.render(CHAT)])[0][-1] == last
    assert stop_token_ids(tokenizer, own) == [end, eos]
    assert stop_token_ids(tokenizer, llama2) == stop_token_ids(tokenizer, None) == [eos]
    # GLM-4's has no end of a turn: the next one begins.
    user = "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' }}{{ m.content }}{% endfor %}"
    template = Template("x", user, tokenizer.special_tokens)
    assert stop_token_ids(tokenizer, template) == [eos, tokenizer.special_ids["<|im_start|>"]]
    two = {"messages": CHAT["messages"] * 2}
    tokens = Encoder(tokenizer, template).tokenize([Encoder(tokenizer, template).render(two)])[0]
    assert words(tokenizer, tokens[tokens >= 0]) == "dogs<|im_start|>dogs<|endoftext|>"
