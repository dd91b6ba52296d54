"""The page: complete, safe, deterministic, and with everything a run left."""

import json
import re
import warnings
from pathlib import Path

import pytest
from helpers.report_page import LOSSES, page_of, run_json

from fm9g.cli import main
from fm9g.config.fields import keys_of
from fm9g.config.train import TrainConfig
from fm9g.report.files import open_runs
from fm9g.report.page import render


def test_one_run(make_run, settings) -> None:
    make_run("tiny", run=run_json(settings, train_iters=10))
    page, text = page_of("tiny")
    assert set(page.within) == {"", "results", "loss", "tasks", "optimizer", "speed", "events", "data", "configuration"}
    cells = {cells[0].split("\n")[0]: cells[1] for _, cells in page.rows if len(cells) > 1}
    assert cells["Steps"] == "10 of 10"
    assert cells["Tokens"] == "1,000"
    assert cells["Loss at the end"] == "2.8000"
    assert cells["Best loss"] == "2.8000 at step 10"
    assert cells["Tokens per second"] == "1,000"
    assert cells["MFU"] == "40.0%"
    assert cells["Peak memory"] == "20.0 GB"
    assert cells["Skipped steps"] == "2"
    assert cells["Duration"] == "1 min 40 s"  # 80 s, a pause, 20 s
    assert cells["Started"] == "2023-11-14 22:13:20"
    assert "Best validation loss" not in cells
    assert "12 parameters & more" in page.within[""]
    assert page.row("wiki")[1] == ["wiki", "1,234", "99.5", "50.0%", "75.0%", "750", "2.50", "all", "d/wiki"]
    assert page.row("lr")[1][1] == "0.0001 command line"
    assert page.row("torch")[1] == ["torch", "2.6.0"]
    titles = {attributes["title"] for tag, attributes in page.tags if tag == "th" and "title" in attributes}
    assert any(title.startswith(keys_of(TrainConfig)["lr"].metadata["help"]) for title in titles)
    folded = "".join(page.folded)
    assert "clip_grad" in folded
    assert "\nlr" not in folded
    assert "differs" not in {kind for kind, _ in page.rows}
    assert text == page_of("tiny")[1]


def test_the_page_needs_nothing_else(make_run, settings) -> None:
    make_run("a", run=run_json(settings))
    make_run("b", run=run_json(settings))
    page, text = page_of("a", "b")
    without = text.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert not re.search(r"https?:|//[a-z]|@import|src=|<script|<link", without.lower())
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities)) > 20
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(identities)
    assert len([tag for tag, _ in page.tags if tag == "svg"]) >= 9
    for _, attributes in page.tags:  # no color is fixed, so all can follow the screen
        assert not re.search(r"#[0-9a-f]{6}", attributes.get("style", ""))
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert used <= set(re.findall(r"(--\w+):", page.styles))


def test_what_a_user_wrote_is_text(make_run, settings) -> None:
    make_run("<i>run", run=run_json(settings))
    page, text = page_of("<i>run")
    assert "<script" not in text
    assert "<i>run" not in text
    assert "<b>x" not in text
    assert "<script>alert('对话')</script> & $x$" in page.within["tasks"]
    assert "A jump to 12 & <more>." in page.within["loss"]  # where the mouse rests on its sign
    assert page.row("path")[1][1] == "<b>x</b> default"


def test_control_characters_do_not_reach_the_page(make_run, line, settings) -> None:
    unusual = "a\x1b[2J\u202eb"
    run = run_json(settings) | {"versions": {unusual: unusual}, "summary": unusual}
    events = [{"step": 3, "time": 1, "kind": unusual, "text": unusual}]
    make_run(unusual, [line(step, **{f"Loss/train/{unusual}": 1.0}) for step in (1, 2, 3)], events, run)
    text = render(open_runs([unusual]))
    assert not set(text) & {"\x1b", "\u202e"}
    assert text.count("a␛[2J\\u202eb") > 6


def test_numbers_beyond_all_reason_are_drawn_without_a_warning(make_run, line) -> None:
    unusual = {"Optimizer/grad_norm": 1e99, "Loss/val": -1e99, "Time/compute": -1e99, "Time/data": 10**60}
    make_run("tiny", [line(step, **(unusual if step % 2 else {})) for step in (1, 2, 2**53 - 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "<svg" in render(open_runs(["tiny"]))


def test_validation_gaps_and_fewer_keys_break_nothing(make_run, line) -> None:
    metrics = [line(step) for step in (1, 2, 3, 5, 8)]
    metrics[2] |= {"Loss/train": None, "Optimizer/grad_norm": None, "Throughput/mfu": None}
    metrics.append({"step": 8, "Loss/val": 3.25, "Loss/val/wiki": 3.0, "Perplexity/val": 25.79})
    make_run("sparse", metrics=metrics)
    make_run("one", metrics=[line(1)], events=[])
    make_run("val", metrics=[{"step": 3, "Loss/val": 2.0}, {"step": 6, "Loss/val": None}], events=[])
    make_run("bare", metrics=[{"step": 3}], events=[])
    page, _ = page_of("sparse", "one", "val", "bare")
    assert page.row("Best validation loss")[1][1:5] == ["3.2500 at step 8", "–", "2.0000 at step 3", "–"]  # noqa: RUF001
    assert page.row("Perplexity at the end")[1][1] == "25.7900"
    for name in ("one", "val", "bare"):
        page, _ = page_of(name)
        assert {"results", "events", "data", "configuration"} <= set(page.within)
    assert "None were recorded." in page.within["events"]
    assert "Not recorded." in page.within["configuration"]


def test_the_subcommand_writes_the_page_and_replaces_it_with_overwrite(make_run, capsys: pytest.CaptureFixture) -> None:
    folder = make_run("tiny", metrics=LOSSES)
    assert main(["report", "tiny"]) == 0
    assert capsys.readouterr().out == "report.html: open it in a browser; it needs no network\n"
    first = Path("report.html").read_text(encoding="utf-8")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "Loss/train": 1.5}) + '\n{"step": 12, "Lo')
    assert main(["report", str(folder), "--output", "report.html", "--overwrite"]) == 0
    second = Path("report.html").read_text(encoding="utf-8")
    assert "1.5000" in second
    assert "1.5000" not in first


def test_nothing_on_the_page_is_wider_than_a_phone(make_run, settings) -> None:
    """Explanations wrap: no rule but those of numbers and times keeps text in one line."""
    make_run("tiny", run=run_json(settings))
    page, _ = page_of("tiny")
    styles, narrow_styles = page.styles.split("@media (max-width: 640px)")
    nowrap_lines = [line for line in styles.splitlines() if "nowrap" in line]
    assert nowrap_lines == [".time, .kind { white-space: nowrap; }"]
    assert ".time, .kind { white-space: normal; }" in narrow_styles
    assert page.row("Tokens")[1] == ["Tokens\npieces of text it was trained on", "1,000"]  # below, not beside
    wide = [line for line in styles.splitlines() if re.search(r"min-width: (?!0)\d", line)]
    assert [line.split()[0] for line in wide] == [".wide", ".settings"]  # figures, and runs side by side, which scroll
