"""The error class for everything that a user can fix."""

import re

from fm9g.printable import printable

_ERROR_CLASS = re.compile(r"\b\w+(?:Error|Exception): ")
_MAX_LINE_LENGTH = 1000  # characters; a value quoted from a file may be as long as the file


class UserError(ValueError):
    """A mistake in an input: a file, a line, a key, an option.

    The message is complete by itself: it names the file, the line or the key, what was found and what to do. The
    command line prints it without a traceback and exits with 2.
    """

    def __init__(self, *lines: str) -> None:
        """lines: the message, mostly one line. Line breaks within an argument are shown, not printed."""
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(printable(_shortened(line)) for line in self.args)


def _shortened(line: str) -> str:
    """A line without its middle if it is too long: it starts with the place and ends with the remedy."""
    omitted = len(line) - _MAX_LINE_LENGTH
    return (
        line
        if omitted <= 0
        else f"{line[: _MAX_LINE_LENGTH // 2]}[{omitted:,} characters]{line[-_MAX_LINE_LENGTH // 2 :]}"
    )


def error_text(error: Exception) -> str:
    """The message of a library's error, on one line and without names of error classes."""
    return " ".join(_ERROR_CLASS.sub("", str(error)).split())
