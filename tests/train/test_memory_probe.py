"""`test_oom_error`: the longest samples are tried, and nothing is trained or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import make_records, small_model, write_json

import fm9g.train.memory_probe
from fm9g.cli import main
from fm9g.config.run import load_run
from fm9g.data.load.packing import Pack
from fm9g.errors import UserError
from fm9g.train.memory_probe import probe_memory


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[Pack]:
    """The rows that are tried."""
    tried: list[Pack] = []
    to_batch = fm9g.train.memory_probe.to_batch
    monkeypatch.setattr(
        "fm9g.train.memory_probe.to_batch", lambda pack, device: tried.append(pack) or to_batch(pack, device)
    )
    return tried


@pytest.fixture
def keys(make_mixture: Callable[..., Path], tokenizer_path: Path, tmp_path: Path) -> dict[str, str]:
    long = {"output": "word " * 100}
    mixture = make_mixture({"a": [*make_records(30), long, *make_records(30)]})
    write_json(tmp_path / "model.json", small_model().to_json())
    keys = {"dataset_config": mixture, "tokenizer_path": tokenizer_path, "output_dir": tmp_path / "out"}
    given = {"max_length": 64, "batch_size": 4, "test_oom_error": "true", "device": "cpu"}
    return {key: str(value) for key, value in {**keys, **given}.items()}


def test_rows_hold_the_longest_samples(
    keys: dict[str, str], packs: list[Pack], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    assert main(["train", "--config", str(tmp_path / "model.json"), *words]) == 0
    shown = capsys.readouterr().out
    assert "longest sample: 64 tokens; one process with the whole model computed; nothing was trained" in shown
    assert [f"batch_size {size} with max_length 64 fits" in shown for size in (4, 8, 16, 32, 64)] == [True] * 4 + [
        False
    ]
    assert packs[0].cu_seqlens.tolist() == [0, 64, 128, 192, 256]
    assert not (tmp_path / "out").exists()


def test_a_size_that_does_not_fit_is_halved(
    keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = fm9g.engine.base.Engine.forward

    def limited(self: object, batch: object, seed: int) -> object:
        if len(batch.input_ids) > 64:  # type: ignore[attr-defined]
            raise RuntimeError("CUDA out of memory")
        return forward(self, batch, seed)  # type: ignore[arg-type]

    monkeypatch.setattr("fm9g.engine.base.Engine.forward", limited)
    probe = probe_memory(load_run(str(tmp_path / "model.json"), keys))
    assert (probe.fits, list(probe.peaks)) == (False, [1])
    assert probe.peaks[1] > 0


def test_one_of_several_processes_is_refused(
    keys: dict[str, str], packs: list[Pack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="this is one of 2; start `fm9g train` once"):
        probe_memory(load_run(str(tmp_path / "model.json"), keys))
    assert not packs


def test_without_packing_a_row_has_no_more_samples_than_the_batch(
    keys: dict[str, str], packs: list[Pack], tmp_path: Path
) -> None:
    run = load_run(str(tmp_path / "model.json"), {**keys, "packing": "false", "batch_size": "2", "max_length": "512"})
    probe_memory(run)
    assert len(packs[0].cu_seqlens) == 3


def test_the_memory_of_the_weights_is_not_doubled(
    keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fm9g.train.memory_probe.rss_bytes", lambda: 60)
    monkeypatch.setattr("fm9g.train.memory_probe._total_memory", lambda device: 100.0)
    monkeypatch.setattr("fm9g.train.memory_probe._peak_of", lambda engine, samples, row, size: 60.0 + row / 64 * 3)
    assert list(probe_memory(load_run(str(tmp_path / "model.json"), keys)).peaks) == [4, 8]
