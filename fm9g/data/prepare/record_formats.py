"""Recognizes the formats of users' records, and converts them to the canonical form that an indexed dataset stores.

A record is an object parsed from JSON, CSV or parquet. Its canonical form is one of

    pair        {"input": str, "output": str}; plain text has an empty input
    chat        {"messages": [turn, ...]}
    preference  {"messages": [the prompt's turns], "chosen": turn, "rejected": turn}
    KTO         {"messages": [all turns of the conversation], "label": true or false}

All but the pair may have "tools", a list of {"type": "function", "function": {...}}. A turn is
{"role": "system", "user", "assistant" or "tool", "content": str} with these optional keys:

    reasoning_content  of the assistant, not blank
    tool_calls         of the assistant: [{"id": str, "type": "function", "function": {"name": str, "arguments": {}}}];
                       the id is optional
    tool_call_id, name strings
    weight             of the assistant: weight of the turn in the loss, a number from 0; 0 is not trained on
    content_weights    of the assistant, instead of weight: [[number of characters, weight], ...], at least two, for
                       the complete content; text of the template has the weight of the part next to it

A pair may have a weight, too. A weight of 1 is left out. Preferences and KTO have no weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fm9g.data.prepare.column_mapping import ColumnMapping, ColumnNames, parse_mapping
from fm9g.data.prepare.loss_weights import (
    combine_weights,
    per_turn_weights,
    record_loss_keys,
    reject_unknown_loss_key,
    scale_weights,
    weight_fields,
)
from fm9g.data.prepare.tools import read_tools
from fm9g.data.prepare.turns import (
    TurnContext,
    canonical_turn,
    canonical_turns,
    find_turns,
    is_sharegpt,
    parse_turns,
)
from fm9g.data.prepare.values import BadRecord, decode_json, found_keys, is_blank, json_equal, wrong_type

Record = dict[str, Any]

PAIR_FORMAT = "input/output"  # the format of most datasets
# (format, required keys, optional keys), written our_name=key if the two differ. The first format whose required keys
# a record has is the record's, so the order matters: Stanford's Alpaca, for example, has a "text" as well.
RECORD_FORMATS = [
    ("preference", "messages chosen rejected", "system tools"),
    ("preference", "messages=conversations chosen rejected", "system tools"),
    ("preference", "prompt=instruction chosen rejected", "query=input system history tools"),
    ("preference", "prompt chosen rejected", "system history tools"),
    ("preference", "chosen rejected", "system tools"),
    ("messages", "messages", "system tools label=kto_tag label"),
    ("messages", "messages=conversations", "system tools label=kto_tag label"),
    ("Alpaca", "prompt=instruction response=output", "query=input system history tools label=kto_tag label"),
    ("query/response", "prompt=query response", "system history tools label=kto_tag label"),
    (PAIR_FORMAT, "response=output", "query=input"),
    ("text", "text", ""),
]


def canonicalize(
    record: Record, columns: ColumnMapping | None = None, dropped_keys: list[str] | None = None
) -> tuple[str, Record]:
    """Recognizes a record's format and converts the record to canonical form.

    Args:
        columns: the user's mapping; None: recognized by the keys.
        dropped_keys: receives the keys that hold content and are left out; those of turns as `turn.refusal`.

    Returns the format (input/output, text, Alpaca, ShareGPT, messages, query/response, preference, KTO, or columns if
    given) and the canonical record, the same object if it is canonical already. Raises BadRecord.
    """
    if columns is None and len(record) == 2 and type(record.get("input")) is type(record.get("output")) is str:
        return PAIR_FORMAT, record  # most records
    record_format, columns = _recognize(tuple(record)) if columns is None else ("columns", columns)
    names = columns.names
    has_feedback = "chosen" in names or "label" in names
    loss_keys = {} if has_feedback else record_loss_keys(record, names)
    context = TurnContext(columns, not has_feedback, [] if dropped_keys is None else dropped_keys)
    if columns.is_pair:
        result = _make_pair(_prompt_text(record, names), _string_field(record, names["response"]), loss_keys)
    elif "response" in names:
        result = _pair_or_chat(record, loss_keys, context)
    elif "text" in names:
        result = _make_pair("", _string_field(record, names["text"]), loss_keys)
    elif "chosen" in names:
        result = _make_preference(record, context)
    else:
        messages = parse_turns(record.get(names["messages"]), names["messages"])
        for key, value in record.items():
            if isinstance(value, list) and len(value) == len(messages) and key not in {*names.values(), *loss_keys}:
                reject_unknown_loss_key(key, "")
        result = _make_chat(record, _message_turns(record, messages, loss_keys, context), names["messages"], context)
        if record_format == "messages" and is_sharegpt(messages[0]):
            record_format = "ShareGPT"
    if dropped_keys is not None:
        used = {*names.values(), *loss_keys}
        dropped_keys += [key for key, value in record.items() if key not in used and not is_blank(value)]
    return record_format, record if json_equal(record, result) else result


@lru_cache(maxsize=1024)  # a dataset has few sets of keys
def _recognize(keys: tuple[str, ...]) -> tuple[str, ColumnMapping]:
    """The format of records with these keys, and the columns that they have."""
    for record_format, needed, optional in RECORD_FORMATS:
        names = parse_mapping(needed)
        if all(key in keys for key in names.values()):
            names |= parse_mapping(optional, keys)
            return "KTO" if "label" in names else record_format, ColumnMapping(names)
    raise BadRecord(f"unknown format; {found_keys(keys)}; map them with --columns prompt=KEY,response=KEY")


def _make_pair(prompt: str, response: str, loss_keys: Record) -> Record:
    pair: Record = {"input": prompt, "output": response}
    return pair | weight_fields(combine_weights(loss_keys)) if loss_keys else pair


def _pair_or_chat(record: Record, loss_keys: Record, context: TurnContext) -> Record:
    """A question and its answer: a pair, or a chat if the record holds more than a pair can."""
    names = context.columns.names
    prompt, response = _prompt_text(record, names), _string_field(record, names["response"])
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    all_turns = _with_system_and_history(record, turns, context)
    if loss_keys:
        all_turns = scale_weights(all_turns, [combine_weights(loss_keys)] * len(all_turns))
    chat = _make_chat(record, all_turns, names["response"], context)
    return _make_pair(prompt, response, loss_keys) if len(chat) == 1 and len(all_turns) == 2 else chat


def _message_turns(record: Record, messages: list[Any], loss_keys: Record, context: TurnContext) -> list[Record]:
    """The turns of a record's messages, with the record's weights and system message applied."""
    turns = canonical_turns(messages, context.columns.names["messages"], context)
    if loss_keys:
        turns = scale_weights(turns, per_turn_weights(loss_keys, turns))
    return _with_system_and_history(record, turns, context)


def _make_chat(record: Record, turns: list[Record], key: str, context: TurnContext) -> Record:
    """A conversation with its tools and label. key: of the conversation, for messages."""
    names = context.columns.names
    result: Record = {"messages": turns}
    if "tools" in names:
        result |= _parse_tools(record, context)
    if "label" in names:
        label = result["label"] = record.get(names["label"])
        if not isinstance(label, bool):
            raise wrong_type(names["label"], label, "true or false")
        if turns[-1]["role"] != "assistant":
            raise BadRecord(f"{key}: the last turn is the {turns[-1]['role']}'s, expected the answer that label rates")
    elif turns[-1]["role"] != "assistant" and all(turn["role"] != "assistant" for turn in turns):
        raise BadRecord(f"{key}: no turn of the assistant, nothing to train on")
    return result


def _make_preference(record: Record, context: TurnContext) -> Record:
    names = context.columns.names
    key = names.get("messages") or names.get("prompt", "")
    prompt: list[Record] = []
    if "messages" in names:
        prompt = canonical_turns(parse_turns(record.get(key), key), key, context)
    elif (messages := find_turns(record.get(key))) is not None:  # TRL's conversational prompt
        prompt = canonical_turns(messages, key, context)
    elif key:
        prompt = [{"role": "user", "content": _prompt_text(record, names)}]
    before, chosen = _parse_answer(record, names["chosen"], context)
    before_rejected, rejected = _parse_answer(record, names["rejected"], context)
    if before != before_rejected:
        raise BadRecord(f"{names['rejected']}: the turns before the answer are not those of {names['chosen']}")
    if all(turn["role"] != "user" for turn in before):
        prompt = prompt + before if before else prompt
    elif prompt[-len(before) :] != before:
        prompt = before  # complete: the prompt column may hold its last question only, or an answer already
    if not prompt:
        raise BadRecord(
            f"no prompt; {found_keys(record)}; name its key with --columns prompt=KEY,chosen=KEY,rejected=KEY"
        )
    if prompt[-1]["role"] not in ("user", "tool"):
        where = names["chosen"] if before else key
        raise BadRecord(f"{where}: the prompt ends with a turn of the {prompt[-1]['role']}, expected user or tool")
    turns = _with_system_and_history(record, prompt, context)
    return {"messages": turns, "chosen": chosen, "rejected": rejected} | _parse_tools(record, context)


def _parse_answer(record: Record, key: str, context: TurnContext) -> tuple[list[Record], Record]:
    """The turns before an answer, if it is a list of turns, and the answer."""
    value = record.get(key)
    if (messages := find_turns(value)) is not None:
        *before, answer = canonical_turns(messages, key, context)
    else:
        before, answer = [], {"role": "assistant", "content": value}
        if not isinstance(value, str):
            try:
                answer = canonical_turn(value, context)
            except BadRecord as error:
                raise BadRecord(f"{key}{error}") from None
    if answer["role"] != "assistant" or "tool_calls" in answer:
        raise BadRecord(f"{key}: expected an answer of the assistant that is text, without tool calls")
    if not answer["content"]:
        raise BadRecord(f"{key}: the answer is empty")
    return before, answer


def _prompt_text(record: Record, names: ColumnNames) -> str:
    """Prompt and query, with a line break between them if neither is empty."""
    query = _string_field(record, names.get("query"), required=False)
    prompt = _string_field(record, names["prompt"]) if "prompt" in names else ""
    return f"{prompt}\n{query}" if prompt and query else prompt or query


def _with_system_and_history(record: Record, turns: list[Record], context: TurnContext) -> list[Record]:
    """The turns behind the record's system message and history. A conversation's own system message has precedence."""
    names = context.columns.names
    if not ("system" in names or "history" in names):
        return turns
    system, history = _string_field(record, names.get("system"), required=False), _history_turns(record, names)
    own = turns[:1] if turns[0]["role"] == "system" else []
    if system and own and system != own[0]["content"]:
        context.dropped_keys.append(names["system"])
    opening = own or ([{"role": "system", "content": system}] if system else [])
    return opening + history + turns[len(own) :]


def _history_turns(record: Record, names: ColumnNames) -> list[Record]:
    """The questions and answers before the last question."""
    key = names.get("history", "")
    given = pairs = record.get(key)
    if isinstance(pairs, str) and (pairs.lstrip().startswith("[") or pairs.strip() == "null"):
        pairs = decode_json(pairs, key)
    if is_blank(pairs) or not pairs:
        return []
    if not isinstance(pairs, list):
        raise wrong_type(key, given, "a list of [question, answer]")
    turns = []
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str]):
            raise BadRecord(f"{key}[{number}]: expected [question, answer], two strings")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _parse_tools(record: Record, context: TurnContext) -> Record:
    key = context.columns.names.get("tools", "")
    value = record.get(key)
    return {"tools": tools} if value and (tools := read_tools(value, key, context.dropped_keys)) else {}


def _string_field(record: Record, key: Any, required: bool = True) -> str:
    """The text of a key; if it is not required, an empty one for a missing key or null."""
    value = record.get(key)
    if isinstance(value, str):
        return value
    if value is None and not required:
        return ""
    raise wrong_type(key, value, "a string") if key in record else BadRecord(f"{key}: missing; {found_keys(record)}")
