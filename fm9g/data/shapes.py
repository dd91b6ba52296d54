"""The shapes that users' records come in, and the canonical form that an indexed dataset stores.

A record is an object already read from JSON, CSV or parquet. Its canonical form is one of

    pair        {"input": str, "output": str}; plain text has an empty input
    chat        {"messages": [turn, ...]}
    preference  {"messages": [the prompt's turns], "chosen": turn, "rejected": turn}
    KTO         {"messages": [the whole conversation], "label": true or false}

all but the pair with "tools", a list of {"type": "function", "function": {...}}, where the record has some. A turn is
{"role": "system", "user", "assistant" or "tool", "content": str}. Where the record says so, it has these as well:

    reasoning_content  what the assistant thought, not blank
    tool_calls         of the assistant: [{"id": str, "type": "function", "function": {"name": str, "arguments": {}}}];
                       no id where there is none
    tool_call_id, name strings
    weight             of the assistant: how much the turn counts in the loss, a number from 0; 0 is not trained on
    content_weights    of the assistant, instead of a weight: [[number of characters, weight], ...], two at least, over
                       the whole content; what the template writes beside the content counts as the part next to it

A pair may have a weight, too. A weight of 1 is not written. Preferences and KTO have no weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from fm9g.data.marks import record_marks, refuse_unknown, scaled, weight_keys, weight_of, weights_beside
from fm9g.data.tools import read_tools
from fm9g.data.turns import OPENAI, SHAREGPT, Reading, canonical_turn, conversation, is_sharegpt, listed_turns, turns_in
from fm9g.data.values import BadRecord, decoded, found, is_blank, same, wrong

Record = dict[str, Any]
Names = dict[str, str]  # our name -> the user's key


def mapping(text: str, keys: Iterable[str] | None = None) -> dict[str, str]:
    """`a=b c` as {"a": "b", "c": "c"}; of the values only those that are in `keys`, where given."""
    pairs = [(word.partition("=")[0], word.rpartition("=")[2]) for word in text.split()]
    return {name: key for name, key in pairs if keys is None or key in keys}


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


def canonical(record: Record, columns: Columns | None = None, left_out: list[str] | None = None) -> tuple[str, Record]:
    """The name of a record's shape and its canonical form: the same object where the record already has that form.

    Names: input/output, text, Alpaca, ShareGPT, messages, query/response, preference, KTO; columns where they are
    given. left_out: gets the names of keys that say something and are left out; those in turns as `turn.refusal`.
    Raises BadRecord.
    """
    if columns is None and len(record) == 2 and type(record.get("input")) is type(record.get("output")) is str:
        return "input/output", record  # most records
    shape, columns = _recognised(tuple(record)) if columns is None else ("columns", columns)
    names = columns.names
    is_judged = "chosen" in names or "label" in names
    marks = {} if is_judged else record_marks(record, names)
    reading = Reading(columns, not is_judged, [] if left_out is None else left_out)
    if columns.is_pair:
        result = _pair(_prompt(record, names), _string(record, names["response"]), marks)
    elif "response" in names:
        result = _exchange(record, marks, reading)
    elif "text" in names:
        result = _pair("", _string(record, names["text"]), marks)
    elif "chosen" in names:
        result = _preference(record, reading)
    else:
        messages = listed_turns(record.get(names["messages"]), names["messages"])
        for key, value in record.items():
            if isinstance(value, list) and len(value) == len(messages) and key not in {*names.values(), *marks}:
                refuse_unknown(key, "")
        result = _chat(record, _conversation(record, messages, marks, reading), names["messages"], reading)
        if shape == "messages" and is_sharegpt(messages[0]):
            shape = "ShareGPT"
    if left_out is not None:
        used = {*names.values(), *marks}
        left_out += [key for key, value in record.items() if key not in used and not is_blank(value)]
    return shape, record if same(record, result) else result


@lru_cache(maxsize=1024)  # a dataset has few sets of keys
def _recognised(keys: tuple[str, ...]) -> tuple[str, Columns]:
    """The shape of the records with these keys, and those of its columns that they have."""
    for shape, needed, optional in SHAPES:
        names = mapping(needed)
        if all(key in keys for key in names.values()):
            names |= mapping(optional, keys)
            return "KTO" if "label" in names else shape, Columns(names)
    raise BadRecord(f"no known shape; {found(keys)}; map them with --columns prompt=KEY,response=KEY")


def _pair(prompt: str, response: str, marks: Record) -> Record:
    pair: Record = {"input": prompt, "output": response}
    return pair | weight_keys(weight_of(marks)) if marks else pair


def _exchange(record: Record, marks: Record, reading: Reading) -> Record:
    """A question and its answer: a pair still, or a chat where the record says more than a pair can hold."""
    names = reading.columns.names
    prompt, response = _prompt(record, names), _string(record, names["response"])
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    opened = _opened(record, turns, reading)
    if marks:
        opened = scaled(opened, [weight_of(marks)] * len(opened))
    chat = _chat(record, opened, names["response"], reading)
    return _pair(prompt, response, marks) if len(chat) == 1 and len(opened) == 2 else chat


def _conversation(record: Record, messages: list[Any], marks: Record, reading: Reading) -> list[Record]:
    """The turns of a record's messages, with its marks and its system message."""
    turns = conversation(messages, reading.columns.names["messages"], reading)
    if marks:
        turns = scaled(turns, weights_beside(marks, turns))
    return _opened(record, turns, reading)


def _chat(record: Record, turns: list[Record], key: str, reading: Reading) -> Record:
    """A conversation and what stands beside it. key: where it was found."""
    names = reading.columns.names
    result: Record = {"messages": turns}
    if "tools" in names:
        result |= _tools(record, reading)
    if "label" in names:
        label = result["label"] = record.get(names["label"])
        if not isinstance(label, bool):
            raise wrong(names["label"], label, "true or false")
        if turns[-1]["role"] != "assistant":
            raise BadRecord(f"{key}: the last turn is the {turns[-1]['role']}'s, expected the answer that is judged")
    elif turns[-1]["role"] != "assistant" and all(turn["role"] != "assistant" for turn in turns):
        raise BadRecord(f"{key}: no turn of the assistant, nothing to train on")
    return result


def _preference(record: Record, reading: Reading) -> Record:
    names = reading.columns.names
    key = names.get("messages") or names.get("prompt", "")
    prompt: list[Record] = []
    if "messages" in names:
        prompt = conversation(listed_turns(record.get(key), key), key, reading)
    elif (messages := turns_in(record.get(key))) is not None:  # TRL's conversational prompt
        prompt = conversation(messages, key, reading)
    elif key:
        prompt = [{"role": "user", "content": _prompt(record, names)}]
    before, chosen = _answer(record, names["chosen"], reading)
    before_rejected, rejected = _answer(record, names["rejected"], reading)
    if before != before_rejected:
        raise BadRecord(f"{names['rejected']}: the turns before the answer are not those of {names['chosen']}")
    if all(turn["role"] != "user" for turn in before):
        prompt = prompt + before if before else prompt
    elif prompt[-len(before) :] != before:
        prompt = before  # the whole of it: what is called prompt may be its last question, or hold an answer already
    if not prompt:
        raise BadRecord(f"no prompt; {found(record)}; name its key with --columns prompt=KEY,chosen=KEY,rejected=KEY")
    if prompt[-1]["role"] not in ("user", "tool"):
        where = names["chosen"] if before else key
        raise BadRecord(f"{where}: the prompt ends with a turn of the {prompt[-1]['role']}, expected user or tool")
    turns = _opened(record, prompt, reading)
    return {"messages": turns, "chosen": chosen, "rejected": rejected} | _tools(record, reading)


def _answer(record: Record, key: str, reading: Reading) -> tuple[list[Record], Record]:
    """The turns before an answer, where it is a list of turns, and the answer."""
    value = record.get(key)
    if (messages := turns_in(value)) is not None:
        *before, answer = conversation(messages, key, reading)
    else:
        before, answer = [], {"role": "assistant", "content": value}
        if not isinstance(value, str):
            try:
                answer = canonical_turn(value, reading)
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


def _opened(record: Record, turns: list[Record], reading: Reading) -> list[Record]:
    """The turns after the record's system message and history. A conversation's own system message is kept instead."""
    names = reading.columns.names
    if not ("system" in names or "history" in names):
        return turns
    system, history = _string(record, names.get("system"), required=False), _history(record, names)
    own = turns[:1] if turns[0]["role"] == "system" else []
    if system and own and system != own[0]["content"]:
        reading.left_out.append(names["system"])
    opening = own or ([{"role": "system", "content": system}] if system else [])
    return opening + history + turns[len(own) :]


def _history(record: Record, names: Names) -> list[Record]:
    """The questions and answers before the last question."""
    key = names.get("history", "")
    given = pairs = record.get(key)
    if isinstance(pairs, str) and (pairs.lstrip().startswith("[") or pairs.strip() == "null"):
        pairs = decoded(pairs, key)
    if is_blank(pairs) or not pairs:
        return []
    if not isinstance(pairs, list):
        raise wrong(key, given, "a list of [question, answer]")
    turns = []
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list | tuple) and [type(text) for text in pair] == [str, str]):
            raise BadRecord(f"{key}[{number}]: expected [question, answer], two strings")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _tools(record: Record, reading: Reading) -> Record:
    key = reading.columns.names.get("tools", "")
    value = record.get(key)
    return {"tools": tools} if value and (tools := read_tools(value, key, reading.left_out)) else {}


def _string(record: Record, key: Any, required: bool = True) -> str:
    """The text under a key; where it is not required, an empty one for no key, for null and where it is not there."""
    value = record.get(key)
    if isinstance(value, str):
        return value
    if value is None and not required:
        return ""
    raise wrong(key, value, "a string") if key in record else BadRecord(f"{key}: missing; {found(record)}")
