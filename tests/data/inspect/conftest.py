"""A check of a mixture with the session's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fm9g.data.inspect.check import check_mixture


@pytest.fixture
def run_check(tokenizer_path: Path, tmp_path: Path) -> Callable[..., dict]:
    def run(path: Path, **keys: object) -> dict:
        output = tmp_path / "data_check"
        report = check_mixture(
            str(path), output, **{"tokenizer_path": str(tokenizer_path), "max_length": 16, "steps": 20, **keys}
        )
        assert json.loads((output / "check.json").read_text(encoding="utf-8")) == report
        assert (output / "lengths.png").read_bytes().startswith(b"\x89PNG")
        assert {file.name for file in output.iterdir()} == {"check.json", "lengths.png"}
        return report

    return run
