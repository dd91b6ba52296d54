"""`fm9g data check`: the folder that it writes, and its messages."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import make_records
from helpers.inspection import CHAT, Make, z

from fm9g.cli import main
from fm9g.errors import UserError


def test_a_sample_is_spread_over_the_dataset(make_mixture: Make, run_check: Callable[..., dict]) -> None:
    path = make_mixture({"a": [z(0, 3 + i) for i in range(6)], "b": [z(0, 4)]})
    report = run_check(path, sample=3)
    one = report["datasets"]["a"]
    assert (one["records"], one["read"], one["tokens"]) == (6, 3, 4 + 6 + 8)
    assert one["run_epochs"] == pytest.approx(one["run_tokens"] / 36)
    assert report["datasets"]["b"]["read"] == 1
    assert report["notes"][0].startswith("only 3 evenly spread records of each dataset were read")


def test_only_its_own_output_is_replaced_unasked(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, output = make_mixture({"a": make_records(20)}), tmp_path / "out"
    command = ["data", "check", str(path), "--tokenizer", str(tokenizer_path), "--steps", "5", "--output", str(output)]
    assert main(command) == main(command) == 0
    (output / "mine").touch()
    capsys.readouterr()
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert not (output / "mine").exists()
    assert main([*command[:-1], str(tmp_path / "indexed"), "--overwrite"]) == 2
    assert "which is an input" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "--steps: found 0, expected 1 to 1000000000"),
        ({"workers": 10**40}, "workers: found 1000.*, expected 0 to 1024"),
        ({"sample": 0}, "--sample: found 0"),
        ({"max_length": 2}, "max_length"),
        ({"train_on": "some"}, "train_on"),
        ({"chat_template": "chatmk"}, "chatml"),
    ],
)
def test_mistakes_of_a_check(make_mixture: Make, run_check: Callable, arguments: dict, message: str) -> None:
    path = make_mixture({"a": make_records(5)})
    with pytest.raises(UserError, match=message):
        run_check(path, **arguments)


def test_a_bad_record_is_named(make_mixture: Make, run_check: Callable, tmp_path: Path) -> None:
    path = make_mixture({"a": [z(0, 3), CHAT]})
    with pytest.raises(UserError, match=r"a, line 2 of .*: a conversation needs a template"):
        run_check(path)
    assert not (tmp_path / "data_check").exists()
    assert run_check(path, chat_template="chatml", max_length=400)["datasets"]["a"]["records"] == 2
