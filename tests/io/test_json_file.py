"""JSON files are refused with the place of the mistake."""

from pathlib import Path

import pytest

from fm9g.errors import UserError
from fm9g.io.json_file import DuplicateKeyError, read_json, read_object, reject_duplicate_keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": {"c": 1, "c": 2}}', "key 'c' is given twice; keep one of them"),
        ('{"a": 1,\n oops}', "line 2, column 2: not JSON"),
        ("[" * 100_000, "cannot be read"),
        ("[1]", "found list, expected a JSON object"),
    ],
)
def test_the_message_names_the_mistake(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_object(tmp_path / "a.json")
    assert str(raised.value).startswith(str(tmp_path / "a.json"))


def test_a_file_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_the_first_repeated_key_is_named() -> None:
    assert reject_duplicate_keys([("a", 1), ("b", 2)]) == {"a": 1, "b": 2}
    with pytest.raises(DuplicateKeyError) as raised:
        reject_duplicate_keys([("a", 1), ("b", 2), ("b", 3), ("a", 4)])
    assert raised.value.key == "b"
