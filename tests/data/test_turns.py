"""What turns say beside their content: thoughts, calls, ids, and marks of what is trained on."""

import json
import re

import pytest

from fm9g.data.prepare.record_formats import BadRecord, ColumnMapping, canonicalize

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THOUGHT = {"type": "thinking", "thinking": "t"}


def stored(turn: dict, **beside: object) -> dict:
    """What a turn becomes in a conversation, and again when it is read from where that is stored."""
    before = json.dumps(turn)
    record = canonicalize({"messages": [USER, turn], **beside})[1]
    assert json.dumps(turn) == before
    copy = json.loads(json.dumps(record))
    assert canonicalize(copy)[1] is copy
    return record["messages"][1]


def complaint(turn: dict, **beside: object) -> str:
    with pytest.raises(BadRecord) as error:
        canonicalize({"messages": [USER, turn], **beside})
    return str(error.value)


@pytest.mark.parametrize(
    "turn",
    [
        {"reasoning_content": "t"},
        {"thinking": "t"},
        {"reasoning": "t"},
        {"reasoning": "t", "thinking": None, "reasoning_content": " \n"},
        {"reasoning": "t", "thinking": "t"},
        {"content": [THOUGHT, {"type": "text", "text": "a"}]},
        {"content": [THOUGHT, {"type": "text", "text": "a"}], "reasoning": "t"},
        {"content": [{"type": "reasoning", "reasoning": "t"}, {"type": "text", "text": "a"}]},
        {"content": [{"type": "reasoning", "text": "t", "reasoning": None}, {"type": "text", "text": "a"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"type": "text", "text": "a"}]},
    ],
)
def test_a_thought_is_kept_under_whatever_key_it_stands(turn: dict) -> None:
    assert stored({**ANSWER, **turn}) == {**ANSWER, "reasoning_content": "t"}


def test_a_thought_needs_no_content_and_goes_with_calls() -> None:
    assert stored({"role": "assistant", "content": None, "thinking": "t", "tool_calls": [CALL]}) == {
        **CALLING,
        "reasoning_content": "t",
    }
    assert stored({"role": "assistant", "content": None, "thinking": "t"})["content"] == ""
    assert stored({**ANSWER, "reasoning": " ", "thinking": ""}) == ANSWER
    preference = {"prompt": "q", "chosen": {**ANSWER, "thinking": "t"}, "rejected": "b"}
    assert canonicalize(preference)[1]["chosen"] == {**ANSWER, "reasoning_content": "t"}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"reasoning_content": "t", "thinking": "u"},
            "messages[1]: reasoning_content and thinking hold different thoughts; keep one of them",
        ),
        (
            {"content": [THOUGHT], "reasoning": "u"},
            "messages[1]: content and reasoning hold different thoughts; keep one of them",
        ),
        ({"reasoning": ["t"]}, "messages[1].reasoning: found list, expected a string"),
        (
            {"content": [{"type": "thinking", "text": "t"}]},
            "messages[1].content[0]: expected a string as its thinking; found the keys type, text",
        ),
        (
            {"content": [{"type": "reasoning", "text": "t", "reasoning": "u"}]},
            "messages[1].content[0]: expected a string as its reasoning or text; found the keys type, text, reasoning",
        ),
        (
            {"content": [{"type": "redacted_thinking"}]},
            'messages[1].content[0]: expected {"type": "text", "text": ...}; fm9g trains on text only',
        ),
    ],
)
def test_thoughts_that_are_no_text_or_differ_are_refused(turn: dict, message: str) -> None:
    assert complaint({**ANSWER, **turn}) == message


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
        ('{"x": Infinity}', """not JSON: Infinity is no number: '{"x": Infinity}'"""),
        ('{"x": -1e999}', """not JSON: -1e999 is no number: '{"x": -1e999}'"""),
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


def test_ids_and_names_are_kept() -> None:
    result = {"role": "tool", "content": "3", "tool_call_id": "abc", "name": "f"}
    call = {"id": "abc", **CALL}
    record = {"messages": [{**USER, "name": "Ann"}, {**CALLING, "tool_calls": [call]}, result]}
    assert canonicalize(record)[1] is record
    nothing = {"tool_call_id": None, "name": None}
    assert canonicalize({"messages": [{**USER, **nothing}, {**CALLING, "tool_calls": [{**CALL, "id": None}]}]})[1] == {
        "messages": [USER, CALLING]
    }


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


NOT_TRAINED = [
    {"train": False},
    {"trainable": False},
    {"training": False},
    {"train_on_turn": False},
    {"loss": False},
    {"loss": 0},
    {"loss_mask": 0},
    {"weight": 0},
    {"loss_weight": 0.0},
    {"loss_scale": 0},
    {"mask": True},
    {"mask": 1},
    {"train": False, "weight": 0, "mask": True, "loss": None},
]
TRAINED = [
    {"train": True},
    {"loss": 1},
    {"weight": None},
    {"loss": None},
    {"mask": False},
    {"mask": 0},
    {"weight": 1.0},
    {"train": True, "weight": 1, "mask": False, "loss_mask": None},
]
WEIGHTED = [{"weight": 0.5}, {"loss_scale": 0.5}, {"train": True, "loss_weight": 0.5, "mask": 0}]


@pytest.mark.parametrize(
    ("marks", "weight"),
    [(m, 0) for m in NOT_TRAINED] + [(m, 1) for m in TRAINED] + [(m, 0.5) for m in WEIGHTED],
)
def test_every_mark_is_a_weight_wherever_it_stands(marks: dict, weight: float) -> None:
    expected = {**ANSWER, **({} if weight == 1 else {"weight": weight})}
    assert stored({**ANSWER, **marks}) == expected
    assert stored({"from": "gpt", "value": "a", **marks}) == expected
    assert stored({**ANSWER, "content": [{"type": "text", "text": "a", **marks}]}) == expected
    assert stored(ANSWER, **marks) == expected
    assert stored(ANSWER, **{key: [None, value] for key, value in marks.items()}) == expected
    assert stored({**CALLING, **marks}) == {**expected, **CALLING}
    weights = {} if weight == 1 else {"weight": weight}
    pair = {"input": "q", "output": "a"}
    for record in (pair, {"instruction": "q", "output": "a"}, {"query": "q", "response": "a"}):
        assert canonicalize({**record, **marks})[1] == {**pair, **weights}
    assert canonicalize({"text": "a", **marks})[1] == {"input": "", "output": "a", **weights}
    with_history = {"instruction": "q", "output": "a", "history": [["q", "a"]], **marks}
    assert canonicalize(with_history)[1] == {"messages": [USER, expected] * 2}
    assert type(stored({**ANSWER, **marks}).get("weight", 1)) is not bool


def test_marks_multiply_over_record_turn_and_part() -> None:
    parts = [{"type": "text", "text": "ab", "weight": 3}, {"type": "text", "text": "cde", "loss": False}]
    turn = {"role": "assistant", "content": parts, "weight": 0.5}
    assert stored(turn) == {"role": "assistant", "content": "abcde", "content_weights": [[2, 1.5], [3, 0]]}
    beside = {"loss_scale": 4, "loss_mask": [0, 0.25]}
    assert stored(turn, **beside)["content_weights"] == [[2, 1.5], [3, 0]]
    assert stored(turn, loss_scale=4)["content_weights"] == [[2, 6.0], [3, 0]]
    assert stored({**ANSWER, "weight": 0.5}, weight=0.5) == {**ANSWER, "weight": 0.25}
    assert stored({**ANSWER, "weight": 0.5}, weight=2) == ANSWER
    assert stored(turn, train=False) == {"role": "assistant", "content": "abcde", "weight": 0}


def test_weights_of_parts_cover_the_whole_content() -> None:
    def parts(*weights: object, texts: str = "abcdef") -> dict:
        made = [{"type": "text", "text": text} for text in texts]
        return {"role": "assistant", "content": [part | {"weight": w} for part, w in zip(made, weights)]}

    assert stored(parts(1, None, 0, 0, 1, 2))["content_weights"] == [[2, 1], [2, 0], [1, 1], [1, 2]]
    assert stored(parts(0, 0)) == {"role": "assistant", "content": "ab", "weight": 0}
    assert stored(parts(1, None)) == {"role": "assistant", "content": "ab"}
    assert stored(parts(0, None))["content_weights"] == [[1, 0], [1, 1]]
    given = {"role": "assistant", "content": "字 字", "content_weights": [[1, 1], [1, 1.0], [0, 3], [1, 0]]}
    assert stored(given)["content_weights"] == [[2, 1], [1, 0]]
    assert stored({**given, "weight": 0.5})["content_weights"] == [[2, 0.5], [1, 0]]
    assert stored({**given, "content_weights": [[3, 0]]}) == {"role": "assistant", "content": "字 字", "weight": 0}
    empty = {"role": "assistant", "content": [{"type": "text", "text": "", "weight": 0}], "tool_calls": [CALL]}
    assert stored(empty) == {**CALLING, "weight": 0}


def test_a_thought_has_the_weight_of_the_text_after_it() -> None:
    text = {"type": "text", "text": "a"}
    masked = {**ANSWER, "reasoning_content": "t", "weight": 0}
    assert stored({**ANSWER, "content": [{**THOUGHT, "weight": 0}, {**text, "weight": 0}]}) == masked
    assert stored({**ANSWER, "content": [THOUGHT, text], "weight": 0}) == masked
    assert stored({**ANSWER, "content": [{**THOUGHT, "weight": 0}]}) == {**masked, "content": ""}
    assert complaint({**ANSWER, "content": [{**THOUGHT, "weight": 0}, text]}) == (
        "messages[1].content[0]: a thought has the weight of the text after it; mark that alike, or the whole turn"
    )


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"weight": -1}, "weight: found -1, expected a number from 0, or true or false"),
        ({"weight": -0.5}, "weight: found -0.5, expected a number from 0, or true or false"),
        ({"loss_scale": float("nan")}, "loss_scale: found nan, expected a number from 0, or true or false"),
        ({"loss_weight": float("inf")}, "loss_weight: found inf, expected a number from 0, or true or false"),
        ({"loss_weight": 1 << 64}, f"loss_weight: found {1 << 64}, expected 0, or a number from 1e-06 to 1e+06"),
        ({"train": "no"}, "train: found 'no', expected a number from 0, or true or false"),
        ({"loss": {"x": 1}}, "loss: found dict, expected a number from 0, or true or false"),
        ({"mask": 0.5}, "mask: found 0.5, expected true or false"),
        ({"weight": 0, "train": True}, "train: True contradicts weight: 0; keep one of them"),
        ({"mask": True, "loss": True}, "loss: True contradicts mask: True; keep one of them"),
        ({"weight": 0.5, "loss_scale": 0.6}, "loss_scale: 0.6 contradicts weight: 0.5; keep one of them"),
        ({"weight": 0.5, "train": True, "loss": False}, "loss: False contradicts weight: 0.5; keep one of them"),
    ],
)
def test_a_mark_that_is_none_is_refused_by_its_name(marks: dict, message: str) -> None:
    assert complaint({**ANSWER, **marks}) == f"messages[1].{message}"
    assert complaint({**ANSWER, "content": [{"type": "text", "text": "a", **marks}]}) == (
        f"messages[1].content[0].{message}"
    )
    assert complaint(ANSWER, **marks) == message
    assert complaint(ANSWER, **{key: [None, value] for key, value in marks.items()}) == f"turn 1 of {message}"
    with pytest.raises(BadRecord, match=f"^{re.escape(message)}$"):
        canonicalize({"input": "q", "output": "a", **marks})


@pytest.mark.parametrize(
    "key", ["train_detail", "train_on_input", "no_train", "weights", "masks", "token_weight", "loss_fn", "loss_masks"]
)
def test_a_key_like_a_mark_is_refused_on_a_turn_and_left_out_of_a_record(key: str) -> None:
    known = f"{key}: looks like a mark of what is trained on, in a spelling that is not known; remove it, or call it"
    for turn in ({**ANSWER, key: 0}, {**ANSWER, key: [{"train": False}]}):
        assert complaint(turn).startswith(f"messages[1].{known} weight")
    assert complaint({**ANSWER, "content": [{"type": "text", "text": "a", key: 0}]}).startswith(
        f"messages[1].content[0].{known}"
    )
    assert stored({**ANSWER, key: None}) == stored({**ANSWER, key: ""}) == ANSWER
    assert stored(ANSWER, **{key: 0}) == ANSWER


@pytest.mark.parametrize("key", ["trainer", "unmasked", "losses", "weighted", "strain", "lossless"])
def test_other_keys_of_a_turn_are_left_out(key: str) -> None:
    assert stored({**ANSWER, key: 0}) == ANSWER


def test_marks_of_others_than_the_assistant_are_dropped() -> None:
    for mark in ({"weight": 0}, {"loss": "x"}, {"mask": True, "train": True}, {"content_weights": 3}):
        record = {"messages": [{"role": "system", "content": "s", **mark}, {**USER, **mark}, ANSWER]}
        assert canonicalize(record)[1] == {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}
    record = {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "weight": -1}]}, ANSWER]}
    assert canonicalize(record)[1] == {"messages": [USER, ANSWER]}
    record = {"messages": [USER, ANSWER, USER], "loss_mask": ["x", 0, -1]}
    assert canonicalize(record)[1] == {"messages": [USER, {**ANSWER, "weight": 0}, USER]}


def test_a_list_beside_the_messages_has_a_value_for_each_turn() -> None:
    turns = [USER, ANSWER, USER, ANSWER]
    record = canonicalize({"messages": turns, "loss_mask": [0, 0, 0, 1], "system": "s"})[1]
    masked = {**ANSWER, "weight": 0}
    assert record == {"messages": [{"role": "system", "content": "s"}, USER, masked, USER, ANSWER]}
    assert canonicalize({"messages": turns, "train": [True, False] * 2, "mask": [0, 1] * 2})[1] == {
        "messages": [USER, masked] * 2
    }
    with pytest.raises(BadRecord, match=r"^loss_mask: found 3 values beside 4 turns, expected one a turn$"):
        canonicalize({"messages": turns, "loss_mask": [0, 0, 1]})
    with pytest.raises(BadRecord, match=r"^loss_mask: found 5 values beside 4 turns, expected one a turn$"):
        canonicalize({"messages": turns, "loss_mask": [0, 0, 1, 1, 1]})
    with pytest.raises(BadRecord, match=r"^loss_mask: found list, expected a number from 0, or true or false$"):
        canonicalize({"input": "q", "output": "a", "loss_mask": [0, 1]})


def test_words_of_a_record_are_no_marks() -> None:
    for key in ("weight", "loss", "mask"):
        assert canonicalize({"text": "a", key: "heavy"})[1] == {"input": "", "output": "a"}
    assert canonicalize({"text": "a", "train": ""})[1] == {"input": "", "output": "a"}
    with pytest.raises(BadRecord, match=r"^train: found 'ICE', expected a number"):
        canonicalize({"text": "a", "train": "ICE"})
    columns = ColumnMapping({"prompt": "question", "response": "train"})
    assert canonicalize({"question": "q", "train": "a", "weight": 0}, columns)[1] == {
        "input": "q",
        "output": "a",
        "weight": 0,
    }


def test_preferences_and_judged_answers_have_no_weights() -> None:
    marks = {"weight": -1, "train_detail": 1, "loss": "x"}
    record = {"messages": [{**USER, **marks}, {**ANSWER, **marks}], "label": True, "loss_mask": [1]}
    assert canonicalize(record)[1] == {"messages": [USER, ANSWER], "label": True}
    record = {"prompt": "q", "chosen": {**ANSWER, **marks}, "rejected": "b", **marks}
    assert canonicalize(record)[1]["chosen"] == ANSWER


@pytest.mark.parametrize(
    "value", [3, [], [[1, 1]], [[1, 1], [2, 1]], [[2, -1]], [[2, True]], [[True, 1], [1, 0]], [[-1, 1], [3, 0]], ["ab"]]
)
def test_content_weights_that_do_not_fit_are_refused(value: object) -> None:
    assert complaint({"role": "assistant", "content": "ab", "content_weights": value}) == (
        "messages[1].content_weights: expected [[number of characters, weight], ...] over the 2 characters of the "
        "content"
    )


def test_weights_that_multiply_beyond_numbers_are_refused() -> None:
    turn = {**ANSWER, "weight": 1e5}
    assert complaint(turn, weight=1e5) == "turn 1: its weights multiply to what is not 0, nor from 1e-06 to 1e+06"
    parts = [{"type": "text", "text": "a", "weight": 1e5}]
    expected = "messages[1]: its weights multiply to what is not 0, nor from 1e-06 to 1e+06"
    assert complaint({**turn, "content": parts}) == expected
    assert complaint({**turn, "content": parts, "content_weights": [[1, 1]]}) == (
        "messages[1].content_weights: the parts of the content have weights already; keep one of the two"
    )


def test_a_conversation_that_is_not_trained_on_at_all_is_kept() -> None:
    assert canonicalize({"messages": [USER, ANSWER], "train": False})[1] == {
        "messages": [USER, {**ANSWER, "weight": 0}]
    }


def test_a_list_beside_the_turns_in_an_unknown_spelling_is_refused() -> None:
    record = {"messages": [{"role": "user", "content": "q"}, ANSWER], "train_mask": [0, 1]}
    with pytest.raises(BadRecord, match="train_mask: looks like a mark of what is trained on"):
        canonicalize(record)
    assert canonicalize(record | {"train_mask": "a.json", "ids": [1, 2]})[1] == {"messages": record["messages"]}


def test_numbers_that_a_filter_has_measured_are_no_weights() -> None:
    assert canonicalize({"text": "a", "loss": 2.5})[1] == {"input": "", "output": "a"}
    assert canonicalize({"input": "q", "output": "a", "loss": 2.5})[1] == {"input": "q", "output": "a"}
    assert canonicalize({"text": "a", "loss": False})[1] == {"input": "", "output": "a", "weight": 0}
    assert canonicalize({"text": "a", "loss_weight": 0.5})[1] == {"input": "", "output": "a", "weight": 0.5}


@pytest.mark.parametrize("key", ["lossMask", "loss-mask", "LOSS_WEIGHT", "Weight", "trainOnTurn", "masked", "trained"])
def test_a_mark_in_another_form_is_refused(key: str) -> None:
    assert f".{key}: looks like a mark of what is trained on" in complaint({**ANSWER, key: 0})
