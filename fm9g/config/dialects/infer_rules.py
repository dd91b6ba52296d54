"""Rules: options of generate, chat and serve, from inference arguments of other tools. All dialects share them."""

from __future__ import annotations

from typing import Any

from fm9g.config.dialects import conversions
from fm9g.config.dialects.table import Given, Keys


def number(value: Any) -> float:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("expected a number")
    return float(value)


def whole(value: Any) -> int:
    """A whole number."""
    if number(value) != int(value):
        raise ValueError("expected a whole number")
    return int(value)


def texts(value: Any) -> tuple[str, ...]:
    """Several texts: a list, or one text."""
    return tuple(map(str, value if isinstance(value, list) else [value]))


def name(value: Any) -> str:
    """A name, which may look like a number."""
    return str(value)


def number_or_all(value: Any) -> int:
    """A number of records from 1; a negative one, which is 0 here, means all."""
    count = whole(value)
    if count == 0:
        raise ValueError("expected a number from 1, or -1 for all records")
    return max(0, count)


def sampling(given: Given) -> Keys:
    """temperature, top_k and top_p. do_sample false, or temperature 0, takes the likeliest token each time."""
    temperature = given.number("temperature")
    if temperature == 0 or ("do_sample" in given.values and not given.flag("do_sample")):
        return {"temperature": 0.0}
    keys: Keys = {"temperature": temperature, "top_k": given.number("top_k"), "top_p": given.number("top_p")}
    keys = {key: value for key, value in keys.items() if value is not None}
    return keys | ({"top_k": max(0, int(keys["top_k"]))} if "top_k" in keys else {})  # -1: all, as 0


def bits(given: Given) -> Keys:
    """The number of bits that weights are opened in: nf4 for 4, int8 for 8."""
    found = next((name for name in ("quantization_bit", "quant_bits") if given[name] not in (None, "none", 0)), "")
    if not found:
        return {"quantization": "nf4"} if given.flag("load_in_4bit") else {}
    if given[found] not in (4, 8):
        raise given.error(found, f"found {given[found]!r}, expected 4 or 8")
    form = given.first("bnb_4bit_quant_type", "quantization_type").lower() or "nf4"
    if given[found] == 4 and form != "nf4":
        raise given.error(found, f"a model is opened in nf4, not in {form}; leave out the type")
    return {"quantization": "nf4" if given[found] == 4 else "int8"}


def dtype(value: Any) -> str:
    """The number format of a model, or auto."""
    return "auto" if str(value).lower() == "auto" else conversions.dtype(value)
