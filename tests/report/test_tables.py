"""The tables of the page."""

from helpers.report_page import LOSSES, page_of, run_json


def test_events_are_listed_and_drawn(make_run) -> None:
    make_run("tiny", metrics=LOSSES)
    page, _ = page_of("tiny")
    assert page.row("2023-11-14 22:14:30")[1][1:] == ["7", "▲ jump of the loss", "A jump to 12 & <more>."]
    assert [cells[2] for _, cells in page.rows if cells and cells[0].startswith("2023")] == [
        "started",
        "★ best validation loss",
        "▲ jump of the loss",
        "▶ resumed from a checkpoint",
        "ended",
        "| checkpoint saved",
    ]
    assert "Saved." in "".join(page.folded)
    assert "jump of the loss" not in "".join(page.folded)
    assert "▲jump of the loss" in page.within["loss"].replace("\n", "")


def test_differing_settings_of_several_runs_are_marked(make_run, settings) -> None:
    first, second = run_json(settings, seed=1, batch_size=4), run_json(settings, seed=2, batch_size=4)
    second["config"]["train"]["lr"]["value"] = 3e-4
    second["config"]["data.code"] = settings(path="code")
    make_run("a", metrics=LOSSES, run=first)
    make_run("b", metrics=LOSSES, run=second)
    make_run("old", metrics=LOSSES, events=[])
    page, _ = page_of("a", "b", "old")
    differing = [cells for kind, cells in page.rows if kind == "differs"]
    assert sorted(cells[0] for cells in differing) == ["≠ lr", "≠ path", "≠ seed"]
    assert ["≠ lr", "0.0001 command line", "0.0003 command line", "not recorded"] in differing
    assert ["≠ path", "–", "code default", "not recorded"] in differing  # noqa: RUF001
    assert "seed" not in "".join(page.folded)
    assert "batch_size" in "".join(page.folded)
    assert {"lr", "seed", "path"} == {cells[1] for _, cells in page.rows if cells[0] in ("Training", "Data: code")}
    assert "lr" in page.within["differences"]
    same, _ = page_of("a", "old")  # one that kept nothing differs from none
    assert [cells for kind, cells in same.rows if kind == "differs"] == []
    assert "No setting that was recorded." in same.within["differences"]


def test_validation_data_has_its_metrics(make_run, settings) -> None:
    metrics = [{"step": step, "Loss/train": 2.0, "Loss/train/wiki": 2.0, "Loss/val/v": 9.0 - step} for step in (1, 2)]
    run = run_json(settings) | {"validation": [{"task": "v", "path": "d/v", "records": 77, "loss": "all"}]}
    make_run("tiny", metrics=[*metrics, {"step": 2, "Perplexity/val/v": 1096.6}], run=run)
    page, _ = page_of("tiny")
    assert page.row("v")[1] == ["v", "77", "7.0000", "7.0000 at step 2", "1,096.6000", "d/v"]
    assert [cells[0] for _, cells in page.rows].count("v") == 1
