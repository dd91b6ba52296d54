"""The values that records are made of: read from text that is JSON, compared, and what is wrong with one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

DEEPEST = 200  # levels of objects and lists in what is stored; orjson writes up to 254
TOO_DEEP = "JSON that is nested too deeply"
_DIGITS = 4000  # of an integer; Python reads up to 4300


class BadRecord(ValueError):  # noqa: N818
    """Why a record cannot be used, in words for the user: `output: found int, expected a string`.

    content: the record, where it is not at hand.
    """

    content: str = ""


def wrong(where: str, value: Any, expected: str) -> BadRecord:
    return BadRecord(f"{where}: found {'nothing' if value is None else type(value).__name__}, expected {expected}")


def found(keys: Iterable[str]) -> str:
    return f"found the keys {', '.join(keys)}" if keys else "found no keys"


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def read_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else refuse_constant(text[:_DIGITS])


def read_integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


# Not orjson, which takes large integers for floats.
JSON = json.JSONDecoder(parse_constant=refuse_constant, parse_float=read_float, parse_int=read_integer)


def decoded(text: str, where: str) -> Any:
    """The value of a text that is to be JSON; where: what the message of BadRecord calls it."""
    try:
        return JSON.decode(text)
    except RecursionError:
        raise BadRecord(f"{where}: {TOO_DEEP}: {text!r:.80}") from None
    except ValueError as error:
        reason = "" if isinstance(error, json.JSONDecodeError) else f"{error}: "
        raise BadRecord(f"{where}: not JSON: {reason}{text!r:.80}") from None


def as_object(value: Any) -> Any:
    """The object that a text holds as JSON; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return JSON.decode(value)
        except (ValueError, RecursionError):
            pass
    return value


def is_blank(value: Any) -> bool:
    """Whether a value says nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def same(a: Any, b: Any) -> bool:
    """Whether two values are one as JSON. To Python True equals 1, so the types are compared as well."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        if len(a) != len(b):
            return False
        for key, value in a.items():  # noqa: SIM110 (a loop costs less, and this is asked of every record)
            if key not in b or (value is not b[key] and not same(value, b[key])):
                return False
        return True
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_storable(value: Any, levels: int = DEEPEST) -> None:
    """Raises BadRecord for a number that is not finite, and for more than `levels` levels of objects and lists."""
    if isinstance(value, (dict, list, tuple)):
        if not levels:
            raise BadRecord(f"{TOO_DEEP}: more than {DEEPEST} levels")
        for item in value.values() if isinstance(value, dict) else value:
            check_storable(item, levels - 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRecord("holds a number that is not finite, which is not JSON")
