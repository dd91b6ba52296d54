"""Chat templates: the text is what transformers writes."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.chat_mixtures import CHAT, OWN
from helpers.conversations import (
    BUILT_IN,
    CALLS,
    FORGETFUL,
    PLAIN,
    PLAIN_TEXT,
    TAGGED,
    TOKENIZER,
    TOKENS,
    TOOLS,
    TWO_TURNS,
    chat,
    cut,
    one,
)

from fm9g.data.encode.template import Template, TemplateLimitError, load_template
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError


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


CHATS = {
    "one question": chat(("user", "What is 1 < 2 & 'x'?")),
    "one answer": chat(("user", "hi"), ("assistant", "hello")),
    "system": chat(("system", " Be brief.\n"), ("user", " hi\n\n"), ("assistant", "\n hello ")),
    "two turns": TWO_TURNS,
    "Chinese": chat(("system", "你是九格。"), ("user", "深度学习?🚀"), ("assistant", "模型 <|im_end|> </s>")),
    "empty": chat(("user", ""), ("assistant", "")),
}


def test_texts_and_token_ids_are_those_of_transformers(tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    reference, actual = AutoTokenizer.from_pretrained(tokenizer_path), load_tokenizer(tokenizer_path)
    filters = """{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=1, sort_keys=True) }}{% endfor %}
        {{ tools | tojson(True, 2, (',', ':')) }} {{ strftime_now('%Y') }} {{ nothing }}
        {% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}
        {{ documents is defined }}{{ pad is defined }}{{ bos_token }}{{ add_generation_prompt }}
    """
    created = {"filters": filters, "tagged": TAGGED, "forgetful": FORGETFUL}
    templates = [load_template(name, TOKENIZER) for name in BUILT_IN]
    templates += [Template(name, text, TOKENS) for name, text in created.items()]
    for template in templates:
        reference.chat_template = template.sources["default"]
        cases = [(name, messages, None) for name, messages in CHATS.items()]
        if template.name == "filters":
            cases += [("tools", CHATS["system"], TOOLS)]
        if template.name == "chatml":
            cases += [("tools", CALLS, TOOLS), ("tools alone", CHATS["two turns"], TOOLS), ("calls alone", CALLS, None)]
        for name, messages, tools in cases:
            for prompt in (False, True):
                text = template.render(messages, tools, prompt)
                options = {"tools": tools, "add_generation_prompt": prompt}
                assert text == reference.apply_chat_template(messages, tokenize=False, **options), (template.name, name)
                ids = reference.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
                assert actual.encode_chat(text)[0] == ids, (template.name, name)


def test_generation_tags_select_what_they_select_in_transformers(tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizer_path)
    for messages in (CHATS["system"], CHATS["two turns"], CHATS["one question"]):
        rendered = one(Template("tagged", TAGGED), messages)
        out = reference.apply_chat_template(
            messages, chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = [i for i, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
        assert reference.decode(trained, clean_up_tokenization_spaces=False) == "".join(cut(rendered))


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


def test_the_date_is_fixed_where_it_is_given() -> None:
    text = "{{ strftime_now('%d %b %Y %H:%M') }}"
    assert Template("x", text, date="2026-07-26").render([]) == "26 Jul 2026 00:00"
    assert Template("x", text).render([]) != "26 Jul 2026 00:00"
    assert Template("x", text, date="2026-07-26").checksum != Template("x", text, date="2026-07-27").checksum
    assert Template("x", "a", date="2026-07-26").checksum == Template("x", "a", date="2026-07-27").checksum


def test_of_several_templates_tool_use_is_taken_for_tools(tokenizer_path: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tokenizer_path)
    reference.chat_template = {"default": PLAIN, "tool_use": "{{ tools | tojson }}" + PLAIN}
    own = SimpleNamespace(special_tokens=TOKENS, chat_template=reference.chat_template)
    template = load_template("tokenizer", own)
    for tools in (None, TOOLS):
        expected = reference.apply_chat_template(TWO_TURNS, tools=tools, tokenize=False)
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


MESSAGES = [{"role": "user", "content": "a"}]


NEST = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=10**9) }}",
        NEST + "{{ n.x }}",
        NEST + "{{ n }}",
        NEST + "{{ n.x ~ '' }}",
        NEST + "{{ n.x | string }}",
        NEST + "{{ n.x | tojson }}",
        NEST + "{{ '%s' % n.x }}",
        NEST + "{{ '{}'.format(n.x) }}",
    ],
)
def test_a_template_does_not_go_on_and_on(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("fm9g.data.encode.template.MAX_SECONDS", 0.1)
    with pytest.raises(
        TemplateLimitError, match=r"^chat template t, line 1: takes more than 0\.1 seconds \(does it loop"
    ):
        Template("t", text).render(MESSAGES)


@pytest.mark.parametrize("sum", ["n.x + n.x", "n.x ~ n.x"])
def test_a_template_that_adds_and_adds_is_ended_by_its_memory(monkeypatch: pytest.MonkeyPatch, sum: str) -> None:
    monkeypatch.setattr("fm9g.data.encode.template.MAX_MEMORY", 1 << 20)
    text = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = " + sum + " %}{% endfor %}"
    with pytest.raises(TemplateLimitError, match=r"^chat template t, line 1: takes more than 1 MB of memory"):
        Template("t", text).render(MESSAGES)
