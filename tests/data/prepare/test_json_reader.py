"""JSON that nests deeply, is cut off, or holds large numbers."""

import contextlib
import json
from pathlib import Path

import pytest
from helpers.common import index_dataset
from helpers.indexing import CALLS, read_dataset

from fm9g.data.prepare.decompress import CHUNK_BYTES
from fm9g.errors import UserError

DEEP, LONG = "[" * 100_000 + "]" * 100_000, "1" * 5000
OBJECTS = '{"a":' * 100_000 + "1" + "}" * 100_000
GOOD = '{"input": "q", "output": "a"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (json.dumps({"messages": [], "tools": DEEP}), "messages: the conversation is empty"),
        (json.dumps({**CALLS[1], "tools": DEEP}), "tools: JSON that is nested too deeply: '[[["),
        (json.dumps({**CALLS[1], "tools": f'[{{"name": "f", "n": {LONG}}}]'}), "tools: not JSON: an integer of 5000"),
        (json.dumps(CALLS[1]).replace('{"n": 1}', json.dumps(OBJECTS)), "messages[1].tool_calls: arguments of add: JS"),
        (json.dumps(CALLS[1]).replace('{"n": 1}', OBJECTS), "JSON that is nested too deeply"),
        (json.dumps(CALLS[1]).replace('{"n": 1}', f'{{"n": {"[" * 300 + "]" * 300}}}'), "JSON that is nested too deep"),
        (f'{{"input": "q", "output": "a", "meta": {DEEP}}}', "JSON that is nested too deeply"),
        (f'{{"input": "q", "output": "a", "meta": "\\"]}}", "more": [1, {OBJECTS}]}}', "JSON that is nested too deep"),
        (f'{{"input": "q", "output": "a", "id": {LONG}}}', ""),
        (f'{{"messages": [], "id": {LONG}}}', ""),
    ],
    ids=range(10),
)
def test_what_nests_too_deeply_or_is_too_long_is_a_bad_record(tmp_path: Path, line: str, reason: str) -> None:
    files = {"a.jsonl": f"{GOOD}\n{line}\n{GOOD}\n", "a.json": f"[{GOOD}, {line},\n{GOOD}]"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        for settings in ({}, {"as_is": True}):
            with contextlib.suppress(UserError):
                index_dataset(tmp_path / name, tmp_path / f"no-{name}", "en", **settings)
        index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True, skip_bad=True)
        rejects = [json.loads(reject) for reject in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
        assert read_dataset(tmp_path / "out") == [json.loads(GOOD)] * 2
        assert [reject["where"] for reject in rejects] == ["line 2" if name == "a.jsonl" else "record 2 (line 1)"]
        assert rejects[0]["reason"].startswith(reason)


def test_how_deep_is_too_deep_depends_on_python_but_never_ends_in_a_traceback(tmp_path: Path) -> None:
    for levels in range(850, 1030, 10):
        line = f'{{"input": "q", "output": "a", "meta": {"[" * levels + "]" * levels}}}'
        for name in ("a.jsonl", "a.json"):
            (tmp_path / name).write_text(f"{GOOD}\n{line}\n" if name == "a.jsonl" else f"[{GOOD}, {line}]")
            index_dataset(tmp_path / name, tmp_path / "out", "en", overwrite=True, skip_bad=True)
            assert read_dataset(tmp_path / "out")[0] == json.loads(GOOD)


def test_the_end_of_a_deep_record_is_not_looked_for_in_a_string_that_is_cut_off(tmp_path: Path) -> None:
    record = f'{{"meta": {DEEP}, "text": "{"}" * (3 * CHUNK_BYTES)}"}}'
    (tmp_path / "a.json").write_text(f"[{record}, {GOOD}]")
    index_dataset(tmp_path / "a.json", tmp_path / "out", "en", skip_bad=True)
    assert read_dataset(tmp_path / "out") == [json.loads(GOOD)]


def test_a_deep_record_at_the_end_of_a_json_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{GOOD}, {{"text": "a", "meta": "[" , "more": {DEEP[:150_000]}')
    with pytest.raises(UserError, match=r"a\.json, line 1, record 2: not JSON: it breaks off"):
        index_dataset(tmp_path / "a.json", tmp_path / "out", "en")
