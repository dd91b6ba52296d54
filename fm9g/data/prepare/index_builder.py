"""Builds an indexed dataset from records: a folder with data.jsonl, index, index.h5 and meta.json.

sources ──chunks──> workers: parse, check, canonicalize ──LineBatch──> DatasetWriter: data.jsonl, index, ...
                                        └──RejectedRecord──> rejects.jsonl, or the end
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from fm9g.data.dataset_files import REJECTS_FILE, SPLITS
from fm9g.data.prepare.dataset_writer import DatasetWriter
from fm9g.data.prepare.fast_scan import TOKENS_PER_UNIT
from fm9g.data.prepare.findings import Findings
from fm9g.data.prepare.index_tasks import CHUNK_BYTES, convert_source
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.line_batch import ChunkResult, RejectedRecord
from fm9g.data.prepare.records import quote
from fm9g.data.prepare.sources import DataSource
from fm9g.data.workers import check_workers, default_workers, worker_pool
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir
from fm9g.io.inputs import protect_inputs
from fm9g.progress import Progress

logger = logging.getLogger(__name__)

_MIN_BYTES_FOR_WORKERS = 32 << 20  # below, starting processes takes longer than the work


class BadRecordError(UserError):
    """A record that cannot be indexed, and that is not to be left out."""


@dataclass
class IndexReport:
    """What an indexing did.

    Args:
        sources: number of sources.
        metas: content of meta.json by dataset folder.
        record_formats: number of records by format.
        read: number of lines or records, blank lines included.
        blank: number of blank lines.
        empty: number of records without output.
        rejected: number of bad records, which were left out.
        filtered: number of records in another language, which were left out.
    """

    sources: int = 0
    metas: dict[Path, dict[str, Any]] = field(default_factory=dict)
    record_formats: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    read: int = 0
    blank: int = 0
    empty: int = 0
    rejected: int = 0
    filtered: int = 0


@protect_inputs()
def build_index(
    sources: list[DataSource],
    output: Path,
    config: IndexConfig,
    workers: int | None = None,
    overwrite: bool = False,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> IndexReport:
    """Checks every record of the sources and writes them to the indexed dataset `output`.

    The folder appears only when it is complete. With `config.split` there are two datasets, output/train and
    output/validation. With `config.skip_bad`, bad records go to output/rejects.jsonl with their file, line and reason.

    Args:
        workers: processes beside this one; None: one per core if the sources are large.
        overwrite: replace an existing folder.
        chunk_bytes: bytes of a file that a worker converts at a time.

    Raises UserError for a bad record, for sources without a good one, and for an output folder that is not empty or
    holds a source.
    """
    _check_config(config)
    check_workers(workers)
    num_bytes = sum(source.size for source in sources)
    if workers is None:
        workers = default_workers(num_bytes, _MIN_BYTES_FOR_WORKERS)
    for source in sources:
        source.register()
    with atomic_dir(output, overwrite) as folder, ExitStack() as stack:
        names = SPLITS if config.split else ("",)
        writers = [stack.enter_context(DatasetWriter(folder / name)) for name in names]
        job = _IndexJob(config, writers, folder / REJECTS_FILE)
        job.report.sources = len(sources)
        counts_bytes = all(source.is_lines and source.is_seekable for source in sources)
        total, unit = (num_bytes, "B") if counts_bytes else (None, "records")
        with Progress("indexing", total, unit) as progress, worker_pool(workers) as pool:
            for source in sources:
                for result in convert_source(source, config, pool, chunk_bytes):
                    job.add(source, result)
                    progress.advance(result.num_bytes if counts_bytes else result.read)
        for name, writer in zip(names, writers):
            if not writer.num_lines:
                raise UserError(job.explain_empty(sources, name))
            job.report.metas[output / name] = writer.finish(config.language, dict(job.report.record_formats))
    _log_report(job.report, config, output)
    return job.report


def _check_config(config: IndexConfig) -> None:
    if config.language not in TOKENS_PER_UNIT:
        raise UserError(f"language: found {config.language!r}, expected one of {', '.join(TOKENS_PER_UNIT)}")
    if config.as_is and config.language_filter:
        raise UserError("--language-filter does not go with --as-is: the prompt of a record of any format is not known")
    if not 0 <= config.split < 1:
        raise UserError(f"split: found {config.split}, expected a share from 0 to below 1")


class _IndexJob:
    """One indexing: passes the results of workers to the writers, and counts."""

    def __init__(self, config: IndexConfig, writers: list[DatasetWriter], rejects: Path) -> None:
        self.report = IndexReport()
        self._config, self._writers, self._rejects = config, writers, rejects
        self._first_rejection = ""

    def add(self, source: DataSource, result: ChunkResult) -> None:
        """Raises UserError for a bad record, unless they are to be left out."""
        for rejected in result.rejected:
            self._reject(source, rejected)
        for writer, batch in zip(self._writers, result.outputs):
            writer.add(batch, source.path)
            self.report.empty += batch.empty
        self.report.record_formats += result.record_formats
        self.report.findings.merge(result.findings)
        self.report.read += result.read
        self.report.blank += result.blank
        self.report.filtered += result.filtered

    def _reject(self, source: DataSource, rejected: RejectedRecord) -> None:
        message = rejection_message(source, rejected)
        if not self._config.skip_bad:
            raise BadRecordError(message)
        self._first_rejection = self._first_rejection or message
        self.report.rejected += 1
        entry = {
            "file": os.fsencode(str(source)).decode("utf-8", "replace"),
            "where": rejected.where,
            "reason": rejected.reason,
            "content": rejected.line.decode("utf-8", "replace"),
        }
        with self._rejects.open("ab") as file:
            file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    def explain_empty(self, sources: list[DataSource], name: str) -> str:
        """Why the dataset `name` has no record."""
        report = self.report
        if self._first_rejection:
            return f"no record is good; the first: {self._first_rejection}"
        if report.filtered and report.filtered + report.blank == report.read:
            return f"language-filter: none of {report.filtered} records is in {self._config.language_filter}"
        if name and report.read > report.blank:
            return f"split: no record of {report.read} fell into {name}; there are too few for this share"
        files = str(sources[0]) if len(sources) == 1 else f"{len(sources)} files"
        return f"{files}: no record found, nothing to index"


def rejection_message(source: DataSource, rejected: RejectedRecord) -> str:
    """Names a bad record's source, location and mistake, and quotes its beginning."""
    content = f": {quote(rejected.line)}" if rejected.line else ""
    return f"{source}, {rejected.where}: {rejected.reason}{content}"


def _log_report(report: IndexReport, config: IndexConfig, output: Path) -> None:
    report.findings.log()
    if report.empty:
        logger.warning(f"{report.empty} records have no output; training skips them")
    if report.filtered:
        logger.info(f"{report.filtered} records are not in {config.language_filter} and were left out")
    if report.rejected:
        logger.warning(f"{report.rejected} bad records were left out; see {output / REJECTS_FILE}")
