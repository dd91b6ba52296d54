"""What workers of an indexing return: lines for data.jsonl with their lengths, and the records that were rejected."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from fm9g.data.prepare.fast_scan import TOKENS_PER_UNIT, count_units
from fm9g.data.prepare.findings import Findings

# Names of length_distribute in meta.json, and the upper bound of each in 1024 estimated tokens.
BUCKETS = {"less_4k": 4, "4k-8k": 8, "8k-16k": 16, "16k-32k": 32, "32k-64k": 64, "64k-128k": 128, "128k-256k": 256}
LAST_BUCKET = "more_256k"


@dataclass(frozen=True)
class RejectedRecord:
    """A record that cannot be used.

    Args:
        where: its location in the source ("record 7"), or its line within the chunk, from 1.
        reason: in words for the user.
        line: its text.
    """

    where: int | str
    reason: str
    line: bytes


@dataclass
class LineBatch:
    """Lines for one data.jsonl.

    Args:
        chunks: the bytes of the lines; (start, end) are offsets in the source file, whose bytes need no copy here.
        lengths: bytes of each line, an array per chunk that was added.
        units: characters or words, from which the number of tokens is estimated.
        buckets: number of lines by estimated tokens, see BUCKETS.
        empty: number of records without output.
        sample: the first line.
    """

    chunks: list[bytes | tuple[int, int]] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    units: int = 0
    buckets: np.ndarray = field(default_factory=lambda: np.zeros(len(BUCKETS) + 1, np.int64))
    empty: int = 0
    sample: bytes = b""

    def add(
        self, chunk: bytes | tuple[int, int], block: np.ndarray, ends: np.ndarray, empty: int, language: str
    ) -> None:
        """Adds lines.

        Args:
            chunk: as in `chunks`.
            block: (bytes,) uint8, the bytes of the chunk.
            ends: (lines,) where each line ends in the block.
            empty: number of records without output.
        """
        units = count_units(block, ends, language)
        limits = [1024 * limit for limit in BUCKETS.values()]
        buckets = np.searchsorted(limits, units * TOKENS_PER_UNIT[language], side="right")
        self.buckets += np.bincount(buckets, minlength=len(self.buckets))
        self.units += int(units.sum())
        self.lengths.append(np.diff(ends, prepend=0))
        self.empty += empty
        self.sample = self.sample or block[: ends[0]].tobytes()
        last = self.chunks[-1] if self.chunks else None
        if isinstance(chunk, tuple) and isinstance(last, tuple) and last[1] == chunk[0]:
            self.chunks[-1] = last[0], chunk[1]
        else:
            self.chunks.append(chunk)


@dataclass
class ChunkResult:
    """What became of a chunk of a source.

    Args:
        outputs: the lines of the dataset, or of the two datasets of a split.
        num_bytes: of the chunk in its file; 0 if it is not a byte range.
        read: number of lines or records, blank lines included.
        blank: number of blank lines.
        filtered: number of records in another language.
        record_formats: number of records by format.
        rejected: bad records; with `skip_bad` off, the first one ends the chunk.
    """

    outputs: list[LineBatch]
    num_bytes: int = 0
    read: int = 0
    blank: int = 0
    filtered: int = 0
    record_formats: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    rejected: list[RejectedRecord] = field(default_factory=list)
