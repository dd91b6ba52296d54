"""The files of an indexed dataset, which is a folder, and what its meta.json states about the records."""

from __future__ import annotations

from pathlib import Path

from fm9g.errors import UserError
from fm9g.io.json_file import read_object

DATA_FILE, INDEX_FILE, INDEX_H5_FILE, META_FILE = "data.jsonl", "index", "index.h5", "meta.json"
REJECTS_FILE = "rejects.jsonl"  # the bad records that were left out
SPLITS = ("train", "validation")  # the two datasets of a split, sub-folders of the output

AS_IS = "as it is"  # the format of records that were indexed without a check
RECORD_FORMATS_KEY = "shapes"  # of meta.json: number of records by format
CANONICAL_FORM_KEY = "canonical_form"  # of meta.json: version of the records' canonical form, if they were checked
CANONICAL_FORM = 1  # to be raised if fm9g.data.prepare.record_formats.canonicalize gives another form


def has_canonical_records(folder: Path) -> bool:
    """Whether the records were checked and stored in today's canonical form, as meta.json states.

    False for a dataset of another tool or of an earlier version, for one indexed with --as-is, and if data.jsonl was
    replaced since.
    """
    try:
        meta = read_object(folder / META_FILE)
        is_current = meta["nbytes"] == (folder / DATA_FILE).stat().st_size
        return bool(is_current and meta[CANONICAL_FORM_KEY] == CANONICAL_FORM)
    except (UserError, OSError, KeyError):
        return False
