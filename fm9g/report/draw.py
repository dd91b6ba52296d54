"""Draws the charts of the page as SVG with matplotlib. Their colors are variables of the page: light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from fm9g.printable import printable
from fm9g.report.curves import MAX_POINTS, Curve, downsample, running_mean

COLORS = 8  # the page defines --c0 to --c7
WIDE, NARROW = (10.0, 3.6), (5.4, 2.9)  # inches; the page scales them
_INK, _GRID = "#00fd01", "#00fd02"
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {f"#00fe0{i}": f"var(--c{i})" for i in range(COLORS)}
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_MAX_DOTS = 40  # a curve with no more points than these is drawn with dots
_MAX_MARKS = 200  # per kind
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in a font of the reader's machine
    "text.parse_math": False,  # a dollar is a dollar
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class Line:
    """A curve of a chart. smooth: draw the running mean, and the values only faintly."""

    curve: Curve
    color: int
    smooth: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """An event in a chart. text: its tooltip. low: a tick at the bottom, without a vertical line."""

    step: int
    symbol: str
    text: str
    color: int | None = None
    low: bool = False


def draw_lines(
    name: str,
    title: str,
    lines: list[Line],
    ylabel: str,
    marks: list[Mark] | None = None,
    wide: bool = False,
    focus: tuple[float, float, float] | None = None,
    log: bool = False,
) -> str:
    """Draws curves over steps.

    Args:
        name: unique among the charts of the page; starts every id in the SVG.
        title: what it shows, for screen readers.
        marks: events to show.
        focus: (first step, lowest value, highest value) to zoom in to.
        log: logarithmic values.
    """
    with _figure(wide, ylabel) as (figure, axes):
        for line in lines:
            _plot(axes, line, focus[0] if focus else -np.inf, MAX_POINTS if wide else MAX_POINTS // 2)
        if len(steps := np.unique(np.concatenate([line.curve.steps for line in lines]))) == 1:
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(format_number)  # the scale sets its own, in formulas
            axes.yaxis.set_minor_formatter("")
        if focus:
            axes.set_ylim(*focus[1:])
        notes = _plot_marks(axes, marks or [])
        return _to_svg(figure, name, title, notes)


def draw_stacked_areas(
    name: str, title: str, edges: np.ndarray, values: np.ndarray, colors: list[int], ylabel: str
) -> str:
    """Draws areas on top of each other. edges: (N + 1,) steps. values: (areas, N)."""
    with _figure(True, ylabel) as (figure, axes):
        tops = np.cumsum(values, axis=0)
        bottom = np.zeros(values.shape[1])
        for top, color in zip(tops, colors):
            pair = (np.append(edge, edge[-1:]) for edge in (bottom, top))
            axes.fill_between(edges, *pair, step="post", color=_color(color), alpha=0.75, linewidth=0)
            bottom = top
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
        return _to_svg(figure, name, title, {})


def format_number(value: float, _: Any = None) -> str:
    """A number as people write it: 1,234,000 or 0.0003."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.6g}"


@contextmanager
def _figure(wide: bool, ylabel: str) -> Iterator[tuple[Any, Any]]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=WIDE if wide else NARROW, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(xlabel="step", ylabel=ylabel)
        axes.grid()
        axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 5, integer=True))
        axes.xaxis.set_major_formatter(format_number)
        axes.yaxis.set_major_formatter(format_number)
        yield figure, axes


def _plot(axes: Any, line: Line, start: float, max_points: int) -> None:
    """Draws a line after step `start`, with at most max_points points."""
    shown, color, dashes = line.curve.after(start), _color(line.color), (0, (5, 2)) if line.dashed else "-"
    is_short, smooth = len(shown) <= _MAX_DOTS, line.smooth and len(shown) > 1
    values = downsample(shown, max_points)
    bold = downsample(running_mean(line.curve).after(start), max_points) if smooth else values
    if smooth:
        axes.plot(values.steps, values.values, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(bold.steps, bold.values, color=color, linewidth=1.8, linestyle=dashes)
    isolated = np.isfinite(shown.values) if is_short else _is_isolated(shown.values)
    axes.plot(shown.steps[isolated], shown.values[isolated], ".", color=color, markersize=5 if is_short else 3)


def _is_isolated(values: np.ndarray) -> np.ndarray:
    """Whether a value has no neighbour to draw a line to."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    isolated: np.ndarray = known[1:-1] & ~known[:-2] & ~known[2:]
    return isolated


def _plot_marks(axes: Any, marks: list[Mark]) -> dict[str, str]:
    """Draws marks at the edges of the axes. Returns their tooltips: id in the SVG -> text."""
    notes: dict[str, str] = {}
    by_kind: dict[tuple[str, int | None], list[Mark]] = {}
    taken: dict[int, int] = {}  # step -> marks drawn there
    for mark in marks:
        by_kind.setdefault((mark.symbol, mark.color), []).append(mark)
    for same in by_kind.values():
        for mark in same[:: math.ceil(len(same) / _MAX_MARKS)]:
            color = _INK if mark.color is None else _color(mark.color)
            if not mark.low:
                axes.axvline(mark.step, color=color, linewidth=0.7, linestyle=":", alpha=0.7)
            height, size = (0.015, 3) if mark.low else (0.97 - 0.06 * taken.get(mark.step, 0), 6)
            taken[mark.step] = taken.get(mark.step, 0) + (not mark.low)
            (point,) = axes.plot(
                [mark.step], [height], mark.symbol, color=color, markersize=size, transform=axes.get_xaxis_transform()
            )
            notes[f"mark{len(notes)}"] = mark.text
            point.set_gid(f"mark{len(notes) - 1}")
    return notes


def _color(number: int) -> str:
    return f"#00fe0{number % COLORS}"


def _to_svg(figure: Any, name: str, title: str, notes: dict[str, str]) -> str:
    """The figure as an <svg> element to put into an HTML page. name, title: as of draw_lines. notes: tooltips."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # deterministic ids
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    view = root.get("viewBox") or ""
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": printable(title)})
    parents = {child: parent for parent in root.iter() for child in parent}
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {found for value in values for found in re.findall(r"(?:^|url\()#([^)]+)", value)}
    for element in list(root.iter()):
        tag = element.tag.removeprefix(f"{{{_SVG}}}") if isinstance(element.tag, str) else ""
        if "metadata" in tag or tag == "style":  # a style would apply to the whole page
            parents[element].remove(element)
            continue
        _fix_svg(element, name, used, notes)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    return ElementTree.tostring(root, encoding="unicode")


def _fix_svg(element: ElementTree.Element, name: str, used: set[str], notes: dict[str, str]) -> None:
    """Replaces colors by variables, makes ids unique to this chart, and shortens paths."""
    element_id = element.attrib.pop("id", "")
    if element_id in notes:
        note = ElementTree.Element(f"{{{_SVG}}}title")
        note.text = printable(notes[element_id])
        element.insert(0, note)
    elif element_id in used:
        element.set("id", f"{name}-{element_id}")
    for key, value in element.attrib.items():
        if key == "style":
            value = re.sub(r"#00f[de]0\d", lambda match: _VARIABLES.get(match[0], match[0]), value)
            value = re.sub(r"font(-family)?:[^;]*;?", _font_size_only, value)
        elif key == "d":
            value = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), value)
            value = " ".join(value.split())
        value = value.replace("url(#", f"url(#{name}-")
        if key == f"{{{_LINK}}}href":
            value = value.replace("#", f"#{name}-", 1)
        element.set(key, value)


def _font_size_only(match: re.Match[str]) -> str:
    """Keeps the size of a `font:` shorthand: the family is the page's."""
    size = re.search(r"[\d.]+px", match[0])
    return f"font-size: {size[0]};" if size else ""
