"""Exactly the turns of the assistant are trained on, and written as generation makes them."""

from __future__ import annotations

import pytest
from helpers.conversations import (
    BUILT_IN,
    CALLS,
    FORGETFUL,
    PLAIN,
    TAGGED,
    TOKENIZER,
    TOKENS,
    TOOLS,
    TWO_TURNS,
    chat,
    cut,
    one,
    shown,
)

from fm9g.data.encode.conversation import RenderedSample, render_samples
from fm9g.data.encode.template import Template, load_template
from fm9g.errors import UserError


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("chatml", "a1<|im_end|>", "a2\n<|im_end|>"),
        ("add_template", "a1<|im_end|>", "a2\n<|im_end|>"),
        ("llama", "a1<|eot_id|>", "a2<|eot_id|>"),
        ("llama2", " a1 </s>", " a2 </s>"),
    ],
)
def test_a_turn_is_learnt_with_its_end_marker_and_nothing_after(name: str, first: str, last: str) -> None:
    template = load_template(name, TOKENIZER)
    assert cut(one(template, TWO_TURNS)) == [first, last]
    assert cut(one(template, TWO_TURNS, loss="last")) == [last]
    everything = one(template, TWO_TURNS, loss="all")
    assert cut(everything) == [everything.text] == [template.render(TWO_TURNS)]
    # A question at the end: the last answer is in the middle.
    open_end = [*TWO_TURNS, *chat(("user", "q3"))]
    assert cut(one(template, open_end)) == [first, last]
    assert cut(one(template, open_end, loss="last")) == [last]
    for loss in ("assistant", "last"):
        assert cut(one(template, TWO_TURNS[:1], loss=loss)) == []


def test_calls_and_answers_are_turns_each() -> None:
    rendered = one(load_template("chatml", TOKENIZER), CALLS, TOOLS)
    turns = cut(rendered)
    assert [turn[:11] for turn in turns] == ["<tool_call>", "One more.\n<", "Sunny.<|im_"]
    assert all(turn.endswith("<|im_end|>") and turn.count("<|im_end|>") == 1 for turn in turns)
    two = chat(("user", "q"), ("assistant", "a"), ("assistant", "b"))
    assert cut(one(load_template("chatml", TOKENIZER), two)) == ["a<|im_end|>", "b<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant() -> None:
    messages = chat(("assistant", "a"), ("user", "q"), ("assistant", "b"))
    for name in ("chatml", "add_template"):
        assert cut(one(load_template(name, TOKENIZER), messages)) == ["a<|im_end|>", "b<|im_end|>"]
    # One that cannot write an empty conversation.
    picky = Template("picky", "{{ messages[0].role.upper() }} " + PLAIN)
    messages = chat(("assistant", "hi"), ("user", "q"))
    assert cut(one(picky, messages)) == ["hi</>"]
    with pytest.raises(UserError, match="template picky: it has no prompt for message 1"):
        one(picky, chat(("assistant", ""), ("user", "q")))


def test_a_template_without_generation_prompt_gives_the_whole_turn() -> None:
    assert cut(one(Template("plain", PLAIN), TWO_TURNS)) == ["<assistant>a1</>", "<assistant>a2\n</>"]


def test_a_template_that_rewrites_earlier_turns_gives_a_text_for_each() -> None:
    thoughts = "<think>t</think>\n\n"
    messages = chat(("user", "q"), ("assistant", f"{thoughts}a"), ("user", "r"), ("assistant", f"{thoughts}b"))
    forgetful = Template("forgetful", FORGETFUL)
    first, second = render_samples(forgetful, messages, with_content_spans=True)
    assert first.text == forgetful.render(messages[:2])
    assert cut(first) == [f"{thoughts}a</>"]
    assert second.text == forgetful.render(messages)
    assert cut(second) == [f"{thoughts}b</>"]
    assert shown(second) == ["q", "r", f"{thoughts}b"]  # the first answer is no more what the message holds
    assert cut(one(forgetful, messages, loss="last")) == [f"{thoughts}b</>"]
    # The same turns, whether or not a question follows.
    followed = render_samples(forgetful, [*messages, *chat(("user", "s"))])
    assert [cut(sample) for sample in followed] == [cut(first), cut(second)]


def test_as_few_texts_as_the_template_allows_or_one_for_each_turn() -> None:
    messages = chat(*[("user", "q"), ("assistant", "a"), ("assistant", "b")] * 2)
    # It forgets the answers to all but the last question.
    template = Template(
        "last question",
        """{% set ns = namespace(last=0) %}{% for m in messages if m.role == 'user' %}{% set ns.last = ns.last + 1 %}
        {%- endfor %}{% set ns.seen = 0 %}
        {%- for m in messages %}{% if m.role == 'user' %}{% set ns.seen = ns.seen + 1 %}
        {%- endif %}<{{ m.role }}>{{ m.content if m.role == 'user' or ns.seen == ns.last else '-' }}</>{% endfor %}
        {%- if add_generation_prompt %}<assistant>{% endif %}""",
    )
    first, second = render_samples(template, messages)
    assert (first.text, cut(first)) == (template.render(messages[:3]), ["a</>", "b</>"])
    assert (second.text, cut(second)) == (template.render(messages), ["a</>", "b</>"])
    plain = Template("plain", PLAIN)
    assert len(render_samples(plain, messages)) == 1
    for rendered, end in zip(render_samples(plain, messages, turns="split"), (2, 3, 5, 6), strict=True):
        assert rendered.text == plain.render(messages[:end])
        assert len(rendered.targets) == 1
        assert rendered.text.rstrip().endswith(cut(rendered)[0])
    tagged = render_samples(Template("tagged", TAGGED), messages, turns="split")
    assert [cut(rendered) for rendered in tagged] == [["a</>"], ["b</>"]] * 2


def test_a_prompt_that_opens_a_thought_is_followed_by_the_records_own() -> None:
    """DeepSeek-R1's: its prompt ends in <think>, and it cuts thoughts out of what it writes."""
    text = """{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}
        {%- set c = c.split('</think>')[-1] %}{% endif %}<{{ m.role }}>{{ c }}{{ eos_token }}{% endfor %}
        {%- if add_generation_prompt %}{{- '<assistant><think>\n' }}{% endif %}"""
    template = Template("r1", text, TOKENS)
    question = {"role": "user", "content": "q"}
    for answer, expected in (
        ({"content": "<think>\nhm\n</think>\n\n4"}, "hm\n</think>\n\n4</s>"),
        ({"content": "<think>hm</think>4"}, "hm</think>4</s>"),
        ({"content": "4", "reasoning_content": "hm"}, "hm\n</think>\n\n4</s>"),
        ({"content": "4"}, "\n</think>\n\n4</s>"),
    ):
        rendered = one(template, [question, {"role": "assistant", **answer}])
        assert rendered.text.startswith("<user>q</s><assistant><think>\n")
        assert cut(rendered) == [expected]
    turns = [question, {"role": "assistant", "content": "<think>hm</think>4"}] * 2
    first, second = render_samples(template, turns)
    assert cut(first) == cut(second) == ["hm</think>4</s>"]
    assert second.text.startswith("<user>q</s><assistant>4</s><user>q</s><assistant><think>\n")
    # One that keeps the thought, with other space, and one that closes it by itself.
    for written, expected in (("<think>hm</think>4", "hm</think>4</>"), ("</think>4", "\n</think>4</>")):
        with_thoughts = Template(
            "kept",
            f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content if m.role == 'user' else '{written}' }}}}</>"
            "{% endfor %}{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}",
        )
        assert cut(one(with_thoughts, [question, {"role": "assistant", "content": "4"}])) == [expected]


def test_a_turn_that_no_generation_from_its_prompt_gives_is_refused() -> None:
    prompt = Template("prompt", PLAIN + "{% if add_generation_prompt %}<assistant>Answer:{% endif %}")
    for loss in ("assistant", "last"):
        with pytest.raises(UserError, match=r"prompt for message 4 ends with 'Answer:', but .*{% generation %}"):
            one(prompt, TWO_TURNS, loss=loss)
    # One that raises on a part.
    full = Template("whole", "{% if messages | length == 2 %}{{ raise_exception('two') }}{% endif %}" + PLAIN)
    with pytest.raises(UserError, match="two"):
        one(full, TWO_TURNS)


def weighted(rendered: RenderedSample) -> list[tuple[str, float]]:
    return list(zip(cut(rendered), rendered.weights))


def test_weights_of_turns_and_of_their_parts() -> None:
    template = load_template("chatml", TOKENIZER)
    end = "<|im_end|>"
    turns = chat(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "bad good"))
    turns[1]["weight"] = 0
    assert weighted(one(template, turns)) == [(f"bad good{end}", 1.0)]
    turns[1]["weight"] = 0.25
    assert weighted(one(template, turns)) == [(f"a{end}", 0.25), (f"bad good{end}", 1.0)]
    turns[3]["content_weights"] = [[4, 0], [4, 0.5]]
    assert weighted(one(template, turns)) == [(f"a{end}", 0.25), (f"good{end}", 0.5)]
    assert weighted(one(template, turns, loss="last")) == [(f"good{end}", 0.5)]
    everything = one(template, turns, loss="all")
    assert [weight for _, weight in weighted(everything)] == [1.0, 0.25, 1.0, 0.5, 1.0]
    assert "".join(cut(everything)) == everything.text.replace("bad ", "")
    turns[3]["weight"] = 0
    assert weighted(one(template, turns, loss="last")) == []
    # Blocks of the template have the weights of their turns, where there is one for each turn.
    turns[3] = {"role": "assistant", "content": "b", "weight": 0.5}
    assert weighted(one(Template("tagged", TAGGED), turns)) == [("a</>", 0.25), ("b</>", 0.5)]
    with pytest.raises(UserError, match="it has 1 generation blocks for 2 turns of the assistant, so their weights"):
        one(Template("x", "{% generation %}a{% endgeneration %}"), turns)
    shouting = Template("x", "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}</>{% endfor %}")
    turns[3] = {"role": "assistant", "content": "ab", "content_weights": [[1, 0], [1, 1]]}
    with pytest.raises(UserError, match="changes the content of message 4, so the weights of its parts"):
        one(shouting, turns)


def test_generation_tags_say_what_is_learnt() -> None:
    tagged = Template("tagged", TAGGED)
    rendered = one(tagged, TWO_TURNS)
    assert rendered.text == tagged.render(TWO_TURNS)
    assert cut(rendered) == ["a1</>", "a2</>"]
    assert cut(one(tagged, TWO_TURNS, loss="last")) == ["a2</>"]
    assert cut(one(tagged, TWO_TURNS, loss="all")) == [rendered.text]
    assert cut(one(tagged, TWO_TURNS[:1])) == []
    # Tags serve where earlier turns change; tags in a comment are none.
    changing = Template("x", "{{ messages | length }}{% generation %}!{{ messages | length }}{% endgeneration %}")
    assert cut(one(changing, TWO_TURNS)) == ["!4"]
    assert cut(one(Template("x", "{# {% generation %} #}" + PLAIN), TWO_TURNS[:2])) == ["<assistant>a1</>"]
    assert cut(one(Template("x", "a{% generation %}{% endgeneration %}"), TWO_TURNS)) == []
    nested = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
    trimmed = "{% set x %}{% generation %}a {% endgeneration %}{% endset %}{{ x | trim }}"
    for text in (nested, trimmed):
        with pytest.raises(UserError, match="template x: the output of its generation blocks is changed"):
            one(Template("x", text), TWO_TURNS)


def test_contents_are_found_where_they_stand_and_not_in_the_template() -> None:
    messages = chat(
        ("system", "system"), ("user", "user"), ("assistant", " a\n"), ("user", ""), ("assistant", "end|>\ufdd0")
    )
    for name in BUILT_IN:
        contents = ["system", "user", " a\n", "end|>\ufdd0"]
        contents = [text.strip() for text in contents] if name.startswith("llama") else contents
        rendered = one(load_template(name, TOKENIZER), messages, with_content_spans=True)
        assert shown(rendered) == contents
        # Each follows its own header.
        before = [rendered.text[:start] for start, _ in rendered.content_spans]
        ends = ("<<SYS>>\n", "<</SYS>>\n\n", "[/INST] ", "[/INST] ") if name == "llama2" else ("\n",) * 4
        assert all(text.endswith(end) for text, end in zip(before, ends)), (name, before)
        assert "user" not in rendered.text[rendered.content_spans[1][1] : rendered.content_spans[2][0]]
    # Found by searching, where a template compares contents or refuses some.
    known = "{% if m.content not in ('', 'q1', 'a1', 'q2', 'a2\\n') %}{{ raise_exception('unknown') }}{% endif %}"
    for do in ("{{ 'Q' if m.content == 'q1' else 'x' }}", known):
        search = Template("search", f"{{% for m in messages %}}{do}{{{{ m.content | trim }}}};{{% endfor %}}")
        rendered = one(search, [*chat(("system", "")), *TWO_TURNS], with_content_spans=True)
        assert shown(rendered) == ["q1", "a1", "q2", "a2"]
