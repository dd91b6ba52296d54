"""How long a record may be: a longer one is a file of another format, and must not fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, AnyStr

from fm9g.errors import UserError

MAX_RECORD_BYTES = 128 << 20


def check_record_size(size: int, source: Any) -> None:
    """size: bytes, or characters where a format is read as text. Raises UserError if that is too many."""
    if size > MAX_RECORD_BYTES:
        raise UserError(
            f"{source}: a record is longer than {MAX_RECORD_BYTES >> 20} MB; is this the right format? (--format)"
        )


def bounded_lines(text: IO[AnyStr], source: Any) -> Iterator[AnyStr]:
    """Yields the lines of a stream. Raises UserError for an endless one before it fills the memory."""
    while line := text.readline(MAX_RECORD_BYTES + 1):
        check_record_size(len(line), source)
        yield line
