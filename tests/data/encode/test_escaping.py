"""Special tokens that a text spells."""

from __future__ import annotations

from typing import Any

import pytest

from fm9g.data.encode.escaping import Unescaped, escape_special_tokens, unescape
from fm9g.data.prepare.record_formats import BadRecord


def test_spellings_are_protected_and_found_again() -> None:
    pattern = load_like("<s>", "</s>", "x")
    value = {"a": ["1 </s> 2", {"</s>": "<s>x"}], "b": 3}
    marked = escape_special_tokens(value, pattern)
    assert marked["b"] == 3
    assert "</s>" not in marked["a"][1]
    assert escape_special_tokens(marked, pattern, is_raw=False) == marked
    assert unescape(marked) == value
    with pytest.raises(BadRecord, match="noncharacter U\\+FDD4"):
        escape_special_tokens(marked, pattern)
    found = Unescaped("<s>" + marked["a"][0] + next(iter(marked["a"][1].values())), pattern)
    assert found.text == "<s>1 </s> 2<s>x"
    assert [found.text[start:end] for start, end in found.escaped] == ["</s>", "<s>", "x"]
    place = len("<s>1 ") + len(marked["a"][0]) - len("1 ")
    assert found.text[found.map_offset(place) :] == "<s>x"


def load_like(*special: str) -> Any:
    import re

    return re.compile("|".join(map(re.escape, special)))
