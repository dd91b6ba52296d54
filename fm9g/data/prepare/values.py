"""The values that records consist of: parsed from JSON text, compared, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 200  # levels of objects and lists in a stored record; orjson writes up to 254
TOO_DEEP = "JSON that is nested too deeply"
NUL_FOUND = "holds a NUL byte; is this text in UTF-8?"
_MAX_DIGITS = 4000  # of an integer; Python parses up to 4300


class BadRecord(ValueError):  # noqa: N818
    """Why a record cannot be used, in words for the user: `output: found int, expected a string`."""

    def __init__(self, problem: str, content: str = "") -> None:
        """content: the text of the record, if whoever catches this does not have it."""
        super().__init__(problem)
        self.content = content


LocatedRecord = tuple[str, "dict[str, Any] | BadRecord"]  # its location ("row 7"), and the record


def wrong_type(where: str, value: Any, expected: str) -> BadRecord:
    return BadRecord(f"{where}: found {'nothing' if value is None else type(value).__name__}, expected {expected}")


def found_keys(keys: Iterable[str]) -> str:
    return f"found the keys {', '.join(keys)}" if keys else "found no keys"


def reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def parse_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else reject_constant(text[:_MAX_DIGITS])


def parse_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


# Not orjson, which parses large integers as floats.
STRICT_JSON = json.JSONDecoder(parse_constant=reject_constant, parse_float=parse_float, parse_int=parse_integer)


def decode_json(text: str, where: str) -> Any:
    """The value of a JSON text. where: the key that holds it, for messages. Raises BadRecord."""
    try:
        return STRICT_JSON.decode(text)
    except RecursionError:
        raise BadRecord(f"{where}: {TOO_DEEP}: {text!r:.80}") from None
    except ValueError as error:
        reason = "" if isinstance(error, json.JSONDecodeError) else f"{error}: "
        raise BadRecord(f"{where}: not JSON: {reason}{text!r:.80}") from None


def parse_object_text(value: Any) -> Any:
    """The object that a text holds as JSON; any other value is returned unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return STRICT_JSON.decode(value)
        except (ValueError, RecursionError):
            pass
    return value


def is_blank(value: Any) -> bool:
    """Whether a value is null, or a text without a visible character."""
    return value is None or (isinstance(value, str) and not value.strip())


def json_equal(a: Any, b: Any) -> bool:
    """Whether two values are the same JSON. To Python True equals 1, so the types are compared as well."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        if len(a) != len(b):
            return False
        for key, value in a.items():
            if key not in b or (value is not b[key] and not json_equal(value, b[key])):
                return False
        return True
    if isinstance(a, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    return bool(a == b)


def check_storable(value: Any, levels: int = MAX_DEPTH) -> None:
    """Raises BadRecord for a number that is not finite, and for more than `levels` levels of objects and lists."""
    if isinstance(value, (dict, list, tuple)):
        if not levels:
            raise BadRecord(f"{TOO_DEEP}: more than {MAX_DEPTH} levels")
        for item in value.values() if isinstance(value, dict) else value:
            check_storable(item, levels - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRecord("holds a number that is not finite, which JSON does not allow")
