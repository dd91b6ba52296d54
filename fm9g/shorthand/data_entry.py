"""An entry of `data`: what a user writes for a dataset, and what it names.

data/chat.jsonl#500:0.3      500 records of the file, drawn at random; three tenths of the tokens
"""

from __future__ import annotations

import glob
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from fm9g.config.fields import did_you_mean
from fm9g.config.load import bare_name, config_folders, find_config
from fm9g.config.registry import find_dataset
from fm9g.data.dataset_files import SPLITS
from fm9g.data.prepare.columns import make_mapping
from fm9g.data.prepare.dataset_info import DATASET_INFO, DatasetInfo, dataset_info_names, read_dataset_info
from fm9g.data.prepare.decompress import STDIN
from fm9g.data.prepare.sources import DataSource, data_stem, find_sources
from fm9g.errors import UserError
from fm9g.path_kind import DATASET, MIXTURE, kind_of
from fm9g.shorthand import hub
from fm9g.shorthand.data_cache import RawData

SAMPLE_AND_SHARE = re.compile("([#:][0-9.]+)+$")  # what may follow the name in an entry
_MAX_JOINED = 8  # parts of a file name with commas
_PROBE_FOLDERS = ("", "data")  # where a bare name looks for a dataset_info.json
# What a file or folder of a repository is called after its split.
_SPLIT_NAMES = {"train": "train", "validation": "validation|valid|dev|val", "test": "test|eval"}
_HUB_OF_KEY = {"hf_hub_url": hub.HF, "ms_hub_url": hub.MS, "om_hub_url": hub.OM, "cloud_file_name": hub.WEB}


@dataclass(frozen=True)
class DataEntry:
    """An entry as it was written.

    Args:
        key: the training key, for messages.
        text: the complete entry.
        name: without sample and share.
        sample: number of records to draw; 0: all.
        share: of the tokens, relative to the other entries; None: by size.
    """

    key: str
    text: str
    name: str
    sample: int = 0
    share: float | None = None

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.key}: {self.text}: {problem}")


@dataclass(frozen=True)
class LocatedData:
    """What an entry names. One of `raw`, `dataset` and `mixture` is set.

    Args:
        task: a name for it.
        raw: files to index.
        dataset: the folder of an indexed dataset.
        mixture: a file of dataset_configs/.
        sample: number of records to draw, where the entry does not say it; 0: all.
    """

    task: str = ""
    raw: RawData | None = None
    dataset: Path | None = None
    mixture: Path | None = None
    sample: int = 0


# From text to entries


def parse_entries(text: str, key: str) -> list[DataEntry]:
    """Divides the value of `key` at commas. A file name that contains a comma, # or : and exists is taken as it is.

    Raises UserError for an empty entry, and for a sample or share that is none.
    """
    parts = text.split(",")
    entries: list[DataEntry] = []
    first = 0
    while first < len(parts):
        end = first + 1
        for longer in range(min(len(parts), first + _MAX_JOINED), end, -1):
            if _names_a_path(",".join(parts[first:longer]).strip()):
                end = longer
                break
        entry = ",".join(parts[first:end]).strip()
        if not entry:
            raise UserError(f"{key}: entry {len(entries) + 1} of {text!r} is empty; remove a comma")
        entries.append(_parse_entry(entry, key))
        first = end
    return entries


def _names_a_path(text: str) -> bool:
    return os.path.lexists(text) or os.path.lexists(SAMPLE_AND_SHARE.sub("", text))


def _parse_entry(text: str, key: str) -> DataEntry:
    entry = DataEntry(key, text, text)
    while not os.path.lexists(entry.name):
        head, mark, value = _last_suffix(entry.name)
        if not mark:
            break
        if mark == "#":
            if not (re.fullmatch("[0-9]+", value) and int(value)):
                raise entry.error(f"found #{value}, expected a number of records from 1, such as #500")
            if entry.sample:
                raise entry.error("has two samples; keep one of them")
            entry = replace(entry, name=head, sample=int(value))
            continue
        share = _parse_share(value)
        if share is None:
            if not os.path.lexists(head) and hub.parse_remote(head):
                break  # the subset of a dataset on a hub, or a part of an address
            raise entry.error(f"found :{value}, expected a share of the tokens above 0, such as :0.3")
        if entry.share is not None:
            raise entry.error("has two shares; keep one of them")
        entry = replace(entry, name=head, share=share)
    if not entry.name:
        raise entry.error("names no data before its sample or share")
    return entry


def _last_suffix(name: str) -> tuple[str, str, str]:
    """What is before and after the last # or :, and which of them it is; the marks of `hf://` and `HF::` are none."""
    start = max(name.rfind("#"), name.rfind(":"))
    head, mark, value = name[: max(start, 0)], name[start : start + 1], name[start + 1 :]
    is_prefix = mark == ":" and (value.startswith("//") or head.endswith(":"))
    return (name, "", "") if start < 0 or is_prefix else (head, mark, value)


def _parse_share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if math.isfinite(share) and share > 0 else None


# From entries to data


def locate(entry: DataEntry) -> LocatedData:
    """Finds what an entry names: a path, a glob, a mixture, a dataset of a dataset_info.json, or a download of a hub.

    Raises UserError if there is nothing of this name, with the nearest one.
    """
    if entry.name == STDIN:
        raise entry.error("stdin can be read once, by one process; index it with `fm9g data index --path -`")
    try:
        for find in (_find_path, _find_glob, _find_mixture, _find_in_dataset_info, _find_registered, _find_remote):
            if located := find(entry):
                return located
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise entry.error(f"cannot be read: {error.strerror}") from None
    raise entry.error(f"no such file, folder or name{did_you_mean(*_nearby_names(entry.name))}")


def _find_path(entry: DataEntry) -> LocatedData | None:
    name, path = entry.name, Path(entry.name)
    if not os.path.lexists(name):
        return None
    if path.name == DATASET_INFO:
        known = ", ".join(str(path.parent / known) for known in dataset_info_names(path))
        raise entry.error(f"name the datasets in it: {known}")
    kind = kind_of(path)
    if kind == MIXTURE:
        return LocatedData(mixture=path)
    absolute = Path(os.path.abspath(name))
    task = (absolute.parent if absolute.name in SPLITS else absolute).name
    if kind == DATASET:
        return LocatedData(task, dataset=absolute)
    if splits := [split for split in SPLITS if kind_of(path / split) == DATASET]:
        raise entry.error(f"contains the datasets {' and '.join(splits)}; give {path / splits[0]}")
    return LocatedData(data_stem(task), _raw_data(entry, name))


def _find_glob(entry: DataEntry) -> LocatedData | None:
    if not glob.has_magic(entry.name):
        return None
    fixed = [part for part in Path(entry.name).parts if not glob.has_magic(part)]
    return LocatedData(fixed[-1] if fixed and fixed[-1] != os.sep else "data", _raw_data(entry, entry.name))


def _raw_data(entry: DataEntry, path: str) -> RawData:
    try:
        return RawData(entry.name, (path,), tuple(find_sources([path])))
    except UserError as error:
        raise UserError(f"{entry.key}: {error.args[0]}", *error.args[1:]) from None


def _find_mixture(entry: DataEntry) -> LocatedData | None:
    path = find_config("dataset_configs", entry.name) if "/" not in entry.name else None
    return LocatedData(mixture=path) if path else None


def _find_in_dataset_info(entry: DataEntry) -> LocatedData | None:
    folder, _, name = entry.name.rpartition("/")
    files = [Path(each, DATASET_INFO) for each in ([folder] if folder else _PROBE_FOLDERS)]
    for file in filter(Path.is_file, files):
        if name in dataset_info_names(file):
            return _locate_info(entry, file, read_dataset_info(file, name), name)
    return None


def _locate_info(entry: DataEntry, file: Path, info: DatasetInfo, name: str) -> LocatedData:
    if info.path is not None:
        raw = _raw_data(entry, str(info.path))
        return LocatedData(name, replace(raw, columns=info.columns), sample=info.num_samples)
    remotes = [hub.Remote(_HUB_OF_KEY[key], text) for key, text in info.remotes.items()]
    beside = (file.parent / part for remote in remotes for part in (remote.name, remote.last_name))
    cached = (folder for remote in remotes if (folder := hub.find_download(remote, hub.DATASET)))
    found = next(filter(Path.exists, beside), None) or next(cached, None)
    if found is None:
        instead = f'write "file_name": "{{}}" in place of {", ".join(info.remotes)} in {info.where}'
        found = hub.require_download(remotes[0], hub.DATASET, instead)
    sources = _sources_of_part(found, (info.subset, info.folder), info.split or "train", info.where)
    return LocatedData(name, _downloaded(entry.name, sources, info), sample=info.num_samples)


def _find_registered(entry: DataEntry) -> LocatedData | None:
    registered = find_dataset(entry.name)
    if registered is None:
        return None
    located = locate(replace(entry, name=registered.data))
    if registered.columns and located.raw:
        columns = make_mapping(registered.columns, registered.tags, f"{entry.name}: columns", f"{entry.name}: tags")
        located = replace(located, raw=replace(located.raw, columns=columns))
    return replace(located, task=entry.name)


def _find_remote(entry: DataEntry) -> LocatedData | None:
    text, subset = entry.name, ""
    if not hub.parse_remote(text):
        text, _, subset = text.rpartition(":")
    remote = hub.parse_remote(text)
    if remote is None or (not remote.hub and (os.path.isdir(text.partition("/")[0]) or _has_suffix(text))):
        return None  # a path whose folder is here or whose name ends like a file's is misspelt, not on a hub
    folder = hub.require_download(remote, hub.DATASET, f"give --{entry.key} {{}}")
    sources = _sources_of_part(folder, (subset,), "train", f"{entry.key}: {entry.text}")
    return LocatedData(f"{remote.last_name}-{subset}" if subset else remote.last_name, _downloaded(entry.name, sources))


def _has_suffix(path: str) -> bool:
    name = os.path.basename(path)
    return data_stem(name) != name


def _downloaded(title: str, sources: list[DataSource], info: DatasetInfo | None = None) -> RawData:
    return RawData(title, tuple(source.path for source in sources), tuple(sources), info.columns if info else None)


def _sources_of_part(folder: Path, parts: tuple[str, ...], split: str, where: str) -> list[DataSource]:
    """The files of a subset or folder, and of a split, of a downloaded repository.

    Without names of splits all files are of the split train.
    """
    for part in parts:
        if part in ("", "default"):  # what a hub calls all files of a repository without subsets
            continue
        if not (folder / part).is_dir():
            names = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir())) or "none"
            raise UserError(f"{where}: {folder} has no folder {part!r}; its folders: {names}")
        folder /= part
    sources = find_sources([str(folder)])
    by_split = {
        name: [source for source in sources if _is_of_split(os.path.relpath(source.path, folder), words)]
        for name, words in _SPLIT_NAMES.items()
    }
    found = {name: files for name, files in by_split.items() if files} or {"train": sources}
    if split not in found:
        raise UserError(f"{where}: {folder} has no files of the split {split!r}; it has {', '.join(found)}")
    return found[split]


def _is_of_split(path: str, words: str) -> bool:
    return bool(re.search(rf"(?<![a-z])({words})(?![a-z])", path.lower()))


def _nearby_names(name: str) -> tuple[str, list[str]]:
    """A word and the names that it may be meant to be: in its folder, of a dataset_info.json, of mixtures."""
    folder, _, last = name.rpartition("/")
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    for each in [folder] if folder else _PROBE_FOLDERS:
        if Path(each, DATASET_INFO).is_file():
            names += dataset_info_names(Path(each, DATASET_INFO))
    if not folder:
        names += [bare_name(file.name) for place in config_folders("dataset_configs") for file in place.glob("*.json")]
        return last, names
    return name, [f"{folder}/{known}" for known in names]
