"""The loss as a picture."""

from pathlib import Path

import pytest

from fm9g.cli import main
from fm9g.errors import UserError
from fm9g.report.files import open_runs
from fm9g.report.plot import plot_loss, plot_runs

HEADS = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", ".PNG": b"\x89PNG"}


def text_of(picture: Path, monkeypatch: pytest.MonkeyPatch, draw) -> str:
    """The picture as an SVG that holds its words as such."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    draw(picture)
    return picture.read_text(encoding="utf-8")


def test_each_suffix_makes_its_format(make_run, line, capsys: pytest.CaptureFixture) -> None:
    make_run("tiny")
    make_run("_under", metrics=[line(1)], events=[])
    for suffix, head in HEADS.items():
        name = f"loss{len(suffix)}{suffix}"
        assert main(["plot", "tiny", "_under", "--output", name]) == 0
        assert capsys.readouterr().out == f"{name}\n"
        assert Path(name).read_bytes().startswith(head)
    assert main(["plot", "tiny", "_under", "--output", "again.svg"]) == 0
    assert Path("again.svg").read_bytes() == Path("loss4.svg").read_bytes()


def test_several_runs_are_named(make_run, line, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("$tiny$")
    make_run("_under", metrics=[line(step, **{"Loss/val": 1.0}) for step in (1, 2)])
    runs = open_runs(["$tiny$", "_under"])
    text = text_of(Path("x.svg"), monkeypatch, lambda picture: plot_runs(runs, picture))
    assert "\u200b$tiny$<" in text
    assert "\u200b_under<" in text
    assert "_under, validation<" in text
    assert "learning rate" not in text
    assert "resume" not in text
    alone = text_of(Path("y.svg"), monkeypatch, lambda picture: plot_runs(runs[:1], picture))
    for words in ("running mean of the loss<", "learning rate<", "resume<", "spike<"):
        assert words in alone, words


def test_marks_of_the_quickstart_and_gaps(make_run, line, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = [line(step) for step in range(1, 6)]
    metrics[2] |= {"Loss/train": None}
    del metrics[3]["Optimizer/lr"]
    file = make_run("tiny", metrics=metrics) / "metrics.jsonl"
    text = text_of(Path("x.svg"), monkeypatch, lambda picture: plot_loss(file, picture, {3: "stopped, resumed"}))
    assert "stopped, resumed<" in text


def test_nothing_to_draw_is_an_error(make_run) -> None:
    file = make_run("empty", metrics=[]) / "metrics.jsonl"
    make_run("bare", metrics=[{"step": 1}])
    with pytest.raises(UserError, match=r"empty/metrics\.jsonl: holds no metrics"):
        plot_loss(file, Path("x.png"))
    with pytest.raises(UserError, match=r"bare/metrics\.jsonl: holds no loss"):
        plot_runs(open_runs(["bare"]), Path("x.png"))
    assert not Path("x.png").exists()
