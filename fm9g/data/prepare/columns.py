"""Column mappings that users write: on the command line, in a JSON file, or in a dataset_info.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fm9g.config.fields import did_you_mean
from fm9g.data.prepare.column_mapping import COLUMN_NAMES, ROLE_TAGS, ColumnMapping, ColumnNames, parse_mapping
from fm9g.data.prepare.record_formats import RECORD_FORMATS
from fm9g.errors import UserError
from fm9g.io.json_file import read_object

_ALIASES = parse_mapping("instruction=prompt input=prompt output=response conversations=messages kto_tag=label")
_MEDIA_KEYS = ("images", "videos", "audios")


def columns_from_text(text: str) -> ColumnMapping:
    """Parses the mapping of `--columns prompt=question,response=answer`. Raises UserError."""
    names: ColumnNames = {}
    for item in text.split(","):
        name, _, key = (part.strip() for part in item.partition("="))
        if not (name and key) or name in names:
            problem = "names a column twice" if name in names else "is not NAME=KEY"
            raise UserError(
                f"--columns: {item.strip()!r} {problem}; write, for example, prompt=question,response=answer"
            )
        names[name] = key
    return _make_mapping(names, {}, "--columns")


def columns_from_file(path: Path) -> ColumnMapping:
    """Reads a mapping: {"columns": {"prompt": "question", ...}, "tags": {...}}, or only the inner object of columns.

    Raises UserError with the file and the key.
    """
    content = read_object(path)
    if not isinstance(content.get("columns"), dict):
        return _make_mapping(content, {}, f"{path}")
    _check_names(content, ("columns", "tags"), f"{path}")
    return _make_mapping(content["columns"], content.get("tags", {}), f"{path}: columns", f"{path}: tags")


def dataset_info_entry(path: Path, name: str) -> tuple[Path, ColumnMapping, int | None]:
    """Reads the entry `name` of LLaMA-Factory's dataset_info.json.

    Defaults are LLaMA-Factory's: the columns are instruction, input and output, or conversations unless the formatting
    is alpaca; a prompt without other columns is plain text.

    Returns the file or folder, its columns, and num_samples. Raises UserError with the file and the key.
    """
    content = read_object(path)
    _check_names({name: None}, content, f"{path}: datasets")
    entry, where = content[name], f"{path}: {name}"
    hubs = [key for key in entry if key.endswith("_url") or key == "cloud_file_name"] if isinstance(entry, dict) else []
    if hubs:
        raise UserError(f"{where}: {hubs[0]}: download the data first, then name its file or folder with file_name")
    _check_names(entry, ("file_name", "formatting", "ranking", "columns", "tags", "num_samples"), where)
    file, formatting = entry.get("file_name"), entry.get("formatting", "alpaca")
    ranking, samples = entry.get("ranking", False), entry.get("num_samples")
    default = "prompt=instruction query=input response=output" if formatting == "alpaca" else "messages=conversations"
    names = entry.get("columns", parse_mapping(default))
    if isinstance(names, dict) and names.keys() == {"prompt"}:
        names = {"text": names["prompt"]}
    columns = _make_mapping(names, entry.get("tags", {}), f"{where}: columns", f"{where}: tags")
    formats = ("sharegpt", "openai") if "messages" in columns.names else ("alpaca",)
    for key, is_valid, expected in (
        ("file_name", isinstance(file, str) and (path.parent / file).exists(), f"a file or folder in {path.parent}"),
        ("formatting", formatting in formats, f"{' or '.join(formats)} with these columns"),
        ("ranking", ranking is ("chosen" in columns.names), "true with the columns chosen and rejected, else false"),
        ("num_samples", samples is None or (type(samples) is int and samples > 0), "an integer from 1"),
    ):
        if not is_valid:
            raise UserError(f"{where}: {key}: found {entry.get(key)!r}, expected {expected}")
    return path.parent / str(file), columns, samples


def _make_mapping(given: Any, tags: Any, where: str, where_tags: str = "") -> ColumnMapping:
    """Checks a mapping that a user wrote. where, where_tags: what messages call `given` and `tags`."""
    _check_names(given, (*COLUMN_NAMES, *_ALIASES), where, texts=True)
    _check_names(tags, (*ROLE_TAGS, "role_tag", "content_tag"), where_tags, texts=True)
    names: ColumnNames = {}
    for word, key in given.items():
        name = _ALIASES.get(word, word)
        if name in names:
            raise UserError(f"{where}: {word} is another word for {name}, which is given too; keep one of them")
        names[name] = key
    for _, needed, optional in RECORD_FORMATS:
        if parse_mapping(needed).keys() <= names.keys() <= parse_mapping(f"{needed} {optional}").keys():
            return ColumnMapping(names, tags)
    raise UserError(
        f"{where}: {', '.join(names) or 'no column'} is not enough for a record; name text, or messages, or prompt and "
        "response, or chosen and rejected with messages or prompt; query, system, history, tools, label are optional"
    )


def _check_names(value: Any, known: Iterable[str], where: str, texts: bool = False) -> None:
    """Raises UserError unless `value` is an object of known keys and, with `texts`, of non-empty strings."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {value!r}, expected an object")
    for key, item in value.items():
        if key not in known:
            hint = "; fm9g trains on text only" if key in _MEDIA_KEYS else did_you_mean(key, [*known])
            raise UserError(f"{where}: unknown name {key!r}{hint} (known: {', '.join(known)})")
        if texts and not (isinstance(item, str) and item):
            raise UserError(f"{where}: {key}: found {item!r}, expected a string that is not empty")
