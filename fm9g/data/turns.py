"""Turns of a conversation, in the spellings of OpenAI, ShareGPT and others, as canonical ones."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NamedTuple

from fm9g.config.fields import nearest
from fm9g.data.marks import CONTENT_WEIGHTS, MARKS, Number, given_parts, refuse_unknown, weight_keys, weight_of
from fm9g.data.tools import read_call_text, read_calls
from fm9g.data.values import BadRecord, as_object, decoded, found, is_blank, same, wrong

if TYPE_CHECKING:
    from fm9g.data.shapes import Columns

Turn = dict[str, Any]

CALL = "function_call"  # not a canonical role: an assistant's turn whose content is the JSON of its calls
OPENAI, SHAREGPT = ("role", "content"), ("from", "value")  # the keys of a turn
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Types of the parts of a content, and the keys that hold what they say.
_PARTS = {"text": ("text",), "thinking": ("thinking",), "reasoning": ("reasoning", "text")}


class Reading(NamedTuple):
    """How the turns of a record are read. weighted: marks count. left_out: gets the names of keys that are left out."""

    columns: Columns
    weighted: bool
    left_out: list[str]


def listed_turns(value: Any, key: str) -> list[Any]:
    """The turns of a conversation that is a list, a list for each of their keys, or JSON text of one. Raises BadRecord.

    key: of the conversation in its record.
    """
    given = value
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = decoded(value, key)
    if isinstance(value, dict) and (lists := {name: item for name, item in value.items() if item is not None}):
        if not all(isinstance(item, list) for item in lists.values()):
            raise wrong(key, given, "a list of turns")
        if len({len(item) for item in lists.values()}) > 1:
            counts = ", ".join(f"{len(item)} of {name}" for name, item in lists.items())
            raise BadRecord(f"{key}: found {counts}, expected as many of each, one a turn")
        value = [dict(zip(lists, items)) for items in zip(*lists.values())]
    if not isinstance(value, list):
        raise wrong(key, given, "a list of turns")
    return value


def turns_in(value: Any) -> list[Any] | None:
    """The turns that a value holds, as a list or as JSON text; None for what is no conversation."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            turns = decoded(value, "")
        except BadRecord:
            return None  # text that begins with a bracket
        keys = (set(OPENAI), set(SHAREGPT))
        if turns and all(isinstance(turn, dict) and any(pair <= turn.keys() for pair in keys) for turn in turns):
            return turns
    return value if isinstance(value, list) else None


def is_sharegpt(message: Any) -> bool:
    return "from" in as_object(message)


def conversation(messages: list[Any], key: str, reading: Reading) -> list[Turn]:
    """Canonical turns; `messages` itself where they are that already. key: of the conversation. Raises BadRecord."""
    turns: list[Turn] = []
    plain = () if reading.columns.tags else ("system", "user", "assistant", "tool")
    try:
        for message in messages:
            kept = (  # what is stored already is read for every sample, so it is let through early
                isinstance(message, dict)
                and len(message) == 2
                and message.get("role") in plain
                and isinstance(message.get("content"), str)
            )
            turns.append(message if kept else canonical_turn(message, reading))
    except BadRecord as error:
        raise BadRecord(f"{key}[{len(turns)}]{error}") from None
    if not turns:
        raise BadRecord(f"{key}: the conversation is empty")
    return messages if all(map(operator.is_, turns, messages)) else turns


def canonical_turn(message: Any, reading: Reading) -> Turn:
    """A turn in canonical form; the same object where it has it already.

    The complaints of BadRecord begin with where in the message they belong, `.content` for example.
    """
    message = as_object(message)
    if not isinstance(message, dict):
        raise wrong("", message, "an object")
    columns = reading.columns
    role_key, content_key = columns.turn_keys or (SHAREGPT if "from" in message else OPENAI)
    spelling, content = message.get(role_key), message.get(content_key)
    if not isinstance(spelling, str):
        raise wrong(f".{role_key}", spelling, "a string")
    role = columns.roles.get(spelling)
    if role is None:
        known = list(columns.roles)
        raise BadRecord(f".{role_key}: unknown role {spelling!r}{nearest(spelling, known)} (known: {', '.join(known)})")
    if role != CALL and len(message) == 2 and isinstance(content, str):  # most turns
        return {"role": role, "content": content}
    beside = {k: value for k, value in message.items() if value is not None and k not in (role_key, content_key)}
    turn = _turn(role, content, f".{content_key}", beside, reading)
    for key, value in beside.items():  # what was not taken out above
        if is_blank(value):
            continue
        if reading.weighted:
            refuse_unknown(key, ".")
        reading.left_out.append(f"turn.{key}")
    return message if same(message, turn) else turn


def _turn(role: str, content: Any, where: str, beside: dict[str, Any], reading: Reading) -> Turn:
    """where: what messages call the content. beside: the other keys of the message; those that are used are removed."""
    said = _Content("", "", [])
    if role == CALL:
        text, calls = _called(content, where, reading)
        role = "assistant"
    else:
        calls = _calls(role, beside, reading)
        said = _content(content, where, role, reading) if isinstance(content, list) else said
        text = said.text if isinstance(content, list) else content
    thought = _thought(beside, said.thought) if role == "assistant" else ""
    if content is None and (calls or thought):
        text = ""
    if not isinstance(text, str):
        raise wrong(where, content, "a string")
    turn: Turn = {"role": role, "content": text}
    if thought:
        turn["reasoning_content"] = thought
    if calls:
        turn["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if isinstance(beside.get(key), str):
            turn[key] = beside.pop(key)
    if reading.weighted:
        marks = {key: beside.pop(key) for key in [*beside] if key in MARKS}
        parts = beside.pop(CONTENT_WEIGHTS, None)
        if role == "assistant" and (marks or parts is not None or said.weights):
            turn |= _weights(marks, parts, said, text)
    return turn


def _called(content: Any, where: str, reading: Reading) -> tuple[str, list[Turn]]:
    if isinstance(content, (dict, list)) and (calls := read_calls(content, where, reading.left_out)):
        return "", calls
    if content is not None and not isinstance(content, (str, dict, list)):
        raise wrong(where, content, "a string")
    return read_call_text(content if isinstance(content, str) else "[]", where, reading.left_out)


def _calls(role: str, beside: dict[str, Any], reading: Reading) -> list[Turn]:
    calls: list[Turn] = []
    for key in ("tool_calls", "function_call"):  # the second: OpenAI's, when there was only one
        if key in beside and not calls:
            calls = read_calls(beside.pop(key), f".{key}", reading.left_out)
    if calls and role != "assistant":
        raise BadRecord(f": a turn of the {role} calls tools; only the assistant's may")
    return calls


def _thought(beside: dict[str, Any], part: str) -> str:
    """What the assistant thought, under whatever keys it stands. part: what parts of the content say of it."""
    thoughts = {"content": part} if part.strip() else {}
    for key in _THOUGHTS:
        value = beside.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise wrong(f".{key}", value, "a string")
        if value and value.strip():
            thoughts[key] = value
    if len(set(thoughts.values())) > 1:
        raise BadRecord(f": {' and '.join(thoughts)} hold different thoughts; keep one of them")
    return next(iter(thoughts.values()), "")


class _Content(NamedTuple):
    """What the parts of a content say. weights: (characters, weight) of each text; none where no part is marked."""

    text: str
    thought: str
    weights: list[tuple[int, Number]]


def _content(parts: list[Any], where: str, role: str, reading: Reading) -> _Content:
    texts: list[str] = []
    thoughts: list[str] = []
    weights: list[tuple[int, Number]] = []
    of_thoughts: list[tuple[str, Number]] = []  # those that have a weight of their own
    is_marked = False
    for number, part in enumerate(parts):
        at = f"{where}[{number}]"
        text = _part(part, at)
        marks = _part_marks(part, where, at, reading)
        weight = weight_of(marks, f"{at}.") if role == "assistant" else 1
        is_marked = is_marked or bool(marks)
        if part["type"] == "text":
            texts.append(text)
            weights.append((len(text), weight))
        elif role == "assistant":
            thoughts.append(text)
            of_thoughts += [(at, weight)] if marks else []
        else:
            reading.left_out.append(f"turn{where}.{part['type']}")
    for at, weight in of_thoughts:  # a template writes the thought before the text
        if weight != (weights or of_thoughts)[0][1]:
            raise BadRecord(f"{at}: a thought has the weight of the text after it; mark that alike, or the whole turn")
    if of_thoughts and not weights:
        weights = [(0, of_thoughts[0][1])]
    return _Content("".join(texts), "".join(thoughts), weights if is_marked else [])


def _part_marks(part: Turn, where: str, at: str, reading: Reading) -> dict[str, Any]:
    """The marks of a part of a content, which is at `at`; its other keys are left out, but for what it says."""
    marks = {}
    for key, value in part.items():
        if value is None or key == "type" or key in _PARTS[part["type"]]:
            continue
        if reading.weighted and key in MARKS:
            marks[key] = value
        elif not is_blank(value):
            if reading.weighted:
                refuse_unknown(key, f"{at}.")
            reading.left_out.append(f"turn{where}.{key}")
    return marks


def _part(part: Any, at: str) -> str:
    """The text or thought of a part of a content."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in _PARTS:
        values = [part[key] for key in _PARTS[kind] if part.get(key) is not None]
        if kind != "text" and values and isinstance(values[0], list):  # Mistral's thoughts are lists of texts
            values = ["".join(_part(inner, f"{at}.{kind}") for inner in values[0])]
        if len(values) == 2 and values[0] == values[1]:
            values.pop()
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
        raise BadRecord(f"{at}: expected a string as its {' or '.join(_PARTS[kind])}; {found(part)}")
    raise BadRecord(f'{at}: expected {{"type": "text", "text": ...}}; fm9g trains on text only')


def _weights(marks: dict[str, Any], given: Any, said: _Content, text: str) -> Turn:
    """What a turn says of its weights. given: its content_weights."""
    weight = weight_of(marks, ".")
    if given is not None:
        if said.weights:
            raise BadRecord(f".{CONTENT_WEIGHTS}: the parts of the content have weights already; keep one of the two")
        return weight_keys(weight, given_parts(given, len(text)))
    if len({part for _, part in said.weights}) == 1:  # also where there is no text that it could be the weight of
        return weight_keys(weight * said.weights[0][1])
    return weight_keys(weight, said.weights)
