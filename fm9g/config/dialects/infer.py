"""Translates inference arguments of another tool into a request for a command: generate, chat, serve or lora merge."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fm9g.config.dialects.table import Dialect
from fm9g.config.dialects.translate import translate
from fm9g.config.fields import did_you_mean
from fm9g.errors import UserError

Verb = Literal["generate", "chat", "serve", "merge"]
_OPENING = ("dtype", "quantization", "device", "chat_template")
_SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "logprobs",
    "num_return_sequences",
)
_TALK = (*_OPENING, *_SAMPLING, "system", "stream", "max_model_len", "save_generation_config")
_BACKEND = ("backend", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "tensor_parallel_size")
_DATA = ("data", "val_split", "split_seed", "sample", "references", "output")
# The options that each command has. Others have no effect on it.
OPTIONS: dict[Verb, tuple[str, ...]] = {
    "generate": (*_TALK, *_DATA, "max_num_seqs"),
    "chat": _TALK,
    "serve": (*_OPENING, *_SAMPLING, *_BACKEND, "host", "port", "api_key", "served_model_name", "page"),
    "merge": ("dtype", "overwrite"),  # and output
}
_LISTENING = ("llamafactory", "swift")  # serve all addresses of the machine by default
_COMMANDS = {verb: "fm9g lora merge" if verb == "merge" else f"fm9g {verb}" for verb in OPTIONS}
_TALKING = ("generate", "chat")
# Variables that `llamafactory-cli api` reads -> the option here.
_VARIABLES = {
    "API_HOST": "--host",
    "API_PORT": "--port",
    "API_KEY": "--api_keys",
    "API_MODEL_NAME": "--served_model_name",
    "MAX_CONCURRENT": "--max_num_seqs",
}


@dataclass(frozen=True)
class InferRequest:
    """What a command of another tool asks for.

    Args:
        verb: the command of fm9g that does it; merge is `fm9g lora merge`.
        model: a path or a name; with merge the base, or empty: the base that the adapter names.
        adapters: paths, or NAME=PATH; with merge the one that is merged.
        options: option of the command -> value; those that the tool leaves to us are missing.
        notes: what has no effect, or differs.
        then: what is run with the merged model; None: nothing.
    """

    verb: Verb
    model: str
    adapters: tuple[str, ...]
    options: dict[str, Any]
    notes: tuple[str, ...]
    then: InferRequest | None = None


def inference_dialects() -> dict[str, Dialect]:
    """The dialects that have inference arguments, by the name that `--from` takes."""
    from fm9g.config.dialects.infer_tables import INFER_SH, LLAMAFACTORY_INFER, SCRIPTS_INFER, SWIFT_INFER

    return {dialect.name: dialect for dialect in (LLAMAFACTORY_INFER, SWIFT_INFER, INFER_SH, SCRIPTS_INFER)}


def translate_inference(
    dialect: str, given: Mapping[str, Any], origin: str = "command line", asked: Verb | None = None
) -> InferRequest:
    """Translates inference arguments. Those that are left out have the defaults of the tool.

    Args:
        dialect: what `--from` says.
        given: name -> value, typed or as text.
        origin: where they are from: a file, or the command line.
        asked: the command of fm9g that the user wrote. Arguments may say chat or generate; a default of the tool does
            not, and `serve` and `lora merge` stay what they are. None: as the tool would do.

    Raises:
        UserError: names every argument that is unknown, refused, or of a wrong type.
    """
    known = inference_dialects()
    if dialect not in known:
        raise UserError(
            f"--from: found {dialect!r}, expected one of {', '.join(known)}, which have arguments of inference"
            f"{did_you_mean(dialect, [*known])}"
        )
    found = translate(known[dialect], given, origin)
    keys, title = dict(found.keys), found.dialect.title
    by_user = {key: where for key, where in found.origins.items() if where != f"default of {title}"}
    verb: Verb = keys.pop("verb", "chat")
    notes = list(found.all_notes)
    if asked and (asked not in _TALKING or verb not in _TALKING or "verb" not in by_user):
        verb = asked
    elif asked and verb != asked:
        notes.append(f"{by_user['verb']}: `{_COMMANDS[verb]}` is run, not `{_COMMANDS[asked]}`")
    if verb == "serve" and dialect == "llamafactory":
        notes += [f"{name}: is not read; write {option}" for name, option in _VARIABLES.items() if name in os.environ]
    if verb == "serve" and dialect in _LISTENING and "host" not in keys:
        notes.append("host: --host 0.0.0.0 --api_keys FILE serves all addresses, as there, but with keys")
    model, adapters = keys.pop("model", ""), keys.pop("adapters", ())
    if not model and len(adapters) != 1:
        name = next(row.name for row in found.dialect.rows if row.ours == "model")
        raise UserError(f"{origin}: {name} is missing; give the path of the model")
    if not model:  # the adapter names its base
        model, adapters = adapters[0], ()
    return _request(verb, model, adapters, keys, by_user, notes)


def _request(
    verb: Verb, model: str, adapters: tuple[str, ...], keys: dict[str, Any], by_user: dict[str, str], notes: list[str]
) -> InferRequest:
    """The request, or one to merge with this one behind it. by_user: keys that the user gave -> the argument."""
    if verb != "merge" and keys.pop("merge_first", False):
        rest = {key: value for key, value in keys.items() if key not in ("merge_to", "overwrite")}
        first = _merge(model, adapters, keys, notes)
        return replace(first, then=_request(verb, first.options["output"], (), rest, by_user, []))
    takes = {*OPTIONS[verb], "merge_first", *(("merge_to",) if verb == "merge" else ())}
    lost = [f"{by_user[key]}: no effect on `{_COMMANDS[verb]}`" for key in keys if key in by_user.keys() - takes]
    notes = list(dict.fromkeys([*notes, *lost]))
    if verb == "merge":
        if "quantization" in keys:
            raise UserError(f"{by_user['quantization']}: an adapter is merged into weights that are not quantized")
        return _merge(model, adapters, keys, notes)
    options = {key: value for key, value in keys.items() if key in OPTIONS[verb] and value is not None}
    return InferRequest(verb, model, adapters, options, tuple(notes))


def _merge(model: str, adapters: tuple[str, ...], keys: dict[str, Any], notes: list[str]) -> InferRequest:
    base, adapter = (model, adapters[0]) if adapters else ("", model)
    merged = keys.get("merge_to") or f"{adapter.rstrip('/')}-merged"
    options = {key: keys[key] for key in OPTIONS["merge"] if keys.get(key, "auto") != "auto"} | {"output": merged}
    return InferRequest("merge", base, (adapter,), options, tuple(notes))
