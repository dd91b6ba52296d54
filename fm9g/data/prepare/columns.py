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
    return make_mapping(names, {}, "--columns")


def columns_from_file(path: Path) -> ColumnMapping:
    """Reads a mapping: {"columns": {"prompt": "question", ...}, "tags": {...}}, or only the inner object of columns.

    Raises UserError with the file and the key.
    """
    content = read_object(path)
    if not isinstance(content.get("columns"), dict):
        return make_mapping(content, {}, f"{path}")
    check_names(content, ("columns", "tags"), f"{path}")
    return make_mapping(content["columns"], content.get("tags", {}), f"{path}: columns", f"{path}: tags")


def make_mapping(given: Any, tags: Any, where: str, where_tags: str = "") -> ColumnMapping:
    """Checks a mapping that a user wrote. where, where_tags: what messages call `given` and `tags`."""
    check_names(given, (*COLUMN_NAMES, *_ALIASES), where, texts=True)
    check_names(tags, (*ROLE_TAGS, "role_tag", "content_tag"), where_tags, texts=True)
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


def check_names(value: Any, known: Iterable[str], where: str, texts: bool = False) -> None:
    """Raises UserError unless `value` is an object of known keys and, with `texts`, of non-empty strings."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {value!r}, expected an object")
    for key, item in value.items():
        if key not in known:
            hint = "; fm9g trains on text only" if key in _MEDIA_KEYS else did_you_mean(key, [*known])
            raise UserError(f"{where}: unknown name {key!r}{hint} (known: {', '.join(known)})")
        if texts and not (isinstance(item, str) and item):
            raise UserError(f"{where}: {key}: found {item!r}, expected a string that is not empty")
