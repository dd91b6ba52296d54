"""Marks of what is trained on, in the spellings of other tools, as weights: 0 is not trained on, 1 is the usual.

A mark stands on a record, on a turn (or in a list beside the turns, one value a turn), or on a part of a turn's
content. Marks of one place say the same; those of different places multiply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from fm9g.data.prepare.values import BadRecord, is_blank

Number = int | float
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6  # weights but 0; beyond them a loss in fp32 is lost, or loses all others
CONTENT_WEIGHTS = "content_weights"

LOSS_KEYS = frozenset(
    "train trainable training train_on_turn loss loss_mask weight loss_weight loss_scale mask".split()  # noqa: SIM905
)
INVERTED_KEY = "mask"  # true where the others say false
_LOOKS_LIKE_LOSS_KEY = re.compile(r"(^|_)(train|trainable|trained|training|loss|mask|masked|weight)s?(_|$)")
_WORD_BORDER = re.compile(r"(?<=[a-z])(?=[A-Z])|-")  # lossMask, loss-mask
# Columns of these names hold text of their own in many datasets.
_AMBIGUOUS_KEYS = ("weight", "loss", "mask")


def reject_unknown_loss_key(key: str, where: str) -> None:
    """Raises BadRecord for a key that looks like a mark and is none: what it marks would be trained on in silence."""
    if _LOOKS_LIKE_LOSS_KEY.search(_WORD_BORDER.sub("_", str(key)).lower()):
        raise BadRecord(
            f"{where}{key}: looks like a mark of what is trained on, in a spelling that is not known; remove it, or "
            "call it weight, with a number from 0"
        )


@lru_cache(maxsize=1024)  # a dataset has few sets of keys
def _loss_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if key in LOSS_KEYS)


def record_loss_keys(record: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The marks of a record. names: its keys that are something else, as in ColumnMapping."""
    return {
        key: value
        for key in _loss_keys(tuple(record))
        if not is_blank(value := record[key])
        and key not in names.values()
        and not (key in _AMBIGUOUS_KEYS and isinstance(value, str))
        # Without turns, such a number is what a filter has measured.
        and not (key == "loss" and "messages" not in names and isinstance(value, float) and value not in (0, 1))
    }


def combine_weights(loss_keys: dict[str, Any], where: str = "") -> Number:
    """The weight that marks of one place give; 1 for none. where: stands before the key in a message."""
    weight: Number = 1
    chosen, is_number = "", False
    for key, value in loss_keys.items():
        if value is None:
            continue
        other, other_is_number = _weight(key, value, where)
        agrees = other == weight if is_number and other_is_number else bool(other) == bool(weight)
        if chosen and not agrees:
            raise BadRecord(f"{where}{key}: {value!r} contradicts {chosen}: {loss_keys[chosen]!r}; keep one of them")
        if not chosen or other_is_number:  # true only says that a weight is not 0
            chosen, weight, is_number = key, other, other_is_number
    return weight


def _weight(key: str, value: Any, where: str) -> tuple[Number, bool]:
    """The weight that one mark gives, and whether it is a number."""
    if isinstance(value, bool) or (key == INVERTED_KEY and value in (0, 1)):
        return int(bool(value) != (key == INVERTED_KEY)), False
    if key == INVERTED_KEY or not is_weight(value):
        shown = f"{value!r:.40}" if isinstance(value, (int, float, str)) else type(value).__name__
        expected = "true or false" if key == INVERTED_KEY else "a number from 0, or true or false"
        if key != INVERTED_KEY and isinstance(value, (int, float)) and 0 < value < math.inf:
            expected = f"0, or a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
        raise BadRecord(f"{where}{key}: found {shown}, expected {expected}")
    return value, True


def is_weight(value: Any) -> bool:
    """Whether a value is 0, or a number that the loss can be multiplied by."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value == 0 or MIN_WEIGHT <= value <= MAX_WEIGHT


def per_turn_weights(loss_keys: dict[str, Any], turns: Sequence[dict[str, Any]]) -> list[Number]:
    """The weight that the marks of a record give each of its turns: lists beside them, and values for all of them."""
    lists = {key: value for key, value in loss_keys.items() if isinstance(value, list)}
    for key, values in lists.items():
        if len(values) != len(turns):
            raise BadRecord(f"{key}: found {len(values)} values beside {len(turns)} turns, expected one a turn")
    common = combine_weights({key: value for key, value in loss_keys.items() if key not in lists})
    weights = []
    for number, turn in enumerate(turns):
        own = {key: values[number] for key, values in lists.items()} if turn["role"] == "assistant" else {}
        try:
            weights.append(common * combine_weights(own))
        except BadRecord as error:
            raise BadRecord(f"turn {number} of {error}") from None
    return weights


def scale_weights(turns: Sequence[dict[str, Any]], weights: Iterable[Number]) -> list[dict[str, Any]]:
    """Canonical turns with the assistant's weights multiplied by these."""
    result = []
    for number, (turn, weight) in enumerate(zip(turns, weights)):
        if turn["role"] == "assistant" and weight != 1:
            kept = {key: value for key, value in turn.items() if key not in ("weight", CONTENT_WEIGHTS)}
            try:
                turn = kept | weight_fields(weight * turn.get("weight", 1), turn.get(CONTENT_WEIGHTS, ()))
            except BadRecord as error:
                raise BadRecord(f"turn {number}{error}") from None
        result.append(turn)
    return result


def weight_fields(weight: Number, parts: Iterable[Sequence[Number]] = ()) -> dict[str, Any]:
    """What a canonical turn says of its weights: `weight` or, where its parts differ, `content_weights`; nothing for 1.

    weight: of the turn. parts: (number of characters, weight) of its content, one after the other. Raises BadRecord
    where a product of weights is too large.
    """
    merged: list[list[Number]] = []
    for count, part in parts:
        part *= weight
        if merged and merged[-1][1] == part:
            merged[-1][0] += count
        elif count:
            merged.append([count, part])
    weight = merged[0][1] if merged else weight
    if not all(map(is_weight, (weight, *(part for _, part in merged)))):
        raise BadRecord(f": its weights multiply to what is not 0, nor from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    if len(merged) > 1:
        return {CONTENT_WEIGHTS: merged}
    return {"weight": weight} if weight != 1 else {}


def check_content_weights(value: Any, length: int) -> list[Sequence[Number]]:
    """The parts that a turn's `content_weights` name. Raises BadRecord unless they cover its content."""
    good = isinstance(value, list) and all(
        isinstance(part, (list, tuple))
        and len(part) == 2
        and type(part[0]) is int
        and part[0] >= 0
        and is_weight(part[1])
        for part in value
    )
    if not good or sum(count for count, _ in value) != length:
        raise BadRecord(
            f".{CONTENT_WEIGHTS}: expected [[number of characters, weight], ...] over the {length} characters of the "
            "content"
        )
    return value
