"""Chat templates: the text is what transformers writes, and exactly the assistant's turns are learnt."""

import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from fm9g.data.encode.conversation import RenderedSample, render_samples
from fm9g.data.encode.template import Template, load_template
from fm9g.data.encode.tokenizer import load_tokenizer
from fm9g.errors import UserError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZER = SimpleNamespace(special_tokens=TOKENS, chat_template=None)
BUILT_IN = ("chatml", "add_template", "llama", "llama2")  # the others are in test_builtin_templates.py


def chat(*turns: tuple[str, str]) -> list[dict]:
    """chat(("user", "q"), ...)"""
    return [{"role": role, "content": content} for role, content in turns]


TWO_TURNS = chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2\n"))
CHATS = {
    "one question": chat(("user", "What is 1 < 2 & 'x'?")),
    "one answer": chat(("user", "hi"), ("assistant", "hello")),
    "system": chat(("system", " Be brief.\n"), ("user", " hi\n\n"), ("assistant", "\n hello ")),
    "two turns": TWO_TURNS,
    "Chinese": chat(("system", "你是九格。"), ("user", "深度学习?🚀"), ("assistant", "模型 <|im_end|> </s>")),
    "empty": chat(("user", ""), ("assistant", "")),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> & 'here' 天气",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"name": "time", "parameters": {}},
]
CALLS = [
    {"role": "system", "content": "Help."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}},
            {"name": "time", "arguments": '{"zone": 8}'},
        ],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "One more.", "tool_calls": [{"function": {"name": "time"}}]},
    {"role": "tool", "content": "one"},
    {"role": "assistant", "content": "Sunny."},
]
# In the manner of templates that show only the newest thoughts.
FORGETFUL = """
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and not loop.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<' + m.role + '>' + content + '</>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
TAGGED = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<assistant>\\n' }}
        {%- generation %}
            {%- set inner = m.content | trim %}
            {{- inner + '</>' }}
        {%- endgeneration %}
        {{- '\\n' + (inner or '') }}
    {%- else %}
        {{- '<' + m.role + '>\\n' + m.content + '</>\\n' }}
    {%- endif %}
{%- endfor %}"""
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
PLAIN_TEXT = "<user>q1</>\n<assistant>a1</>\n<user>q2</>\n<assistant>a2\n</>\n"


def cut(rendered: RenderedSample) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.targets]


def one(template: Template, messages: list[dict], tools: list[dict] | None = None, **options) -> RenderedSample:
    """The only text of a conversation."""
    (rendered,) = render_samples(template, messages, tools, **options)
    return rendered


def shown(rendered: RenderedSample) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.content_spans]


def test_texts_and_token_ids_are_those_of_transformers(tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(tokenizer_path), load_tokenizer(tokenizer_path)
    filters = """{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=1, sort_keys=True) }}{% endfor %}
        {{ tools | tojson(True, 2, (',', ':')) }} {{ strftime_now('%Y') }} {{ nothing }}
        {% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}
        {{ documents is defined }}{{ pad is defined }}{{ bos_token }}{{ add_generation_prompt }}
    """
    made = {"filters": filters, "tagged": TAGGED, "forgetful": FORGETFUL}
    templates = [load_template(name, TOKENIZER) for name in BUILT_IN]
    templates += [Template(name, text, TOKENS) for name, text in made.items()]
    for template in templates:
        theirs.chat_template = template.sources["default"]
        cases = [(name, messages, None) for name, messages in CHATS.items()]
        if template.name == "filters":
            cases += [("tools", CHATS["system"], TOOLS)]
        if template.name == "chatml":
            cases += [("tools", CALLS, TOOLS), ("tools alone", CHATS["two turns"], TOOLS), ("calls alone", CALLS, None)]
        for name, messages, tools in cases:
            for prompt in (False, True):
                text = template.render(messages, tools, prompt)
                options = {"tools": tools, "add_generation_prompt": prompt}
                assert text == theirs.apply_chat_template(messages, tokenize=False, **options), (template.name, name)
                ids = theirs.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
                assert ours.encode_chat(text)[0] == ids, (template.name, name)


def test_generation_tags_select_what_they_select_in_transformers(tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_path)
    for messages in (CHATS["system"], CHATS["two turns"], CHATS["one question"]):
        rendered = one(Template("tagged", TAGGED), messages)
        out = theirs.apply_chat_template(
            messages, chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True
        )
        learnt = [i for i, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
        assert theirs.decode(learnt, clean_up_tokenization_spaces=False) == "".join(cut(rendered))


def test_the_built_in_templates_write_what_they_are_known_for() -> None:
    messages = chat(("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", " q2 "))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    expected = {
        "chatml": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1"
        "<|im_end|>\n<|im_start|>user\n q2 <|im_end|>\n<|im_start|>assistant\n",
        "add_template": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>User\nq1<|im_end|>\n<|im_start|>assistant\na1"
        "<|im_end|>\n<|im_start|>User\n q2 <|im_end|>\n<|im_start|>assistant\n",
        "llama": "<s>"
        + "".join(head.format(m["role"], m["content"].strip()) for m in messages)
        + "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq1 [/INST] a1 </s><s>[INST] q2 [/INST]",
    }
    assert set(expected) == set(BUILT_IN)
    for name, text in expected.items():
        assert load_template(name, TOKENIZER).render(messages, add_generation_prompt=True) == text
        # Where there is no such token, nothing takes its place; and no other program stumbles over our tags.
        bare = load_template(name, SimpleNamespace(special_tokens={}, chat_template=None))
        assert bare.render(messages, add_generation_prompt=True) == re.sub("</?s>", "", text)
        assert "generation %" not in bare.sources["default"]
    assert Template("x", "{{ bos_token is defined }}").render([]) == "False"


def test_add_template_is_the_transform_of_the_guide() -> None:
    text = load_template("add_template", TOKENIZER).render(chat(("user", "问"), ("assistant", "答")))
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == f"<s>{system}<|im_start|>User\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n"
    assert load_template("add_template", TOKENIZER).render([]) == f"<s>{system}"


def test_chatml_lists_tools_and_writes_calls_and_responses() -> None:
    text = load_template("chatml", TOKENIZER).render(CALLS, TOOLS)
    head, rest = text.split("<|im_end|>\n", 1)
    assert head.startswith("<s><|im_start|>system\nHelp.\n\n# Tools\n\n")
    tools = re.search(r"\n<tools>\n(.*?)\n</tools>\n", head, re.DOTALL)[1].split("\n")
    assert tools[0].startswith(
        '{"type": "function", "function": {"name": "weather", "description": "The weather <now> &'
    )
    assert tools[1] == '{"name": "time", "parameters": {}}'
    assert rest == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {"zone": 8}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        '<|im_start|>assistant\nOne more.\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nSunny.<|im_end|>\n"
    )


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
        kept = Template(
            "kept",
            f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content if m.role == 'user' else '{written}' }}}}</>"
            "{% endfor %}{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}",
        )
        assert cut(one(kept, [question, {"role": "assistant", "content": "4"}])) == [expected]


def test_a_turn_that_no_generation_from_its_prompt_gives_is_refused() -> None:
    prompt = Template("prompt", PLAIN + "{% if add_generation_prompt %}<assistant>Answer:{% endif %}")
    for loss in ("assistant", "last"):
        with pytest.raises(UserError, match=r"prompt for message 4 ends with 'Answer:', but .*{% generation %}"):
            one(prompt, TWO_TURNS, loss=loss)
    # One that raises on a part.
    whole = Template("whole", "{% if messages | length == 2 %}{{ raise_exception('two') }}{% endif %}" + PLAIN)
    with pytest.raises(UserError, match="two"):
        one(whole, TWO_TURNS)


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


def test_the_date_is_fixed_where_it_is_given() -> None:
    text = "{{ strftime_now('%d %b %Y %H:%M') }}"
    assert Template("x", text, date="2026-07-26").render([]) == "26 Jul 2026 00:00"
    assert Template("x", text).render([]) != "26 Jul 2026 00:00"
    assert Template("x", text, date="2026-07-26").checksum != Template("x", text, date="2026-07-27").checksum
    assert Template("x", "a", date="2026-07-26").checksum == Template("x", "a", date="2026-07-27").checksum


def test_of_several_templates_tool_use_is_taken_for_tools(tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer_path)
    theirs.chat_template = {"default": PLAIN, "tool_use": "{{ tools | tojson }}" + PLAIN}
    own = SimpleNamespace(special_tokens=TOKENS, chat_template=theirs.chat_template)
    template = load_template("tokenizer", own)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(TWO_TURNS, tools=tools, tokenize=False)
        assert template.render(TWO_TURNS, tools) == expected
    unnamed = Template("tokenizer", {"chat": PLAIN, "tool_use": PLAIN})
    assert unnamed.render(TWO_TURNS, TOOLS) == PLAIN_TEXT
    with pytest.raises(UserError, match="has chat, tool_use, and none of them is called default"):
        unnamed.render(TWO_TURNS)


def test_what_a_template_has_no_form_for_is_known() -> None:
    assert load_template("chatml", TOKENIZER).ignored_features(TOOLS) == frozenset()
    assert load_template("llama2", TOKENIZER).ignored_features(TOOLS) == frozenset()  # it says so itself
    assert Template("x", PLAIN).ignored_features(TOOLS) == {"tools", "calls"}
    assert Template("x", "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}").ignored_features(
        TOOLS
    ) == {
        "tools",
        "calls",
        "results",
    }
    assert load_template("chatml", TOKENIZER).markers == ["<|im_start|>", "<|im_end|>"]


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
        with pytest.raises(UserError, match="template x: what its generation blocks write"):
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


def test_what_a_template_raises_reaches_the_user() -> None:
    question = chat(("user", "q"))
    for text, expected in {
        "\n{{ raise_exception('only two roles') }}": "template mine, line 2: only two roles",
        "\n\n{{ nothing.at_all }}": "template mine, line 3: 'nothing' is undefined",
        "{{ messages + 1 }}": "template mine, line 1: can only concatenate list",
        "{{ ''.__class__.__mro__ }}": "template mine, line 1: access to attribute '__class__'.* unsafe",
        "{{ messages.append(1) }}": "template mine, line 1: access to attribute 'append'.* unsafe",
    }.items():
        with pytest.raises(UserError, match=expected):
            Template("mine", text).render(question)
    assert Template("mine", "a{{ nothing }}b").render(question) == "ab"


def test_a_template_that_is_not_jinja_is_refused_with_its_line() -> None:
    for text, expected in {
        "\n{% if %}": "template mine, line 2: Expected an expression",
        "a\n\n{{ x | nothing }}": "template mine, line 3: No filter named 'nothing'",
        "{% generation %}": "template mine, line 1: Unexpected end of template.*endgeneration",
        "{% break %}": "template mine: 'break' outside loop",
    }.items():
        with pytest.raises(UserError, match=expected):
            Template("mine", text)


@pytest.mark.parametrize("name", ["add_template", "llama", "llama2"])
def test_what_a_template_has_no_form_for_is_refused(name: str) -> None:
    template = load_template(name, TOKENIZER)
    for messages, tools in ((CALLS[1:2], TOOLS), (CALLS[1:3], None), (CALLS[:2] + CALLS[3:4], None)):
        with pytest.raises(UserError, match=f"template {name}, line .*(no form for tools|has the role tool)"):
            template.render(messages, tools)


@pytest.mark.parametrize("name", BUILT_IN)
def test_messages_of_no_known_form_are_refused(name: str) -> None:
    template = load_template(name, TOKENIZER)
    with pytest.raises(UserError, match="message 2 has the role gpt"):
        template.render(chat(("user", "q"), ("gpt", "a")))
    for content in ([{"type": "text", "text": "q"}], None, 1):
        with pytest.raises(UserError, match="the content of message 1 is not a string"):
            template.render([{"role": "user", "content": content}])


def test_llama2_wants_turns_to_alternate() -> None:
    template = load_template("llama2", TOKENIZER)
    for roles in (("assistant",), ("user", "user"), ("system", "assistant"), ("system", "system"), ("user", "system")):
        with pytest.raises(UserError, match=f"message {len(roles)} has the role {roles[-1]}; in llama2 user"):
            template.render(chat(*((role, "x") for role in roles)))


def test_thoughts_are_shown_under_every_name_and_none_is_no_key() -> None:
    template = Template("x", "{% for key, value in messages[0] | dictsort %}{{ key }}={{ value }} {% endfor %}")
    for key in ("reasoning_content", "thinking", "reasoning"):
        text = template.render([{"role": "r", key: "t", "tool_calls": None}])
        assert text.replace("reasoning=t ", "") == "reasoning_content=t role=r thinking=t "


def test_load_template_knows_built_in_names_files_and_the_tokenizers_own(tmp_path: Path) -> None:
    tokens = {"bos_token": "<b>", "eos_token": "<e>"}
    own = SimpleNamespace(special_tokens=tokens, chat_template="own{{ bos_token }}{{ eos_token }}")
    assert load_template("tokenizer", own).render([]) == "own<b><e>"
    with pytest.raises(UserError, match=r"has no chat template of its own.*--chat_template chatml"):
        load_template("tokenizer", TOKENIZER)
    file = tmp_path / "九.jinja"
    file.write_text("文件{{ bos_token }}", encoding="utf-8")
    template = load_template(str(file), TOKENIZER)
    assert (template.sources["default"], template.render([])) == ("文件{{ bos_token }}", "文件<s>")
    file.write_text("\n{{", encoding="utf-8")
    with pytest.raises(UserError, match=r"九\.jinja, line 2: "):
        load_template(str(file), TOKENIZER)
    file.write_bytes("文件".encode("gbk"))
    with pytest.raises(UserError, match=r"九\.jinja: not UTF-8"):
        load_template(str(file), TOKENIZER)
    with pytest.raises(UserError, match="'chatm': no such chat template; did you mean 'chatml'"):
        load_template("chatm", TOKENIZER)
    with pytest.raises(UserError, match=r"give a file, or one of add_template, .*chatml, .*tokenizer, none"):
        load_template(str(tmp_path), TOKENIZER)


def test_a_template_can_be_sent_to_another_process() -> None:
    template = load_template("chatml", TOKENIZER)
    assert one(pickle.loads(pickle.dumps(template)), TWO_TURNS) == one(template, TWO_TURNS)
