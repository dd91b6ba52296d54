"""LLaMA-Factory's dataset_info.json: a name for each dataset, with its file or hub, its columns and its sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fm9g.data.prepare.column_mapping import ColumnMapping, parse_mapping
from fm9g.data.prepare.columns import check_names, make_mapping
from fm9g.errors import UserError
from fm9g.io.json_file import read_object

DATASET_INFO = "dataset_info.json"
_HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url")  # in the order of preference
_REMOTE_KEYS = (*_HUB_KEYS, "cloud_file_name")
_PART_KEYS = ("subset", "split", "folder")  # of a repository on a hub
_KEYS = ("file_name", *_REMOTE_KEYS, "script_url", *_PART_KEYS, "formatting", "ranking", "columns", "tags")


@dataclass(frozen=True)
class DatasetInfo:
    """An entry of a dataset_info.json.

    Args:
        where: the file and the name of the entry, for messages.
        path: of its file or folder; None: it is on a hub or in a cloud.
        remotes: hf_hub_url, ms_hub_url, om_hub_url or cloud_file_name -> the name or address there.
        subset, split, folder: the part of a repository on a hub that is meant; empty: not given.
        num_samples: number of records to draw; 0: all.
    """

    where: str
    path: Path | None
    remotes: dict[str, str]
    columns: ColumnMapping
    subset: str = ""
    split: str = ""
    folder: str = ""
    num_samples: int = 0


def dataset_info_names(path: Path) -> list[str]:
    """The names of the datasets in a dataset_info.json. Raises UserError if it is not readable."""
    return list(read_object(path))


def read_dataset_info(path: Path, name: str) -> DatasetInfo:
    """Reads the entry `name` of a dataset_info.json.

    Defaults are LLaMA-Factory's: the columns are instruction, input and output, or conversations unless the formatting
    is alpaca; a prompt without other columns is plain text.

    Raises UserError with the file and the key.
    """
    content = read_object(path)
    check_names({name: None}, content, f"{path}: datasets")
    entry, where = content[name], f"{path}: {name}"
    check_names(entry, (*_KEYS, "num_samples"), where)
    if "script_url" in entry:
        raise UserError(
            f"{where}: script_url: a script that loads data is code, which fm9g does not run; save its records as a "
            ".jsonl file, and name that with file_name in place of script_url"
        )
    texts = {key: entry[key] for key in ("file_name", *_REMOTE_KEYS, *_PART_KEYS) if entry.get(key) is not None}
    for key, value in texts.items():
        if not (isinstance(value, str) and value):
            raise UserError(f"{where}: {key}: found {value!r}, expected a string that is not empty")
    remotes = {key: texts[key] for key in _REMOTE_KEYS if key in texts}
    columns = _columns(entry, where)
    samples, file = entry.get("num_samples"), texts.get("file_name", "")
    if not (samples is None or (type(samples) is int and samples > 0)):
        raise UserError(f"{where}: num_samples: found {samples!r}, expected an integer from 1")
    if not (remotes or (file and (path.parent / file).exists())):
        raise UserError(
            f"{where}: file_name: found {entry.get('file_name')!r}, expected a file or folder in {path.parent}"
        )
    parts = {key: texts.get(key, "") for key in _PART_KEYS}
    if not remotes and (given := [key for key, part in parts.items() if part and (key, part) != ("split", "train")]):
        raise UserError(f"{where}: {given[0]}: selects a part of a dataset on a hub; name that part with file_name")
    return DatasetInfo(
        where, None if remotes else path.parent / file, remotes, columns, **parts, num_samples=samples or 0
    )


def _columns(entry: dict[str, Any], where: str) -> ColumnMapping:
    formatting, ranking = entry.get("formatting", "alpaca"), entry.get("ranking", False)
    default = "prompt=instruction query=input response=output" if formatting == "alpaca" else "messages=conversations"
    names = entry.get("columns", parse_mapping(default))
    if isinstance(names, dict) and names.keys() == {"prompt"}:
        names = {"text": names["prompt"]}
    columns = make_mapping(names, entry.get("tags", {}), f"{where}: columns", f"{where}: tags")
    formats = ("sharegpt", "openai") if "messages" in columns.names else ("alpaca",)
    for key, is_valid, expected in (
        ("formatting", formatting in formats, f"{' or '.join(formats)} with these columns"),
        ("ranking", ranking is ("chosen" in columns.names), "true with the columns chosen and rejected, else false"),
    ):
        if not is_valid:
            raise UserError(f"{where}: {key}: found {entry.get(key)!r}, expected {expected}")
    return columns
