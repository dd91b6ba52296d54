"""Special tokens that a text spells."""

from __future__ import annotations

from typing import Any

import pytest

from fm9g.data.encode.escaping import Unescaped, escape_special_tokens, unescape
from fm9g.data.prepare.record_formats import BadRecord


def test_spellings_are_protected_and_found_again() -> None:
    pattern = load_like("<s>", "</s>", "x")
    value = {"a": ["1 </s> 2", {"</s>": "<s>x"}], "b": 3}
    escaped = escape_special_tokens(value, pattern)
    assert escaped["b"] == 3
    assert "</s>" not in escaped["a"][1]
    assert escape_special_tokens(escaped, pattern, is_raw=False) == escaped
    assert unescape(escaped) == value
    with pytest.raises(BadRecord, match="noncharacter U\\+FDD4"):
        escape_special_tokens(escaped, pattern)
    found = Unescaped("<s>" + escaped["a"][0] + next(iter(escaped["a"][1].values())), pattern)
    assert found.text == "<s>1 </s> 2<s>x"
    assert [found.text[start:end] for start, end in found.escaped] == ["</s>", "<s>", "x"]
    offset = len("<s>1 ") + len(escaped["a"][0]) - len("1 ")
    assert found.text[found.map_offset(offset) :] == "<s>x"


def load_like(*special: str) -> Any:
    import re

    return re.compile("|".join(map(re.escape, special)))
