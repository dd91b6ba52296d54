"""Statistics of a dataset, against values computed by hand."""

from collections.abc import Callable

import pytest
from helpers.inspection import Make, z

from fm9g.data.encode.oversize import LONG_INPUT, OVERSIZE


@pytest.mark.parametrize("workers", [0, 1])
def test_every_rule_is_counted(make_mixture: Make, run_check: Callable[..., dict], workers: int) -> None:
    segments = [z(0, 9), z(0, 39), z(4, 30), z(20, 1), z(3, 0), z(0, 9)]
    full = [z(0, 29), z(0, 39), z(15, 2)]
    path = make_mixture(
        {"cut": segments, "drop": [z(0, 9), z(2, 37)], "whole": full},
        drop={"oversize_rule": "drop"},
        whole={"oversize_rule": "whole", "nlines": 4, "ave_tokens": 29.0, "total_tokens": 0.5},
    )
    report = run_check(path, batch_size=2, workers=workers)  # a row has 32 tokens
    one, two, three = report["datasets"].values()
    assert report["buckets"] == [1, 2, 4, 8, 16, 32, 64]
    expected = {
        "records": 6,
        "read": 6,
        "tokens": 10 + 40 + 35 + 22 + 0 + 10,
        "mean": 117 / 5,
        "min": 10,
        "median": 22,
        "p95": 40,
        "max": 40,
        "kept_tokens": 10 + 40 + 16 + 10,
        "learnt_tokens": 10 + 40 + 12 + 10,
        "truncated": 1,
        "segmented": 1,
        "segments": 3,
        "dropped": {LONG_INPUT: 1, OVERSIZE: 0},
        "empty": 1,
        "duplicates": 1,
        "histogram": [0, 0, 0, 0, 2, 1, 2],
    }
    assert {key: one[key] for key in expected} == expected
    assert (two["kept_tokens"], two["dropped"][OVERSIZE], two["truncated"]) == (10, 1, 0)
    assert (three["kept_tokens"], three["learnt_tokens"], three["dropped"]) == (48, 33, {LONG_INPUT: 0, OVERSIZE: 1})
    notes = "\n".join(report["notes"])
    for note in (
        f"cut: 1 of 6 records (16.7%) give nothing to train on: {LONG_INPUT}",
        "cut: 1 of 6 records (16.7%) give nothing to train on: no output",
        "cut: 1 of 6 records (16.7%) are truncated to 16 tokens",
        "cut: 1 of 6 records (16.7%) are exact duplicates of another one",
        f"drop: 1 of 2 records (50.0%) give nothing to train on: {OVERSIZE}",
        "whole: nlines: 4 in the configuration, 3 measured",
        "whole: total_tokens: 0.5 in the configuration, 8.8e-08 measured",
    ):
        assert note in notes
    assert "average tokens" not in notes  # 29 and 29.33 are near enough
