"""Turns of a conversation of OpenAI, ShareGPT and others in canonical form."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from fm9g.config.fields import did_you_mean
from fm9g.data.prepare.column_mapping import OPENAI_KEYS, SHAREGPT_KEYS, ColumnMapping
from fm9g.data.prepare.loss_weights import (
    CONTENT_WEIGHTS,
    LOSS_KEYS,
    Number,
    check_content_weights,
    combine_weights,
    reject_unknown_loss_key,
    weight_fields,
)
from fm9g.data.prepare.tools import read_call_text, read_calls
from fm9g.data.prepare.values import (
    BadRecord,
    decode_json,
    found_keys,
    is_blank,
    json_equal,
    parse_object_text,
    wrong_type,
)

Turn = dict[str, Any]

FUNCTION_CALL = "function_call"  # ShareGPT's role of an assistant's turn whose content is the JSON of its calls
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Types of the parts of a content, and the keys of their texts.
_PART_TEXT_KEYS = {"text": ("text",), "thinking": ("thinking",), "reasoning": ("reasoning", "text")}


class TurnContext(NamedTuple):
    """How the turns of a record are read.

    Args:
        use_weights: read loss weights.
        dropped_keys: receives the keys that are left out.
    """

    columns: ColumnMapping
    use_weights: bool
    dropped_keys: list[str]


def parse_turns(value: Any, key: str) -> list[Any]:
    """The turns of a conversation.

    Args:
        value: a list of turns, an object with a list per key of the turns, or JSON text of either.
        key: of the conversation in its record.

    Raises BadRecord.
    """
    given = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = decode_json(value, key)
    if isinstance(value, dict) and (lists := {name: item for name, item in value.items() if item is not None}):
        if not all(isinstance(item, list) for item in lists.values()):
            raise wrong_type(key, given, "a list of turns")
        if len({len(item) for item in lists.values()}) > 1:
            counts = ", ".join(f"{len(item)} of {name}" for name, item in lists.items())
            raise BadRecord(f"{key}: found {counts}, expected the same number of each, one per turn")
        value = [dict(zip(lists, items)) for items in zip(*lists.values())]
    if not isinstance(value, list):
        raise wrong_type(key, given, "a list of turns")
    return value


def find_turns(value: Any) -> list[Any] | None:
    """The turns of a list, or of its JSON text; None if the value is not a conversation."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            turns: list[Any] = decode_json(value, "")
        except BadRecord:
            return None  # a text that starts with a bracket
        keys = (set(OPENAI_KEYS), set(SHAREGPT_KEYS))
        if turns and all(isinstance(turn, dict) and any(pair <= turn.keys() for pair in keys) for turn in turns):
            return turns
    return value if isinstance(value, list) else None


def is_sharegpt(message: Any) -> bool:
    return "from" in parse_object_text(message)


def canonical_turns(messages: list[Any], key: str, context: TurnContext) -> list[Turn]:
    """Canonical turns; `messages` itself if it is canonical. key: of the conversation. Raises BadRecord."""
    turns: list[Turn] = []
    plain = () if context.columns.tags else ("system", "user", "assistant", "tool")
    try:
        for message in messages:
            is_canonical = (  # a shortcut for most turns
                isinstance(message, dict)
                and len(message) == 2
                and message.get("role") in plain
                and isinstance(message.get("content"), str)
            )
            turns.append(message if is_canonical else canonical_turn(message, context))
    except BadRecord as error:
        raise BadRecord(f"{key}[{len(turns)}]{error}") from None
    if not turns:
        raise BadRecord(f"{key}: the conversation is empty")
    return messages if all(map(operator.is_, turns, messages)) else turns


def canonical_turn(message: Any, context: TurnContext) -> Turn:
    """A turn in canonical form; the same object if it is canonical.

    Raises BadRecord with a text that starts with the location in the message, for example `.content`.
    """
    message = parse_object_text(message)
    if not isinstance(message, dict):
        raise wrong_type("", message, "an object")
    columns = context.columns
    role_key, content_key = columns.turn_keys or (SHAREGPT_KEYS if "from" in message else OPENAI_KEYS)
    spelling, content = message.get(role_key), message.get(content_key)
    if not isinstance(spelling, str):
        raise wrong_type(f".{role_key}", spelling, "a string")
    role = columns.roles.get(spelling)
    if role is None:
        known = list(columns.roles)
        raise BadRecord(
            f".{role_key}: unknown role {spelling!r}{did_you_mean(spelling, known)} (known: {', '.join(known)})"
        )
    if role != FUNCTION_CALL and len(message) == 2 and isinstance(content, str):  # most turns
        return {"role": role, "content": content}
    other_keys = {k: value for k, value in message.items() if value is not None and k not in (role_key, content_key)}
    turn = _make_turn(role, content, f".{content_key}", other_keys, context)
    for key, value in other_keys.items():  # _make_turn has removed those that it used
        if is_blank(value):
            continue
        if context.use_weights:
            reject_unknown_loss_key(key, ".")
        context.dropped_keys.append(f"turn.{key}")
    return message if json_equal(message, turn) else turn


def _make_turn(role: str, content: Any, where: str, other_keys: dict[str, Any], context: TurnContext) -> Turn:
    """Builds a turn.

    Args:
        where: the key of the content, for messages.
        other_keys: the other keys of the message; those that are used are removed.
    """
    parsed = _Content("", "", [])
    if role == FUNCTION_CALL:
        text, calls = _parse_call_content(content, where, context)
        role = "assistant"
    else:
        calls = _pop_calls(role, other_keys, context)
        parsed = _parse_content(content, where, role, context) if isinstance(content, list) else parsed
        text = parsed.text if isinstance(content, list) else content
    reasoning = _pop_reasoning(other_keys, parsed.reasoning) if role == "assistant" else ""
    if content is None and (calls or reasoning):
        text = ""
    if not isinstance(text, str):
        raise wrong_type(where, content, "a string")
    turn: Turn = {"role": role, "content": text}
    if reasoning:
        turn["reasoning_content"] = reasoning
    if calls:
        turn["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if isinstance(other_keys.get(key), str):
            turn[key] = other_keys.pop(key)
    if context.use_weights:
        loss_keys = {key: other_keys.pop(key) for key in [*other_keys] if key in LOSS_KEYS}
        parts = other_keys.pop(CONTENT_WEIGHTS, None)
        if role == "assistant" and (loss_keys or parts is not None or parsed.weights):
            turn |= _turn_weight_fields(loss_keys, parts, parsed, text)
    return turn


def _parse_call_content(content: Any, where: str, context: TurnContext) -> tuple[str, list[Turn]]:
    if isinstance(content, (dict, list)) and (calls := read_calls(content, where, context.dropped_keys)):
        return "", calls
    if content is not None and not isinstance(content, (str, dict, list)):
        raise wrong_type(where, content, "a string")
    return read_call_text(content if isinstance(content, str) else "[]", where, context.dropped_keys)


def _pop_calls(role: str, other_keys: dict[str, Any], context: TurnContext) -> list[Turn]:
    calls: list[Turn] = []
    for key in ("tool_calls", "function_call"):  # OpenAI's former format had one call, in function_call
        if key in other_keys and not calls:
            calls = read_calls(other_keys.pop(key), f".{key}", context.dropped_keys)
    if calls and role != "assistant":
        raise BadRecord(f": a turn of the {role} calls tools; only turns of the assistant may")
    return calls


def _pop_reasoning(other_keys: dict[str, Any], part: str) -> str:
    """The assistant's reasoning, from any of its keys. part: reasoning among the parts of the content."""
    candidates = {"content": part} if part.strip() else {}
    for key in _REASONING_KEYS:
        value = other_keys.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise wrong_type(f".{key}", value, "a string")
        if value and value.strip():
            candidates[key] = value
    if len(set(candidates.values())) > 1:
        raise BadRecord(f": {' and '.join(candidates)} hold different reasoning; keep one of them")
    return next(iter(candidates.values()), "")


class _Content(NamedTuple):
    """A content that came in parts. weights: (characters, weight) of each text; empty if no part has a loss key."""

    text: str
    reasoning: str
    weights: list[tuple[int, Number]]


def _parse_content(parts: list[Any], where: str, role: str, context: TurnContext) -> _Content:
    texts: list[str] = []
    reasoning_texts: list[str] = []
    weights: list[tuple[int, Number]] = []
    reasoning_weights: list[tuple[str, Number]] = []  # of reasoning with loss keys
    has_loss_keys = False
    for number, part in enumerate(parts):
        at = f"{where}[{number}]"
        text = _part_text(part, at)
        loss_keys = _part_loss_keys(part, where, at, context)
        weight = combine_weights(loss_keys, f"{at}.") if role == "assistant" else 1
        has_loss_keys = has_loss_keys or bool(loss_keys)
        if part["type"] == "text":
            texts.append(text)
            weights.append((len(text), weight))
        elif role == "assistant":
            reasoning_texts.append(text)
            reasoning_weights += [(at, weight)] if loss_keys else []
        else:
            context.dropped_keys.append(f"turn{where}.{part['type']}")
    for at, weight in reasoning_weights:  # a template writes the reasoning before the text
        if weight != (weights or reasoning_weights)[0][1]:
            raise BadRecord(f"{at}: reasoning and the text after it need the same weight; or give the turn a weight")
    if reasoning_weights and not weights:
        weights = [(0, reasoning_weights[0][1])]
    return _Content("".join(texts), "".join(reasoning_texts), weights if has_loss_keys else [])


def _part_loss_keys(part: Turn, where: str, at: str, context: TurnContext) -> dict[str, Any]:
    """The loss keys of a part of a content. where, at: of the content and of the part, for messages."""
    loss_keys = {}
    for key, value in part.items():
        if value is None or key == "type" or key in _PART_TEXT_KEYS[part["type"]]:
            continue
        if context.use_weights and key in LOSS_KEYS:
            loss_keys[key] = value
        elif not is_blank(value):
            if context.use_weights:
                reject_unknown_loss_key(key, f"{at}.")
            context.dropped_keys.append(f"turn{where}.{key}")
    return loss_keys


def _part_text(part: Any, at: str) -> str:
    """The text or reasoning of a part of a content."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _PART_TEXT_KEYS:
        values = [part[key] for key in _PART_TEXT_KEYS[kind] if part.get(key) is not None]
        if kind != "text" and values and isinstance(values[0], list):  # Mistral's reasoning is a list of texts
            values = ["".join(_part_text(inner, f"{at}.{kind}") for inner in values[0])]
        if len(values) == 2 and values[0] == values[1]:
            values.pop()
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
        raise BadRecord(f"{at}: expected a string as its {' or '.join(_PART_TEXT_KEYS[kind])}; {found_keys(part)}")
    raise BadRecord(f'{at}: expected {{"type": "text", "text": ...}}; fm9g trains on text only')


def _turn_weight_fields(loss_keys: dict[str, Any], given: Any, parsed: _Content, text: str) -> Turn:
    """The weight keys of a turn. given: its content_weights."""
    weight = combine_weights(loss_keys, ".")
    if given is not None:
        if parsed.weights:
            raise BadRecord(f".{CONTENT_WEIGHTS}: the parts of the content have weights too; keep one of the two")
        return weight_fields(weight, check_content_weights(given, len(text)))
    if len({part for _, part in parsed.weights}) == 1:  # also if the content is empty
        return weight_fields(weight * parsed.weights[0][1])
    return weight_fields(weight, parsed.weights)
