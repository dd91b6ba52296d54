"""The one error class for what a user can mend."""


class UserError(ValueError):
    """A mistake in what was given: a file, a line, a key, an option.

    Its text stands alone: it names the file, the line or the key, says what was found and what to do. The
    command line prints it without a traceback and exits with 2.
    """
