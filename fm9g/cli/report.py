"""The subcommands that show how runs went: report, plot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_report_commands(subcommand: Any) -> None:
    """Adds the subcommands. subcommand: see fm9g.cli."""
    report = subcommand(
        "report", _report, "how runs went, as one HTML page: curves, events, configuration; or side by side"
    )
    _add_arguments(report, "report.html", "the page to write (%(default)s)")
    plot = subcommand("plot", _plot, "the loss of runs as a picture")
    _add_arguments(plot, "loss.png", "the picture to write: .png, .svg or .pdf (%(default)s)")


def _add_arguments(parser: argparse.ArgumentParser, output: str, meaning: str) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a name in data/logs/, the path of such a folder, or its metrics.jsonl"
    )
    parser.add_argument("--output", type=Path, default=Path(output), help=meaning)
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")


def _report(options: argparse.Namespace) -> None:
    from fm9g.io.output import check_output_file
    from fm9g.report.files import open_runs
    from fm9g.report.page import write_page

    runs = open_runs(options.runs)
    check_output_file(options.output, "--output", (".html", ".htm"), options.overwrite)
    write_page(runs, options.output)
    print(f"{options.output}: open it in a browser; it needs no network")


def _plot(options: argparse.Namespace) -> None:
    from fm9g.io.output import IMAGE_SUFFIXES, check_output_file
    from fm9g.report.files import open_runs
    from fm9g.report.plot import plot_runs

    runs = open_runs(options.runs)
    check_output_file(options.output, "--output", IMAGE_SUFFIXES, options.overwrite)
    plot_runs(runs, options.output)
    print(options.output)
