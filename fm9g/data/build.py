"""Making an indexed dataset: a .jsonl file in, a folder with data.jsonl, index, index.h5 and meta.json out."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fm9g.data.index import DATA, INDEX, INDEX_H5, META
from fm9g.data.records import parse_record
from fm9g.errors import UserError
from fm9g.files import new_folder
from fm9g.progress import Progress

LANGUAGES = ("zh", "en", "code")
_BUCKETS = {"less_4k": 4, "4k-8k": 8, "8k-16k": 16, "16k-32k": 32, "32k-64k": 64, "64k-128k": 128, "128k-256k": 256}
_SAMPLE_CHARACTERS = 50


def estimated_tokens(line: bytes, language: str) -> float:
    """The toolkit's estimate: 0.7 a character in Chinese, 1.5 a whitespace-separated word otherwise."""
    return 0.7 * len(line.decode()) if language == "zh" else 1.5 * len(line.split())


@dataclass
class Statistics:
    """What meta.json tells of a dataset, gathered line by line."""

    language: str
    nlines: int = 0
    tokens: float = 0.0
    lengths: dict[str, int] = field(default_factory=lambda: dict.fromkeys([*_BUCKETS, "more_256k"], 0))
    sample: dict[str, Any] = field(default_factory=dict)

    def add(self, line: bytes, record: dict[str, Any]) -> None:
        tokens = estimated_tokens(line, self.language)
        bucket = next((name for name, limit in _BUCKETS.items() if tokens < limit * 1024), "more_256k")
        self.lengths[bucket] += 1
        self.tokens += tokens
        self.nlines += 1
        self.sample = self.sample or record

    def to_json(self, nbytes: int) -> dict[str, Any]:
        return {
            "language": self.language,
            "nlines": self.nlines,
            "nbytes": nbytes,
            "length_distribute": self.lengths,
            "avg_token_per_line": self.tokens / self.nlines,
            "data_sample": {key: _cut(value) for key, value in self.sample.items()},
        }


def _cut(value: Any) -> Any:
    long = isinstance(value, str) and len(value) > _SAMPLE_CHARACTERS
    return value[:_SAMPLE_CHARACTERS] + "..." if long else value


def build_index(source: Path, output: Path, language: str, overwrite: bool = False) -> dict[str, Any]:
    """Checks every line of a .jsonl file and makes the indexed dataset `output` from it.

    The folder appears under its name only when whole. Blank lines are left out; CRLF, a byte order mark and a
    missing last newline are put right.
    Returns the content of meta.json. Raises UserError for a missing or empty source, a bad line, an output folder
    that holds something (unless overwrite) or that is the source's own.
    """
    if language not in LANGUAGES:
        raise UserError(f"language: found {language!r}, expected one of {', '.join(LANGUAGES)}")
    if not source.is_file():
        raise UserError(f"{source}: {'a folder, expected a .jsonl file' if source.is_dir() else 'no such file'}")
    with new_folder(output, overwrite, sources=(source,)) as folder:
        statistics, ends = _copy_lines(source, folder / DATA, language)
        if not statistics.nlines:
            raise UserError(f"{source}: the file is empty; nothing to index")
        bounds = np.array(ends, dtype=np.int64)
        bounds.tofile(folder / INDEX, sep="\n")
        with h5py.File(folder / INDEX_H5, "w") as file:
            file.create_dataset("index", data=bounds)
        meta = statistics.to_json(nbytes=int(bounds[-1]))
        (folder / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")
    return meta


def _copy_lines(source: Path, target: Path, language: str) -> tuple[Statistics, array]:
    """Copies the checked lines; returns their statistics and the N+1 bounds."""
    statistics, bounds, position = Statistics(language), array("q", [0]), 0
    with source.open("rb") as lines, target.open("wb") as out:
        with Progress(f"indexing {source.name}", total=source.stat().st_size, unit="B") as progress:
            for number, line in enumerate(lines, 1):
                progress.advance(len(line))
                text = (line[3:] if number == 1 and line.startswith(b"\xef\xbb\xbf") else line).strip()
                if not text:
                    continue
                statistics.add(text, parse_record(text, f"{source}, line {number}"))
                out.write(text)
                out.write(b"\n")
                position += len(text) + 1
                bounds.append(position)
    return statistics, bounds


def texts_of(files: Iterable[Path], limit: int | None = None) -> Iterator[str]:
    """The texts that a tokenizer is trained on: the lines of .txt files, input and output of the records of .jsonl.

    limit: bytes to read of each file. Raises UserError for a missing file and a bad line.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        read = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if file.suffix == ".jsonl" and line.strip():
                    record = parse_record(line, f"{file}, line {number}")
                    yield from (record[key] for key in ("input", "output") if record.get(key))
                else:
                    yield line.decode("utf-8", "replace")
                read += len(line)
                if limit is not None and read >= limit:
                    break
