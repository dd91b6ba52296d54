"""Writes files from tensors on disk, a few megabytes at a time, so that an interrupted conversion can be resumed.

    .TARGET.partial/
        journal.json                  {"identity": fingerprint, "files": {name: [bytes on disk, CRC-32 of their tail]}}
        model-00001-of-00002...       complete
        model-00002-of-00002...       |<-- on disk, in the journal -->|<-- written since -->|

A call for the same files resumes at the journal's positions. Partial output of a different conversion is deleted.
"""

from __future__ import annotations

import errno
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
from fm9g.io.append import AppendWriter
from fm9g.io.atomic import fsync_path
from fm9g.io.lazy_tensor import LazyConcat, tensor_bytes
from fm9g.io.lock import try_lock
from fm9g.io.os_errors import as_user_error
from fm9g.io.pt_checksums import crc32_of_range, write_checksums
from fm9g.io.pt_file import preallocate
from fm9g.io.safetensors_file import SAFETENSORS_DTYPES
from fm9g.progress import Progress

logger = logging.getLogger(__name__)

JOURNAL = "journal.json"
CHUNK_BYTES = 1 << 22  # of a tensor in memory at a time: few enough that the allocator reuses them
SYNC_BYTES = 1 << 29  # after which written bytes are brought to the disk and recorded
BUFFER_BYTES = 1 << 22  # from memory that are written at a time
_MAX_READERS = 4  # threads
_MAX_PREFETCHED = 2 * _MAX_READERS  # chunks that are read ahead of the writer
_MAX_LISTED = 5  # non-finite weights in a message
_TAIL_BYTES = 1 << 16  # before a position; their checksum shows whether the file was changed
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class OutputFile:
    """A file to write.

    Args:
        content: literal bytes and tensors, in the order of the file.
        tensors: those of content, by name.
        is_archive: whether it is a zip archive, which holds a checksum of each tensor.
    """

    name: str
    content: Sequence[bytes | LazyConcat]
    tensors: Mapping[str, LazyConcat]
    is_archive: bool = False

    @property
    def nbytes(self) -> int:
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.content)


def safetensors_output(name: str, tensors: Mapping[str, LazyConcat]) -> OutputFile:
    """A safetensors file in the layout that transformers writes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return OutputFile(name, [len(text).to_bytes(8, "little") + text, *tensors.values()], tensors)


def pt_output(name: str, tensors: Mapping[str, LazyConcat], folder: Path) -> OutputFile:
    """A .pt file in the layout that torch.save writes. folder: for a temporary file, which has no values."""
    skeleton = folder / f"{name}.hollow"
    content: list[bytes | LazyConcat] = []
    try:
        offsets = preallocate(skeleton, tensors)
        with skeleton.open("rb") as file:
            end = 0
            for key, offset in sorted(offsets.items(), key=lambda item: item[1]):
                content += [_read_range(file.fileno(), end, offset), tensors[key]]
                end = offset + tensors[key].nbytes
            content.append(_read_range(file.fileno(), end, skeleton.stat().st_size))
    finally:
        skeleton.unlink(missing_ok=True)
    return OutputFile(name, content, tensors, is_archive=True)


def _read_range(file: int, start: int, end: int) -> bytes:
    return os.pread(file, end - start, start)


@contextmanager
def resumable_dir(target: Path) -> Iterator[Path]:
    """A working folder beside `target`. It survives any failure except a user error, so that a retry can resume.

    Raises:
        UserError: another process is in such a block for the same target; or the system failed, as with a full disk.
    """
    folder = target.parent / f".{target.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if try_lock(descriptor) is False:
            raise _ResumableError(f"{target}: another process is writing it; wait for its end or choose another name")
        yield folder
    except _ResumableError:
        raise
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"{target}: the disk is full" if is_full else as_user_error(error, target)
        raise _ResumableError(
            f"{reason}. What is written so far is kept in {folder}: "
            f"{'free some space and ' if is_full else ''}give the same command again to resume"
        ) from error
    finally:
        os.close(descriptor)


class _ResumableError(UserError):
    """Ends a conversion that the same command can resume."""


def write_resumable(
    folder: Path,
    outputs: Sequence[OutputFile],
    title: str,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    sync_bytes: int = SYNC_BYTES,
    buffer_bytes: int = BUFFER_BYTES,
) -> None:
    """Writes files into `folder`, or the rest of them if an earlier call was interrupted. Returns when all are on disk.

    Args:
        title: of the progress bar.
        chunk_bytes: of a tensor in memory at a time.
        sync_bytes: written bytes between two entries in the journal; an interruption loses about as many.
        buffer_bytes: from memory that are written at a time, a multiple of 4096.

    Raises:
        UserError: a weight holds NaN or infinity.
    """
    journal = _Journal(folder, _fingerprint(outputs))
    positions = journal.resume_points([output.name for output in outputs])
    total, already_written = sum(output.nbytes for output in outputs), sum(positions.values())
    with (
        Progress(title, total, "B", already_written) as progress,
        ThreadPoolExecutor(1) as disk,
        _readers() as readers,
    ):
        if already_written:
            logger.info(f"{title}: resumes at {already_written:,} of {total:,} bytes, which an earlier call wrote")
        for output in outputs:
            start = positions.get(output.name)
            if start == output.nbytes:
                continue
            writer = _Writer(folder / output.name, start or 0, buffer_bytes, sync_bytes, disk, journal, progress)
            try:
                crcs = _write(output, writer, readers, chunk_bytes)
                writer.flush()
                if output.is_archive:
                    write_checksums(folder / output.name, crcs)
                writer.finish()
            except _NotFiniteError:
                raise UserError(*_describe_non_finite(outputs)) from None
            finally:
                writer.close()
    fsync_path(folder)


@contextmanager
def _readers() -> Iterator[ThreadPoolExecutor]:
    """Threads that read values. Each computes on one core: torch's own threads lose time waiting for busy cores."""
    threads = torch.get_num_threads()
    count = max(1, min(_MAX_READERS, (os.cpu_count() or 1) - 1))
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as readers:
        yield readers
    torch.set_num_threads(threads)  # for threads that start after this


@dataclass(frozen=True)
class _Chunk:
    """Bytes to write.

    Args:
        part_offset: where the part of the file's content begins that they belong to: literal bytes or a tensor.
        skipped: how many of them are in the file already.
    """

    content: bytes | LazyConcat
    part_offset: int
    skipped: int


def _write(output: OutputFile, writer: _Writer, readers: ThreadPoolExecutor, chunk_bytes: int) -> dict[int, int]:
    """Writes the rest of a file, from the writer's position on. Readers read ahead meanwhile.

    Returns the CRC-32 of each tensor of an archive, by the tensor's offset.
    """
    crcs = _written_crcs(output, writer) if output.is_archive else {}
    for chunk, values in _prefetched(_remaining_chunks(output, writer.position, chunk_bytes), readers):
        rest = values[chunk.skipped :]
        source = chunk.content.file_range if isinstance(chunk.content, LazyConcat) else None
        if source:  # the kernel copies from the cache, into which the reader has just brought it
            writer.copy(source.file, source.offset + chunk.skipped, len(rest))
        else:
            writer.write(rest)
        if output.is_archive and isinstance(chunk.content, LazyConcat):
            crcs[chunk.part_offset] = zlib.crc32(rest, crcs.get(chunk.part_offset, 0))
    return crcs


def _written_crcs(output: OutputFile, writer: _Writer) -> dict[int, int]:
    """The CRC-32 of the bytes of each tensor that an earlier call wrote."""
    crcs, end = {}, 0
    for part in output.content:
        start, end = end, end + (len(part) if isinstance(part, bytes) else part.nbytes)
        if isinstance(part, LazyConcat) and start < writer.position:
            crcs[start] = crc32_of_range(writer.path, start, min(end, writer.position))
    return crcs


def _remaining_chunks(output: OutputFile, position: int, chunk_bytes: int) -> Iterator[_Chunk]:
    """The chunks of a file that end behind a position."""
    end = 0
    for part in output.content:
        part_offset = end
        for chunk in [part] if isinstance(part, bytes) else part.row_chunks(chunk_bytes):
            start, end = end, end + (len(chunk) if isinstance(chunk, bytes) else chunk.nbytes)
            if position < end:
                yield _Chunk(chunk, part_offset, max(0, position - start))


def _prefetched(chunks: Iterator[_Chunk], readers: ThreadPoolExecutor) -> Iterator[tuple[_Chunk, memoryview]]:
    """Chunks with their bytes, which are read while earlier ones are written."""
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
    """A chunk holds NaN or infinity."""


def _is_finite(values: torch.Tensor) -> bool:
    if not values.numel():
        return True
    values = values if values.dtype.itemsize > 1 else values.float()  # torch does not order 8-bit floats
    return all(math.isfinite(end) for end in values.aminmax())  # one pass; NaN is its own minimum and maximum


def _describe_non_finite(outputs: Sequence[OutputFile]) -> list[str]:
    """A line for each of the first non-finite weights, and the remedy. Reads all weights."""
    lines = []
    for name, tensor in (item for output in outputs for item in output.tensors.items()):
        count = sum(int((~chunk.read().double().isfinite()).sum()) for chunk in tensor.row_chunks(CHUNK_BYTES))
        if count:
            lines.append(
                f"{tensor.parts[0].file}: {name}: {count:,} of {tensor.shape.numel():,} values are NaN or infinite"
            )
    more = [f"and {len(lines) - _MAX_LISTED} more weights"] if len(lines) > _MAX_LISTED else []
    remedy = "Nothing was written: take an earlier checkpoint, from before this happened, or get the file again"
    return [*lines[:_MAX_LISTED], *more, remedy]


class _Writer(AppendWriter):
    """A growing file, which another thread brings to the disk now and then and records in the journal.

    While one sync is under way no other starts, so that writing does not wait for the disk before the end.
    """

    def __init__(
        self,
        path: Path,
        start: int,
        buffer_bytes: int,
        sync_bytes: int,
        disk: ThreadPoolExecutor,
        journal: _Journal,
        progress: Progress,
    ) -> None:
        """start: bytes to keep of the file. disk: the thread that waits for the disk."""
        super().__init__(path, start, buffer_bytes)
        self.path, self._disk, self._journal, self._progress = path, disk, journal, progress
        self._sync_bytes, self._last_sync = sync_bytes, start
        self._sync: Future[None] | None = None

    def _advance(self, count: int) -> None:
        super()._advance(count)
        self._progress.advance(count)
        if self.position - self._last_sync >= self._sync_bytes and (self._sync is None or self._sync.done()):
            self._start_sync()

    def _start_sync(self) -> None:
        if self._sync is not None:
            self._sync.result()  # raises its error
        self._last_sync = self.position
        self._sync = self._disk.submit(self._sync_and_record, self.position)

    def _sync_and_record(self, position: int) -> None:
        self.fdatasync()
        self._journal.record(self.path.name, position, _tail_checksum(self.path, position))

    def finish(self) -> None:
        """Returns when the file is complete on the disk and in the journal."""
        self.flush()
        self._start_sync()
        assert self._sync is not None
        self._sync.result()

    def close(self) -> None:
        if self._sync is not None:
            self._sync.exception()  # waits: the thread uses the file
        super().close()


class _Journal:
    """Bytes on the disk of each file, and the checksum of the last of them."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._file, self._fingerprint = folder / JOURNAL, fingerprint
        self._files: dict[str, list[int]] = {}

    def resume_points(self, names: list[str]) -> dict[str, int]:
        """Bytes on the disk of the first files, by name. Deletes files that were changed or belong to other outputs.

        Args:
            names: of all files, in the order in which they are written.
        """
        with suppress(OSError, ValueError, LookupError, AttributeError, TypeError):
            journal = json.loads(self._file.read_text(encoding="utf-8"))
            if journal["identity"] == self._fingerprint and self._is_intact(journal["files"]):
                self._files = {name: journal["files"][name] for name in names[: len(journal["files"])]}
        for leftover in self._file.parent.iterdir():
            if leftover.name not in (self._file.name, *self._files):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return {name: position for name, (position, _) in self._files.items()}

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
    """A hash of everything the files consist of: literal bytes, types, transforms, and ranges of dated source files.

    Stable across versions, so that a conversion that an earlier version began can be resumed.
    """
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
            for tensor in part.parts:
                if tensor.file not in sources:
                    status = tensor.file.stat()
                    sources[tensor.file] = f"{tensor.file.resolve()} {status.st_size} {status.st_mtime_ns}"
                location = (sources[tensor.file], tensor.shape, tensor.dtype, tensor.offset, tensor.stride)
                digest.update(repr(location).encode())
    return digest.hexdigest()
