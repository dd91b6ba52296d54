"""Every format of records becomes its canonical form, which stays as it is."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fm9g.data.prepare.record_formats import BadRecord, canonicalize

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
BAD = {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
RESULT = {"role": "tool", "content": "3"}
PREFERENCE = {"messages": [USER], "chosen": ANSWER, "rejected": BAD}
ROLES = (
    "system, developer, user, human, assistant, gpt, chatgpt, bard, bing, tool, observation, function, tool_response, "
    "function_call, tool_call"
)
CALLS = (
    'the JSON of calls, {"name": ..., "arguments": {...}} or a list of these, optionally after <think>...</think> and '
    "each within <tool_call>...</tool_call>"
)


def chat(*turns: dict, **extra: object) -> dict:
    return {"messages": list(turns), **extra}


SHAPES = [
    ("input/output", {"input": "q", "output": "a", "id": 7}, {"input": "q", "output": "a"}),
    ("input/output", {"output": "a"}, {"input": "", "output": "a"}),
    ("input/output", {"input": None, "output": ""}, {"input": "", "output": ""}),
    ("text", {"text": "a", "url": "x", "label": 3}, {"input": "", "output": "a"}),
    ("Alpaca", {"instruction": "q", "output": "a"}, {"input": "q", "output": "a"}),
    ("Alpaca", {"instruction": "q", "input": "x", "output": "a"}, {"input": "q\nx", "output": "a"}),
    ("Alpaca", {"instruction": "", "input": "x", "output": "a", "text": "t"}, {"input": "x", "output": "a"}),
    (
        "Alpaca",
        {"instruction": "q", "input": None, "output": "a", "system": None, "history": None, "tools": ""},
        {"input": "q", "output": "a"},
    ),
    ("Alpaca", {"instruction": "q", "output": "a", "system": "s"}, chat(SYSTEM, USER, ANSWER)),
    (
        "Alpaca",
        {"instruction": "q", "input": "x", "output": "a", "history": [["q", "a"], ["q", "b"]]},
        chat(USER, ANSWER, USER, BAD, {"role": "user", "content": "q\nx"}, ANSWER),
    ),
    ("Alpaca", {"instruction": "q", "output": "a", "tools": [TOOL]}, chat(USER, ANSWER, tools=[TOOL])),
    ("KTO", {"instruction": "q", "output": "a", "kto_tag": False}, chat(USER, ANSWER, label=False)),
    ("query/response", {"query": "q", "response": "a"}, {"input": "q", "output": "a"}),
    (
        "query/response",
        {"query": "q", "response": "a", "system": "s", "history": [["q", "b"]]},
        chat(SYSTEM, USER, BAD, USER, ANSWER),
    ),
    ("query/response", {"query": "q", "response": "a", "history": '[["q", "b"]]'}, chat(USER, BAD, USER, ANSWER)),
    ("query/response", {"query": "q", "response": "a", "history": " "}, {"input": "q", "output": "a"}),
    ("query/response", {"query": "q", "response": "a", "history": "null"}, {"input": "q", "output": "a"}),
    ("KTO", {"query": "q", "response": "a", "label": True}, chat(USER, ANSWER, label=True)),
    ("ShareGPT", {"conversations": [HUMAN, GPT], "id": "1"}, chat(USER, ANSWER)),
    ("ShareGPT", {"conversations": [HUMAN, GPT], "system": "s", "tools": "[]"}, chat(SYSTEM, USER, ANSWER)),
    (
        "ShareGPT",
        {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "system": "other"},
        chat(SYSTEM, USER, ANSWER),
    ),
    (
        "ShareGPT",
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "chatgpt", "value": "a"},
            ],
            "tools": '[{"name": "f", "parameters": {}}]',
        },
        chat(USER, CALLING, RESULT, ANSWER, tools=[TOOL]),
    ),
    (
        "ShareGPT",
        {"conversations": [HUMAN, {"from": "tool_call", "value": json.dumps([CALL, CALL])}]},
        chat(USER, {**CALLING, "tool_calls": [CALL, CALL]}),
    ),
    ("messages", {"messages": [USER, ANSWER], "tools": None}, chat(USER, ANSWER)),
    ("messages", {"conversations": [USER, ANSWER]}, chat(USER, ANSWER)),
    ("messages", {"messages": [USER, ANSWER], "tools": "null"}, chat(USER, ANSWER)),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "s", "name": "x"},
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **CALL}]},
                {"role": "tool", "content": "3", "tool_call_id": "1", "tool_calls": None},
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "content": "3"},
            ],
            "tools": [{"name": "f", "parameters": {}}],
        },
        chat(
            {**SYSTEM, "name": "x"},
            {"role": "user", "content": "qq"},
            {**CALLING, "tool_calls": [{"id": "1", **CALL}]},
            {**RESULT, "tool_call_id": "1"},
            {**CALLING, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
            RESULT,
            tools=[TOOL],
        ),
    ),
    ("messages", chat(USER, ANSWER, SYSTEM, USER), chat(USER, ANSWER, SYSTEM, USER)),
    ("messages", {"messages": json.dumps([USER, ANSWER])}, chat(USER, ANSWER)),
    ("ShareGPT", {"conversations": json.dumps([HUMAN, GPT])}, chat(USER, ANSWER)),
    ("messages", {"messages": [json.dumps(USER), ANSWER]}, chat(USER, ANSWER)),
    ("ShareGPT", {"conversations": [json.dumps(HUMAN), json.dumps(GPT)]}, chat(USER, ANSWER)),
    (
        "messages",
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"], "tool_calls": None, "name": [None, "x"]}},
        chat(USER, {**ANSWER, "name": "x"}),
    ),
    ("ShareGPT", {"conversations": json.dumps({"from": ["human", "gpt"], "value": ["q", "a"]})}, chat(USER, ANSWER)),
    ("messages", chat(USER, ANSWER, tools=json.dumps([TOOL])), chat(USER, ANSWER, tools=[TOOL])),
    ("messages", chat(USER, ANSWER, tools=[json.dumps(TOOL), None]), chat(USER, ANSWER, tools=[TOOL])),
    ("KTO", {"messages": [USER, ANSWER], "label": True}, chat(USER, ANSWER, label=True)),
    ("KTO", {"conversations": [HUMAN, GPT], "kto_tag": False}, chat(USER, ANSWER, label=False)),
    ("preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": BAD}, PREFERENCE),
    ("preference", {"messages": [USER], "chosen": "a", "rejected": [BAD]}, PREFERENCE),
    ("preference", {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}, PREFERENCE),
    (
        "preference",
        {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b", "system": "s", "history": [["q", "a"]]},
        {**PREFERENCE, "messages": [SYSTEM, USER, ANSWER, {"role": "user", "content": "q\nx"}]},
    ),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [TOOL]}, {**PREFERENCE, "tools": [TOOL]}),
    ("preference", {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]}, PREFERENCE),
    ("preference", {"prompt": json.dumps([USER]), "chosen": json.dumps([ANSWER]), "rejected": "b"}, PREFERENCE),
    (
        "preference",
        {"prompt": '["q"]', "chosen": "[a]", "rejected": '[{"b": 1}]'},
        {
            "messages": [{"role": "user", "content": '["q"]'}],
            "chosen": {**ANSWER, "content": "[a]"},
            "rejected": {**BAD, "content": '[{"b": 1}]'},
        },
    ),
    (
        "preference",
        {"prompt": [SYSTEM, USER], "system": "other", "history": [["q", "b"]], "chosen": "a", "rejected": "b"},
        {**PREFERENCE, "messages": [SYSTEM, USER, BAD, USER]},
    ),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, BAD]}, PREFERENCE),
    (  # UltraFeedback: the whole chosen conversation is there as well
        "preference",
        {"prompt": "q", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, BAD]},
        PREFERENCE,
    ),
    (  # the system message is in the prompt alone
        "preference",
        {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, BAD]},
        {**PREFERENCE, "messages": [SYSTEM, USER]},
    ),
    (  # a conversation says more than its last question
        "preference",
        {"prompt": "q", "messages": [USER, BAD, USER], "chosen": "a", "rejected": "b"},
        {**PREFERENCE, "messages": [USER, BAD, USER]},
    ),
    (  # the prompt is only the last question
        "preference",
        {"prompt": "q", "chosen": [USER, BAD, USER, ANSWER], "rejected": [USER, BAD, USER, BAD]},
        {**PREFERENCE, "messages": [USER, BAD, USER]},
    ),
    (  # the answer begins with a call
        "preference",
        {"prompt": "q", "chosen": [CALLING, RESULT, ANSWER], "rejected": [CALLING, RESULT, BAD]},
        {**PREFERENCE, "messages": [USER, CALLING, RESULT]},
    ),
]


@pytest.mark.parametrize(("shape", "record", "expected"), SHAPES)
def test_each_shape_becomes_its_canonical_form_which_stays_as_it_is(shape: str, record: dict, expected: dict) -> None:
    before = json.dumps(record)
    assert canonicalize(record) == (shape, expected)
    assert json.dumps(record) == before
    copy = json.loads(json.dumps(expected))
    assert canonicalize(copy)[1] is copy


@pytest.mark.parametrize(
    "record",
    [
        {"input": "q", "output": "a", "id": 1},
        chat({**USER, "name": None}, ANSWER),
        chat(USER, {**ANSWER, "weight": False}),
        chat(USER, {**ANSWER, "weight": 1}),
        chat(USER, {**ANSWER, "reasoning_content": " "}),
        {"input": "q", "output": "a", "weight": False},
        chat(HUMAN, GPT),
        chat(USER, ANSWER, tools=[]),
        chat(USER, {**CALLING, "tool_calls": [{**CALL, "id": 1}]}),
        {**PREFERENCE, "chosen": "a"},
    ],
)
def test_a_record_that_is_nearly_canonical_is_not_returned_itself(record: dict) -> None:
    assert canonicalize(record)[1] is not record


MISTAKES = [
    ({"input": "q", "output": 3}, "output: found int, expected a string"),
    ({"input": ["q"], "output": "a"}, "input: found list, expected a string"),
    ({"output": None}, "output: found nothing, expected a string"),
    ({"text": 1.5}, "text: found float, expected a string"),
    ({}, "unknown format; found no keys; map them with --columns prompt=KEY,response=KEY"),
    (
        {"question": "q", "answer": "a"},
        "unknown format; found the keys question, answer; map them with --columns prompt=KEY,response=KEY",
    ),
    ({"instruction": None, "output": "a"}, "instruction: found nothing, expected a string"),
    ({"instruction": "q", "output": "a", "system": 1}, "system: found int, expected a string"),
    ({"query": "q", "response": "a", "history": "q"}, "history: found str, expected a list of [question, answer]"),
    (
        {"query": "q", "response": "a", "history": [["q", "a"], ["q"]]},
        "history[1]: expected [question, answer], two strings",
    ),
    (
        {"query": "q", "response": "a", "history": [["q", None]]},
        "history[0]: expected [question, answer], two strings",
    ),
    ({"instruction": "q", "output": "a", "label": 1}, "label: found int, expected true or false"),
    (chat(USER, ANSWER, label="true"), "label: found str, expected true or false"),
    (chat(USER, label=True), "messages: the last turn is the user's, expected the answer that label rates"),
    ({"messages": "q"}, "messages: found str, expected a list of turns"),
    ({"conversations": []}, "conversations: the conversation is empty"),
    (chat(USER, "a"), "messages[1]: found str, expected an object"),
    (chat(USER, ANSWER, {"role": "user", "content": 3}), "messages[2].content: found int, expected a string"),
    (chat(USER, {"role": "assistant"}), "messages[1].content: found nothing, expected a string"),
    (chat({"content": "q"}), "messages[0].role: found nothing, expected a string"),
    (
        {"conversations": [{"from": "human", "content": "q"}]},
        "conversations[0].value: found nothing, expected a string",
    ),
    (
        {"conversations": [HUMAN, {"from": "gtp", "value": "a"}]},
        f"conversations[1].from: unknown role 'gtp'; did you mean 'gpt'? (known: {ROLES})",
    ),
    (chat({"role": "x", "content": "q"}), f"messages[0].role: unknown role 'x' (known: {ROLES})"),
    ({"messages": "[q"}, "messages: not JSON: '[q'"),
    ({"messages": '{"role": "user"}'}, "messages: found str, expected a list of turns"),
    ({"messages": {"role": "user", "content": "q"}}, "messages: found dict, expected a list of turns"),
    (
        {"messages": {"role": ["user", "assistant"], "content": ["q"]}},
        "messages: found 2 of role, 1 of content, expected the same number of each, one per turn",
    ),
    (chat(SYSTEM, USER), "messages: no turn of the assistant, nothing to train on"),
    (
        chat(
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {}}]}, ANSWER
        ),
        'messages[0].content[1]: expected {"type": "text", "text": ...}; fm9g trains on text only',
    ),
    (
        chat({**USER, "tool_calls": [CALL]}),
        "messages[0]: a turn of the user calls tools; only turns of the assistant may",
    ),
    (chat(USER, {**CALLING, "tool_calls": ["f"]}), 'messages[1].tool_calls: expected functions, objects with a "name"'),
    (
        chat(USER, {**CALLING, "tool_calls": [{"function": {"name": "f", "parameters": {"x": 1}}}]}),
        "messages[1].tool_calls: arguments of f: missing; found the keys name, parameters",
    ),
    (
        {"conversations": [HUMAN, {"from": "function_call", "value": "f(1)"}]},
        f"conversations[1].value: found 'f(1)', expected {CALLS}",
    ),
    (
        {"conversations": [HUMAN, {"from": "function_call", "value": "[]"}]},
        f"conversations[1].value: calls no function; expected {CALLS}",
    ),
    (chat(USER, ANSWER, tools=[{"description": "f"}]), 'tools: expected functions, objects with a "name"'),
    (chat(USER, ANSWER, tools="f"), "tools: not JSON: 'f'"),
    ({**PREFERENCE, "chosen": ""}, "chosen: the answer is empty"),
    ({**PREFERENCE, "rejected": {**ANSWER, "content": ""}}, "rejected: the answer is empty"),
    ({**PREFERENCE, "rejected": 3}, "rejected: found int, expected an object"),
    ({**PREFERENCE, "chosen": {"from": "gpt", "value": 1}}, "chosen.value: found int, expected a string"),
    ({**PREFERENCE, "chosen": USER}, "chosen: expected an answer of the assistant that is text, without tool calls"),
    ({**PREFERENCE, "chosen": CALLING}, "chosen: expected an answer of the assistant that is text, without tool calls"),
    (
        {**PREFERENCE, "messages": [USER, ANSWER]},
        "messages: the prompt ends with a turn of the assistant, expected user or tool",
    ),
    (
        {"prompt": "q", "chosen": [USER, BAD, ANSWER], "rejected": [USER, BAD, BAD]},
        "chosen: the prompt ends with a turn of the assistant, expected user or tool",
    ),
    (
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [BAD]},
        "rejected: the turns before the answer are not those of chosen",
    ),
    (
        {"chosen": "a", "rejected": "b"},
        "no prompt; found the keys chosen, rejected; name its key with --columns prompt=KEY,chosen=KEY,rejected=KEY",
    ),
]


@pytest.mark.parametrize(("record", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_place(record: dict, message: str) -> None:
    with pytest.raises(BadRecord) as error:
        canonicalize(record)
    assert str(error.value) == message


JUNK: list = [None, 3, True, "", "text", "[]", "[[", "{", 1e400, [], {}, [[]], [None], [{}], {"type": "text"}]


def spoilt(value: object) -> list:
    """Copies of a value, each with one part of it, or all, replaced by junk."""
    copies: list = list(JUNK)
    if isinstance(value, dict):
        copies += [{**value, key: copy} for key in value for copy in spoilt(value[key])]
    if isinstance(value, list):
        copies += [[*value[:i], copy, *value[i + 1 :]] for i in range(len(value)) for copy in spoilt(value[i])]
    return copies


@pytest.mark.parametrize("record", [record for _, record, _ in SHAPES])
def test_whatever_a_record_holds_it_becomes_canonical_or_is_refused(record: dict) -> None:
    refused = 0
    for copy in spoilt(record):
        if isinstance(copy, dict):
            try:
                result = canonicalize(copy)[1]
            except BadRecord:
                refused += 1
            else:
                assert canonicalize(result)[1] is result
                copy = json.loads(json.dumps(result))
                assert canonicalize(copy)[1] is copy
    assert refused


REAL = [
    ("alpaca_en_demo", "Alpaca", 999),
    ("alpaca_zh_demo", "Alpaca", 1000),
    ("identity", "Alpaca", 91),
    ("dpo_zh_demo", "preference", 300),
    ("glaive_toolcall_zh_demo", "ShareGPT", 300),
    ("kto_en_demo", "KTO", 300),
]


@pytest.mark.parametrize(("name", "shape", "count"), REAL)
def test_real_files_have_their_shapes(shared: Path, name: str, shape: str, count: int) -> None:
    found = [canonicalize(record) for record in json.loads((shared / "data" / f"{name}.json").read_text())]
    assert Counter(shape for shape, _ in found) == {shape: count}
    for _, record in found:
        assert canonicalize(record)[1] is record


def test_real_lines_of_text(shared: Path) -> None:
    lines = (shared / "data" / "c4_demo.jsonl").read_text().splitlines()
    assert Counter(canonicalize(json.loads(line))[0] for line in lines) == {"text": len(lines)}


LEFT_OUT = [
    ({"input": "q", "output": "a", "id": 7, "url": None, "note": " "}, ["id"]),
    ({"text": "a", "label": 3, "weight": "heavy"}, ["label", "weight"]),
    ({"text": "a", "text_weight": 3}, ["text_weight"]),
    (chat({**USER, "id": 1}, {**ANSWER, "refusal": "no", "audio": None}), ["turn.id", "turn.refusal"]),
    (chat(USER, {**ANSWER, "tool_call_id": 3}), ["turn.tool_call_id"]),
    (chat({**USER, "reasoning": "r"}, ANSWER), ["turn.reasoning"]),
    (chat({**USER, "weight": 0, "loss_mask": "x", "content_weights": 3}, ANSWER), []),
    (chat(USER, {**CALLING, "tool_calls": [{**CALL, "index": 0, "id": None}]}), ["turn.tool_calls.index"]),
    (chat(USER, ANSWER, tools=[{**TOOL, "strict": True}]), ["tools.strict"]),
    (
        chat(USER, {**ANSWER, "content": [{"type": "text", "text": "a", "annotations": [1], "citations": None}]}),
        ["turn.content.annotations"],
    ),
    ({"conversations": [SYSTEM, HUMAN, GPT], "system": "other"}, ["system"]),
    ({"conversations": [SYSTEM, HUMAN, GPT], "system": "s"}, []),
    ({**PREFERENCE, "chosen": {**ANSWER, "train": False}, "weight": 0.5}, ["turn.train", "weight"]),
    (chat(USER, {**ANSWER, "weight": 0, "train_detail": [1]}, label=True), ["turn.weight", "turn.train_detail"]),
]


@pytest.mark.parametrize(("record", "expected"), LEFT_OUT)
def test_keys_that_are_left_out_are_named(record: dict, expected: list[str]) -> None:
    left_out: list[str] = []
    result = canonicalize(record, None, left_out)[1]
    assert left_out == expected
    assert "weight" not in json.dumps(result)
    left_out.clear()
    canonicalize(result, None, left_out)
    assert left_out == []


def test_real_tool_calls_keep_what_they_say(shared: Path) -> None:
    source = json.loads((shared / "data" / "glaive_toolcall_zh_demo.json").read_text())
    calls = 0
    for given, (_, record) in zip(source, map(canonicalize, source)):
        assert [tool["function"] for tool in record.get("tools", [])] == json.loads(given["tools"])
        for before, turn in zip(given["conversations"], record["messages"], strict=True):
            if before["from"] == "function_call":
                calls += 1
                assert turn["role"] == "assistant"
                assert [call["function"] for call in turn["tool_calls"]] == [json.loads(before["value"])]
            else:
                assert turn["content"] == before["value"]
    assert calls == 216
    assert sum("tools" in canonicalize(record)[1] for record in source) == 200
