"""The table of a check."""

from pathlib import Path

import pytest
from helpers.common import make_records
from helpers.inspection import Make

from fm9g.cli import main


def test_the_table_names_every_dataset(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = [f"dataset_with_a_long_name_{i}" for i in range(5)] + ["中文"]
    path = make_mixture({name: make_records(20) for name in names})
    command = ["data", "check", str(path), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    assert main([*command, "--max_length", "40", "--steps", "5", "--packs", "2"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for name in names:
        assert len([line for line in lines if name in line.split()]) == 1, name
    assert max(map(len, lines)) < 120
    assert lines[1].split() == ["records", *["20"] * (len(lines[1].split()) - 1)]
    above, _, below = printed.partition("max_length  ─")
    assert "33 - 40  █" in above
    assert "41 - 64  █" in below
    assert "packing: " in printed
    assert "epochs in 5 steps" in printed
