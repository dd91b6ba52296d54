"""What tests ask of the page of a report."""

import re
from html.parser import HTMLParser

import numpy as np

from fm9g.report.files import open_runs
from fm9g.report.page import render

LOSSES = [{"step": step, "Loss/train": 2 + 8 / step} for step in range(1, 11)]  # where one metric is enough
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


def paths_of(text: str, title: str) -> list[np.ndarray]:
    """The lines of the figure with this title: (points, 2) each, the longest first."""
    svg = re.search(rf'<svg[^>]*aria-label="{title}".*?</svg>', text, re.DOTALL)
    assert svg, title
    paths = [
        np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", data), float)
        for data in re.findall(r'<path d="([^"]+)"[^>]*clip-path', svg[0])
    ]
    return sorted(paths, key=len, reverse=True)
