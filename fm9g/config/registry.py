"""Registered names of models, datasets and chat templates: the built-in ones, and those of the user's registry.

The user's file is registry.yaml or registry.json in the current folder, or the one that FM9G_REGISTRY names. It has the
sections of ms-swift's MODEL_MAPPING, DATASET_MAPPING and TEMPLATE_MAPPING:

    models:
      my-7b: {model_id: ./my-7b-chat, template: my-chat, lora_TM: [q_proj, v_proj]}
    datasets:
      my-qa: {dataset_path: qa.jsonl, columns: {prompt: question, response: answer}}
    templates:
      my-chat:
        prefix: "{{SYSTEM}}\n"                  before the first turn
        prompt: "User: {{QUERY}}\nAnswer: "     a question; {{ROUND}} is its number, from 1
        chat_sep: "\n"                          between an answer and the next question
        suffix: [[eos_token_id]]                after the last answer
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fm9g.config.fields import did_you_mean
from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config_object

BUILTIN_REGISTRY = Path(__file__).with_suffix(".yaml")
VARIABLE = "FM9G_REGISTRY"
_NAMES = ("registry.yaml", "registry.yml", "registry.json")
_PARTS = ("prefix", "prompt", "chat_sep", "suffix")
_TEXT, _TEXTS, _OBJECT = (str,), (str, list), (dict,)
_KEYS: dict[str, dict[str, tuple[type, ...]]] = {  # section -> key -> types of its value
    "models": {
        "model_id": _TEXT,
        "template": _TEXT,
        "lora_TM": _TEXTS,
        "refused": _TEXT,
    },
    "datasets": {
        "dataset_id": _TEXT,
        "dataset_path": _TEXT,
        "columns": _OBJECT,
        "tags": _OBJECT,
        "subset": _TEXT,
        "refused": _TEXT,
    },
    "templates": dict.fromkeys(_PARTS, _TEXTS),
}
_TYPE_NAMES: dict[type, str] = {str: "a text", list: "a list", dict: "keys and values"}
_REFUSED = {
    "get_function": "fm9g runs no code of a registry; give a folder as model_id, or files as dataset_path, and convert "
    "records with transforms",
    "revision": "fm9g downloads nothing: a hub name is the revision that was downloaded; leave it out",
    "ignore_file_pattern": "fm9g downloads nothing: it reads the files that it needs of a folder; leave it out",
}
_BUILTIN_LAYERS = ("qkv",)  # lora_TM of all models there
_TOKENS = {"bos_token_id": "bos_token", "eos_token_id": "eos_token"}


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model.

    Args:
        model: a folder or a hub name.
        template: the chat template; empty: the tokenizer's own.
        lora_layers: linear layers that get adapters unless others are given; empty: all.
    """

    model: str
    template: str = ""
    lora_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class RegisteredDataset:
    """A registered dataset.

    Args:
        data: a file, a folder or a hub name, as `data` takes it.
        columns, tags: which key holds what, as in a dataset_info.json; empty: keys are recognized.
    """

    data: str
    columns: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)


def find_model(name: str) -> RegisteredModel | None:
    """The registered model of a name."""
    entry, folder = _find("models", name)
    if entry is None:
        return None
    if "model_id" not in entry:
        raise UserError(f"{_where('models', name)}: model_id: missing; give a folder or a hub name")
    layers = entry.get("lora_TM") or (_BUILTIN_LAYERS if folder == BUILTIN_REGISTRY.parent else ())
    layers = (layers,) if isinstance(layers, str) else tuple(map(str, layers))
    model = _beside(entry["model_id"], folder)
    _check_no_name("models", name, "model_id", model)
    return RegisteredModel(model, entry.get("template", ""), layers)


def find_dataset(name: str) -> RegisteredDataset | None:
    """The registered dataset of a name."""
    entry, folder = _find("datasets", name)
    if entry is None:
        return None
    data = entry.get("dataset_path") or entry.get("dataset_id")
    if not data:
        raise UserError(f"{_where('datasets', name)}: dataset_path: missing; give files or a hub name")
    subset = f":{entry['subset']}" if entry.get("subset") else ""
    path = _beside(data, folder)
    _check_no_name("datasets", name, "dataset_path" if "dataset_path" in entry else "dataset_id", path)
    return RegisteredDataset(path + subset, entry.get("columns") or {}, entry.get("tags") or {})


def find_template(name: str) -> str | None:
    """The Jinja source of a registered chat template."""
    entry, _ = _find("templates", name)
    return None if entry is None else template_source(entry, _where("templates", name))


def registered_names(section: str) -> list[str]:
    """The names in a section: models, datasets or templates."""
    return [name for file in _files() for name in _read(file, _stamp(file)).get(section, {})]


def template_source(parts: dict[str, Any], where: str) -> str:
    """The Jinja source that renders conversations as ms-swift's template of these parts does.

    Args:
        parts: prefix, prompt, chat_sep and suffix, each a text or a list of texts and lists of token names.
        where: what messages call the template.
    """
    prefix, prompt, separator, suffix = (_pieces(parts.get(part), f"{where}: {part}") for part in _PARTS)
    if not any("{{QUERY}}" in piece for piece in prompt if isinstance(piece, str)):
        raise UserError(f"{where}: prompt: has no {{{{QUERY}}}}, which stands for the question")
    return "".join((
        "{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else '' %}",
        _render(prefix),
        "{%- set rounds = namespace(number=0) %}",
        "{%- for message in messages %}",
        "{%- if message['role'] == 'user' %}",
        "{%- set rounds.number = rounds.number + 1 %}",
        "{%- set query = message['content'] %}",
        _render(prompt),
        "{%- elif message['role'] == 'assistant' %}",
        "{{- message['content'] }}",
        "{%- if loop.last %}",
        _render(suffix),
        "{%- else %}",
        _render(separator),
        "{%- endif %}",
        "{%- elif not (loop.first and message['role'] == 'system') %}",
        "{{- raise_exception('message ' ~ loop.index ~ ' has the role ' ~ message['role'] ~ '; this template knows a "
        "first system message, user and assistant') }}",
        "{%- endif %}",
        "{%- endfor %}",
    ))  # fmt: skip


_VARIABLES = {"{{SYSTEM}}": "system", "{{QUERY}}": "query", "{{ROUND}}": "rounds.number"}


def _render(pieces: list[str | tuple[str, ...]]) -> str:
    """Jinja that writes the pieces of a part."""
    out = []
    for piece in pieces:
        if isinstance(piece, tuple):
            out += [f"{{{{- {_TOKENS[token]} }}}}" for token in piece]
            continue
        for text in re.split(r"(\{\{(?:SYSTEM|QUERY|ROUND)\}\})", piece):
            out.append(f"{{{{- {_VARIABLES.get(text) or json.dumps(text, ensure_ascii=False)} }}}}" if text else "")
    return "".join(out)


def _pieces(part: Any, where: str) -> list[str | tuple[str, ...]]:
    """A part as texts and tuples of token names."""
    pieces: list[str | tuple[str, ...]] = []
    for piece in [part or ""] if isinstance(part or "", str) else part:
        tokens = tuple(piece) if isinstance(piece, list) else ()
        if not all(isinstance(token, str) and token in _TOKENS for token in tokens):
            raise UserError(f"{where}: found {piece!r}, expected a list of {' and '.join(_TOKENS)}")
        if not isinstance(piece, (str, list)):
            raise UserError(f"{where}: found {piece!r}, expected a text, or a list of texts and token names")
        pieces.append(tokens if isinstance(piece, list) else piece)
    return pieces


def _find(section: str, name: str) -> tuple[dict[str, Any] | None, Path]:
    """The entry of a name, the user's before a built-in one, and the folder of its file."""
    for file in _files():
        entries = _read(file, _stamp(file)).get(section, {})
        if name in entries:
            if problem := entries[name].get("refused"):
                raise UserError(f"{section}: {name}: {problem}")
            return entries[name], file.parent
    return None, Path()


def _beside(path: str, folder: Path) -> str:
    """A path of a registry: relative to its file."""
    return str(folder / path) if (folder / path).exists() and not os.path.isabs(path) else path


def _check_no_name(section: str, name: str, key: str, value: str) -> None:
    """Raises UserError if an entry stands for another one: two could stand for each other."""
    if not os.path.lexists(value) and value in registered_names(section):
        raise UserError(f"{_where(section, name)}: {key}: {value} is a registered name; give a path or a hub name")


def _where(section: str, name: str) -> str:
    file = next(file for file in _files() if name in _read(file, _stamp(file)).get(section, {}))
    return f"{file}: {section}: {name}"


def _files() -> list[Path]:
    """The registries, the user's first."""
    if named := os.environ.get(VARIABLE, ""):
        return [Path(named), BUILTIN_REGISTRY]
    return [*[Path(name) for name in _NAMES if Path(name).is_file()][:1], BUILTIN_REGISTRY]


def _stamp(file: Path) -> int:
    """Changes when the file does; so a registry is parsed once."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@cache
def _read(file: Path, stamp: int) -> dict[str, dict[str, Any]]:
    """The checked content of a registry."""
    content = read_config_object(file)
    checked: dict[str, dict[str, Any]] = {}
    for section, entries in content.items():
        if section not in _KEYS:
            raise UserError(f"{file}: {section}: unknown section{did_you_mean(section, [*_KEYS])} ({', '.join(_KEYS)})")
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise UserError(f"{file}: {section}: expected names with keys and values, such as my-name: {{...}}")
        for name, entry in entries.items():
            for key, value in entry.items():
                if key not in _KEYS[section]:
                    known = _REFUSED.get(key) or f"unknown key{did_you_mean(key, [*_KEYS[section]])}"
                    raise UserError(f"{file}: {section}: {name}: {key}: {known}")
                if not isinstance(value, types := _KEYS[section][key]):
                    expected = " or ".join(_TYPE_NAMES[each] for each in types)
                    raise UserError(f"{file}: {section}: {name}: {key}: found {value!r}, expected {expected}")
        checked[section] = {str(name): entry for name, entry in entries.items()}
    return checked
