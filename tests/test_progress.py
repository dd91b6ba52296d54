"""Progress bars."""

import logging
import sys
from collections.abc import Iterator

import pytest

from fm9g.log import log_to_console
from fm9g.printable import printable_output
from fm9g.progress import Progress, write_line

EVIL, SHOWN = "x\x1b[31m\x9b2J\u202ey", "x␛[31m\\u009b2J\\u202ey"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger of the library, which is afterwards as it was."""
    logger = logging.getLogger("fm9g")
    level = logger.level
    yield logger
    logger.setLevel(level)


def test_progress_is_for_programs_that_want_messages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logger: logging.Logger
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for level, bar in ((logging.WARNING, False), (logging.INFO, True)):
        logger.setLevel(level)
        with Progress("reading", 10, "files") as progress:
            progress.advance(3)
            progress.set_metrics("half")
        assert ("reading" in capsys.readouterr().err) is bar


def test_a_bar_moves_the_cursor_and_its_texts_do_not(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with printable_output(), log_to_console(), Progress(EVIL, 10, "files") as progress:
        progress.set_metrics(EVIL)
        write_line(EVIL)
        progress.advance(3)
    printed = capsys.readouterr().err
    assert printed.startswith("\r")
    assert SHOWN in printed
    assert not set(printed) & {"\x1b", "\x9b", "\u202e"}
