"""The devices of a run on the page."""

import pytest
from helpers.report_page import page_of


def started(step: int, **devices: int) -> dict:
    return {"step": step, "time": 0, "kind": "resume" if step else "start", "text": "", "devices": devices}


@pytest.mark.parametrize(
    ("events", "shown", "memory", "never"),
    [
        ([started(0, CPU=1)], "CPU", "maximum of a process, in the machine's memory", "GPU"),
        ([started(0, CPU=2)], "CPU, 2 processes", "the system may end the run", "GPU"),
        ([started(0, H100=8)], "8 x H100", "Near the GPU's size", "CPU"),
        ([started(0, H100=8), started(5, H100=8)], "8 x H100", "maximum of a GPU", "from step"),
        (
            [started(0, CPU=2), started(5, H100=1, A100=1), started(7, CPU=2)],
            "CPU, 2 processes; from step 5: 1 x H100 and 1 x A100; from step 7: CPU, 2 processes",
            "in the memory of a GPU or of the machine",
            "",
        ),
        ([{"step": 0, "time": 0, "kind": "start", "text": "", "devices": [1]}], None, "maximum of a process", "CPU"),
    ],
)
def test_the_page_names_the_devices_of_the_run(
    make_run, events: list, shown: str | None, memory: str, never: str
) -> None:
    make_run("tiny", events=events)
    page, _ = page_of("tiny")
    cells = {cells[0].split("\n")[0]: cells[1] for _, cells in page.rows if len(cells) > 1}
    assert cells.get("Trained on") == shown
    text = page.within["results"] + page.within["speed"]
    assert memory in text
    assert not never or never not in text
