"""Every argument of a tool has a row. arguments/ lists the fields of the argument classes of a version."""

from pathlib import Path

import pytest

from fm9g.config.dialects.translate import find_dialect

LISTS = sorted((Path(__file__).parent / "arguments").glob("*.txt"))


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_every_field_has_a_row(file: Path) -> None:
    name, _, version = file.stem.partition("-")
    dialect = find_dialect(name)
    fields = file.read_text(encoding="utf-8").split()
    assert dialect.version == version
    assert len(fields) > 150
    assert [field for field in fields if dialect.row_of(field) is None] == []
