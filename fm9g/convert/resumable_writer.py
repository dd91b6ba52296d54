"""Files written from tensors on disk, a few megabytes at a time, so that what was cut off can be gone on with.

The files grow in a folder of their own, with a journal that says how much of each is on the disk. A call for the same
files goes on from there; what a call for others left is deleted.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fm9g.errors import UserError
from fm9g.io.append import ResumableAppendWriter
from fm9g.io.atomic import as_user_error, fsync_path
from fm9g.io.lazy_tensor import SAFETENSORS_DTYPES, LazyConcat
from fm9g.io.pt_checksums import crc32_of_range, write_checksums
from fm9g.io.weights import preallocate, tensor_bytes
from fm9g.progress import Progress

logger = logging.getLogger(__name__)

JOURNAL = "journal.json"
_CHUNK_BYTES = 1 << 22  # bytes of a tensor in memory at a time: few enough that the allocator keeps them
_MAX_READERS = 4  # threads at most
_MAX_PREFETCHED = 2 * _MAX_READERS  # chunks that are made before they are written
_SYNC_EVERY = 1 << 29  # bytes after which what is written is brought to the disk, and noted
_MAX_SHOWN = 5  # weights that are not finite, at most
_TAIL_BYTES = 1 << 16  # bytes before a mark whose checksum tells whether they are what was written
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class OutputFile:
    """A file to write: its bytes, literal ones and those of tensors, in order. tensors: the same ones, by name.
    is_archive: whether it holds checksums of the tensors."""

    name: str
    content: Sequence[bytes | LazyConcat]
    tensors: Mapping[str, LazyConcat]
    is_archive: bool = False

    @property
    def nbytes(self) -> int:
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.content)


def safetensors_output(name: str, tensors: Mapping[str, LazyConcat]) -> OutputFile:
    """A safetensors file as transformers writes it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return OutputFile(name, [len(text).to_bytes(8, "little") + text, *tensors.values()], tensors)


def pt_output(name: str, tensors: Mapping[str, LazyConcat], folder: Path) -> OutputFile:
    """A .pt file as torch.save writes it. folder: where it may be laid out, without its values."""
    skeleton = folder / f"{name}.hollow"
    content: list[bytes | LazyConcat] = []
    try:
        offsets = preallocate(skeleton, tensors)
        with skeleton.open("rb") as file:
            end = 0
            for key, offset in sorted(offsets.items(), key=lambda item: item[1]):
                content += [_between(file.fileno(), end, offset), tensors[key]]
                end = offset + tensors[key].nbytes
            content.append(_between(file.fileno(), end, skeleton.stat().st_size))
    finally:
        skeleton.unlink(missing_ok=True)
    return OutputFile(name, content, tensors, is_archive=True)


def _between(file: int, start: int, end: int) -> bytes:
    return os.pread(file, end - start, start)


@contextmanager
def resumable_dir(target: Path) -> Iterator[Path]:
    """A folder beside `target` where it may grow, kept when the block ends by what is not a mistake of the user.

    Raises UserError where another process is in such a block for the same target, and, with the folder kept, for an
    error of the system.
    """
    folder = target.parent / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            _lock(descriptor, target)
        yield folder
    except _ResumableError:
        raise
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"{target}: the disk is full" if full else as_user_error(error, target)
        raise _ResumableError(
            f"{reason}. What is done is kept in {folder}: "
            f"{'free some space and ' if full else ''}give the same command again, and it goes on from there"
        ) from error
    finally:
        os.close(descriptor)


class _ResumableError(UserError):
    """Ends a conversion that the same command goes on with."""


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _ResumableError(
            f"{target}: another process is writing it; wait for its end or choose another name"
        ) from None


def write_resumable(folder: Path, outputs: Sequence[OutputFile], title: str) -> None:
    """Writes files in `folder`, or what an earlier call for the same ones left to do. They are on the disk then.

    Raises UserError for values that are not finite.
    """
    journal = _Journal(folder, _fingerprint(outputs))
    done = journal.resume_points([output.name for output in outputs])
    total, already_written = sum(output.nbytes for output in outputs), sum(done)
    with (
        Progress(title, total, "B", already_written) as progress,
        ThreadPoolExecutor(1) as disk,
        _readers() as readers,
    ):
        if already_written:
            logger.info(f"{title}: continues after {already_written:,} of {total:,} bytes, which an earlier call wrote")
        for number, output in enumerate(outputs):
            start = done[number] if number < len(done) else 0
            if number < len(done) and start == output.nbytes:
                continue
            writer = _Writer(folder / output.name, start, disk, journal, progress)
            try:
                crcs = _write(output, writer, readers)
                writer.flush()
                if output.is_archive:
                    write_checksums(folder / output.name, crcs)
                writer.finish()
            except _NotFiniteError:
                raise UserError(*_not_finite(outputs)) from None
            finally:
                writer.close()
    fsync_path(folder)


@contextmanager
def _readers() -> Iterator[ThreadPoolExecutor]:
    """Threads that make values. Each works alone: where cores are busy, several that wait for one another lose more."""
    threads = torch.get_num_threads()
    count = max(1, min(_MAX_READERS, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        yield readers
    torch.set_num_threads(threads)  # for threads that are begun from here on


@dataclass(frozen=True)
class _Chunk:
    """Bytes to write. part: where the literal bytes or the tensor begins of which they are a chunk. skipped: how many
    are there already."""

    content: bytes | LazyConcat
    part: int
    skipped: int


def _write(output: OutputFile, writer: _Writer, readers: ThreadPoolExecutor) -> dict[int, int]:
    """Gives a writer all that it does not have yet. readers: make the next values meanwhile.

    Returns where the tensors of an archive begin, and the CRC-32 of each.
    """
    crcs = _written_crcs(output, writer) if output.is_archive else {}
    for chunk, values in _prefetched(_remaining_chunks(output, writer.position), readers):
        rest = values[chunk.skipped :]
        source = chunk.content.file_range if isinstance(chunk.content, LazyConcat) else None
        if source:  # the system copies what was just read
            writer.copy(source.file, source.offset + chunk.skipped, len(rest))
        else:
            writer.write(rest)
        if output.is_archive and isinstance(chunk.content, LazyConcat):
            crcs[chunk.part] = zlib.crc32(rest, crcs.get(chunk.part, 0))
    return crcs


def _written_crcs(output: OutputFile, writer: _Writer) -> dict[int, int]:
    """The CRC-32 of what an earlier call wrote of each tensor."""
    crcs, end = {}, 0
    for part in output.content:
        start, end = end, end + (len(part) if isinstance(part, bytes) else part.nbytes)
        if isinstance(part, LazyConcat) and start < writer.position:
            crcs[start] = crc32_of_range(writer.path, start, min(end, writer.position))
    return crcs


def _remaining_chunks(output: OutputFile, position: int) -> Iterator[_Chunk]:
    """The chunks of a file that are not all before a position."""
    end = 0
    for part in output.content:
        begin = end
        for chunk in [part] if isinstance(part, bytes) else part.row_chunks(_CHUNK_BYTES):
            start, end = end, end + (len(chunk) if isinstance(chunk, bytes) else chunk.nbytes)
            if position < end:
                yield _Chunk(chunk, begin, max(0, position - start))


def _prefetched(chunks: Iterator[_Chunk], readers: ThreadPoolExecutor) -> Iterator[tuple[_Chunk, memoryview]]:
    """Pieces with their bytes, which are made while the ones before are in use."""
    waiting: deque[tuple[_Chunk, Future[memoryview]]] = deque()
    for chunk in chunks:
        waiting.append((chunk, readers.submit(_load, chunk.content)))
        if len(waiting) > _MAX_PREFETCHED:
            done, values = waiting.popleft()
            yield done, values.result()
    while waiting:
        done, values = waiting.popleft()
        yield done, values.result()


def _load(content: bytes | LazyConcat) -> memoryview:
    """Raises _NotFiniteError."""
    if isinstance(content, bytes):
        return memoryview(content)
    values = content.read()
    if not _is_finite(values):
        raise _NotFiniteError
    return tensor_bytes(values)


class _NotFiniteError(Exception):
    """A piece holds NaN or infinity."""


def _is_finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    values = values if values.dtype.itemsize > 1 else values.float()  # torch does not order numbers of 8 bits
    return all(math.isfinite(end) for end in values.aminmax())  # one pass, which NaN outlasts


def _not_finite(outputs: Sequence[OutputFile]) -> list[str]:
    """A line for each weight that is not finite, the first ones, and what to do. Reads them all."""
    found = []
    for name, tensor in (item for output in outputs for item in output.tensors.items()):
        bad = sum(int((~group.read().double().isfinite()).sum()) for group in tensor.row_chunks(_CHUNK_BYTES))
        if bad:
            found.append(
                f"{tensor.parts[0].file}: {name}: {bad:,} of {tensor.shape.numel():,} values are NaN or infinite"
            )
    more = [f"and {len(found) - _MAX_SHOWN} more weights"] if len(found) > _MAX_SHOWN else []
    remedy = "Nothing was written: take a checkpoint from before they became so, or get the file again"
    return [*found[:_MAX_SHOWN], *more, remedy]


class _Writer(ResumableAppendWriter):
    """A file that is brought to the disk now and then, while it goes on growing."""

    def __init__(self, path: Path, start: int, disk: ThreadPoolExecutor, journal: _Journal, progress: Progress) -> None:
        """start: bytes that are there. disk: a thread that waits for the disk."""
        super().__init__(path, start)
        self.path, self._disk, self._journal, self._progress = path, disk, journal, progress
        self._last_sync = start
        self._sync_point: Future[None] | None = None

    def _advance(self, count: int) -> None:
        super()._advance(count)
        self._progress.advance(count)
        if self.position - self._last_sync >= _SYNC_EVERY and (self._sync_point is None or self._sync_point.done()):
            self._start_sync()

    def _start_sync(self) -> None:
        if self._sync_point is not None:
            self._sync_point.result()  # raises what the disk said
        self._last_sync = self.position
        self._sync_point = self._disk.submit(self._sync_and_record, self.position)

    def _sync_and_record(self, position: int) -> None:
        self.fdatasync()
        self._journal.record(self.path.name, position, _tail_checksum(self.path, position))

    def finish(self) -> None:
        """Returns when all is on the disk."""
        self.flush()
        self._start_sync()
        assert self._sync_point is not None
        self._sync_point.result()

    def close(self) -> None:
        if self._sync_point is not None:
            self._sync_point.exception()  # nothing may use the file any more
        super().close()


class _Journal:
    """How many bytes of each file are on the disk, and the checksum of the last of them."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._file, self._fingerprint = folder / JOURNAL, fingerprint
        self._files: dict[str, list[int]] = {}

    def resume_points(self, names: list[str]) -> list[int]:
        """How many bytes are there of the first files; all that is of something else, or was changed, is deleted."""
        with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
            journal = json.loads(self._file.read_text(encoding="utf-8"))
            if journal["identity"] == self._fingerprint and self._is_intact(journal["files"]):
                self._files = {name: journal["files"][name] for name in names[: len(journal["files"])]}
        for leftover in self._file.parent.iterdir():
            if leftover.name not in (self._file.name, *self._files):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return [position for position, _ in self._files.values()]

    def _is_intact(self, files: dict[str, list[int]]) -> bool:
        for name, (position, checksum) in files.items():
            if _tail_checksum(self._file.parent / name, position) != checksum:
                return False
        return True

    def record(self, name: str, position: int, checksum: int) -> None:
        self._files[name] = [position, checksum]
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({"identity": self._fingerprint, "files": self._files}), encoding="utf-8")
        new.replace(self._file)


def _tail_checksum(path: Path, position: int) -> int:
    length = min(position, _TAIL_BYTES)
    with path.open("rb") as file:
        file.seek(position - length)
        return zlib.crc32(file.read(length))


def _fingerprint(outputs: Sequence[OutputFile]) -> str:
    """A checksum of what the files are made of: the bytes, places and changes, and the age of what is read."""
    digest = hashlib.sha256()
    sources: dict[Path, str] = {}
    for output in outputs:
        digest.update(repr((output.name, output.nbytes)).encode())
        for part in output.content:
            if isinstance(part, bytes):
                digest.update(part)
                continue
            transform = part.transform.__name__ if part.transform else ""
            digest.update(repr((part.dtype, transform, part.first_row)).encode())
            for stored in part.parts:
                if stored.file not in sources:
                    facts = stored.file.stat()
                    sources[stored.file] = f"{stored.file.resolve()} {facts.st_size} {facts.st_mtime_ns}"
                location = (sources[stored.file], stored.shape, stored.dtype, stored.offset, stored.stride)
                digest.update(repr(location).encode())
    return digest.hexdigest()
