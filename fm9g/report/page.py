"""One self-contained HTML page about one or several runs."""

from __future__ import annotations

from pathlib import Path

from fm9g import __version__
from fm9g.io.atomic import atomic_file
from fm9g.printable import printable_lines
from fm9g.report.checkpoints import advise_checkpoints
from fm9g.report.files import Run
from fm9g.report.panels import sections
from fm9g.report.tables import MISSING, configuration, datasets, events, results, validation_datasets, versions

_TEMPLATE = "page.html.jinja"


def write_page(runs: list[Run], output: Path) -> None:
    """Writes the page, replacing `output`. Raises UserError if it cannot be written."""
    text = render(runs)
    with atomic_file(output) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(runs: list[Run]) -> str:
    """The page as HTML. Deterministic: the same runs and checkpoints give the same text."""
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable_lines(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # from draw.py, which escapes its input
    groups = configuration(runs)
    return environment.get_template(_TEMPLATE).render(
        runs=runs,
        several=len(runs) > 1,
        none=MISSING,
        results=results(runs),
        sections=sections(runs),
        events=events(runs, routine=False),
        routine=events(runs, routine=True),
        checkpoints=[(run, advice) for run in runs if (advice := advise_checkpoints(run))],
        datasets=[(run, rows) for run in runs if (rows := datasets(run))],
        validation=[(run, rows) for run in runs if (rows := validation_datasets(run))],
        groups=groups,
        differing=[(group.title, row) for group in groups for row in group.rows if row.differs],
        versions=versions(runs),
        version=__version__,
    )
