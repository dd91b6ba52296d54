"""The quickstart, whole, on a few files of the library and a few steps."""

from pathlib import Path

import pytest

from fm9g import quickstart
from fm9g.errors import UserError


def test_the_whole_path_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    files = quickstart.library_sources()
    assert len(files) > 500
    monkeypatch.setattr(quickstart, "library_sources", lambda: [file for file in files if file.parent.name == "json"])
    out = tmp_path / "out"
    (out / "datasets" / "sources").mkdir(parents=True)
    (out / "datasets" / "sources" / "old").write_text("of an earlier run")
    quickstart.quickstart(out, steps=2, overwrite=True)
    printed = capsys.readouterr().out
    assert "    class Queue:" in printed
    assert "loss at start and end" in printed
    assert (out / "hf" / "model.safetensors").is_file()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "data" / "checkpoints" / "tiny" / "2").is_dir()
    with pytest.raises(UserError, match="is not empty"):
        quickstart.quickstart(out, steps=2)
    with pytest.raises(UserError, match="--steps: found 1000000000000, expected 2 to"):
        quickstart.quickstart(tmp_path / "other", steps=10**12)
    assert not (tmp_path / "other").exists()


def test_docstrings_are_found_and_broken_sources_passed_over() -> None:
    source = '"""Module."""\ndef f():\n    """Does\n    it."""\n'
    assert list(quickstart.docstrings_of(source)) == ["Module.", "Does it."]
    assert list(quickstart.docstrings_of("def (")) == []
