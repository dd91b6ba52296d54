"""Checksums of records in .pt files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from fm9g.io.pt_file import write_weights


def test_files_have_the_checksums_that_torch_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(700, 3), "none": torch.zeros(0, 2), "b": torch.arange(5)}
    write_weights(tmp_path / "ours.pt", weights, reversed(weights.items()))
    torch.save(weights, tmp_path / "theirs.pt")
    sums = []
    for name in ("ours", "theirs"):
        with zipfile.ZipFile(tmp_path / f"{name}.pt") as archive:
            assert archive.testzip() is None
            sums.append([record.CRC for record in archive.infolist() if "/data/" in record.filename])
            assert len(set(sums[-1])) == 3
    assert sums[0] == sums[1]
    assert all(torch.equal(value, weights[name]) for name, value in torch.load(tmp_path / "ours.pt").items())
