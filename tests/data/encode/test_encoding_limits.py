"""A tokenizer's regular expressions neither kill nor hang a process without a message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.common import ROOT
from helpers.mixtures import answer_dataset
from helpers.stopped_clock import StandStill

from fm9g.data.encode import encoding_limits
from fm9g.data.encode.template import load_template
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError

MESSAGES = [{"role": "user", "content": "a"}]


def with_regex(folder: Path, regex: str) -> Path:
    """A tokenizer whose file has a regular expression."""
    train_tokenizer(["a b"], 300, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_regular_expression_beyond_its_engine_is_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = with_regex(tmp_path / "t", "(a+)+$")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("aaa b")
    text = "a" * 60 + "c"
    calls: list[Callable[[], Any]] = [
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_batch([text] * 3),
        lambda: tokenizer.encode_chat(text),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"t: the tokenizer broke off: .*retry-limit.*json cannot handle"):
            call()
    mixture = Mixture([answer_dataset(tmp_path, text)], str(folder), 64, 1)
    mixture.encoders[0] = mixture.encoders[0].__class__(mixture.tokenizer, load_template("chatml", mixture.tokenizer))
    with pytest.raises(
        UserError, match=r"^task, one of the lines 1 of .*data: its text cannot be encoded: .* the tokenizer broke off"
    ):
        mixture.encode(0, [0])
    assert "stack backtrace" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_tokenizer_that_never_ends_ends_the_process_with_a_message(tmp_path: Path) -> None:
    """Each of the words is below the limit of the engine, which no signal reaches."""
    folder = with_regex(tmp_path / "t", "(a+)+$")
    program = (
        "import fm9g.data.encode.encoding_limits as limits\n"
        "from fm9g.data.encode.tokenizer_loading import load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(folder)!r})\n"
        "limits.BASE_SECONDS, limits._CHECK_INTERVAL = 0.2, 0.1\n"
        "limits.CHARACTERS_PER_SECOND = 10**12\n"
        "tokenizer.encode(('a' * 19 + 'b') * 100_000)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"fm9g: {folder}: the tokenizer takes more than 0 seconds. A regular expression")


@pytest.mark.parametrize(("looks", "ended"), [(50, False), (70, True)])
def test_a_program_that_was_stopped_has_its_time_to_encode_afterwards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, looks: int, ended: bool
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    watch = encoding_limits._EncodingWatchdog
    monkeypatch.setattr(watch, "_process", os.getpid())  # so that no thread starts
    monkeypatch.setattr(encoding_limits, "time", StandStill(looks))
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit if ended else InterruptedError), encoding_limits.bounded_encoding("t", 0):
        watch._watch()
    assert ("t: the tokenizer takes more than 60 seconds" in capsys.readouterr().err) is ended


def test_usual_texts_are_far_from_the_limit_of_time() -> None:
    assert encoding_limits.BASE_SECONDS >= 60
    assert encoding_limits.CHARACTERS_PER_SECOND <= 50_000
