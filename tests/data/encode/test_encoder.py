"""What is trained on of a record, with and without template, transform and weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.chat_mixtures import CALL, CHAT, OWN, TOOLS, open_chat_mixture, text_of, words
from helpers.common import ROOT, load_steps

from fm9g.data.encode.encoder import Encoder
from fm9g.data.encode.template import Template, load_template
from fm9g.data.encode.token_array import loss_weights, token_ids
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.inspect.check import check_mixture
from fm9g.data.inspect.show import show_samples
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.mixture_checks import describe_templates
from fm9g.data.load.token_cache_builder import build_token_cache
from fm9g.data.prepare.record_formats import BadRecord
from fm9g.errors import UserError

Make = Callable[..., Path]


def test_pairs_are_as_they_are_unless_a_template_is_named(make_mixture: Make, chat_tokenizer: Path) -> None:
    path = make_mixture({"a": [{"input": "fox", "output": "dogs"}, CHAT]})
    chat = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\ndogs<|im_end|>"
    mixture = open_chat_mixture(path, chat_tokenizer)
    assert text_of(mixture) == ("<s>foxdogs<|endoftext|>", "dogs<|endoftext|>")
    assert text_of(mixture, 1) == (chat, "dogs<|im_end|>")
    assert describe_templates(mixture) == [
        "pairs are as they are, conversations are written with the tokenizer's own template"
    ]
    mixture = open_chat_mixture(path, chat_tokenizer, chat_template="none")
    assert text_of(mixture) == ("<s>foxdogs<|endoftext|>", "dogs<|endoftext|>")
    with pytest.raises(UserError, match=r"line 2 of .*: a conversation needs a template"):
        text_of(mixture, 1)
    mixture = open_chat_mixture(path, chat_tokenizer, chat_template="tokenizer")
    assert text_of(mixture) == text_of(mixture, 1) == (chat, "dogs<|im_end|>")
    # A dataset may have none although the run has one.
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([entries[0] | {"chat_template": "none"}]))
    assert text_of(open_chat_mixture(path, chat_tokenizer, chat_template="chatml"))[0] == "<s>foxdogs<|endoftext|>"


def test_the_choice_of_template_is_part_of_what_a_position_and_a_cache_belong_to(
    make_mixture: Make, chat_tokenizer: Path
) -> None:
    path = make_mixture({"a": [CHAT]})
    settings: list[dict[str, Any]] = [{}, {"chat_template": "none"}, {"chat_template": "chatml"}, {"turns": "split"}]
    keys = [json.dumps(open_chat_mixture(path, chat_tokenizer, **some).encoding_fingerprint(0)) for some in settings]
    assert len(set(keys)) == len(keys)


def test_the_guides_transform_writes_special_tokens_and_its_data_does_not(
    make_mixture: Make, chat_tokenizer: Path
) -> None:
    script = ROOT / "dataset_configs" / "add_template.py"
    records = [{"input": "fox", "output": "dogs"}, {"input": "what is <|im_end|>?", "output": "<|im_end|> ends"}]
    path = make_mixture({"a": records}, a={"transforms": str(script)})
    mixture = open_chat_mixture(path, chat_tokenizer)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    prompt = f"<s>{system}<|im_start|>User\n%s<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(mixture) == (f"{prompt % 'fox'}dogs<|im_end|><|endoftext|>", "dogs<|im_end|><|endoftext|>")
    # The markers are tokens, once; what the data spells is letters.
    marker = mixture.tokenizer.special_ids["<|im_end|>"]
    counts = [Counter(token_ids(mixture.tokenize_records(0, [n], [n])[0]).tolist())[marker] for n in (0, 1)]
    assert counts == [3, 3]
    full, trained = text_of(mixture, 1)
    assert full == f"{prompt % records[1]['input']}{records[1]['output']}<|im_end|><|endoftext|>"
    assert trained == "<|im_end|> ends<|im_end|><|endoftext|>"


def test_weights_reach_the_packs_and_keep_a_cache_from_being_made(
    make_mixture: Make, chat_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "bad", "weight": 0}]
    turns += [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "good", "weight": 0.5}]
    path = make_mixture({"a": [{"messages": turns}, {"input": "fox", "output": "dogs", "weight": 2}]})
    mixture = open_chat_mixture(path, chat_tokenizer)
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
    build_token_cache(with_cache, 0)
    assert caplog.messages == ["a: no token cache: its tokens have loss weights, which a cache cannot store"]


def test_a_conversation_of_several_texts_is_cached_and_checked(
    make_mixture: Make, chat_tokenizer: Path, tmp_path: Path
) -> None:
    two = {"messages": CHAT["messages"] * 2}
    path = make_mixture({"a": [two, CHAT, {"input": "x", "output": ""}]})
    mixture = open_chat_mixture(path, chat_tokenizer, turns="split")
    samples = [
        len(item.segments)
        for item in (mixture.split_or_truncate(0, mixture.tokenize_records(0, [n], [n])[0]) for n in range(3))
    ]
    assert samples == [2, 1, 0]
    spec = mixture.spec._replace(token_cache_dir=str(tmp_path / "cache"))
    cached = build_token_cache(Mixture(*spec), 0)
    for number in range(3):
        plain = mixture.encode(0, [number])[0]
        for one, other in zip(cached.encode(0, [number])[0].segments, plain.segments, strict=True):
            np.testing.assert_array_equal(one, other)
    options = {"tokenizer_path": str(chat_tokenizer), "turns": "split", "steps": 3, "packs": 1, "max_length": 256}
    stats = check_mixture(str(path), tmp_path / "out", **options)["datasets"]["a"]
    assert (stats["records"], stats["samples"], stats["empty"]) == (3, 4, 1)
    pieces = [piece for number in range(3) for piece in mixture.encode(0, [number])[0].segments]
    assert stats["kept_tokens"] == sum(len(piece) - 1 for piece in pieces)
    shown = "\n".join(show_samples(mixture, count=3, task="", record=1, packs=False, color=False, full=True))
    assert "sample 1 of 2 of this record" in shown
    assert "sample 2 of 2 of this record" in shown
    assert shown.count("«dogs<|im_end|>»") == 2


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


def test_a_turn_that_ends_in_white_space_has_the_end_of_a_turn(chat_tokenizer: Path) -> None:
    """In a format without an end marker: generation has to make the white space to get to it."""
    tokenizer = load_tokenizer(chat_tokenizer)
    text = "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' }}{{ m.content }}{% endfor %}"
    encoder = Encoder(tokenizer, Template("x", text, tokenizer.special_tokens))
    turns = [*CHAT["messages"][:1], {"role": "assistant", "content": "dogs \n"}, *CHAT["messages"]]
    assert weighted_text(encoder, {"messages": turns})[1] == "dogs \n<|im_start|>dogs<|endoftext|>"
    assert weighted_text(encoder, {"messages": turns[:2]})[1] == "dogs \n<|endoftext|>"  # of the last one, too


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
    with pytest.raises(BadRecord, match="its prompt for message 2 does not contain message 1"):
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
