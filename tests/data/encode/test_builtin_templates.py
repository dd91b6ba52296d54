"""The built-in chat templates write what their families publish, as transformers renders them, and drop nothing."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fm9g.data.encode.template
from fm9g.data.encode.template import Template
from fm9g.errors import UserError

Messages = list[dict[str, Any]]
Record = tuple[Messages, list[dict[str, Any]] | None]

FOLDER = Path(fm9g.data.encode.template.__file__).parent / "templates"
TEXTS = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
# Of the families in this file; the others have tests of their own.
WITH_TOOLS = ("chatglm3", "glm4", "internlm2", "mistral", "qwen", "qwen3")
WITHOUT_TOOLS = ("baichuan2", "default", "minicpm", "yi")
FAMILIES = (*WITH_TOOLS, *WITHOUT_TOOLS, "deepseek")


def tokenizer_with(tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


TOKENIZERS = {"both": (BOTH, tokenizer_with(BOTH)), "neither": ({}, tokenizer_with({}))}


def ours(name: str, messages: Messages, tools: Any = None, prompt: bool = False, tokens: Any = BOTH) -> str:
    return Template(name, TEXTS[name], tokens).render(messages, tools, prompt)


def theirs(text: str, messages: Messages, tools: Any = None, prompt: bool = False, kind: str = "both", **more) -> str:
    """What transformers renders with the text of a template."""
    rendered = TOKENIZERS[kind][1].apply_chat_template(
        messages, chat_template=text, tools=tools, add_generation_prompt=prompt, tokenize=False, **more
    )
    assert isinstance(rendered, str)
    return rendered


def unless_it_raises(render: Callable[..., str], *arguments: Any, **options: Any) -> str | None:
    try:
        return render(*arguments, **options)
    except Exception:  # a template is a program: it can raise anything
        return None


def wide(text: str) -> str:
    """The text with the full-width bars that DeepSeek's tokens have."""
    return text.replace("<|", "<\uff5c").replace("|>", "\uff5c>")


def chat(*turns: tuple[str, str]) -> Messages:
    """chat(("user", "q"), ...)"""
    return [{"role": role, "content": content} for role, content in turns]


def calling(*calls: tuple[str, dict[str, Any]], content: str | None = None, **more: Any) -> dict[str, Any]:
    """A message of the assistant that calls; each call has a name and arguments, and an id where that is among more."""
    functions = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    functions = [{"id": more["ids"][i], **call} if "ids" in more else call for i, call in enumerate(functions)]
    message = {"role": "assistant", "tool_calls": functions, **{k: v for k, v in more.items() if k != "ids"}}
    return message if content is None else {**message, "content": content}


def result(content: str, identity: str = "") -> dict[str, Any]:
    message = {"role": "tool", "content": content, "name": "weather"}
    return {**message, "tool_call_id": identity} if identity else message


def thinking(reasoning: str, content: str, key: str = "reasoning_content") -> dict[str, Any]:
    return {"role": "assistant", key: reasoning, "content": content}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & 'here' 天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {}}}
TOOLS = [WEATHER, TIME]

ASKED = chat(("system", "Help."), ("user", "Weather?"))
BEIJING = ("weather", {"city": "北京", "days": 2, "hourly": True, "from": None})
IDS = ["aaaaaaaa1", "aaaaaaaa2"]
TWO = chat(("system", "S"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
CALLED: Messages = [*ASKED, calling(BEIJING, content=""), result("sunny"), *chat(("assistant", "Sunny."))]
THOUGHT = [*TWO[:2], thinking("t1", "a1"), TWO[3], thinking("\nt2\n\n", "a2")]
INSIDE = chat(
    ("user", "q1"), ("assistant", "<think>\nt1\n</think>\n\na1"), ("user", "q2"), ("assistant", "<think>t2</think>a2")
)

RECORDS: dict[str, Record] = {
    "one question": (chat(("user", "What is 1 < 2 & 'x'?")), None),
    "one answer": (chat(("user", "hi"), ("assistant", "hello")), None),
    "a system message": (chat(("system", " Be brief.\n"), ("user", " hi\n\n"), ("assistant", "\n hello ")), None),
    "two turns": (TWO, None),
    "two turns without a system message": (TWO[1:], None),
    "a question at the end": (TWO[:4], None),
    "the assistant first": (TWO[2:], None),
    "two answers": ([*TWO, *chat(("assistant", "more"))], None),
    "Chinese": (chat(("system", "你是九格。"), ("user", "深度学习?🚀"), ("assistant", "模型 <|im_end|> </s>")), None),
    "empty": (chat(("user", ""), ("assistant", "")), None),
    "tools": (TWO, TOOLS),
    "tools without a system message": (TWO[1:4], TOOLS),
    "an empty list of tools": (TWO, []),
    "a call": (CALLED, [WEATHER]),
    "a call without tools": (CALLED, None),
    "a call without content": ([*ASKED, calling(BEIJING), *CALLED[3:]], [WEATHER]),
    "a call at the end": ([*ASKED, calling(BEIJING, content="Let me see.")], None),
    "a call with an id": ([*ASKED, calling(BEIJING, ids=IDS), result("20", IDS[0]), *CALLED[4:]], [WEATHER]),
    "a call with a long id": ([*ASKED, calling(BEIJING, ids=["call_123456789"])], None),
    "a call with a text": ([*ASKED, calling(BEIJING, content="Let me see."), *CALLED[3:]], [WEATHER]),
    "two calls": ([*ASKED, calling(BEIJING, ("time", {}), ids=IDS), *(result("1", i) for i in IDS)], TOOLS),
    "two calls with a text": ([*ASKED, calling(BEIJING, ("time", {}), content="c"), result("1"), result("2")], TOOLS),
    "a result at the end": (CALLED[:4], None),
    "two rounds": ([*CALLED[:4], calling(("time", {}), content=""), result("noon"), *CALLED[4:]], TOOLS),
    "a question after a call": ([*CALLED, *TWO[3:]], TOOLS),
    "thoughts": (THOUGHT, None),
    "thoughts and a question": ([*THOUGHT, *chat(("user", "q3"))], None),
    "thoughts by another name": ([*TWO[:4], thinking("t2", "a2", "thinking")], None),
    "an empty thought": ([*TWO[:4], thinking("", "a2")], None),
    "a thought that calls": ([*ASKED, calling(BEIJING, content="", reasoning_content="t1"), *CALLED[3:]], None),
    "thoughts around a result": (
        [*ASKED, calling(BEIJING, content="c", reasoning_content="t1"), result("1"), thinking("t2", "a")],
        TOOLS,
    ),
    "thoughts inside": (INSIDE, None),
    "a thought inside and a question": (INSIDE[:3], None),
    "a thought that only ends": (chat(("user", "q"), ("assistant", "t\n</think>\n\na")), None),
    "a thought inside that calls": ([*ASKED, calling(BEIJING, content="<think>t</think>c"), *CALLED[3:]], None),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEXTS)
def test_transformers_renders_the_same(name: str, kind: str) -> None:
    for title, (messages, tools) in RECORDS.items():
        for prompt in (False, True):
            text = unless_it_raises(ours, name, messages, tools, prompt, TOKENIZERS[kind][0])
            assert text == unless_it_raises(theirs, TEXTS[name], messages, tools, prompt, kind), (title, prompt)
            assert kind == "both" or "<s>" not in (text or ""), title


def published(name: str) -> str:
    """A chat template that trl holds a copy of."""
    pytest.importorskip("trl")
    return (importlib.resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def titles(chosen: Callable[[Messages, Any], Any]) -> set[str]:
    return {title for title, (messages, tools) in RECORDS.items() if chosen(messages, tools)}


LISTED = titles(lambda messages, tools: tools)
CALLS = titles(lambda messages, tools: any("tool_calls" in message for message in messages))
APART = titles(lambda messages, tools: any(m.get("reasoning_content") or m.get("thinking") for m in messages))
INSIDE_TEXT = titles(lambda messages, tools: any("</think>" in m.get("content", "") for m in messages))
# Each of ours, a published template of its family, and the records that the two do not write alike.
PUBLISHED = {
    ("qwen", "qwen2_5"): APART,  # it drops these thoughts; ours refuses them
    ("qwen3", "qwen3"): set[str](),
    # These cut the thought of the last answer, too, and drop tools. The second closes no list of a single call.
    ("deepseek", "deepseekv3_training"): LISTED | APART | INSIDE_TEXT,
    ("deepseek", "deepseek_r1_distill"): LISTED | APART | INSIDE_TEXT | CALLS,
    ("llama", "llama3"): LISTED | CALLS,  # it drops tools and calls
}


@pytest.mark.parametrize(("name", "other"), PUBLISHED)
def test_the_text_is_the_published_one(name: str, other: str) -> None:
    compared = 0
    for title, (messages, tools) in RECORDS.items():
        for prompt in (False, True):
            if prompt and messages and messages[-1]["role"] == "assistant":
                continue  # an answer upon an answer
            expected = unless_it_raises(theirs, published(other), messages, tools, prompt)
            if expected is None or title in PUBLISHED[name, other]:
                continue
            if name == "deepseek" and prompt:
                expected = expected.removesuffix("<think>\n")  # ours lets the model open its thought
            assert ours(name, messages, tools, prompt) == expected, (title, prompt)
            compared += 1
    assert compared >= 12


def test_system_messages_go_to_the_front_where_their_family_puts_them() -> None:
    messages = chat(("system", "S"), ("user", "q"), ("system", "T"))
    text = ours("deepseek", messages)
    assert text == theirs(published("deepseekv3"), messages) == wide("<s>S\n\nT<|User|>q")
    assert ours("glm4", messages) == "[gMASK]<sop><|system|>\nS<|system|>\nT<|user|>\nq"
    for name in ("qwen", "qwen3", "internlm2", "yi"):
        assert ours(name, messages).endswith("q<|im_end|>\n<|im_start|>system\nT<|im_end|>\n")


def test_glm4_asks_as_its_successor_does() -> None:
    """The template of GLM-4.5 writes questions as that of GLM-4 does, and answers in another way."""
    for title in ("one question", "a system message", "Chinese"):
        messages = [message for message in RECORDS[title][0] if message["role"] != "assistant"]
        assert ours("glm4", messages, prompt=True) == theirs(published("glm4moe"), messages, prompt=True)


def test_qwen3_takes_the_published_switch_of_thoughts() -> None:
    for messages in (TWO[:4], CALLED[:4]):
        for on in (False, True):
            text = theirs(TEXTS["qwen3"], messages, prompt=True, enable_thinking=on)
            assert text == theirs(published("qwen3"), messages, prompt=True, enable_thinking=on)
            assert text.endswith("<think>\n\n</think>\n\n") != on


def test_deepseek_cuts_thoughts_as_published_but_for_that_of_the_last_answer() -> None:
    for title in ("thoughts", "thoughts and a question", "a thought inside and a question"):
        messages = RECORDS[title][0]
        text = ours("deepseek", messages).replace("<think>\nt2\n</think>\n\n", "")
        assert text == theirs(published("deepseekv3"), messages), title


CHATML = "<|im_start|>{}\n{}<|im_end|>\n"
SAID = "".join(CHATML.format(message["role"], message["content"]) for message in TWO)
# A system message and two turns.
SHORT = {
    "qwen": SAID,
    "qwen3": SAID.replace("\na2", "\n<think>\n\n</think>\n\na2"),
    "deepseek": wide("<s>S<|User|>q1<|Assistant|>a1<|end▁of▁sentence|><|User|>q2<|Assistant|>a2<|end▁of▁sentence|>"),
    "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nq1<|assistant|>\na1<|user|>\nq2<|assistant|>\na2",
    "chatglm3": "[gMASK]sop<|system|>\n S<|user|>\n q1<|assistant|>\n a1<|user|>\n q2<|assistant|>\n a2",
    "internlm2": f"<s>{SAID}",
    "mistral": "<s>[INST] q1[/INST] a1</s>[INST] S\n\nq2[/INST] a2</s>",
    "yi": SAID,
    "minicpm": "<s>S<用户>q1<AI>a1</s><用户>q2<AI>a2</s>",
    "baichuan2": "S<reserved_106>q1<reserved_107>a1<reserved_106>q2<reserved_107>a2",
    "default": "System: S</s>\nHuman: q1</s>\nAssistant:a1</s>\nHuman: q2</s>\nAssistant:a2</s>\n",
}
# What asks for the next answer, after a question.
PROMPTS = {
    **dict.fromkeys(("qwen", "qwen3", "internlm2", "yi"), "<|im_start|>assistant\n"),
    "deepseek": wide("<|Assistant|>"),
    "glm4": "<|assistant|>",
    "chatglm3": "<|assistant|>",
    "mistral": "",
    "minicpm": "<AI>",
    "baichuan2": "<reserved_107>",
    "default": "Assistant:",
}


def test_each_family_writes_a_conversation_in_its_form() -> None:
    assert set(SHORT) == set(PROMPTS) == set(FAMILIES)
    for name, expected in SHORT.items():
        assert ours(name, TWO) == expected
        assert ours(name, TWO, tokens={}) == expected.replace("<s>", "").replace("</s>", "")
        question = ours(name, TWO[:4])
        assert question.endswith(("q2", "q2<|im_end|>\n", "q2[/INST]", "q2</s>\n"))
        assert ours(name, TWO[:4], prompt=True) == question + PROMPTS[name]


DESCRIBED = (
    '{"name": "weather", "description": "The weather <now> & \'here\' 天气", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string"}}, "required": ["city"]}}'
)
TIMED = '{"name": "time", "parameters": {}}'
FUNCTIONS = f'{{"type": "function", "function": {DESCRIBED}}}', f'{{"type": "function", "function": {TIMED}}}'
INDENTED = """{
    "name": "weather",
    "description": "The weather <now> & 'here' 天气",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {
                "type": "string"
            }
        },
        "required": [
            "city"
        ]
    }
}"""
GIVEN = '{"city": "北京", "days": 2, "hourly": true, "from": null}'
QWEN_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call><|im_end|>
""".format(*FUNCTIONS)
QWEN = f"""<|im_start|>system
Help.

{QWEN_TOOLS}<|im_start|>user
Weather?<|im_end|>
<|im_start|>assistant
<tool_call>
{{"name": "weather", "arguments": {GIVEN}}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
sunny
</tool_response><|im_end|>
<|im_start|>assistant
Sunny.<|im_end|>
"""
# The conversation CALLED with TOOLS; for deepseek without.
WITH_A_CALL = {
    "qwen": QWEN,
    "qwen3": QWEN.replace("\nSunny.", "\n<think>\n\n</think>\n\nSunny."),
    "deepseek": wide(f"""<s>Help.<|User|>Weather?<|Assistant|>\
<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>weather
```json
{GIVEN}
```<|tool▁call▁end|><|tool▁calls▁end|><|end▁of▁sentence|>\
<|tool▁outputs▁begin|><|tool▁output▁begin|>sunny<|tool▁output▁end|><|tool▁outputs▁end|>\
Sunny.<|end▁of▁sentence|>"""),
    "glm4": f"""[gMASK]<sop><|system|>
# 可用工具

## weather

{INDENTED}
在调用上述函数时\uff0c请使用 Json 格式表示调用的参数。
## time

{{
    "name": "time",
    "parameters": {{}}
}}
在调用上述函数时\uff0c请使用 Json 格式表示调用的参数。<|system|>
Help.<|user|>
Weather?<|assistant|>weather
{GIVEN}<|observation|>
sunny<|assistant|>
Sunny.""",
    "chatglm3": """[gMASK]sop<|system|>
 Answer the following questions as best as you can. You have access to the following tools:
[
    {},
    {{
        "name": "time",
        "parameters": {{}}
    }}
]<|system|>
 Help.<|user|>
 Weather?<|assistant|>weather
 ```python
tool_call(city='北京', days=2, hourly=True, from=None)
```<|observation|>
 sunny<|assistant|>
 Sunny.""".format(INDENTED.replace("\n", "\n    ")),
    "internlm2": f"""<s><|im_start|>system
Help.<|im_end|>
<|im_start|>system name=<|plugin|>
[{DESCRIBED}, {TIMED}]<|im_end|>
<|im_start|>user
Weather?<|im_end|>
<|im_start|>assistant
<|action_start|><|plugin|>
{{"name": "weather", "parameters": {GIVEN}}}<|action_end|><|im_end|>
<|im_start|>environment name=<|plugin|>
sunny<|im_end|>
<|im_start|>assistant
Sunny.<|im_end|>
""",
    "mistral": f"<s>[AVAILABLE_TOOLS] [{', '.join(FUNCTIONS)}][/AVAILABLE_TOOLS][INST] Help.\n\nWeather?[/INST]"
    f'[TOOL_CALLS] [{{"name": "weather", "arguments": {GIVEN}}}]</s>'
    '[TOOL_RESULTS] {"content": sunny}[/TOOL_RESULTS] Sunny.</s>',
}


@pytest.mark.parametrize("name", WITH_A_CALL)
def test_each_family_writes_tools_calls_and_results_in_its_form(name: str) -> None:
    assert set(WITH_A_CALL) == {*WITH_TOOLS, "deepseek"}
    tools = None if name == "deepseek" else TOOLS
    assert ours(name, CALLED, tools) == WITH_A_CALL[name]
    without = [*ASKED, calling(BEIJING), *CALLED[3:]]  # no content at all
    assert ours(name, without, tools) == WITH_A_CALL[name]
    if name != "chatglm3":  # it writes arguments as Python
        message = calling(("weather", GIVEN), content="")  # type: ignore[arg-type]
        assert ours(name, [*ASKED, message, *CALLED[3:]], tools) == WITH_A_CALL[name]


def test_tools_are_listed_without_a_system_message_too() -> None:
    messages = TWO[1:2]
    plugin = f"<s><|im_start|>system name=<|plugin|>\n[{DESCRIBED}, {TIMED}]<|im_end|>\n"
    qwen = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    for name, head in (
        ("internlm2", f"{plugin}<|im_start|>user\nq1"),
        ("qwen", f"<|im_start|>system\n{qwen}\n\n{QWEN_TOOLS}<|im_start|>user\nq1"),
        ("qwen3", f"<|im_start|>system\n{QWEN_TOOLS}<|im_start|>user\nq1"),
        ("mistral", f"<s>[AVAILABLE_TOOLS] [{', '.join(FUNCTIONS)}][/AVAILABLE_TOOLS][INST] q1[/INST]"),
    ):
        assert ours(name, messages, TOOLS).startswith(head)
    assert ours("qwen", messages).startswith(f"<|im_start|>system\n{qwen}<|im_end|>\n<|im_start|>user\nq1")


def test_several_calls_and_results() -> None:
    messages, tools = RECORDS["two calls"]
    expected = {
        "qwen": f'{{"name": "weather", "arguments": {GIVEN}}}\n</tool_call>\n<tool_call>\n{{"name": "time", '
        '"arguments": {}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n'
        "<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "deepseek": wide(
            f"weather\n```json\n{GIVEN}\n```<|tool▁call▁end|>\n<|tool▁call▁begin|>function<|tool▁sep|>time\n```json\n"
            "{}\n```<|tool▁call▁end|><|tool▁calls▁end|><|end▁of▁sentence|><|tool▁outputs▁begin|><|tool▁output▁begin|>1"
            "<|tool▁output▁end|>\n<|tool▁output▁begin|>1<|tool▁output▁end|><|tool▁outputs▁end|>"
        ),
        "glm4": f"<|assistant|>weather\n{GIVEN}<|assistant|>time\n{{}}"
        "<|observation|>\n1<|observation|>\n1<|assistant|>",
        "internlm2": f'{{"name": "weather", "parameters": {GIVEN}}}<|action_end|><|action_start|><|plugin|>\n'
        '{"name": "time", "parameters": {}}<|action_end|><|im_end|>\n<|im_start|>environment name=<|plugin|>\n1'
        "<|im_end|>\n<|im_start|>environment name=<|plugin|>\n1<|im_end|>\n<|im_start|>assistant\n",
        "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {GIVEN}, "id": "aaaaaaaa1"}}, {{"name": "time", '
        '"arguments": {}, "id": "aaaaaaaa2"}]</s>[TOOL_RESULTS] {"content": 1, "call_id": "aaaaaaaa1"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": 1, "call_id": "aaaaaaaa2"}[/TOOL_RESULTS]',
    }
    expected["qwen3"] = expected["qwen"]
    for name, end in expected.items():
        text = ours(name, messages, None if name == "deepseek" else tools, prompt=True)
        assert text.endswith(end), name


def test_thoughts_are_written_in_the_last_answer_and_cut_from_earlier_ones() -> None:
    for name, prompt in (("qwen3", "<|im_start|>assistant\n"), ("deepseek", wide("<|Assistant|>"))):
        for messages in (THOUGHT, INSIDE):
            text = ours(name, messages)
            assert f"{prompt}<think>\nt2\n</think>\n\na2<" in text
            assert "t1" not in text
            assert "a1" in text
    # What was thought since the last question stays, in qwen3.
    messages, tools = RECORDS["thoughts around a result"]
    assert "<think>\nt1\n</think>\n\nc\n<tool_call>" in ours("qwen3", messages, tools)
    assert "t1" not in ours("deepseek", messages)
    assert wide("<|tool▁outputs▁end|><think>\nt2\n</think>\n\na<") in ours("deepseek", messages)


@pytest.mark.parametrize("name", TEXTS)
def test_an_answer_is_written_as_generation_has_to_make_it(name: str) -> None:
    checked = 0
    for title, (messages, tools) in RECORDS.items():
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            text = unless_it_raises(ours, name, messages[: number + 1], tools)
            if text is not None:
                prompt = ours(name, messages[:number], tools, prompt=True)
                assert text.startswith(prompt), (title, number)
                assert message.get("content", "").strip()[-1:] in text[len(prompt) :]
                checked += 1
    assert checked >= 12


CALL: Messages = [*ASKED, calling(BEIJING)]
RESULT: Messages = [*ASKED, result("sunny")]
TURNS = {
    "the user first": chat(("assistant", "a")),
    "the assistant next": chat(("user", "q"), ("user", "q")),
    "one system message": chat(("system", "s"), ("system", "s")),
    "no system message between": chat(("user", "q"), ("system", "s")),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_no_family_has_a_place_for_is_refused(name: str) -> None:
    for messages, expected in (
        (chat(("user", "q"), ("gpt", "a")), "message 2 has the role gpt; "),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "the content of message 1 is not a string"),
        ([{"role": "user"}], "the content of message 1 is not a string"),
        ([*TWO[1:2], {"role": "assistant", "content": None}], "the content of message 2 is not a string"),
        ([*TWO[1:2], calling(BEIJING, content=1)], "the content of message 2 is not a string"),  # type: ignore[arg-type]
        ([{**calling(BEIJING, content=""), "role": "user"}], "message 1 "),
        ([{**TWO[1], "reasoning_content": "t"}], "message 1 has "),
        ([*TWO[1:2], {"role": "assistant", "tool_calls": [{"type": "function", "function": {}}]}], ""),
    ):
        with pytest.raises(UserError, match=f"chat template {name}, line .*{expected}"):
            ours(name, messages)


@pytest.mark.parametrize("name", WITHOUT_TOOLS)
def test_tools_are_refused_where_there_is_no_form_for_them(name: str) -> None:
    for messages, tools in ((ASKED, TOOLS), (CALL, None)):
        with pytest.raises(UserError, match=f"{name} has no form for tools; chatml has"):
            ours(name, messages, tools)
    with pytest.raises(UserError, match=f"message 3 has the role tool; {name} knows system, user and assistant"):
        ours(name, RESULT)


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"qwen3", "deepseek"}))
def test_a_thought_is_refused_where_there_is_no_form_for_it(name: str) -> None:
    with pytest.raises(UserError, match=f"message 3 has a thought; {name} has no form for thoughts; qwen3 has"):
        ours(name, THOUGHT)
    assert ours(name, RECORDS["an empty thought"][0]) == SHORT[name]
    assert "t2" in ours(name, INSIDE)  # as part of a text it is text


@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
def test_a_thought_that_would_take_text_with_it_is_refused(name: str) -> None:
    for content in ("First. <think>t</think>a", "<think>t</think>a<think>u</think>b", "<think>t</think>a</think>b"):
        for after in ([], TWO[3:]):
            with pytest.raises(UserError, match="message 2 has a thought that is not at its beginning, or several"):
                ours(name, [*chat(("user", "q"), ("assistant", content)), *after])
    both = [TWO[1], thinking("t", "<think>u</think>a")]
    if name == "deepseek":
        with pytest.raises(UserError, match=r"message 2 has a thought .*, or several"):
            ours(name, both)
    else:  # as published
        assert "<think>\nt\n</think>\n\n<think>u</think>a<" in ours(name, both)


def test_what_single_families_have_no_place_for_is_refused() -> None:
    for name, messages, tools, expected in (
        ("deepseek", ASKED, TOOLS, "deepseek has no form for a list of tools; the system message can describe them"),
        ("chatglm3", RECORDS["two calls"][0], None, "message 3 calls too many tools; .* one at a time"),
        ("chatglm3", [*ASKED, calling(("time", "now"))], None, "arguments of the call in message 3 are not an object"),  # type: ignore[arg-type]
        ("chatglm3", ASKED, [TIME["function"]], "not JSON serializable"),
        ("internlm2", ASKED, [TIME["function"]], "not JSON serializable"),
        (
            "mistral",
            RECORDS["a call with a long id"][0],
            None,
            "message 3 has the call id call_123456789; .* 9 letters",
        ),
        ("mistral", [*CALL, result("1", "1")], None, "message 4 has the call id 1; in mistral an id has 9 letters"),
        ("mistral", RECORDS["a call at the end"][0], None, "message 3 calls tools; .* in a message without content"),
        ("mistral", TWO[:1], None, "mistral writes the system message and the tools into the last question"),
        ("mistral", [], TOOLS, "mistral writes the system message and the tools into the last question"),
        *(("mistral", m, None, f"message {len(m)} has the role .* take turns") for m in TURNS.values()),
        *(
            (name, TURNS["one system message"], None, "a system message comes first")
            for name in ("minicpm", "baichuan2")
        ),
    ):
        with pytest.raises(UserError, match=f"chat template {name}, line .*{expected}"):
            ours(name, messages, tools)
