"""Requests of the OpenAI API: checked field by field. A field that would have no effect is refused."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fm9g.errors import UserError
from fm9g.infer.options import MAX_LOGPROBS, GenerationOptions
from fm9g.serve.errors import ApiError

MAX_STOP = 16
_ANSWER_TOKENS, _COMPLETION_TOKENS = 1024, 16  # tokens of an answer if the request does not say; 16 is OpenAI's
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
# Fields that describe the caller or his account, and change no answer.
_ABOUT_THE_CALLER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that are not supported -> the values with which they change nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
}
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Request:
    """A checked request.

    Args:
        model: empty: the first one.
        prompts: texts or lists of token ids of a completion; none in a chat.
        messages, tools: of a chat.
        options: how tokens are chosen.
        max_tokens_given: whether the request says how long the answer may be.
        stream: whether pieces are sent as they come; include_usage: also the number of tokens at the end.
    """

    model: str
    options: GenerationOptions
    prompts: tuple[str | list[int], ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    max_tokens_given: bool = False
    stream: bool = False
    include_usage: bool = False


class _Fields:
    """Takes the fields of a body one at a time; those that remain are unknown."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise ApiError(400, "expected a JSON object")
        self._body = {key: value for key, value in body.items() if value is not None}

    def take(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        value = self._body.pop(name, default)
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if float in kinds and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if value is not default and type(value) not in kinds:
            expected = " or ".join(_KINDS[kind] for kind in kinds)
            raise ApiError(400, f"{name}: found {_shown(value)}, expected {expected}", name)
        return value

    def check_rest(self) -> None:
        """Raises ApiError for a field that is unknown, or would have no effect."""
        for name, value in self._body.items():
            if name in _ABOUT_THE_CALLER:
                continue
            if name not in _WITHOUT_EFFECT:
                raise ApiError(400, f"{name}: this server knows no such field", name, "unknown_field")
            if value not in _WITHOUT_EFFECT[name]:
                raise ApiError(400, f"{name}: {_shown(value)} is not supported; leave it out", name, "unsupported")


_KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def parse_chat(body: Any, defaults: Mapping[str, Any]) -> Request:
    """A body of /v1/chat/completions. defaults: options of the server for fields that are not given.

    Raises ApiError that names the field.
    """
    given = _Fields(body)
    messages = given.take("messages", list)
    if not messages:
        raise ApiError(400, "messages: expected at least one message", "messages")
    parsed = tuple(_message(message, f"messages[{number}]") for number, message in enumerate(messages))
    tools = tuple(given.take("tools", list, []))
    if not all(isinstance(tool, dict) and isinstance(tool.get("function"), dict) for tool in tools):
        raise ApiError(400, "tools: expected objects with type and function", "tools")
    choice = given.take("tool_choice", (str, dict), "auto")
    if choice not in ("none", "auto"):
        raise ApiError(400, f"tool_choice: {_shown(choice)} is not supported; expected none or auto", "tool_choice")
    top = given.take("top_logprobs", int, 0)
    wants_logprobs = given.take("logprobs", bool, False)
    if top and not wants_logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs true", "top_logprobs")
    max_tokens = given.take("max_completion_tokens", int)
    deprecated = given.take("max_tokens", int)
    return _request(
        given,
        defaults,
        max_tokens if max_tokens is not None else deprecated,
        _ANSWER_TOKENS,
        logprobs=top if wants_logprobs else None,
        messages=parsed,
        tools=tools if choice == "auto" else (),
    )


def parse_completion(body: Any, defaults: Mapping[str, Any]) -> Request:
    """A body of /v1/completions; see `parse_chat`."""
    given = _Fields(body)
    prompt = given.take("prompt", (str, list))
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not prompts or not all(isinstance(item, str) or _is_ids(item) for item in prompts):
        raise ApiError(400, "prompt: expected a text, token ids, or a list of them", "prompt")
    return _request(
        given,
        defaults,
        given.take("max_tokens", int),
        _COMPLETION_TOKENS,
        logprobs=given.take("logprobs", int),
        prompts=tuple(prompts),
    )


def _request(
    given: _Fields,
    defaults: Mapping[str, Any],
    max_tokens: int | None,
    default_tokens: int,
    logprobs: int | None,
    **content: Any,
) -> Request:
    stop = given.take("stop", (str, list), list(defaults.get("stop", ())))
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MAX_STOP or not all(isinstance(text, str) and text for text in stop):
        raise ApiError(400, f"stop: expected a text, or a list of at most {MAX_STOP} texts", "stop")
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise ApiError(400, f"logprobs: found {logprobs}, expected 0 to {MAX_LOGPROBS}", "logprobs")
    stream = given.take("stream", bool, False)
    stream_options = given.take("stream_options", dict, {})
    include_usage = stream_options.get("include_usage", False)
    if stream_options and (not stream or set(stream_options) - {"include_usage"} or type(include_usage) is not bool):
        raise ApiError(400, "stream_options: expected include_usage alone, with stream true", "stream_options")
    values: dict[str, Any] = {"temperature": 1.0, **defaults, "stop": tuple(stop)}
    for name in _SAMPLING:
        kind = float if isinstance(_DEFAULTS[name], float) else int
        # Without a seed, answers differ from each other.
        otherwise = secrets.randbits(62) if name == "seed" else _DEFAULTS[name]
        values[name] = given.take(name, kind, values.get(name, otherwise))
    values["top_k"] = max(values["top_k"], 0)  # -1 is vLLM's word for all tokens
    n = given.take("n", int, 1)
    model = given.take("model", str, "")
    given.check_rest()
    if max_tokens is not None:
        values["max_new_tokens"] = max_tokens
    elif "max_new_tokens" not in defaults:
        values["max_new_tokens"] = default_tokens
    if values["temperature"] == 0 and n > 1:
        raise ApiError(400, f"n: {n} answers would all be the same at temperature 0", "n")
    try:
        options = GenerationOptions(**values, num_return_sequences=n, logprobs=logprobs)
    except UserError as error:
        name = str(error).partition(":")[0]
        api_names = {"max_new_tokens": "max_tokens", "num_return_sequences": "n"}
        raise ApiError(400, str(error).replace(name, api_names.get(name, name), 1), api_names.get(name, name)) from None
    return Request(
        model, options, max_tokens_given=max_tokens is not None, stream=stream,
        include_usage=include_usage, **content,
    )  # fmt: skip


_DEFAULTS = {field.name: field.default for field in fields(GenerationOptions)}


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message with its content as one text."""
    if not isinstance(message, dict):
        raise ApiError(400, f"{where}: expected an object with role and content", "messages")
    role = message.get("role")
    if role not in _ROLES:
        raise ApiError(400, f"{where}.role: found {_shown(role)}, expected one of {', '.join(_ROLES)}", "messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise ApiError(
                400, f"{where}.content: this model reads texts alone; expected parts of type text", "messages"
            )
        content = "".join(map(str, parts))
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise ApiError(400, f"{where}.content: found {_shown(content)}, expected a text", "messages")
    result = {key: message[key] for key in ("name", "tool_call_id", "reasoning_content") if message.get(key)}
    if calls:
        if not isinstance(calls, list):
            raise ApiError(400, f"{where}.tool_calls: found {_shown(calls)}, expected a list", "messages")
        result["tool_calls"] = [_call(call, where) for call in calls]
    return {"role": "system" if role == "developer" else role, "content": content or "", **result}


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call of a tool; its arguments are an object for the template."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {**call, "function": {**function, "arguments": parsed}}
    except (TypeError, KeyError, ValueError, RecursionError):
        raise ApiError(
            400, f"{where}.tool_calls: expected objects with function.name and function.arguments in JSON", "messages"
        ) from None


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
