"""The record of a failure, which other machines send."""

from __future__ import annotations

import pytest

from fm9g.launch.failure import Failure


@pytest.mark.parametrize(
    "record",
    [
        {"cause": "x", "rank": 1, "host": "h", "node": 0, "code": 0},
        {"cause": "x", "rank": 1, "host": "h", "node": 0, "code": 256},
        {"cause": "x", "rank": "1", "host": "h", "node": 0},
        {"cause": 5, "rank": 1, "host": "h", "node": 0},
        {"unknown": 5},
        3,
        "text",
        [],
    ],
)
def test_a_failure_is_never_a_success(record: object) -> None:
    failure = Failure.from_json(record)
    assert 0 < failure.code < 256
    assert failure.cause


def test_what_another_machine_says_cannot_act_on_a_terminal() -> None:
    failure = Failure("\x1b[2Jgone\r", 1, "\x1b]0;host\x07", 0, detail="a\x1b[31m\nb")
    assert "\x1b" not in failure.text
    assert "\r" not in failure.text
    assert len(failure.text.split("\n")) == 3
