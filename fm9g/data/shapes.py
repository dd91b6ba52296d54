"""The shapes that users' records come in, and the canonical form that an indexed dataset stores.

A record is an object already read from JSON, CSV or parquet. Its canonical form is one of

    pair        {"input": str, "output": str}; plain text has an empty input
    chat        {"messages": [turn, ...]}
    preference  {"messages": [the prompt's turns], "chosen": turn, "rejected": turn}
    KTO         {"messages": [the whole conversation], "label": true or false}

all but the pair with "tools", a list of {"type": "function", "function": {...}}, where the record has some. A turn is
{"role": "system", "user", "assistant" or "tool", "content": str}; an assistant that calls tools has "tool_calls",
[{"type": "function", "function": {"name": str, "arguments": dict or str}}], as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from fm9g.config.fields import nearest

Record = dict[str, Any]
Names = dict[str, str]  # our name -> the user's key


def mapping(text: str, keys: Iterable[str] | None = None) -> dict[str, str]:
    """`a=b c` as {"a": "b", "c": "c"}; of the values only those that are in `keys`, where given."""
    pairs = [(word.partition("=")[0], word.rpartition("=")[2]) for word in text.split()]
    return {name: key for name, key in pairs if keys is None or key in keys}


CALL = "function_call"  # not a canonical role: an assistant's turn whose content is the JSON of its calls
OPENAI, SHAREGPT = ("role", "content"), ("from", "value")  # the keys of a turn
ROLES = mapping(
    "system developer=system user human=user assistant gpt=assistant chatgpt=assistant bard=assistant bing=assistant "
    "tool observation=tool function=tool tool_response=tool function_call tool_call=function_call"
)
ROLE_TAGS = mapping(
    "system_tag=system user_tag=user assistant_tag=assistant observation_tag=tool function_tag=function_call"
)
NAMES = ("prompt", "query", "response", "system", "history", "text", "messages", "tools", "chosen", "rejected", "label")

# What tells a shape and what else it may have, as our_name=key where the two differ. The first shape whose keys are all
# there counts, so the order matters: Stanford's Alpaca, for one, has a "text" as well.
SHAPES = [
    ("preference", "messages chosen rejected", "system tools"),
    ("preference", "messages=conversations chosen rejected", "system tools"),
    ("preference", "prompt=instruction chosen rejected", "query=input system history tools"),
    ("preference", "prompt chosen rejected", "system history tools"),
    ("preference", "chosen rejected", "system tools"),
    ("messages", "messages", "system tools label=kto_tag label"),
    ("messages", "messages=conversations", "system tools label=kto_tag label"),
    ("Alpaca", "prompt=instruction response=output", "query=input system history tools label=kto_tag label"),
    ("query/response", "prompt=query response", "system history tools label=kto_tag label"),
    ("input/output", "response=output", "query=input"),
    ("text", "text", ""),
]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


class BadRecord(ValueError):  # noqa: N818
    """Why a record cannot be used, in words for the user: `output: found int, expected a string`.

    content: the record, where it is not at hand.
    """

    content: str = ""


@dataclass(frozen=True)
class Columns:
    """How the keys of a user's records map to ours.

    names: one of NAMES -> their key.
    tags: as in LLaMA-Factory's dataset_info.json: role_tag and content_tag -> their key in a turn, user_tag,
        assistant_tag, observation_tag, function_tag, system_tag -> their spelling of a role, beside those in ROLES.
    """

    names: Names
    tags: dict[str, str] = field(default_factory=dict)

    @cached_property
    def roles(self) -> dict[str, str]:
        """Their spelling of a role -> ours."""
        return ROLES | {self.tags[tag]: role for tag, role in ROLE_TAGS.items() if tag in self.tags}

    @cached_property
    def turn_keys(self) -> tuple[str, str] | None:
        """Their keys of a turn's role and content; None where each turn shows by itself which they are."""
        role, content = self.tags.get("role_tag"), self.tags.get("content_tag")
        if not (role or content):
            return None
        other = SHAREGPT if role == "from" or content == "value" else OPENAI
        return role or other[0], content or other[1]

    @cached_property
    def is_pair(self) -> bool:
        return self.names.keys() <= {"prompt", "query", "response"}


def canonical(record: Record, columns: Columns | None = None) -> tuple[str, Record]:
    """The name of a record's shape and its canonical form: the same object where the record already has that form.

    Names: input/output, text, Alpaca, ShareGPT, messages, query/response, preference, KTO; columns where they are
    given. Keys that a shape does not know are left out. Raises BadRecord.
    """
    shape, columns = _recognised(tuple(record)) if columns is None else ("columns", columns)
    names = columns.names
    if columns.is_pair:
        result = {"input": _prompt(record, names), "output": _string(record, names["response"])}
    elif "response" in names:
        result = _exchange(record, names)
    elif "text" in names:
        result = {"input": "", "output": _string(record, names["text"])}
    elif "chosen" in names:
        result = _preference(record, columns)
    else:
        key = names["messages"]
        result = _chat(record, names, _opened(record, names, _conversation(record.get(key), key, columns)), key)
        if shape == "messages" and "from" in record[key][0]:
            shape = "ShareGPT"
    return shape, record if record == result else result


@lru_cache(maxsize=1024)  # a dataset has few sets of keys
def _recognised(keys: tuple[str, ...]) -> tuple[str, Columns]:
    """The shape of the records with these keys, and those of its columns that they have."""
    for shape, needed, optional in SHAPES:
        names = mapping(needed)
        if all(key in keys for key in names.values()):
            names |= mapping(optional, keys)
            return "KTO" if "label" in names else shape, Columns(names)
    raise BadRecord(f"no known shape; {_found(keys)}; map them with --columns prompt=KEY,response=KEY")


def _exchange(record: Record, names: Names) -> Record:
    """A question and its answer: a pair still, or a chat where the record says more than a pair can hold."""
    prompt, response = _prompt(record, names), _string(record, names["response"])
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    chat = _chat(record, names, _opened(record, names, turns), names["response"])
    return {"input": prompt, "output": response} if chat == {"messages": turns} else chat


def _chat(record: Record, names: Names, turns: list[Record], key: str) -> Record:
    """A conversation and what stands beside it. key: where it was found."""
    result: Record = {"messages": turns}
    if "tools" in names:
        result |= _tools(record, names["tools"])
    if "label" in names:
        label = result["label"] = record.get(names["label"])
        if not isinstance(label, bool):
            raise _wrong(names["label"], label, "true or false")
        if turns[-1]["role"] != "assistant":
            raise BadRecord(f"{key}: the last turn is the {turns[-1]['role']}'s, expected the answer that is judged")
    elif turns[-1]["role"] != "assistant" and all(turn["role"] != "assistant" for turn in turns):
        raise BadRecord(f"{key}: no turn of the assistant, nothing to learn")
    return result


def _preference(record: Record, columns: Columns) -> Record:
    names = columns.names
    key = names.get("messages") or names.get("prompt", "")
    prompt: list[Record] = []
    if "messages" in names or isinstance(record.get(key), list):  # the second: TRL's conversational prompt
        prompt = _conversation(record.get(key), key, columns)
    elif key:
        prompt = [{"role": "user", "content": _prompt(record, names)}]
    before, chosen = _answer(record, names["chosen"], columns)
    before_rejected, rejected = _answer(record, names["rejected"], columns)
    if before != before_rejected:
        raise BadRecord(f"{names['rejected']}: the turns before the answer are not those of {names['chosen']}")
    if all(turn["role"] != "user" for turn in before):
        prompt = prompt + before
    elif prompt[-len(before) :] != before:
        prompt = before  # the whole of it: what is called prompt may be its last question, or hold an answer already
    if not prompt:
        raise BadRecord(f"no prompt; {_found(record)}; name its key with --columns prompt=KEY,chosen=KEY,rejected=KEY")
    if prompt[-1]["role"] not in ("user", "tool"):
        where = names["chosen"] if before else key
        raise BadRecord(f"{where}: the prompt ends with a turn of the {prompt[-1]['role']}, expected user or tool")
    turns = _opened(record, names, prompt)
    return {"messages": turns, "chosen": chosen, "rejected": rejected} | _tools(record, names.get("tools"))


def _answer(record: Record, key: str, columns: Columns) -> tuple[list[Record], Record]:
    """The turns before an answer, where it is a list of turns, and the answer."""
    value = record.get(key)
    if isinstance(value, list):
        *before, answer = _conversation(value, key, columns)
    else:
        before, answer = [], {"role": "assistant", "content": value}
        if not isinstance(value, str):
            try:
                answer = _turn(value, columns)
            except BadRecord as error:
                raise BadRecord(f"{key}{error}") from None
    if answer["role"] != "assistant" or "tool_calls" in answer:
        raise BadRecord(f"{key}: expected an answer of the assistant that is text, without tool calls")
    if not answer["content"]:
        raise BadRecord(f"{key}: the answer is empty")
    return before, answer


def _prompt(record: Record, names: Names) -> str:
    """Prompt and query, with a line break between them where both say something."""
    query = _string(record, names.get("query"), required=False)
    prompt = _string(record, names["prompt"]) if "prompt" in names else ""
    return f"{prompt}\n{query}" if prompt and query else prompt or query


def _opened(record: Record, names: Names, turns: list[Record]) -> list[Record]:
    """The turns after the record's system message and history. A conversation's own system message goes first."""
    opening = []
    if system := _string(record, names.get("system"), required=False):
        opening = [{"role": "system", "content": system}]
    if "history" in names and (history := record.get(names["history"])):
        if not isinstance(history, list):
            raise _wrong(names["history"], history, "a list of [question, answer]")
        for number, pair in enumerate(history):
            if not (isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str]):
                raise BadRecord(f"{names['history']}[{number}]: expected [question, answer], two strings")
            opening += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return opening + turns if opening and turns[0]["role"] != "system" else turns


def _conversation(value: Any, key: str, columns: Columns) -> list[Record]:
    if not isinstance(value, list):
        raise _wrong(key, value, "a list of turns")
    turns: list[Record] = []
    plain = () if columns.tags else ("system", "user", "assistant", "tool")
    try:
        for message in value:
            kept = (  # what is stored already is read for every sample, so it is let through early
                isinstance(message, dict)
                and len(message) == 2
                and message.get("role") in plain
                and isinstance(message.get("content"), str)
            )
            turn = message if kept else _turn(message, columns)
            if turns and turn["role"] == "system":
                raise BadRecord(": a system message, which only the first turn may be")
            turns.append(turn)
    except BadRecord as error:
        raise BadRecord(f"{key}[{len(turns)}]{error}") from None
    if not turns:
        raise BadRecord(f"{key}: the conversation is empty")
    return turns


def _turn(message: Any, columns: Columns) -> Record:
    """A turn in canonical form. Its complaints begin with where in the message they belong, `.content` for example."""
    if not isinstance(message, dict):
        raise _wrong("", message, "an object")
    role_key, content_key = columns.turn_keys or (SHAREGPT if "from" in message else OPENAI)
    spelling, content = message.get(role_key), message.get(content_key)
    if not isinstance(spelling, str):
        raise _wrong(f".{role_key}", spelling, "a string")
    role = columns.roles.get(spelling)
    if role is None:
        known = list(columns.roles)
        raise BadRecord(f".{role_key}: unknown role {spelling!r}{nearest(spelling, known)} (known: {', '.join(known)})")
    for key in ("weight", "loss"):
        if key in message and not message[key]:
            raise BadRecord(f".{key}: turns that are not learnt are not known here; remove the key, or see --loss last")
    if role != CALL and len(message) == 2 and isinstance(content, str):  # most turns
        return {"role": role, "content": content}
    if isinstance(content, list):
        content = "".join(_text(part, f".{content_key}[{number}]") for number, part in enumerate(content))
    calls = message.get("tool_calls") or message.get("function_call")  # the second: OpenAI's, when there was only one
    if not isinstance(content, str) and not (content is None and calls):
        raise _wrong(f".{content_key}", content, "a string")
    if role == CALL:
        calls = _functions(content or [], f".{content_key}", called=True)
        return {"role": "assistant", "content": "", "tool_calls": calls}
    if not calls:
        return {"role": role, "content": content}
    if role != "assistant":
        raise BadRecord(f": a turn of the {role} calls tools; only the assistant's may")
    return {"role": role, "content": content or "", "tool_calls": _functions(calls, ".tool_calls", called=True)}


def _text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise BadRecord(f'{where}: expected {{"type": "text", "text": ...}}; fm9g trains on text only')


def _tools(record: Record, key: Any) -> Record:
    value = record.get(key)
    return {"tools": tools} if value and (tools := _functions(value, key, called=False)) else {}


def _functions(value: Any, where: str, called: bool) -> list[Record]:
    """Functions in canonical form from one or a list of them, bare or as {"function": {...}}, or from JSON of that.

    called: they are calls, so there is one at least, with arguments.
    """
    if isinstance(value, str):
        try:
            value = _JSON.decode(value) or []  # not orjson, which takes large integers for floats
        except ValueError:
            raise BadRecord(f"{where}: not JSON: {value!r:.80}") from None
    functions = []
    for item in value if isinstance(value, list) else [value]:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f'{where}: expected functions, objects with a "name"')
        if called:
            name, arguments = function["name"], function.get("arguments")
            if not isinstance(arguments, dict | str):
                raise _wrong(f"{where}: arguments of {name}", arguments, "an object or a string")
            function = {"name": name, "arguments": arguments}
        functions.append({"type": "function", "function": function})
    if called and not functions:
        raise BadRecord(f"{where}: calls no function")
    return functions


def _string(record: Record, key: Any, required: bool = True) -> str:
    """The text under a key; where it is not required, an empty one for no key, for null and where it is not there."""
    value = record.get(key)
    if isinstance(value, str):
        return value
    if value is None and not required:
        return ""
    raise _wrong(key, value, "a string") if key in record else BadRecord(f"{key}: missing; {_found(record)}")


def _wrong(where: str, value: Any, expected: str) -> BadRecord:
    return BadRecord(f"{where}: found {'nothing' if value is None else type(value).__name__}, expected {expected}")


def _found(keys: Iterable[str]) -> str:
    return f"found the keys {', '.join(keys)}" if keys else "found no keys"
