"""The one error class for what a user can mend."""

import re

from fm9g.printable import printable

_ERROR_CLASS = re.compile(r"\b\w+(?:Error|Exception): ")
_MAX_LINE_LENGTH = 1000  # characters of a line: what was found in a file may be as long as the file


class UserError(ValueError):
    """A mistake in what was given: a file, a line, a key, an option.

    Its text stands alone: it names the file, the line or the key, says what was found and what to do. The
    command line prints it without a traceback and exits with 2.
    """

    def __init__(self, *lines: str) -> None:
        """lines: of the text, mostly one. What is no line of its own ends none: a name may hold anything."""
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(printable(_shortened(line)) for line in self.args)


def _shortened(line: str) -> str:
    """A line without its middle, where it is too long: the place is named at its beginning, the remedy at its end."""
    omitted = len(line) - _MAX_LINE_LENGTH
    return (
        line
        if omitted <= 0
        else f"{line[: _MAX_LINE_LENGTH // 2]}[{omitted:,} characters]{line[-_MAX_LINE_LENGTH // 2 :]}"
    )


def error_text(error: Exception) -> str:
    """What an error of a library says, on one line and without the names of classes of errors."""
    return " ".join(_ERROR_CLASS.sub("", str(error)).split())
