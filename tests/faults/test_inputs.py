"""Some bad inputs for every command; campaign_inputs.py makes thousands."""

import random
from pathlib import Path

import pytest
from faults.forked import EndedCommand
from faults.inputs import COMMANDS, Attempt, Command, Inputs, problems_of

_MESSAGE = "fm9g: a.json: not JSON\n"


@pytest.mark.parametrize("count", [5, pytest.param(500, marks=pytest.mark.slow)])
def test_bad_inputs_are_refused_by_one_message_and_change_nothing(count: int, tmp_path: Path) -> None:
    commands = random.Random(count).sample(COMMANDS, min(count, len(COMMANDS)))
    found = [
        f"{attempt}: {'; '.join(attempt.problems)}\n{attempt.stderr[-1000:]}"
        for attempt in Inputs(tmp_path, seed=count).attempts(count, commands)
        if attempt.problems
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("ended", "after", "expected"),
    [
        (EndedCommand(2, "", _MESSAGE, 1), {}, []),
        (EndedCommand(0, "", "", 1), {"out": "1"}, []),
        (EndedCommand(1, "", "Traceback\nRuntimeError: a.json\n", 1), {}, ["exit code 1", "words of a library"]),
        (EndedCommand(2, "", f"{_MESSAGE}ValueError: no\n", 1), {}, ["words of a library"]),
        (EndedCommand(2, "", "fm9g: not JSON\n", 1), {}, ["names none of"]),
        (EndedCommand(2, "", "", 1), {}, ["no message", "names none of"]),
        (EndedCommand(2, "", _MESSAGE * 9, 1), {}, ["9 lines"]),
        (EndedCommand(2, "", f"fm9g: a.json: {'x' * 2000}\n", 1), {}, ["a message of more than"]),
        (EndedCommand(2, "", "fm9g: a.json: \x1b[31m\n", 1), {}, ["unprintable"]),
        (EndedCommand(2, "", "fm9g: a.json: out of memory\n", 1), {}, ["too much memory"]),
        (EndedCommand(-9, "", _MESSAGE, 1), {}, ["ended by signal 9", "exit code -9"]),
        (EndedCommand(-9, "", _MESSAGE, 1, timed_out=True), {}, ["took more than", "exit code -9"]),
        (EndedCommand(2, "", _MESSAGE, 1, orphans=1), {}, ["1 processes lived on"]),
        (EndedCommand(2, "", _MESSAGE, 1), {"a.json": "2"}, ["changed"]),
        (EndedCommand(2, "", _MESSAGE, 1), {"out": "1"}, ["made"]),
        (EndedCommand(0, "", "", 1), {".out.12.tmp/x": "1"}, ["made", "left"]),
    ],
)
def test_what_a_command_should_not_do_is_seen(ended: EndedCommand, after: dict[str, str], expected: list[str]) -> None:
    command = Command("data index --path a.json --output out", ("a.json",))
    attempt = Attempt(command, "empty", "a.json: empty", ("a.json",), command.argv)
    found = problems_of(attempt, ended, before := {"a.json": "1"}, before | after)
    assert [problem for problem, start in zip(found, expected, strict=True) if not problem.startswith(start)] == []
