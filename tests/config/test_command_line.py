"""Words of the command line as keys and values."""

from __future__ import annotations

import pytest

from fm9g.config.command_line import parse_words, single_values
from fm9g.errors import UserError


def test_keys_have_values_lists_or_none() -> None:
    words = "--lr 1e-4 --lora-layer q_proj v_proj --overwrite --data.my-task.path=x=y --data a.json b.json"
    parsed = parse_words(words.split())
    assert parsed["data.my-task.path"] == ["x=y"]
    assert single_values(parsed) == {
        "lr": "1e-4",
        "lora_layer": "q_proj,v_proj",
        "overwrite": "true",
        "data.my-task.path": "x=y",
        "data": "a.json,b.json",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lr 1", "found 'lr', expected --key value"),
        ("lr=1", "found 'lr=1', expected --key value; did you mean --lr 1?"),
        ("--lr", "--lr: its value is missing"),
        ("--lr 1 2", "found '2', expected --key value"),
        ("--lr 1 --lr 2", "--lr is given twice"),
        ("--data a.json -model m", "found '-model', expected --key value; did you mean --model?"),
        ("--model m run.yaml", "found 'run.yaml', expected --key value; a run file is the first word"),
        ("-- 1", "found '--', expected --key value"),
    ],
)
def test_what_is_no_key_and_value_is_refused(words: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        single_values(parse_words(words.split()))
