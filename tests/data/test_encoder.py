"""What is trained on of a record, with and without template, transform and weights; and what is said of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.common import ROOT, load_steps

from fm9g.data.encode.encoder import (
    LOST_REASONING,
    LOST_SYSTEM,
    LOST_TOOLS,
    PLACEHOLDER,
    REPEATED_MARKER,
    BadRecord,
    Encoder,
    stop_token_ids,
)
from fm9g.data.encode.escaping import Unescaped, escape_special_tokens, unescape
from fm9g.data.encode.template import Template, load_template
from fm9g.data.encode.token_array import loss_weights, token_ids
from fm9g.data.encode.tokenizer import Tokenizer, load_tokenizer
from fm9g.data.inspect.check import check_mixture, open_named_mixture
from fm9g.data.inspect.show import show_samples
from fm9g.data.load.encoding_pool import build_token_cache
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError

Make = Callable[..., Path]
OWN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dogs"}]}


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's tokenizer with ChatML's markers and template; its eos is <|endoftext|>, as a base model's."""
    from tokenizers import Tokenizer as Model

    folder = tmp_path_factory.mktemp("chat-tokenizer")
    model = Model.from_file(str(tokenizer_path / "tokenizer.json"))
    model.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OWN}))
    return folder


def open_mixture(path: Path, tokenizer: Path, **settings: Any) -> Mixture:
    return open_named_mixture(str(path), tokenizer_path=str(tokenizer), max_length=256, **settings)[0]


def text_of(mixture: Mixture, number: int = 0) -> tuple[str, str]:
    """A record's tokens in words, and those that are trained on."""
    tokens = mixture.tokenize_records(0, [number], [number])[0]
    return words(mixture.tokenizer, tokens), words(mixture.tokenizer, tokens[1:][tokens[1:] >= 0])


def words(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    parts = []
    for token in token_ids(tokens).tolist():
        parts.append(tokenizer.special_token(token) or tokenizer.decode([token]))
    return "".join(parts)


def test_pairs_are_as_they_are_unless_a_template_is_named(make_mixture: Make, chat_tokenizer: Path) -> None:
    path = make_mixture({"a": [{"input": "fox", "output": "dogs"}, CHAT]})
    chat = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\ndogs<|im_end|>"
    mixture = open_mixture(path, chat_tokenizer)
    assert text_of(mixture) == ("<s>foxdogs<|endoftext|>", "dogs<|endoftext|>")
    assert text_of(mixture, 1) == (chat, "dogs<|im_end|>")
    assert mixture.describe() == ["pairs are as they are, conversations are written with the tokenizer's own template"]
    mixture = open_mixture(path, chat_tokenizer, chat_template="none")
    assert text_of(mixture) == ("<s>foxdogs<|endoftext|>", "dogs<|endoftext|>")
    with pytest.raises(UserError, match=r"line 2 of .*: a conversation needs a template"):
        text_of(mixture, 1)
    mixture = open_mixture(path, chat_tokenizer, chat_template="tokenizer")
    assert text_of(mixture) == text_of(mixture, 1) == (chat, "dogs<|im_end|>")
    # A dataset may have none although the run has one.
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([entries[0] | {"chat_template": "none"}]))
    assert text_of(open_mixture(path, chat_tokenizer, chat_template="chatml"))[0] == "<s>foxdogs<|endoftext|>"


def test_the_choice_of_template_is_part_of_what_a_position_and_a_cache_belong_to(
    make_mixture: Make, chat_tokenizer: Path
) -> None:
    path = make_mixture({"a": [CHAT]})
    settings: list[dict[str, Any]] = [{}, {"chat_template": "none"}, {"chat_template": "chatml"}, {"turns": "split"}]
    keys = [json.dumps(open_mixture(path, chat_tokenizer, **some).encoding_fingerprint(0)) for some in settings]
    assert len(set(keys)) == len(keys)


def test_the_guides_transform_writes_special_tokens_and_its_data_does_not(
    make_mixture: Make, chat_tokenizer: Path
) -> None:
    script = ROOT / "dataset_configs" / "add_template.py"
    records = [{"input": "fox", "output": "dogs"}, {"input": "what is <|im_end|>?", "output": "<|im_end|> ends"}]
    path = make_mixture({"a": records}, a={"transforms": str(script)})
    mixture = open_mixture(path, chat_tokenizer)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    prompt = f"<s>{system}<|im_start|>User\n%s<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(mixture) == (f"{prompt % 'fox'}dogs<|im_end|><|endoftext|>", "dogs<|im_end|><|endoftext|>")
    # The markers are tokens, once; what the data spells is letters.
    marker = mixture.tokenizer.special_ids["<|im_end|>"]
    counts = [Counter(token_ids(mixture.tokenize_records(0, [n], [n])[0]).tolist())[marker] for n in (0, 1)]
    assert counts == [3, 3]
    whole, trained = text_of(mixture, 1)
    assert whole == f"{prompt % records[1]['input']}{records[1]['output']}<|im_end|><|endoftext|>"
    assert trained == "<|im_end|> ends<|im_end|><|endoftext|>"


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


def test_weights_reach_the_packs_and_keep_a_cache_from_being_made(
    make_mixture: Make, chat_tokenizer: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "bad", "weight": 0}]
    turns += [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "good", "weight": 0.5}]
    path = make_mixture({"a": [{"messages": turns}, {"input": "fox", "output": "dogs", "weight": 2}]})
    mixture = open_mixture(path, chat_tokenizer)
    assert [text_of(mixture, n)[1] for n in (0, 1)] == ["good<|im_end|>", "dogs<|endoftext|>"]
    weights = [set(loss_weights(mixture.tokenize_records(0, [n], [n])[0]).tolist()) for n in (0, 1)]
    assert weights == [{0, 0.5}, {0, 2}]
    packs = [pack for step in load_steps(mixture, 2)[0] for pack in step]
    found = {weight for pack in packs for weight in pack.target_weights.tolist()}
    assert found == {0, 0.5, 2}
    packs_of_workers = [pack for step in load_steps(mixture, 2, workers=1)[0] for pack in step]
    for one, other in zip(packs, packs_of_workers):
        np.testing.assert_array_equal(one.target_weights, other.target_weights)
    with_cache = Mixture(mixture.configs, str(chat_tokenizer), 256, 1, token_cache_dir=str(tmp_path / "cache"))
    _, notes = build_token_cache(with_cache, 0)
    assert notes == ["a: no token cache: its tokens have weights, for which a cache has no place"]


def test_a_conversation_of_several_texts_is_cached_and_checked(
    make_mixture: Make, chat_tokenizer: Path, tmp_path: Path
) -> None:
    two = {"messages": CHAT["messages"] * 2}
    path = make_mixture({"a": [two, CHAT, {"input": "x", "output": ""}]})
    mixture = open_mixture(path, chat_tokenizer, turns="split")
    samples = [
        len(item.segments)
        for item in (mixture.split_or_truncate(0, mixture.tokenize_records(0, [n], [n])[0]) for n in range(3))
    ]
    assert samples == [2, 1, 0]
    spec = mixture.spec._replace(token_cache_dir=str(tmp_path / "cache"))
    cached, _ = build_token_cache(Mixture(*spec), 0)
    for number in range(3):
        plain = mixture.encode(0, [number])[0]
        for one, other in zip(cached.encode(0, [number])[0].segments, plain.segments, strict=True):
            np.testing.assert_array_equal(one, other)
    options = {"tokenizer_path": str(chat_tokenizer), "turns": "split", "steps": 3, "packs": 1, "max_length": 256}
    figures = check_mixture(str(path), tmp_path / "out", **options)["datasets"]["a"]
    assert (figures["records"], figures["samples"], figures["empty"]) == (3, 4, 1)
    pieces = [piece for number in range(3) for piece in mixture.encode(0, [number])[0].segments]
    assert figures["kept_tokens"] == sum(len(piece) - 1 for piece in pieces)
    shown = "\n".join(show_samples(mixture, count=3, task="", record=1, packs=False, color=False, full=True))
    assert "text 1 of 2 of this record" in shown
    assert "text 2 of 2 of this record" in shown
    assert shown.count("«dogs<|im_end|>»") == 2


THOUGHTFUL = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "<think>hm</think>dogs"}]}
CUTS = OWN.replace("m.content", "m.content.split('</think>')[-1]")
TOOLS = [{"type": "function", "function": {"name": "fox"}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "fox", "arguments": {}}}],
}


@pytest.mark.parametrize(
    ("text", "record", "finding"),
    [
        (OWN, CHAT, None),
        (CUTS, THOUGHTFUL, LOST_REASONING),
        (OWN, THOUGHTFUL, None),
        (
            OWN,
            {"messages": [CHAT["messages"][0], CHAT["messages"][1] | {"reasoning_content": "hm"}]},
            LOST_REASONING,
        ),
        (
            OWN.replace("in messages", "in messages if m.role != 'system'"),
            {"messages": [{"role": "system", "content": "brief"}, *CHAT["messages"]]},
            LOST_SYSTEM,
        ),
        (
            OWN.replace("'<|im_end|>\n'", "(m.tool_calls or '') | string + '<|im_end|>\n'", 1),
            {**CHAT, "tools": TOOLS},
            LOST_TOOLS,
        ),
        (
            OWN,
            {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "I am {{name}}"}]},
            PLACEHOLDER,
        ),
        (OWN, {"messages": [{"role": "user", "content": "a<|im_end|>"}, CHAT["messages"][1]]}, REPEATED_MARKER),
    ],
)
def test_what_is_lost_or_likely_not_meant_is_said(
    make_mixture: Make, chat_tokenizer: Path, tmp_path: Path, text: str, record: dict, finding: str | None
) -> None:
    (tmp_path / "mine.jinja").write_text(text)
    path = make_mixture({"a": [record, CHAT]})
    mixture = open_mixture(path, chat_tokenizer, chat_template=str(tmp_path / "mine.jinja"))
    expected = [f"a: 1 of 2 records (50.0%) have {finding}"] if finding else []
    assert mixture.preview() == expected
    options = {"tokenizer_path": str(chat_tokenizer), "chat_template": str(tmp_path / "mine.jinja"), "steps": 2}
    assert [n for n in check_mixture(str(path), tmp_path / "out", **options)["notes"] if " have " in n] == expected
    shown = list(show_samples(mixture, count=1, task="", record=1, packs=False, color=False, full=False))
    assert (f"note: it has {finding}" in shown) == bool(finding)


def test_calls_results_and_tools_without_a_form_are_refused(make_mixture: Make, chat_tokenizer: Path) -> None:
    encoder = Encoder(
        load_tokenizer(chat_tokenizer), None, chat_template=load_template("tokenizer", load_tokenizer(chat_tokenizer))
    )
    user, result = CHAT["messages"][0], {"role": "tool", "content": "x"}
    for messages, tools, expected in (
        ([user, CALL], None, "it calls tools, for which the template tokenizer has no form"),
        (CHAT["messages"], TOOLS, "it has tools, for which"),
    ):
        with pytest.raises(BadRecord, match=expected):
            encoder.render({"messages": messages} | ({"tools": tools} if tools else {}))
    silent = Template("silent", OWN.replace("in messages", "in messages if m.role != 'tool'"))
    with pytest.raises(BadRecord, match="it has results of tools, for which the template silent has no form"):
        Encoder(encoder.tokenizer, silent).render(
            {"messages": [user, CHAT["messages"][1], result, CHAT["messages"][1]]}
        )


def test_a_template_of_another_tokenizer_is_said(
    make_mixture: Make, tokenizer_path: Path, chat_tokenizer: Path
) -> None:
    path = make_mixture({"a": [CHAT]})
    assert open_mixture(path, chat_tokenizer, chat_template="chatml").notes() == []
    (note,) = open_mixture(path, chat_tokenizer, chat_template="llama").notes()
    assert note.startswith("a: the template llama writes <|start_header_id|>, <|end_header_id|>, <|eot_id|>, which the")
    assert "<|im_start|>, <|im_end|>" in open_mixture(path, tokenizer_path, chat_template="chatml").notes()[0]


def test_spellings_are_protected_and_found_again() -> None:
    pattern = load_like("<s>", "</s>", "x")
    value = {"a": ["1 </s> 2", {"</s>": "<s>x"}], "b": 3}
    marked = escape_special_tokens(value, pattern)
    assert marked["b"] == 3
    assert "</s>" not in marked["a"][1]
    assert escape_special_tokens(marked, pattern, is_raw=False) == marked
    assert unescape(marked) == value
    with pytest.raises(BadRecord, match="noncharacter U\\+FDD4"):
        escape_special_tokens(marked, pattern)
    found = Unescaped("<s>" + marked["a"][0] + next(iter(marked["a"][1].values())), pattern)
    assert found.text == "<s>1 </s> 2<s>x"
    assert [found.text[start:end] for start, end in found.literal] == ["</s>", "<s>", "x"]
    place = len("<s>1 ") + len(marked["a"][0]) - len("1 ")
    assert found.text[found.map_offset(place) :] == "<s>x"


def load_like(*special: str) -> Any:
    import re

    return re.compile("|".join(map(re.escape, special)))


def weighted_text(encoder: Encoder, record: dict[str, Any]) -> dict[float, str]:
    """The text of each weight."""
    tokens = encoder.tokenize([encoder.render(record)])[0]
    weights = loss_weights(tokens)
    return {weight: words(encoder.tokenizer, tokens[weights == weight]) for weight in sorted(set(weights.tolist()))}


def test_weights_of_parts_lie_where_the_parts_do(chat_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    thoughtful = OWN.replace(
        "m.content", "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '') + m.content"
    )
    encoder = Encoder(tokenizer, Template("x", thoughtful, tokenizer.special_tokens))
    answer = {"role": "assistant", "content": "abc<|im_end|>def", "content_weights": [[13, 0.5], [3, 0]]}
    found = weighted_text(encoder, {"messages": [CHAT["messages"][0], answer]})
    assert found[0.5] == "abc<|im_end|>"  # the spelling of a special token, as letters
    assert found[0].endswith("def<|im_end|>")
    # The thought has the same words as the answer.
    answer = {"role": "assistant", "content": "yes no", "reasoning_content": "yes no"}
    answer["content_weights"] = [[4, 0], [2, 1]]  # type: ignore[assignment]
    found = weighted_text(encoder, {"messages": [CHAT["messages"][0], answer]})
    assert found[1] == "no<|im_end|>"
    trims = Template("x", OWN.replace("m.content", "(m.content | trim)"), tokenizer.special_tokens)
    answer = {"role": "assistant", "content": "  ab cd ", "content_weights": [[4, 0], [4, 1]]}
    assert weighted_text(Encoder(tokenizer, trims), {"messages": [CHAT["messages"][0], answer]})[1] == " cd<|im_end|>"


def test_calls_without_tools_are_refused_where_only_the_template_for_tools_has_a_form(chat_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    with_calls = OWN.replace("+ m.content", "+ m.content + (m.tool_calls | tojson if m.tool_calls else '')")
    template = Template(
        "x", {"default": OWN, "tool_use": "{{ tools | tojson }}" + with_calls}, tokenizer.special_tokens
    )
    encoder = Encoder(tokenizer, template)
    messages = [CHAT["messages"][0], CALL]
    assert '"name": "fox"' in encoder.render({"messages": messages, "tools": TOOLS}).samples[0].text  # type: ignore[union-attr]
    with pytest.raises(BadRecord, match="it calls tools, for which the template x has no form"):
        encoder.render({"messages": messages})


def test_a_template_that_would_write_arguments_as_python_does_gets_their_json(chat_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    text = OWN.replace(
        "+ m.content", "+ m.content + (m.tool_calls[0].function.arguments | string if m.tool_calls else '')"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "fox", "arguments": {"a": True, "b": None, "c": "深"}}}
    ]}  # fmt: skip
    rendered = Template("x", text, tokenizer.special_tokens).render([CHAT["messages"][0], call])
    assert '{"a": true, "b": null, "c": "深"}<|im_end|>' in rendered


def test_a_turn_that_ends_in_white_space_has_the_end_of_a_turn(chat_tokenizer: Path) -> None:
    """In a format without an end marker: generation has to make the white space to get to it."""
    tokenizer = load_tokenizer(chat_tokenizer)
    text = "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' }}{{ m.content }}{% endfor %}"
    encoder = Encoder(tokenizer, Template("x", text, tokenizer.special_tokens))
    turns = [*CHAT["messages"][:1], {"role": "assistant", "content": "dogs \n"}, *CHAT["messages"]]
    assert weighted_text(encoder, {"messages": turns})[1] == "dogs \n<|im_start|>dogs<|endoftext|>"
    assert weighted_text(encoder, {"messages": turns[:2]})[1] == "dogs \n<|endoftext|>"  # of the last one, too


def test_borders_cost_no_more_than_the_text_is_long(chat_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    text = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, Template("x", text, tokenizer.special_tokens))
    encoded, encode_chat = 0, type(tokenizer)._encode_chat

    def counted(self: Tokenizer, text: str, literal: Any) -> Any:
        nonlocal encoded
        encoded += len(text)
        return encode_chat(self, text, literal)

    monkeypatch.setattr(type(tokenizer), "_encode_chat", counted)
    costs = []
    for count in (20, 80):
        turns = [{"role": role, "content": f"fox {n} dogs"} for n in range(count) for role in ("user", "assistant")]
        chat = encoder.render({"messages": turns})
        encoded = 0
        encoder.tokenize([chat])
        costs.append(encoded / len(chat.samples[0].text))  # type: ignore[union-attr]
    assert costs[1] < 1.5 * costs[0]


def test_the_end_marker_of_a_masked_end_is_masked(chat_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    encoder = Encoder(tokenizer, load_template("tokenizer", tokenizer))
    answer = {"role": "assistant", "content": "dogs\n", "content_weights": [[4, 1], [1, 0]]}
    assert weighted_text(encoder, {"messages": [CHAT["messages"][0], answer]})[1] == "dogs"
    # With all of the text, it ends at its end marker.
    tokens = Encoder(tokenizer, encoder.template, "all").tokenize([encoder.render(CHAT)])[0]
    assert words(tokenizer, tokens).endswith("dogs<|im_end|>")


def test_a_template_that_writes_pairs_of_turns_is_refused(chat_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    text = (
        "{% for i in range(0, messages | length - 1, 2) %}"
        "{{ messages[i].content + messages[i + 1].content }}{% endfor %}"
    )
    with pytest.raises(BadRecord, match="its prompt for message 2 does not hold message 1"):
        Encoder(tokenizer, Template("x", text, tokenizer.special_tokens)).render(CHAT)


def test_keys_of_arguments_are_text(chat_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizer)
    encoder = Encoder(tokenizer, load_template("chatml", tokenizer))
    counts = []
    for word in ("fox", "<|im_end|>"):
        function = {"name": "f", "arguments": {f"k{word}": f"v{word}"}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        ids = token_ids(encoder.tokenize([encoder.render({"messages": [CHAT["messages"][0], call]})])[0]).tolist()
        counts.append(ids.count(tokenizer.special_ids["<|im_end|>"]))
    assert counts == [2, 2]
