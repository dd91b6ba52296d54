"""The cache of raw files that were indexed for `data`.

    CACHE/NAME-KEY/        an indexed dataset; KEY is a hash of the files' content and of how they are read
    CACHE/entries/ID.json  what the files of an entry were when they were last hashed, and the KEY of that
    CACHE/locks/           locks of the processes that are hashing or indexing

A file whose size, times and inode are those of the entry is not read again. Content decides, not the name: a copy of an
indexed file is found, and a changed one is indexed into another folder.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import multiprocessing
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.data.dataset_files import CANONICAL_FORM, META_FILE
from fm9g.data.prepare.sources import DataSource
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_file, atomic_rmtree, clean_stale_temps
from fm9g.io.json_file import read_object
from fm9g.io.lock import wait_lock
from fm9g.path_kind import DATASET, kind_of
from fm9g.progress import Progress

if TYPE_CHECKING:
    from fm9g.data.prepare.column_mapping import ColumnMapping

logger = logging.getLogger(__name__)

_VERSION = 1  # of the keys; to be raised if the same files and options give other records
_HASH_BLOCK = 4 << 20
_SHOW_PROGRESS_BYTES = 64 << 20  # hashing less takes a moment
_FRESH_NS = 2 * 10**9  # a file that changed so shortly before it was hashed may change again at the same time stamp
_LANGUAGE_SOURCES, _LANGUAGE_BYTES = 4, 1 << 18  # how much is read to recognize the language

FileState = list[Any]  # [real path, size, mtime_ns, ctime_ns, inode]


@dataclass(frozen=True)
class RawData:
    """Files that become one indexed dataset.

    Args:
        title: what messages call them.
        paths: where they were searched: the same paths may have other files later.
        sources: the files.
        columns: which of the user's keys holds what; None: recognized by their names.
    """

    title: str
    paths: tuple[str, ...]
    sources: tuple[DataSource, ...]
    columns: ColumnMapping | None = None

    def options(self) -> dict[str, Any]:
        """How the files are read, as JSON."""
        columns = [self.columns.names, self.columns.tags] if self.columns else None
        return {
            "sources": [[source.format, source.compression, source.text_unit] for source in self.sources],
            "columns": columns,
            "version": _VERSION,
            "canonical_form": CANONICAL_FORM,
        }


@dataclass(frozen=True)
class CachedDataset:
    """A dataset of the cache.

    Args:
        paths: what it was made of; empty: unknown.
        is_current: whether an entry leads to it: the files exist, and did not change since.
    """

    folder: Path
    paths: tuple[str, ...]
    num_bytes: int
    is_current: bool


def default_cache_folder() -> Path:
    """$XDG_CACHE_HOME/fm9g/data, by default ~/.cache/fm9g/data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fm9g" / "data"


class DataCache:
    """Indexed datasets of raw files, in one folder. Several processes may use it at the same time."""

    def __init__(self, folder: str | Path = "") -> None:
        """folder: created when needed; empty: the default."""
        self.folder = Path(os.path.expanduser(folder)) if folder else default_cache_folder()

    def find(self, raw: RawData, allow_fresh: bool = False) -> Path | None:
        """The indexed dataset of these files if there is one and they did not change. Does not read them.

        allow_fresh: also for files that may have been changed within two seconds of the time at which they were hashed.
        """
        states, hashes = _file_states(raw.sources), _known_hashes(self._read_entry(raw), allow_fresh)
        if not all(tuple(state) in hashes for state in states):
            return None
        return self._find_dataset(_content_key(raw, [hashes[tuple(state)] for state in states]))

    def find_or_build(self, raw: RawData) -> Path:
        """The indexed dataset of these files, which is built if there is none. Says which of the two it did.

        Raises UserError for a bad record, a file that changes meanwhile, and a folder that cannot be written.
        """
        if (folder := self.find(raw)) is None:
            _check_not_in_worker()
            self._prepare_folder()
            with wait_lock(self._lock(_entry_id(raw)), f"data: another process reads {raw.title}"):
                folder = self.find(raw) or self._hash_and_build(raw)
        else:
            logger.info(f"data: {raw.title}: {_describe(folder)} (indexed before)")
        return folder

    def datasets(self) -> list[CachedDataset]:
        """The datasets of the cache, by name."""
        entries = [_read(file) for file in sorted(self._entries.glob("*.json"))]
        current = {entry["dataset"] for entry in entries if _is_current(entry)}
        # If several entries lead to a dataset, a current one counts.
        paths = {entry.get("dataset"): tuple(entry.get("paths", ())) for entry in sorted(entries, key=_is_current)}
        folders = sorted(path for path in self.folder.glob("*") if kind_of(path) == DATASET)
        return [
            CachedDataset(
                folder,
                paths.get(folder.name, ()),
                sum(file.stat().st_size for file in folder.iterdir()),
                folder.name in current,
            )
            for folder in folders
        ]

    def prune(self) -> list[CachedDataset]:
        """Deletes the datasets whose files changed or are gone, and what killed processes left. Returns the deleted."""
        outdated = [dataset for dataset in self.datasets() if not dataset.is_current]
        self._prepare_folder()
        for dataset in outdated:
            key = dataset.folder.name.rpartition("-")[2]
            with wait_lock(self._lock(key), f"data: another process indexes {dataset.folder.name}"):
                atomic_rmtree(dataset.folder)
        for file in self._entries.glob("*.json"):
            with wait_lock(self._lock(file.stem), f"data: another process reads {file.stem}"):
                if not _is_current(_read(file)):
                    file.unlink(missing_ok=True)
        clean_stale_temps(self.folder)
        return outdated

    @property
    def _entries(self) -> Path:
        return self.folder / "entries"

    def _lock(self, name: str) -> Path:
        return self.folder / "locks" / name

    def _entry_file(self, raw: RawData) -> Path:
        return self._entries / f"{_entry_id(raw)}.json"

    def _read_entry(self, raw: RawData) -> dict[str, Any]:
        return _read(self._entry_file(raw))

    def _prepare_folder(self) -> None:
        """Creates the folder. Raises UserError that names data_cache_dir if it cannot be written."""
        try:
            for folder in (self._entries, self.folder / "locks"):
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(0, "permission denied")
        except OSError as error:
            raise UserError(
                f"{self.folder}: indexed data cannot be stored here: {error.strerror}; name another folder with "
                "data_cache_dir"
            ) from None

    def _find_dataset(self, key: str) -> Path | None:
        found = self.folder.glob(f"*-{glob.escape(key)}")
        return next((folder for folder in found if kind_of(folder) == DATASET), None)

    def _hash_and_build(self, raw: RawData) -> Path:
        """Hashes what is not known, builds the dataset unless another entry has the same content, and notes both."""
        before, states, started = self._read_entry(raw), _file_states(raw.sources), time.time_ns()
        hashes = _known_hashes(before)
        digests = _hash_files(states, hashes)
        key = _content_key(raw, digests)
        change = _describe_change(before, states, digests)
        with wait_lock(self._lock(key), f"data: another process indexes {raw.title}"):
            if folder := self._find_dataset(key):
                logger.info(f"data: {raw.title}: {_describe(folder)} (indexed before)")
            else:
                folder = self.folder / f"{_folder_name(raw)}-{key}"
                logger.info(f"data: indexing {raw.title} into {folder} ({change or 'first use'})")
                self._build(raw, folder)
                if _file_states(raw.sources) != states:
                    atomic_rmtree(folder)
                    raise UserError(f"{raw.title}: was changed while it was being read; wait until it is complete")
                logger.info(f"data: {raw.title}: {_describe(folder)}")
        is_fresh = [max(state[2], state[3]) > started - _FRESH_NS for state in states]
        content = {
            "paths": [os.path.abspath(path) for path in raw.paths],
            "options": raw.options(),
            "indexed": time.strftime("%Y-%m-%d %H:%M:%S"),
            "dataset": folder.name,
            "files": [[*state, digest, fresh] for state, digest, fresh in zip(states, digests, is_fresh)],
        }
        with atomic_file(self._entry_file(raw)) as temporary:
            temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8", errors="surrogateescape")
        return folder

    def _build(self, raw: RawData, folder: Path) -> None:
        from fm9g.data.prepare.index_builder import BadRecordError, build_index
        from fm9g.data.prepare.index_worker import IndexConfig
        from fm9g.data.prepare.language import detect_language
        from fm9g.data.prepare.texts import iter_texts

        clean_stale_temps(self.folder)
        sources = list(raw.sources)
        try:
            texts = iter_texts(sources[:_LANGUAGE_SOURCES], _LANGUAGE_BYTES, raw.columns)
            # Another process without locks may have been faster with the same content.
            build_index(sources, folder, IndexConfig(detect_language(texts), raw.columns), overwrite=True)
        except BadRecordError as error:
            raise UserError(
                *error.args,
                "Correct it; or leave bad records out with `fm9g data index --skip-bad`, and name the folder that it "
                "makes in place of the file",
            ) from None


def _check_not_in_worker() -> None:
    """Raises UserError in a worker process of the indexing that runs the user's script again, while it is started.

    It would wait for the process that started it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            'a script that uses several processes runs again in each: put its calls under `if __name__ == "__main__":`'
        )


def _entry_id(raw: RawData) -> str:
    paths = [os.path.abspath(path) for path in raw.paths]
    columns = [raw.columns.names, raw.columns.tags] if raw.columns else None
    return _digest([paths, columns])


def _content_key(raw: RawData, digests: list[str]) -> str:
    return _digest([raw.options(), digests])


def _digest(value: Any) -> str:
    """16 hexadecimal digits of a hash of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _folder_name(raw: RawData) -> str:
    return re.sub(r"[^\w-]+", "_", os.path.basename(raw.title).partition(".")[0])[:60].strip("_") or "data"


def _files_of(source: DataSource) -> list[str]:
    """The file of a source, or the files of a saved dataset."""
    if source.format != "datasets":
        return [source.path]
    return sorted(str(file) for file in Path(source.path).rglob("*") if file.is_file())


def _file_states(sources: tuple[DataSource, ...]) -> list[FileState]:
    """What changes if one of the files is written to or replaced."""
    return [_state_of(os.path.realpath(path)) for source in sources for path in _files_of(source)]


def _known_hashes(entry: dict[str, Any], allow_fresh: bool = False) -> dict[tuple[Any, ...], str]:
    """State of a file -> hash of its content. allow_fresh: see DataCache.find."""
    files = entry.get("files", ())
    return {tuple(state): digest for *state, digest, is_fresh in files if allow_fresh or not is_fresh}


def _hash_files(states: list[FileState], known: dict[tuple[Any, ...], str]) -> list[str]:
    """The SHA-256 of each file. known: of files that need not be read."""
    num_bytes = sum(state[1] for state in states if tuple(state) not in known)
    if num_bytes < _SHOW_PROGRESS_BYTES:
        return [known.get(tuple(state)) or _hash_file(state[0]) for state in states]
    with Progress("reading", num_bytes, "B") as progress:
        return [known.get(tuple(state)) or _hash_file(state[0], progress) for state in states]


def _hash_file(path: str, progress: Progress | None = None) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
                if progress:
                    progress.advance(len(block))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _describe_change(entry: dict[str, Any], states: list[FileState], digests: list[str]) -> str:
    """Which files have changed since an entry was written; empty: there was none, or the content is the same."""
    if not entry:
        return ""
    before = {file[0]: file[-2] for file in entry["files"]}
    now = {state[0]: digest for state, digest in zip(states, digests)}
    changed = [path for path in before | now if before.get(path) != now.get(path)]
    if not changed:
        return ""
    files = os.path.basename(changed[0]) if len(changed) == 1 else f"{len(changed)} files"
    verb = "has" if len(changed) == 1 else "have"
    return f"{files} {verb} changed since {entry['indexed']}; `fm9g data cache --prune` deletes what is outdated"


def _describe(folder: Path) -> str:
    """What meta.json says about a dataset."""
    return f"{_read(folder / META_FILE).get('nlines')} records in {folder}"


def _is_current(entry: dict[str, Any]) -> bool:
    """Whether all files of an entry are as they were."""
    try:
        return bool(entry) and all(_state_of(file[0]) == file[:-2] for file in entry["files"])
    except OSError:
        return False


def _state_of(path: str) -> FileState:
    status = os.stat(path)
    return [path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read(file: Path) -> dict[str, Any]:
    """An object of JSON; empty if it is missing or damaged: the cache is then filled again."""
    try:
        return read_object(file, is_input=False)
    except UserError:
        return {}
