"""Whether a dataset states that its records are canonical."""

import json
import os
from pathlib import Path

from helpers.common import index_dataset, make_records, write_jsonl

from fm9g.data.dataset_files import has_canonical_records


def test_only_a_dataset_that_was_checked_is_canonical(tmp_path: Path) -> None:
    source, folder = write_jsonl(tmp_path / "a.jsonl", make_records(5)), tmp_path / "out"
    index_dataset(source, folder, "en", as_is=True)
    assert not has_canonical_records(folder)
    index_dataset(source, folder, "en", overwrite=True)
    assert has_canonical_records(folder)
    content = (folder / "meta.json").read_text()
    meta = json.loads(content)
    del meta["canonical_form"]  # as the published converter and earlier versions write it
    for other in (json.dumps(meta), json.dumps(meta | {"canonical_form": 0}), "[]", "3", "", content[:-1]):
        (folder / "meta.json").write_text(other)
        assert not has_canonical_records(folder), other
    (folder / "meta.json").unlink()
    assert not has_canonical_records(folder)
    os.mkfifo(folder / "meta.json")  # which would be waited for
    assert not has_canonical_records(folder)
    (folder / "meta.json").unlink()
    (folder / "meta.json").write_text(content)
    with (folder / "data.jsonl").open("ab") as file:
        file.write(b'{"text": "a"}\n')
    assert not has_canonical_records(folder)
