"""Progress of long work: a bar on a terminal, a line every few seconds in a log.

Both are INFO of the logger `fm9g`: where that is off, as in a program that sets up no logging, nothing appears.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from fm9g.printable import printable, printable_lines, raw_stream

logger = logging.getLogger(__name__)

LOG_INTERVAL = 10.0  # seconds


def write_line(text: str) -> None:
    """Prints to stderr, on a terminal above the progress bars of this process."""
    stream = raw_stream(sys.stderr)
    if "tqdm" in sys.modules and stream.isatty():
        sys.modules["tqdm"].tqdm.write(printable_lines(text), file=stream)
    else:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts units of work up to `total` (None: unknown). A context manager."""

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        from tqdm import tqdm  # imported here to keep command line parsing fast

        self._terminal = raw_stream(sys.stderr).isatty()
        self._title, self._unit, self.done, self.total = title, unit, done, total
        self._of_total = "" if total is None else f" of {total}"
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=printable(title),
            unit=unit,
            unit_scale=unit == "B",
            disable=not (self._terminal and logger.isEnabledFor(logging.INFO)),
            file=raw_stream(sys.stderr),  # a bar moves the cursor
        )

    def advance(self, units: int = 1) -> None:
        self.done += units
        if self._terminal:
            self._bar.update(units)
        elif time.monotonic() - self._last_line > LOG_INTERVAL:
            self._last_line = time.monotonic()
            logger.info(f"{self._title}: {self.done}{self._of_total} {self._unit}")

    def set_metrics(self, text: str) -> None:
        """Shows current metrics: after the bar on a terminal, as a line in a log."""
        if self._terminal:
            self._bar.set_postfix_str(printable(text))
        else:
            self._last_line = time.monotonic()
            logger.info(f"{self._title} {self.done}{self._of_total} | {text}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
