"""Loss weights of records, turns and parts of turns, from the keys of other tools."""

import json
import re

import pytest

from fm9g.data.prepare.column_mapping import ColumnMapping
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
    extra = {"loss_scale": 4, "loss_mask": [0, 0.25]}
    assert stored(turn, **extra)["content_weights"] == [[2, 1.5], [3, 0]]
    assert stored(turn, loss_scale=4)["content_weights"] == [[2, 6.0], [3, 0]]
    assert stored({**ANSWER, "weight": 0.5}, weight=0.5) == {**ANSWER, "weight": 0.25}
    assert stored({**ANSWER, "weight": 0.5}, weight=2) == ANSWER
    assert stored(turn, train=False) == {"role": "assistant", "content": "abcde", "weight": 0}


def test_weights_of_parts_cover_the_whole_content() -> None:
    def parts(*weights: object, texts: str = "abcdef") -> dict:
        created = [{"type": "text", "text": text} for text in texts]
        return {"role": "assistant", "content": [part | {"weight": w} for part, w in zip(created, weights)]}

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
        "messages[1].content[0]: reasoning and the text after it need the same weight; or give the turn a weight"
    )


@pytest.mark.parametrize(
    ("weights", "message"),
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
def test_a_mark_that_is_none_is_refused_by_its_name(weights: dict, message: str) -> None:
    assert complaint({**ANSWER, **weights}) == f"messages[1].{message}"
    assert complaint({**ANSWER, "content": [{"type": "text", "text": "a", **weights}]}) == (
        f"messages[1].content[0].{message}"
    )
    assert complaint(ANSWER, **weights) == message
    assert complaint(ANSWER, **{key: [None, value] for key, value in weights.items()}) == f"turn 1 of {message}"
    with pytest.raises(BadRecord, match=f"^{re.escape(message)}$"):
        canonicalize({"input": "q", "output": "a", **weights})


@pytest.mark.parametrize(
    "key", ["train_detail", "train_on_input", "no_train", "weights", "masks", "token_weight", "loss_fn", "loss_masks"]
)
def test_a_key_like_a_mark_is_refused_on_a_turn_and_left_out_of_a_record(key: str) -> None:
    known = f"{key}: looks like a loss weight or mask under an unknown name; remove it, or rename it"
    for turn in ({**ANSWER, key: 0}, {**ANSWER, key: [{"train": False}]}):
        assert complaint(turn).startswith(f"messages[1].{known} to weight")
    assert complaint({**ANSWER, "content": [{"type": "text", "text": "a", key: 0}]}).startswith(
        f"messages[1].content[0].{known}"
    )
    assert stored({**ANSWER, key: None}) == stored({**ANSWER, key: ""}) == ANSWER
    assert stored(ANSWER, **{key: 0}) == ANSWER


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
    with pytest.raises(BadRecord, match=r"^loss_mask: found 3 values beside 4 turns, expected one per turn$"):
        canonicalize({"messages": turns, "loss_mask": [0, 0, 1]})
    with pytest.raises(BadRecord, match=r"^loss_mask: found 5 values beside 4 turns, expected one per turn$"):
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
    weights = {"weight": -1, "train_detail": 1, "loss": "x"}
    record = {"messages": [{**USER, **weights}, {**ANSWER, **weights}], "label": True, "loss_mask": [1]}
    assert canonicalize(record)[1] == {"messages": [USER, ANSWER], "label": True}
    record = {"prompt": "q", "chosen": {**ANSWER, **weights}, "rejected": "b", **weights}
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
    assert complaint(turn, weight=1e5) == "turn 1: the product of its weights is neither 0 nor from 1e-06 to 1e+06"
    parts = [{"type": "text", "text": "a", "weight": 1e5}]
    expected = "messages[1]: the product of its weights is neither 0 nor from 1e-06 to 1e+06"
    assert complaint({**turn, "content": parts}) == expected
    assert complaint({**turn, "content": parts, "content_weights": [[1, 1]]}) == (
        "messages[1].content_weights: the parts of the content have weights too; keep one of the two"
    )


def test_a_conversation_that_is_not_trained_on_at_all_is_kept() -> None:
    assert canonicalize({"messages": [USER, ANSWER], "train": False})[1] == {
        "messages": [USER, {**ANSWER, "weight": 0}]
    }


def test_a_list_beside_the_turns_in_an_unknown_spelling_is_refused() -> None:
    record = {"messages": [{"role": "user", "content": "q"}, ANSWER], "train_mask": [0, 1]}
    with pytest.raises(BadRecord, match="train_mask: looks like a loss weight or mask"):
        canonicalize(record)
    assert canonicalize(record | {"train_mask": "a.json", "ids": [1, 2]})[1] == {"messages": record["messages"]}


def test_numbers_that_a_filter_has_measured_are_no_weights() -> None:
    assert canonicalize({"text": "a", "loss": 2.5})[1] == {"input": "", "output": "a"}
    assert canonicalize({"input": "q", "output": "a", "loss": 2.5})[1] == {"input": "q", "output": "a"}
    assert canonicalize({"text": "a", "loss": False})[1] == {"input": "", "output": "a", "weight": 0}
    assert canonicalize({"text": "a", "loss_weight": 0.5})[1] == {"input": "", "output": "a", "weight": 0.5}


@pytest.mark.parametrize("key", ["lossMask", "loss-mask", "LOSS_WEIGHT", "Weight", "trainOnTurn", "masked", "trained"])
def test_a_mark_in_another_form_is_refused(key: str) -> None:
    assert f".{key}: looks like a loss weight or mask" in complaint({**ANSWER, key: 0})
