"""The page: whole, safe, the same each time, and with everything a run left."""

import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fm9g.checkpoint.checkpoint import file_name
from fm9g.cli import main
from fm9g.report.curves import MAX_POINTS, Curve, binned_means, curve, downsample, running_mean
from fm9g.report.files import open_runs
from fm9g.report.page import render

LOSSES = [{"step": step, "Loss/train": 2 + 8 / step} for step in range(1, 11)]  # where a figure is enough
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """What the tests ask of a page; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.rows: list[tuple[str, list[str]]] = []  # class and cells of each line of a table
        self.within: dict[str, str] = {}  # id of a section -> its text
        self.folded: list[str] = []  # text in <details>
        self.styles = ""
        self._section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = values["id"]
        if tag == "tr":
            self.rows.append((values.get("class", ""), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "section":
            self._section = ""
        if tag in ("td", "th"):
            self.rows[-1][1][-1] = self.rows[-1][1][-1].strip()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
        self.within[self._section] = self.within.get(self._section, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data
        if "details" in self.open:
            self.folded.append(data)

    def row(self, first: str) -> tuple[str, list[str]]:
        """Class and cells of the line whose first cell this is."""
        return next((kind, cells) for kind, cells in self.rows if cells and cells[0].split("\n")[0] == first)


def page_of(*names: str) -> tuple[Page, str]:
    text = render(open_runs(list(names)))
    return Page(text), text


def run_json(settings, **train: object) -> dict:
    return {
        "config": {"train": settings(lr=1e-4, clip_grad=1.0, **train), "data.wiki": settings(path="<b>x</b>")},
        "data": [
            {"task": "wiki", "path": "d/wiki", "records": 1234, "share": 0.5, "tokens_a_sample": 99.5, "loss": "all"}
        ],
        "summary": "12 parameters & more",
        "versions": {"torch": "2.6.0"},
    }


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
    assert "learning rate at the top of the schedule" in " ".join(titles)
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


def test_nothing_on_the_page_changes_how_the_rest_reads(make_run, line, settings) -> None:
    odd = "a\x1b[2J\u202eb"
    run = run_json(settings) | {"versions": {odd: odd}, "summary": odd}
    events = [{"step": 3, "time": 1, "kind": odd, "text": odd}]
    make_run(odd, [line(step, **{f"Loss/train/{odd}": 1.0}) for step in (1, 2, 3)], events, run)
    text = render(open_runs([odd]))
    assert not set(text) & {"\x1b", "\u202e"}
    assert text.count("a␛[2J\\u202eb") > 6


def test_numbers_beyond_all_reason_are_drawn_without_a_warning(make_run, line) -> None:
    odd = {"Optimizer/grad_norm": 1e99, "Loss/val": -1e99, "Time/compute": -1e99, "Time/data": 10**60}
    make_run("tiny", [line(step, **(odd if step % 2 else {})) for step in (1, 2, 2**53 - 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "<svg" in render(open_runs(["tiny"]))


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


def paths_of(text: str, title: str) -> list[np.ndarray]:
    """The lines of the figure with this title: (points, 2) each, the longest first."""
    svg = re.search(rf'<svg[^>]*aria-label="{title}".*?</svg>', text, re.DOTALL)
    assert svg, title
    paths = [
        np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", data), float)
        for data in re.findall(r'<path d="([^"]+)"[^>]*clip-path', svg[0])
    ]
    return sorted(paths, key=len, reverse=True)


def test_curves_show_the_figures(make_run, line) -> None:
    rate = [1e-4 * min(step, 20) for step in range(1, 41)]
    make_run("tiny", metrics=[line(step, **{"Optimizer/lr": rate[step - 1]}) for step in range(1, 41)])
    _, text = page_of("tiny")
    points = paths_of(text, "Learning rate")[0]
    # The picture is an affine image of the curve: straight up to step 20, then level, at places that fit.
    corner = points[np.argmin(np.abs(points[:, 0] - (points[0, 0] + (points[-1, 0] - points[0, 0]) * 19 / 39)))]
    assert corner[1] == pytest.approx(points[:, 1].min(), abs=0.02)
    assert points[-1, 1] == pytest.approx(corner[1], abs=0.02)
    assert points[0, 1] > corner[1] + 50
    for title in ("Loss of the whole run", "Loss of each dataset", "Gradient norm", "Tokens per second"):
        assert len(paths_of(text, title)[0]) >= 2, title


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


def test_a_long_run_makes_a_small_page(make_run) -> None:
    make_run("long", metrics=[{"step": step, "Loss/train": 3 + np.sin(step * 7.0)} for step in range(1, 9001)])
    _, text = page_of("long")
    assert max(len(path) for path in paths_of(text, "Loss of the whole run")) <= MAX_POINTS + 2
    assert len(text) < 200_000


def test_a_close_up_comes_where_the_first_fall_hides_the_rest(make_run) -> None:
    make_run("steep", metrics=[{"step": step, "Loss/train": 2 + 10 * 0.9**step} for step in range(1, 101)])
    make_run("flat", metrics=[{"step": step, "Loss/train": 2 - step / 100} for step in range(1, 101)])
    assert "without the first 10 steps" in page_of("steep")[0].within["loss"]
    assert "without the first" not in page_of("flat")[0].within["loss"]


def test_thinning_keeps_peaks_and_gaps() -> None:
    values = np.ones(10_000)
    values[1234], values[5678], values[8000:8100] = 99, -99, np.nan
    thinned = downsample(Curve(np.arange(10_000.0), values))
    assert len(thinned.values) <= MAX_POINTS
    assert np.nanmax(thinned.values) == 99
    assert thinned.steps[np.nanargmin(thinned.values)] == 5678
    assert np.isnan(thinned.values[(thinned.steps > 8010) & (thinned.steps < 8090)]).all()
    assert (np.diff(thinned.steps) > 0).all()


def test_the_running_mean_does_not_lag_and_leaves_gaps() -> None:
    steps = np.arange(100.0)
    straight = running_mean(Curve(steps, 5 - steps))
    assert straight.values[:90] == pytest.approx(5 - steps[:90])
    values = np.ones(20)
    values[[3, 10]] = np.nan
    mean = running_mean(Curve(steps[:20], values))
    assert np.flatnonzero(np.isnan(mean.values)).tolist() == [3, 10]
    assert np.nanmax(np.abs(mean.values - 1)) == 0


def test_blocks_keep_the_mean_over_steps() -> None:
    metrics = [{"step": step, "Time/data": step % 3, "Time/compute": 1.0} for step in range(2, 2001, 2)]
    metrics.insert(5, {"step": 11, "Loss/val": 1.0})  # no time was taken
    edges, values = binned_means(metrics, ["Time/data", "Time/compute"])
    assert (edges[0], edges[-1]) == (0, 2000)
    assert len(edges) - 1 == values.shape[1] <= 300
    assert (values[0] * np.diff(edges)).sum() == 2 * sum(step % 3 for step in range(2, 2001, 2))
    assert values[1] == pytest.approx(1)
    assert binned_means([{"step": 1}], ["Time/data"])[1].size == 0


def test_a_curve_has_only_what_was_written() -> None:
    found = curve([{"step": 1, "x": 1}, {"step": 2}, {"step": 3, "x": None}], "x")
    assert found.steps.tolist() == [1, 3]
    assert len(found) == 1


def test_the_verb_writes_the_page_and_replaces_it_when_told(make_run, capsys: pytest.CaptureFixture) -> None:
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


def started(step: int, **devices: int) -> dict:
    return {"step": step, "time": 0, "kind": "resume" if step else "start", "text": "", "devices": devices}


@pytest.mark.parametrize(
    ("events", "shown", "memory", "never"),
    [
        ([started(0, CPU=1)], "CPU", "the most of the machine's memory that a process held", "GPU"),
        ([started(0, CPU=2)], "CPU, 2 processes", "the system may end the run", "GPU"),
        ([started(0, H100=8)], "8 x H100", "Near the GPU's size", "CPU"),
        ([started(0, H100=8), started(5, H100=8)], "8 x H100", "the most that a GPU held", "from step"),
        (
            [started(0, CPU=2), started(5, H100=1, A100=1), started(7, CPU=2)],
            "CPU, 2 processes; from step 5: 1 x H100 and 1 x A100; from step 7: CPU, 2 processes",
            "in the memory of a GPU or of the machine",
            "",
        ),
        ([{"step": 0, "time": 0, "kind": "start", "text": "", "devices": [1]}], None, "that a process held", "CPU"),
    ],
)
def test_the_page_speaks_of_the_devices_that_were_there(
    make_run, events: list, shown: str | None, memory: str, never: str
) -> None:
    make_run("tiny", events=events)
    page, _ = page_of("tiny")
    cells = {cells[0].split("\n")[0]: cells[1] for _, cells in page.rows if len(cells) > 1}
    assert cells.get("Trained on") == shown
    text = page.within["results"] + page.within["speed"]
    assert memory in text
    assert not never or never not in text


def checkpoint(root: Path, step: int, val_loss: float | None) -> None:
    """A whole checkpoint, as far as its manifest and its counts go."""
    folder = root / str(step)
    folder.mkdir(parents=True)
    counts = folder / file_name(step, "trainer_state")
    counts.write_text(json.dumps({"val_loss": val_loss}))
    manifest = {"step": step, "files": {counts.name: [counts.stat().st_size, "0"]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_page_says_which_checkpoint_to_use(make_run, settings) -> None:
    root = Path("data/checkpoints/my run")
    losses = {2: 3.0, 4: 2.5, 5: 2.25, 6: 4.0}
    metrics = [{"step": step, "Loss/train": 2.0, "Loss/val": loss, "Loss/val/v": loss} for step, loss in losses.items()]
    run = run_json(settings, model_unique="my run", save=True, lora_layer=[], pretrained_model="")
    make_run("group_my run", metrics=metrics, run=run)

    def advice() -> str:
        return " ".join(page_of("group_my run")[0].within["checkpoints"].split())

    assert "No checkpoint of this run is in data/checkpoints/my run." in advice()
    checkpoint(root, 1, 9.0)
    (root / "1" / file_name(1, "trainer_state")).write_text("cut")
    assert "No checkpoint in data/checkpoints/my run is whole" in advice()
    shutil.rmtree(root)
    for step in (2, 4, 6):
        checkpoint(root, step, losses[step])
    text = advice()
    assert "Step 4, the best, validation loss 2.5000: data/checkpoints/my run/4." in text
    assert "fm9g convert 'data/checkpoints/my run/4' 'hf-my run-4'" in text
    assert "Step 6, the last, validation loss 4.0000" in text
    assert "lower still at step 5 (2.2500), which has no checkpoint" in text
    checkpoint(root, 5, 2.25)
    shutil.rmtree(root / "6")
    text = advice()
    assert "Step 5, the best, and the last" in text
    assert "lower still" not in text


def test_without_validation_the_last_checkpoint_is_named(make_run, settings) -> None:
    adapters = {"lora_layer": ["project_q"], "pretrained_model": "base"}
    make_run("lora", metrics=LOSSES, run=run_json(settings, model_unique="lora", **adapters))
    checkpoint(Path("data/checkpoints/lora"), 4, None)
    text = page_of("lora")[0].within["checkpoints"]
    assert "Use the last one: the run had no validation data" in text
    assert "fm9g lora merge base data/checkpoints/lora/4 hf-lora-4" in text
    make_run("old", metrics=LOSSES)
    assert "checkpoints" not in page_of("old")[0].within


def test_validation_data_has_its_figures(make_run, settings) -> None:
    metrics = [{"step": step, "Loss/train": 2.0, "Loss/train/wiki": 2.0, "Loss/val/v": 9.0 - step} for step in (1, 2)]
    run = run_json(settings) | {"validation": [{"task": "v", "path": "d/v", "records": 77, "loss": "all"}]}
    make_run("tiny", metrics=[*metrics, {"step": 2, "Perplexity/val/v": 1096.6}], run=run)
    page, _ = page_of("tiny")
    assert page.row("v")[1] == ["v", "77", "7.0000", "7.0000 at step 2", "1,096.6000", "d/v"]
    assert [cells[0] for _, cells in page.rows].count("v") == 1


def test_nothing_on_the_page_is_wider_than_a_phone(make_run, settings) -> None:
    """Explanations wrap: no rule but those of numbers and times keeps text in one line."""
    make_run("tiny", run=run_json(settings))
    page, _ = page_of("tiny")
    styles, narrow = page.styles.split("@media (max-width: 640px)")
    kept = [line for line in styles.splitlines() if "nowrap" in line]
    assert kept == [".time, .kind { white-space: nowrap; }"]
    assert ".time, .kind { white-space: normal; }" in narrow
    assert page.row("Tokens")[1] == ["Tokens\npieces of text it was trained on", "1,000"]  # below, not beside
    wide = [line for line in styles.splitlines() if re.search(r"min-width: (?!0)\d", line)]
    assert [line.split()[0] for line in wide] == [".wide", ".settings"]  # figures, and runs side by side, which scroll
