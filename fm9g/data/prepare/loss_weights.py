"""Loss weights of records, turns and parts of turns, from the keys of other tools: 0 is not trained on, 1 is usual.

A loss key belongs to a record, to a turn (or is a list beside the turns, with a value per turn), or to a part of a
turn's content. Loss keys of the same object must agree; the weights of record, turn and part multiply.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from fm9g.data.prepare.values import BadRecord, is_blank

Number = int | float
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6  # except 0; beyond them an fp32 sum loses this loss, or all others
CONTENT_WEIGHTS = "content_weights"

LOSS_KEYS = frozenset(
    "train trainable training train_on_turn loss loss_mask weight loss_weight loss_scale mask".split()  # noqa: SIM905
)
INVERTED_KEY = "mask"  # true means not trained on
_LOOKS_LIKE_LOSS_KEY = re.compile(r"(^|_)(train|trainable|trained|training|loss|mask|masked|weight)s?(_|$)")
_WORD_BORDER = re.compile(r"(?<=[a-z])(?=[A-Z])|-")  # lossMask, loss-mask
# In many datasets, columns of these names hold text that is not a loss weight.
_AMBIGUOUS_KEYS = ("weight", "loss", "mask")


def reject_unknown_loss_key(key: str, where: str) -> None:
    """Raises BadRecord for a key that looks like an unknown loss key: to ignore it would train on masked text."""
    if _LOOKS_LIKE_LOSS_KEY.search(_WORD_BORDER.sub("_", str(key)).lower()):
        raise BadRecord(
            f"{where}{key}: looks like a loss weight or mask under an unknown name; remove it, or rename it to weight, "
            "with a number from 0"
        )


@lru_cache(maxsize=1024)  # a dataset has few sets of keys
def _loss_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if key in LOSS_KEYS)


def record_loss_keys(record: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The loss keys of a record and their values. names: as in ColumnMapping, keys with another meaning."""
    return {
        key: value
        for key in _loss_keys(tuple(record))
        if not is_blank(value := record[key])
        and key not in names.values()
        and not (key in _AMBIGUOUS_KEYS and isinstance(value, str))
        # Without turns, such a number is a measurement of a data filter.
        and not (key == "loss" and "messages" not in names and isinstance(value, float) and value not in (0, 1))
    }


def combine_weights(loss_keys: dict[str, Any], where: str = "") -> Number:
    """The weight of the loss keys of one object; 1 for none. where: prefix of the key in messages."""
    weight: Number = 1
    chosen, is_number = "", False
    for key, value in loss_keys.items():
        if value is None:
            continue
        other, other_is_number = _weight(key, value, where)
        agrees = other == weight if is_number and other_is_number else bool(other) == bool(weight)
        if chosen and not agrees:
            raise BadRecord(f"{where}{key}: {value!r} contradicts {chosen}: {loss_keys[chosen]!r}; keep one of them")
        if not chosen or other_is_number:  # true means any weight but 0
            chosen, weight, is_number = key, other, other_is_number
    return weight


def _weight(key: str, value: Any, where: str) -> tuple[Number, bool]:
    """The weight of one loss key, and whether its value is a number."""
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
    """Whether a value is 0 or a number within the limits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value == 0 or MIN_WEIGHT <= value <= MAX_WEIGHT


def per_turn_weights(loss_keys: dict[str, Any], turns: Sequence[dict[str, Any]]) -> list[Number]:
    """The weight of each turn by the loss keys of the record: lists with a value per turn, and values for all turns."""
    lists = {key: value for key, value in loss_keys.items() if isinstance(value, list)}
    for key, values in lists.items():
        if len(values) != len(turns):
            raise BadRecord(f"{key}: found {len(values)} values beside {len(turns)} turns, expected one per turn")
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
    """Multiplies the weights of the assistant's canonical turns."""
    result = []
    for number, (turn, weight) in enumerate(zip(turns, weights)):
        if turn["role"] == "assistant" and weight != 1:
            unweighted = {key: value for key, value in turn.items() if key not in ("weight", CONTENT_WEIGHTS)}
            try:
                turn = unweighted | weight_fields(weight * turn.get("weight", 1), turn.get(CONTENT_WEIGHTS, ()))
            except BadRecord as error:
                raise BadRecord(f"turn {number}{error}") from None
        result.append(turn)
    return result


def weight_fields(weight: Number, parts: Iterable[Sequence[Number]] = ()) -> dict[str, Any]:
    """The weight keys of a canonical turn: `weight`, or `content_weights` if its parts differ; none for weight 1.

    Args:
        weight: of the turn.
        parts: (number of characters, weight) of consecutive parts of its content.

    Raises BadRecord if a product of weights is too large or too small.
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
        raise BadRecord(f": the product of its weights is neither 0 nor from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}")
    if len(merged) > 1:
        return {CONTENT_WEIGHTS: merged}
    return {"weight": weight} if weight != 1 else {}


def check_content_weights(value: Any, length: int) -> list[Sequence[Number]]:
    """Checks `content_weights` of a turn with `length` characters. Raises BadRecord unless they cover the content."""
    is_valid = isinstance(value, list) and all(
        isinstance(part, (list, tuple))
        and len(part) == 2
        and type(part[0]) is int
        and part[0] >= 0
        and is_weight(part[1])
        for part in value
    )
    if not is_valid or sum(count for count, _ in value) != length:
        raise BadRecord(
            f".{CONTENT_WEIGHTS}: expected [[number of characters, weight], ...] over the {length} characters of the "
            "content"
        )
    parts: list[Sequence[Number]] = value
    return parts
