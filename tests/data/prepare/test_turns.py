"""Turns: reasoning, ids and names, other keys."""

import json

import pytest

from fm9g.data.prepare.record_formats import BadRecord, canonicalize

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THOUGHT = {"type": "thinking", "thinking": "t"}


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
            "messages[1]: reasoning_content and thinking hold different reasoning; keep one of them",
        ),
        (
            {"content": [THOUGHT], "reasoning": "u"},
            "messages[1]: content and reasoning hold different reasoning; keep one of them",
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


def test_ids_and_names_are_kept() -> None:
    result = {"role": "tool", "content": "3", "tool_call_id": "abc", "name": "f"}
    call = {"id": "abc", **CALL}
    record = {"messages": [{**USER, "name": "Ann"}, {**CALLING, "tool_calls": [call]}, result]}
    assert canonicalize(record)[1] is record
    nothing = {"tool_call_id": None, "name": None}
    assert canonicalize({"messages": [{**USER, **nothing}, {**CALLING, "tool_calls": [{**CALL, "id": None}]}]})[1] == {
        "messages": [USER, CALLING]
    }


@pytest.mark.parametrize("key", ["trainer", "unmasked", "losses", "weighted", "strain", "lossless"])
def test_other_keys_of_a_turn_are_left_out(key: str) -> None:
    assert stored({**ANSWER, key: 0}) == ANSWER
