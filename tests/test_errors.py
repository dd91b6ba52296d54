"""UserError: the text that a user sees."""

from fm9g.errors import UserError

EVIL, SHOWN = "x\x1b[31m\x9b2J\u202ey\nfm9g: done\r", "x␛[31m\\u009b2J\\u202ey␊fm9g: done␍"


def test_a_message_has_the_lines_that_it_was_given_and_no_more() -> None:
    error = UserError(f"{EVIL}: bad", "second")
    assert str(error) == f"{SHOWN}: bad\nsecond"
    assert str(UserError(f"in: {UserError(EVIL)}")) == f"in: {SHOWN}"
