"""Tool definitions and tool calls of OpenAI and ShareGPT in canonical form."""

from __future__ import annotations

import json
from typing import Any

from fm9g.data.prepare.values import (
    STRICT_JSON,
    TOO_DEEP,
    BadRecord,
    decode_json,
    found_keys,
    parse_object_text,
    wrong_type,
)

_CALLS = (
    'the JSON of calls, {"name": ..., "arguments": {...}} or a list of these, optionally after <think>...</think> and '
    "each within <tool_call>...</tool_call>"
)
_THINK, _END_THINK, _CALL, _END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"


def read_tools(value: Any, where: str, dropped_keys: list[str]) -> list[dict[str, Any]]:
    """Tools as [{"type": "function", "function": {...}}]. where: the key, for messages. Raises BadRecord."""
    tools = []
    for item, function in _parse_functions(value, where):
        tools.append({"type": "function", "function": function})
        if function is not item:
            dropped_keys += [f"{where}.{key}" for key in item if key not in ("type", "function")]
    return tools


def read_calls(value: Any, where: str, dropped_keys: list[str]) -> list[dict[str, Any]]:
    """Calls with their arguments as objects, and with their ids if they have any. Raises BadRecord."""
    calls = []
    for item, function in _parse_functions(value, where):
        name = function["name"]
        others = [key for key in function if key not in ("name", "arguments", "id", "type", "index")]
        if others and "arguments" not in function:
            raise BadRecord(f"{where}: arguments of {name}: missing; {found_keys(function)}")
        call = {"type": "function", "function": {"name": name, "arguments": _parse_arguments(function, where)}}
        identifier = item.get("id")
        calls.append({"id": identifier, **call} if isinstance(identifier, str) else call)
        keys = [key for key in item if key not in ("id", "type", "function")] if function is not item else []
        keys += [key for key in others if function[key] is not None]
        dropped_keys += [f"turn.tool_calls.{key}" for key in keys if item.get(key, function.get(key)) is not None]
    return calls


def read_call_text(text: str, where: str, dropped_keys: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """The reasoning, with its tags, and the calls of a ShareGPT function_call turn. Raises BadRecord."""
    rest, reasoning = text.strip(), ""
    if rest.startswith(_THINK) and _END_THINK in rest:
        reasoning, _, rest = rest.partition(_END_THINK)
        reasoning, rest = reasoning + _END_THINK, rest.lstrip()
    try:
        value = _parse_tagged_calls(rest) if rest.startswith(_CALL) else STRICT_JSON.decode(rest)
    except RecursionError:
        raise BadRecord(f"{where}: {TOO_DEEP}: {text!r:.80}") from None
    except ValueError as error:
        reason = "" if isinstance(error, json.JSONDecodeError) else f"{error}; "
        raise BadRecord(f"{where}: {reason}found {text!r:.80}, expected {_CALLS}") from None
    calls = read_calls(value, where, dropped_keys)
    if not calls:
        raise BadRecord(f"{where}: calls no function; expected {_CALLS}")
    return reasoning, calls


def _parse_tagged_calls(text: str) -> list[Any]:
    """The JSON values in <tool_call>...</tool_call>. Raises ValueError."""
    values: list[Any] = []
    while text:
        if not text.startswith(_CALL):
            raise json.JSONDecodeError("no call", text, 0)
        text = text.removeprefix(_CALL).lstrip()
        value, end = STRICT_JSON.raw_decode(text)
        text = text[end:].lstrip()
        if not text.startswith(_END_CALL):
            raise json.JSONDecodeError("no end", text, 0)
        text = text.removeprefix(_END_CALL).lstrip()
        values += value if isinstance(value, list) else [value]
    return values


def _parse_functions(value: Any, where: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(item, its function) of each item.

    value: one function or a list, each bare or as {"function": {...}}, or JSON text of these; blank for no functions.
    """
    if isinstance(value, str):
        value = decode_json(value, where) if value.strip() else None
    functions = []
    for item in value if isinstance(value, list) else [value or None]:
        item = parse_object_text(item)
        if item is None or item == {}:
            continue
        function = (item.get("function") or item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f'{where}: expected functions, objects with a "name"')
        functions.append((item, function))
    return functions


def _parse_arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    value, where = function.get("arguments"), f"{where}: arguments of {function['name']}"
    if isinstance(value, str):
        value = decode_json(value, where) if value.strip() else None
    if value is not None and not isinstance(value, dict):
        raise wrong_type(where, value, "an object")
    return value if value is not None else {}
