"""Records as files of all formats, and reading an indexed dataset back."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

from fm9g.data.load.indexed_dataset import IndexedDataset

RECORDS = [
    {"input": "问题", "output": "回答 一\n第二行"},
    {"input": "", "output": 'quotes " and \\ and \u2028'},
    {"input": "x", "output": "last"},
]
JSONL = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)
CALLS = [  # records with tools, of which Arrow makes columns with nulls
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "f", "arguments": {"city": "P"}}}],
            },
            {"role": "tool", "content": "3", "name": "f"},
        ],
        "tools": [{"name": "f", "parameters": {"properties": {"city": {"type": "string", "enum": ["P", None]}}}}],
        "system": None,
    },
    {
        "messages": [
            {"role": "user", "content": "add?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"n": 1}}}]},
        ],
        "tools": [{"name": "add", "parameters": {"properties": {"n": {"type": "integer", "minimum": 0}}}}],
        "system": "s",
    },
]


def read_dataset(folder: Path) -> list[dict]:
    """All records of an indexed dataset."""
    dataset = IndexedDataset(folder)
    return [dataset[index] for index in range(len(dataset))]


def as_csv(delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["input", "output"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue().encode()


FILES = {  # RECORDS, by the name of the file
    "a.jsonl": JSONL,
    "a.jsonl.gz": gzip.compress(JSONL[:70]) + gzip.compress(JSONL[70:]),
    "a.jsonl.xz": lzma.compress(JSONL),
    "a.jsonl.bz2": bz2.compress(JSONL),
    "a.ndjson": JSONL.removesuffix(b"\n"),
    "a.json": json.dumps(RECORDS).encode(),
    "pretty.json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode("utf-8-sig"),
    "objects.json": "\n\n".join(json.dumps(record, indent=1) for record in RECORDS).encode(),
    "lines.json": JSONL,
    "a.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "a.csv": as_csv(),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(),
    "a.tsv": as_csv("\t"),
}
