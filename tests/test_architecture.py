"""docs/architecture.md names every module of the package, and no other."""

from __future__ import annotations

import re

from helpers.common import ROOT

PACKAGES = {path.name for path in (ROOT / "fm9g").iterdir() if (path / "__init__.py").is_file()}


def modules_in_the_document() -> set[str]:
    """Modules of its tables, as paths below fm9g/. A name without a folder is in the folder of the previous name."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    outside, _, sections = text.partition("## Files")
    modules = set()
    for row in re.findall(r"^\| (`.*?) \|", outside.partition("Modules without a package")[2], re.MULTILINE):
        modules |= set(re.findall(r"`(\w+)`", row))
    for section in sections.split("\n### ")[1:]:
        package = folder = section.partition("\n")[0]
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
            for name in re.findall(r"`([\w/]+)`", row):
                folder, name = name.rpartition("/")[::2] if "/" in name else (folder, name)
                base = f"{package}/{folder}" if (ROOT / "fm9g" / package / folder).is_dir() else folder
                modules.add(f"{base}/{name}")
    return modules


def test_every_module_is_in_the_document_and_no_other() -> None:
    here = {
        path.relative_to(ROOT / "fm9g").with_suffix("").as_posix()
        for path in (ROOT / "fm9g").rglob("*.py")
        if path.stem not in ("__init__", "__main__")
    }
    assert modules_in_the_document() == here


def test_the_table_of_borders_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \|", text.partition("## Packages")[2].partition("Modules without")[0], re.M
    )
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == PACKAGES
