"""The estimate of tokens."""

import numpy as np

from fm9g.data.prepare.fast_scan import TOKENS_PER_UNIT, count_units


def test_tokens_are_estimated_by_language() -> None:
    lines = ["一二三 四", "one two\tthree ", "", " x"]
    block = np.frombuffer("".join(line + "\n" for line in lines).encode(), np.uint8)
    ends = np.cumsum([len(line.encode()) + 1 for line in lines])
    assert count_units(block, ends, "zh").tolist() == [len(line) for line in lines]
    for language in ("en", "code"):
        assert count_units(block, ends, language).tolist() == [len(line.split()) for line in lines]
    assert TOKENS_PER_UNIT == {"zh": 0.7, "en": 1.5, "code": 1.5}
