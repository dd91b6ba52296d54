"""The loader measured alone, with --only_run_dataloader."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fm9g.cli import main


def test_the_loader_alone_reports_what_it_gives(
    make_mixture: Callable, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mixture = make_mixture(
        {"a": [{"input": "fox", "output": "dogs " * 30}] * 50, "b": [{"output": ""}, {"output": "x"}]}
    )
    arguments = ["train", "--config", "tiny", "--dataset_config", str(mixture), "--tokenizer_path", str(tokenizer_path)]
    arguments += ["--only_run_dataloader", "1", "--train_iters", "20", "--max_length", "128", "--output_dir"]
    assert main([*arguments, str(tmp_path / "data"), "--dataloader_num_workers", "0"]) == 0
    output, warnings = capsys.readouterr()
    assert output.startswith("20 steps, ")
    assert "tokens/s" in output
    assert "padding; nothing was trained" in output
    assert "records were skipped: no output" in warnings
    assert not (tmp_path / "data").exists()
