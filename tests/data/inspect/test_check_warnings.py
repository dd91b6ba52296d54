"""Warnings about the shares of datasets."""

import re
from collections.abc import Callable

from helpers.common import make_records
from helpers.inspection import Make, z


def test_notes_on_shares(make_mixture: Make, run_check: Callable[..., dict]) -> None:
    data = {"small": make_records(2), "big": make_records(200), "never": make_records(3), "mute": [z(20, 1), z(30, 1)]}
    path = make_mixture(data, never={"abs_weight": 0.0})
    report = run_check(path, max_length=20, steps=1, packs=1, chat_template="")
    notes = "\n".join(report["notes"])
    assert re.search(r"small: has 1\.\d\d% of the mixture's tokens, but is 33\.33% of the run", notes)
    assert "never: its share is 0, so the run does not use it" in notes
    assert "mute: no token is trained on; a run that draws from it ends with an error" in notes
    assert report["datasets"]["mute"]["run_tokens"] == 0
