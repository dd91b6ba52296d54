"""What reaches a terminal: nothing in it acts there, and nothing else is changed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import small_model

from fm9g.cli import main
from fm9g.io.pt_file import write_weights
from fm9g.model.transformer import weight_shapes
from fm9g.printable import PrintableStream, printable, printable_lines, printable_output, raw_stream
from fm9g.progress import Progress

EVIL = "x\x1b[31m\x9b2J\u202ey\nfm9g: done\r"
SHOWN = "x␛[31m\\u009b2J\\u202ey␊fm9g: done␍"


EMOJI = "👩\u200d👩\u200d👧 ❤\ufe0f 🏳\ufe0f\u200d🌈"


@pytest.mark.parametrize(
    "text", ["plain", "九格大模型", EMOJI, "e\u0301 ñ", "\u0628\u200f \u0639", "a\tb", "\u3000", "«␛»", "\\x1b"]
)
def test_text_that_only_reads_stays(text: str) -> None:
    assert printable(text) == printable_lines(text) == text


def test_whatever_acts_is_shown() -> None:
    assert printable(EVIL) == SHOWN
    assert printable_lines(EVIL) == SHOWN.replace("␊", "\n")
    acting = [*range(9), *range(10, 32), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F)]
    for code in [*acting, *range(0x2066, 0x206A)]:
        assert chr(code) not in printable(f"a{chr(code)}b")
        assert len(printable(f"a{chr(code)}b")) > 2
    assert printable(SHOWN) == SHOWN


def test_streams_keep_what_was_printed_already(capsys: pytest.CaptureFixture) -> None:
    before = sys.stdout, sys.stderr
    with printable_output(), printable_output():
        print(EVIL, end="|")
        print(EVIL, file=sys.stderr, end="|")
        sys.stdout.writelines(["\x1b", "a\n"])
        print("\x1b[1mours\x1b[0m", file=raw_stream(sys.stdout))
        assert isinstance(sys.stdout, PrintableStream)
        assert sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
    lines = SHOWN.replace("␊", "\n")
    assert capsys.readouterr() == (f"{lines}|␛a\n\x1b[1mours\x1b[0m\n", f"{lines}|")


def test_libraries_leave_their_colours_out(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wandb and swanlab, which write with click and rich: signs in the place of colours would be all over a log."""
    click = pytest.importorskip("click")

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with printable_output():
        click.echo(click.style("wandb", "blue"), err=True)
        assert Progress("title", 1, "files")._terminal  # ours look at the stream below
    assert capsys.readouterr().err.startswith("wandb\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    code = main(list(words))
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert not {char for char in text if char != "\n" and not char.isprintable()}, text
    assert not any(line.startswith("fm9g: done") for line in text.splitlines())
    return code, text


@pytest.mark.parametrize(
    "words", ["ckpt show", "ckpt verify", "ckpt ls", "convert FILE o.pt", "lora show", "report", "generate --prompt x"]
)
def test_a_file_name_does_nothing(words: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    command = words.replace("FILE", "").split()
    command[len(command) - command.count("o.pt") :] = [EVIL, *(["o.pt"] if "o.pt" in command else [])]
    code, text = run(capsys, *command)
    assert code == 2
    assert SHOWN in text
    assert len(text.splitlines()) == 1


def test_names_in_weights_and_configurations_do_nothing(here: Path, capsys: pytest.CaptureFixture) -> None:
    model = small_model()
    weights: dict[str, Any] = {name: torch.zeros(shape) for name, shape in weight_shapes(model).items()}
    for file, more in (("a.pt", {EVIL: torch.ones(1)}), ("b.pt", {EVIL + "2": torch.ones(1)})):
        write_weights(here / file, weights | more, (weights | more).items())
        (here / file).with_suffix(".json").write_text(json.dumps(model.to_json()))
    code, text = run(capsys, "ckpt", "show", "a.pt", "--weights")
    assert (code, text.count(SHOWN)) == (0, 1)
    code, text = run(capsys, "ckpt", "diff", "a.pt", "b.pt")
    assert (code, text.count(SHOWN)) == (1, 2)
    code, text = run(capsys, "convert", "a.pt", "out")
    assert (code, text.count(SHOWN)) == (2, 1)
    (here / "a.json").write_text(json.dumps({**model.to_json(), EVIL: 1}))
    code, text = run(capsys, "convert", "a.pt", "out")
    assert (code, SHOWN in text) == (2, True)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_generated_text_is_shown_on_a_terminal_and_kept_elsewhere(
    is_terminal: bool, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(self: Any, prompt: str, options: Any, on_text: Any) -> None:
        for piece in ("", " 中\x1b", "[31m", "文\n", "👩‍👧"):
            on_text(piece)

    monkeypatch.setattr("fm9g.infer.open_model.open_model", lambda *given: type("Model", (), {"generate": generate})())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    assert main(["generate", "hf", "--prompt", "a\x9b"]) == 0
    expected = "a\x9b 中\x1b[31m文\n👩‍👧\n"
    assert capsys.readouterr().out == (printable_lines(expected) if is_terminal else expected)


@pytest.mark.parametrize("words", ["ckpt show", "convert", "generate --prompt x", "report", "data index --path"])
def test_a_path_with_nul_is_a_mistake(words: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    more = {"convert": ["o"], "data index --path": ["--language", "en", "--output", "o"]}.get(words, [])
    code, text = run(capsys, *words.split(), "a\0b", *more)
    assert (code, text) == (2, "fm9g: a␀b: contains a NUL character, which is not possible in a path or an argument\n")


def test_a_path_with_nul_in_a_file_is_a_mistake(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fm9g.report.files.find_run", lambda name: os.stat("a\0b"))
    code, text = run(capsys, "report", "x")
    assert (code, len(text.splitlines())) == (2, 1)
    assert "NUL" in text
    monkeypatch.setattr("fm9g.report.files.find_run", lambda name: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["report", "x"])
