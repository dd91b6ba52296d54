"""Tools and their calls."""

import json

import pytest

from fm9g.data.prepare.record_formats import BadRecord, canonicalize

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def stored(turn: dict, **extra: object) -> dict:
    """What a turn becomes in a conversation, and again when it is read from where that is stored."""
    before = json.dumps(turn)
    record = canonicalize({"messages": [USER, turn], **extra})[1]
    assert json.dumps(turn) == before
    copy = json.loads(json.dumps(record))
    assert canonicalize(copy)[1] is copy
    return record["messages"][1]


def complaint(turn: dict, **extra: object) -> str:
    with pytest.raises(BadRecord) as error:
        canonicalize({"messages": [USER, turn], **extra})
    return str(error.value)


F, G = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": "{\\"s\\": \\"</tool_call>\\"}"}'
CALL_G = {"type": "function", "function": {"name": "g", "arguments": {"s": "</tool_call>"}}}


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (F, "", [CALL]),
        (f"[{F}, {G}]", "", [CALL, CALL_G]),
        (f"<think>t</think>{F}", "<think>t</think>", [CALL]),
        (f" <think>\nt\n</think>\n\n[{F}]\n", "<think>\nt\n</think>", [CALL]),
        (f"<tool_call>\n{F}\n</tool_call>", "", [CALL]),
        (f"<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>\n", "", [CALL, CALL_G]),
        (f"<think>t</think><tool_call>[{G}]</tool_call>", "<think>t</think>", [CALL_G]),
    ],
)
def test_text_of_calls_may_have_a_thought_and_tags(text: str, content: str, calls: list) -> None:
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": text}]}
    turn = canonicalize(record)[1]["messages"][1]
    assert turn == {"role": "assistant", "content": content, "tool_calls": calls}


@pytest.mark.parametrize(
    "text",
    [
        "{'name': 'f', 'arguments': {'x': 1}}",
        f"I call {F}",
        f"<think>t{F}",
        f"<tool_call>{F}",
        f"<tool_call>{F}</tool_call> done",
        "<tool_call></tool_call>",
        "<tool_call>{'name': 'f'}</tool_call>",
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": 1e999}}',
        f'{{"name": "f", "arguments": {{"x": {"1" * 5000}}}}}',
    ],
)
def test_other_text_of_calls_is_refused_with_what_is_expected(text: str) -> None:
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": text}]}
    with pytest.raises(
        BadRecord, match=r'^conversations\[1\]\.value: .*expected the JSON of calls, {"name": ..., "arg'
    ):
        canonicalize(record)


def test_calls_may_stand_as_values_where_their_text_would() -> None:
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.loads(F)}]}
    assert canonicalize(record)[1]["messages"][1] == CALLING


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"x": None}, {"x": None}),
        ('{"city": "Paris", "n": [1.5, null]}', {"city": "Paris", "n": [1.5, None]}),
        (" {} ", {}),
        ({}, {}),
        ("", {}),
        (" \n", {}),
        (None, {}),
        ("null", {}),
    ],
)
def test_arguments_become_an_object(arguments: object, expected: dict) -> None:
    for turn in (
        {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]},
        {"tool_calls": [{"id": "1", "name": "f", "arguments": arguments}]},
    ):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": expected}}
        assert stored({"role": "assistant", "content": None, **turn}) == {**CALLING, "tool_calls": [call]}
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": arguments}}
    assert stored(turn)["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("[1]", "found list, expected an object"),
        ([1], "found list, expected an object"),
        ("3", "found int, expected an object"),
        ("city=Paris", "not JSON: 'city=Paris'"),
        ('{"x": Infinity}', """not JSON: Infinity is not a number: '{"x": Infinity}'"""),
        ('{"x": -1e999}', """not JSON: -1e999 is not a number: '{"x": -1e999}'"""),
        ("1" * 5000, f"not JSON: an integer of 5000 digits: '{'1' * 79}"),
        ("[" * 100_000, f"JSON that is nested too deeply: '{'[' * 79}"),
    ],
)
def test_arguments_that_are_no_object_name_the_function(arguments: object, message: str) -> None:
    turn = {**CALLING, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert complaint(turn) == f"messages[1].tool_calls: arguments of f: {message}"


def test_a_call_without_arguments_is_one_with_none() -> None:
    turn = stored({**CALLING, "tool_calls": [{"id": "1", "type": "function", "index": 0, "function": {"name": "f"}}]})
    assert turn["tool_calls"] == [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize("calls", [None, [], "", "[]", "null", {}, [None], " "])
def test_blank_calls_are_none(calls: object) -> None:
    assert stored({**ANSWER, "tool_calls": calls, "function_call": None}) == ANSWER
    assert stored({**ANSWER, "tool_calls": calls, "function_call": json.loads(F)})["tool_calls"] == [CALL]


@pytest.mark.parametrize("tools", ["", " ", "\n", "[]", "null", "{}", "[null]", None, [], {}, [None], [{}]])
def test_blank_tools_are_none(tools: object) -> None:
    assert canonicalize({"messages": [USER, ANSWER], "tools": tools})[1] == {"messages": [USER, ANSWER]}
    conversations = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert canonicalize({"conversations": conversations, "tools": tools})[1] == {"messages": [USER, ANSWER]}
    assert canonicalize({"instruction": "q", "output": "a", "tools": tools})[1] == {"input": "q", "output": "a"}


def test_tools_nested_too_deeply_are_a_bad_record() -> None:
    for text in ("[" * 100_000, "[" * 100_000 + "]" * 100_000):
        assert complaint(ANSWER, tools=text).startswith("tools: JSON that is nested too deeply: '[[[")
        assert complaint(ANSWER, tools=[text]) == 'tools: expected functions, objects with a "name"'
    objects = '{"a":' * 100_000
    assert complaint(ANSWER, tools=[objects]) == 'tools: expected functions, objects with a "name"'
    for text in (objects, f"<tool_call>{objects}"):
        call = {"from": "function_call", "value": text}
        assert complaint(call).startswith("messages[1].value: JSON that is nested too deeply: ")
    with pytest.raises(BadRecord, match="messages: JSON that is nested too deeply"):
        canonicalize({"messages": "[" * 100_000})
    with pytest.raises(BadRecord, match="history: JSON that is nested too deeply"):
        canonicalize({"query": "q", "response": "a", "history": "[" * 100_000})
    deep = "[" * 100_000
    assert canonicalize({"prompt": deep, "chosen": deep, "rejected": "b"})[1]["messages"][0]["content"] == deep
