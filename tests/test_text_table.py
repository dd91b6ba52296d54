"""Columns stay aligned, whatever the cells contain."""

from fm9g.text_table import display_width, text_table


def test_wide_characters_take_two_columns() -> None:
    assert text_table([("name", "n"), ("数据", "10"), ("a", "")], right=[1]) == ["name   n", "数据  10", "a"]
    assert display_width("数a") == 3


def test_cells_cannot_act_on_the_terminal() -> None:
    assert text_table([("a\x1b[2J\n", "b")]) == ["a␛[2J␊  b"]


def test_a_table_without_rows_is_empty() -> None:
    assert text_table([]) == []
