"""Console output of the logger `fm9g`.

Every module logs with `logging.getLogger(__name__)`. As a library, fm9g sets no handler and no level: silence or
redirect it with `logging.getLogger("fm9g")`. The command line calls `log_to_console`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fm9g.printable import printable_lines
from fm9g.progress import write_line


class _ConsoleHandler(logging.Handler):
    """Writes to stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = printable_lines(record.getMessage())
            write_line(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}")
        except Exception:
            self.handleError(record)


@contextmanager
def log_to_console() -> Iterator[None]:
    """Within the block, INFO goes to stderr as it is, and levels above it after their name: "warning: ..."."""
    logger, handler = logging.getLogger("fm9g"), _ConsoleHandler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def log_only_errors() -> None:
    """Silences INFO and WARNING in this process: for ranks other than 0, whose messages repeat those of rank 0."""
    logging.getLogger("fm9g").setLevel(logging.ERROR)
