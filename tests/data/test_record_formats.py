"""Shapes of records: what each becomes, what is said of a mistake, and how columns are named."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fm9g.data.prepare.columns import columns_from_file, columns_from_text, dataset_info_entry
from fm9g.data.prepare.record_formats import BadRecord, ColumnMapping, canonicalize
from fm9g.errors import UserError

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
    'the JSON of calls, {"name": ..., "arguments": {...}} or a list of these; <think>...</think> may stand before it, '
    "and <tool_call>...</tool_call> around each"
)


def chat(*turns: dict, **beside: object) -> dict:
    return {"messages": list(turns), **beside}


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
    ({}, "no known shape; found no keys; map them with --columns prompt=KEY,response=KEY"),
    (
        {"question": "q", "answer": "a"},
        "no known shape; found the keys question, answer; map them with --columns prompt=KEY,response=KEY",
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
    (chat(USER, label=True), "messages: the last turn is the user's, expected the answer that is judged"),
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
        "messages: found 2 of role, 1 of content, expected as many of each, one a turn",
    ),
    (chat(SYSTEM, USER), "messages: no turn of the assistant, nothing to train on"),
    (
        chat(
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {}}]}, ANSWER
        ),
        'messages[0].content[1]: expected {"type": "text", "text": ...}; fm9g trains on text only',
    ),
    (chat({**USER, "tool_calls": [CALL]}), "messages[0]: a turn of the user calls tools; only the assistant's may"),
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
JUNK += [{"name": "f"}, {"from": "gpt"}, {"role": [None]}]


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


COLUMNS = [
    ("prompt=question,response=answer", {"question": "q", "answer": "a", "id": 1}, {"input": "q", "output": "a"}),
    ("instruction=i, query = c ,output=o", {"i": "q", "c": "x", "o": "a"}, {"input": "q\nx", "output": "a"}),
    ("input=q,output=a,system=s", {"q": "q", "a": "a", "s": "s"}, chat(SYSTEM, USER, ANSWER)),
    ("prompt=q,response=a,system=s", {"q": "q", "a": "a"}, {"input": "q", "output": "a"}),
    ("text=raw_content", {"raw_content": "a", "input": "no", "output": "no"}, {"input": "", "output": "a"}),
    ("conversations=dialog,tools=t", {"dialog": [HUMAN, ANSWER], "t": [TOOL]}, chat(USER, ANSWER, tools=[TOOL])),
    ("messages=m,kto_tag=good", {"m": [USER, ANSWER], "good": True}, chat(USER, ANSWER, label=True)),
    ("prompt=q,chosen=win,rejected=lose", {"q": "q", "win": "a", "lose": "b"}, PREFERENCE),
    ("messages=m,chosen=win,rejected=lose", {"m": [USER], "win": GPT, "lose": "b"}, PREFERENCE),
]


@pytest.mark.parametrize(("text", "record", "expected"), COLUMNS)
def test_columns_name_the_keys(text: str, record: dict, expected: dict) -> None:
    assert canonicalize(record, columns_from_text(text)) == ("columns", expected)


def test_columns_that_name_the_canonical_keys_keep_the_record() -> None:
    record = {"input": "q", "output": "a"}
    assert canonicalize(record, columns_from_text("prompt=input,response=output"))[1] is record


def test_messages_about_columns_name_the_users_keys() -> None:
    columns = columns_from_text("prompt=question,response=answer")
    with pytest.raises(BadRecord, match=r"^question: missing; found the keys qestion, answer$"):
        canonicalize({"qestion": "q", "answer": "a"}, columns)
    with pytest.raises(BadRecord, match=r"^answer: found nothing, expected a string$"):
        canonicalize({"question": "q", "answer": None}, columns)


NAMES = "prompt, query, response, system, history, text, messages, tools, chosen, rejected, label"
KNOWN = f"{NAMES}, instruction, input, output, conversations, kto_tag"
NO_RECORD = (
    "makes no record; name text, or messages, or prompt and response, or chosen and rejected with messages or prompt; "
    "query, system, history, tools, label may stand beside them"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt", "--columns: 'prompt' is not NAME=KEY; write it as prompt=question,response=answer"),
        ("prompt=a,", "--columns: '' is not NAME=KEY; write it as prompt=question,response=answer"),
        ("prompt=a,prompt=b", "--columns: 'prompt=b' is given twice; write it as prompt=question,response=answer"),
        ("prompt=a,input=b", "--columns: input means prompt, which is given already; keep one of them"),
        ("promt=a,response=b", f"--columns: unknown name 'promt'; did you mean 'prompt'? (known: {KNOWN})"),
        ("images=a", f"--columns: unknown name 'images'; fm9g trains on text only (known: {KNOWN})"),
        ("prompt=a", f"--columns: prompt {NO_RECORD}"),
        ("text=a,system=b", f"--columns: text, system {NO_RECORD}"),
    ],
)
def test_a_mistake_in_columns_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        columns_from_text(text)
    assert str(error.value) == message


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_file_of_columns_may_have_tags(tmp_path: Path) -> None:
    names = {"prompt": "question", "response": "answer"}
    assert columns_from_file(write(tmp_path / "a.json", names)) == ColumnMapping(names)
    assert columns_from_file(write(tmp_path / "a.json", {"columns": names})) == ColumnMapping(names)
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A", "function_tag": "C"}
    columns = columns_from_file(write(tmp_path / "a.json", {"columns": {"messages": "dialog"}, "tags": tags}))
    turns = [{"who": "U", "says": "q"}, {"who": "C", "says": json.dumps(CALL)}, {"who": "tool", "says": "3"}]
    assert canonicalize({"dialog": [*turns, {"who": "A", "says": "a"}]}, columns)[1] == chat(
        USER, CALLING, RESULT, ANSWER
    )


def test_tags_win_over_our_own_names_of_roles() -> None:
    columns = ColumnMapping({"messages": "messages"}, {"user_tag": "assistant", "assistant_tag": "user"})
    record = chat({"role": "assistant", "content": "q"}, {"role": "user", "content": "a"})
    assert canonicalize(record, columns)[1] == chat(USER, ANSWER)


@pytest.mark.parametrize(
    ("tags", "turn"),
    [
        ({"role_tag": "from"}, {"from": "user", "value": "q"}),
        ({"role_tag": "who"}, {"who": "user", "content": "q"}),
        ({"content_tag": "value"}, {"from": "user", "value": "q"}),
        ({"content_tag": "says"}, {"role": "user", "says": "q"}),
    ],
)
def test_one_tag_leaves_the_other_key_what_it_is_without_tags(tags: dict[str, str], turn: dict) -> None:
    record = {"messages": [turn], "chosen": "a", "rejected": "b"}
    names = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    assert canonicalize(record, ColumnMapping(names, tags))[1] == PREFERENCE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"promt": "a"}, f"unknown name 'promt'; did you mean 'prompt'? (known: {KNOWN})"),
        ({"text": 3}, "text: found 3, expected a string that is not empty"),
        ({"columns": {"text": ""}}, "columns: text: found '', expected a string that is not empty"),
        ({"columns": {"text": "a"}, "tag": {}}, "unknown name 'tag'; did you mean 'tags'? (known: columns, tags)"),
        ({"columns": {"text": "a"}, "tags": 3}, "tags: found 3, expected an object"),
        (
            {"columns": {"messages": "m"}, "tags": {"usr_tag": "U"}},
            "tags: unknown name 'usr_tag'; did you mean 'user_tag'? (known: system_tag, user_tag, assistant_tag, "
            "observation_tag, function_tag, role_tag, content_tag)",
        ),
    ],
)
def test_a_mistake_in_a_file_of_columns_is_named(tmp_path: Path, content: dict, message: str) -> None:
    path = write(tmp_path / "columns.json", content)
    with pytest.raises(UserError) as error:
        columns_from_file(path)
    assert str(error.value) == f"{path}: {message}"


KTO_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
REAL_ENTRIES = {  # as LLaMA-Factory has them
    "identity": {},
    "alpaca_en_demo": {},
    "alpaca_zh_demo": {},
    "glaive_toolcall_zh_demo": {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools"},
    },
    "dpo_zh_demo": {
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "kto_en_demo": {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
        "tags": KTO_TAGS,
    },
}


def test_real_datasets_by_their_entries(shared: Path, tmp_path: Path) -> None:
    info = {name: {"file_name": str(shared / "data" / f"{name}.json"), **more} for name, more in REAL_ENTRIES.items()}
    info["c4_demo"] = {"file_name": str(shared / "data" / "c4_demo.jsonl"), "columns": {"prompt": "text"}}
    path = write(tmp_path / "dataset_info.json", info)
    for name, _, count in REAL:
        file, columns, samples = dataset_info_entry(path, name)
        assert (file, samples) == (shared / "data" / f"{name}.json", None)
        records = json.loads(file.read_text())
        assert len(records) == count
        for record in records:
            assert canonicalize(record, columns) == ("columns", canonicalize(record)[1])
    file, columns, _ = dataset_info_entry(path, "c4_demo")
    for line in file.read_text().splitlines():
        assert canonicalize(json.loads(line), columns)[1] == canonicalize(json.loads(line))[1]


def test_an_entry_says_where_what_and_how_many(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    alpaca = {"prompt": "instruction", "query": "input", "response": "output"}
    path = write(
        tmp_path / "dataset_info.json",
        {
            "a": {"file_name": "folder", "num_samples": 5},
            "b": {"file_name": "folder", "formatting": "openai"},
            "c": {"file_name": "folder", "columns": {"prompt": "x"}},
        },
    )
    assert dataset_info_entry(path, "a") == (tmp_path / "folder", ColumnMapping(alpaca), 5)
    assert dataset_info_entry(path, "b") == (tmp_path / "folder", ColumnMapping({"messages": "conversations"}), None)
    assert dataset_info_entry(path, "c") == (tmp_path / "folder", ColumnMapping({"text": "x"}), None)


RANKING = "expected true with the columns chosen and rejected, else false"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "found 3, expected an object"),
        (
            {"hf_hub_url": "a/b", "file_name": "x.json"},
            "hf_hub_url: download it first, then name its file or folder with file_name instead",
        ),
        (
            {"script_url": "a", "subset": "en"},
            "script_url: download it first, then name its file or folder with file_name instead",
        ),
        (
            {"file_name": "x.json", "colums": {}},
            "unknown name 'colums'; did you mean 'columns'? (known: file_name, formatting, ranking, columns, tags, "
            "num_samples)",
        ),
        ({}, "file_name: found None, expected a file or folder in {folder}"),
        ({"file_name": "y.json"}, "file_name: found 'y.json', expected a file or folder in {folder}"),
        (
            {"file_name": "x.json", "formatting": "sharegtp"},
            "formatting: found 'sharegtp', expected sharegpt or openai with these columns",
        ),
        (
            {"file_name": "x.json", "formatting": "sharegpt", "columns": {"text": "a"}},
            "formatting: found 'sharegpt', expected alpaca with these columns",
        ),
        ({"file_name": "x.json", "ranking": True}, f"ranking: found True, {RANKING}"),
        (
            {"file_name": "x.json", "columns": {"prompt": "a", "chosen": "b", "rejected": "c"}},
            f"ranking: found None, {RANKING}",
        ),
        ({"file_name": "x.json", "num_samples": 0}, "num_samples: found 0, expected a whole number from 1"),
        ({"file_name": "x.json", "num_samples": True}, "num_samples: found True, expected a whole number from 1"),
        ({"file_name": "x.json", "columns": ["a"]}, "columns: found ['a'], expected an object"),
        (
            {"file_name": "x.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
            f"columns: unknown name 'images'; fm9g trains on text only (known: {KNOWN})",
        ),
        (
            {"file_name": "x.json", "tags": {"user_tag": 3}},
            "tags: user_tag: found 3, expected a string that is not empty",
        ),
    ],
)
def test_a_mistake_in_an_entry_is_named(tmp_path: Path, entry: object, message: str) -> None:
    (tmp_path / "x.json").write_text("[]")
    path = write(tmp_path / "dataset_info.json", {"mine": entry})
    with pytest.raises(UserError) as error:
        dataset_info_entry(path, "mine")
    assert str(error.value) == f"{path}: mine: {message.replace('{folder}', str(tmp_path))}"


def test_an_unknown_dataset_is_named_with_those_there(tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_info.json", {"identity": {}, "alpaca": {}})
    with pytest.raises(UserError) as error:
        dataset_info_entry(path, "identitty")
    assert str(error.value) == (
        f"{path}: datasets: unknown name 'identitty'; did you mean 'identity'? (known: identity, alpaca)"
    )
