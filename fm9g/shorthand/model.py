"""What `model` names: a Hugging Face folder, a 9G .pt file, a checkpoint, an adapter, a size, or a hub name.

Nothing is converted. The configuration, the tokenizer and the chat template are read where they are.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.config.fields import did_you_mean
from fm9g.config.load import find_config, known_configs
from fm9g.config.mixture import BUILTIN_TEMPLATES, TOKENIZER_TEMPLATE
from fm9g.config.model import ModelConfig
from fm9g.config.registry import find_model, registered_names
from fm9g.config.train import TrainConfig
from fm9g.data.encode.tokenizer_files import CHAT_TEMPLATE, TOKENIZER_CONFIG, tokenizer_files
from fm9g.errors import UserError
from fm9g.io.json_file import read_object
from fm9g.path_kind import ADAPTER, CHECKPOINT, MODEL, MODEL_CONFIG, WEIGHTS, check_kind, kind_of
from fm9g.shorthand import hub

logger = logging.getLogger(__name__)

_RUN_CONFIG = "run_config.json"
_NO_TEMPLATE = "none, so questions and answers are joined without roles (--chat_template chatml adds them)"
_FOREIGN_WEIGHTS = {  # patterns of files that are the weights of other tools -> what they are
    "*.gguf": "a GGUF file of llama.cpp",
    "*.onnx": "an ONNX model",
    "*.ggml": "a GGML file of llama.cpp",
    "tf_model*.h5": "weights of TensorFlow",
    "flax_model*.msgpack": "weights of Flax",
}


@dataclass(frozen=True)
class ModelDescription:
    """What is known about a model.

    Args:
        name: of a run that trains it, unless the user gives one.
        origin: where this is from, as messages and `fm9g config show` name it.
        keys: training key -> value: pretrained_model, tokenizer_path, adapter, chat_template, config.
        config: its architecture; None: that of the configuration file which `keys` names.
        is_adapter: it is an adapter on another model, and training continues it.
        is_random: it has no weights yet.
        lora_layers: linear layers that get adapters unless others are given; empty: all.
    """

    name: str
    origin: str
    keys: dict[str, Any] = field(default_factory=dict)
    config: ModelConfig | None = None
    is_adapter: bool = False
    is_random: bool = False
    lora_layers: tuple[str, ...] = ()


def describe_model(text: str) -> ModelDescription:
    """Finds a model and reads what is known about it.

    Raises:
        UserError: there is no such model, or it cannot be trained here; says what to give instead.
    """
    from fm9g.checkpoint.find import resolve_checkpoint_path

    path = resolve_checkpoint_path(Path(text))
    if path.is_symlink() and not path.exists():
        raise UserError(f"model: {path}: is a symbolic link that leads nowhere; its target is {os.readlink(path)}")
    if not path.exists():
        if find_config("model_configs", text):
            return ModelDescription(text, f"model {text}", {"config": text}, is_random=True)
        if registered := find_model(text):
            described = describe_model(registered.model)
            template = {"chat_template": registered.template} if registered.template else {}
            keys = described.keys | template
            return replace(described, name=text, keys=keys, lora_layers=registered.lora_layers)
        path = _find_elsewhere(text)
    if path.is_file() and path.suffix == ".json" and kind_of(path) == MODEL_CONFIG:
        return ModelDescription(path.stem, str(path), {"config": str(path)}, is_random=True)
    if kind_of(path) == ADAPTER or (path.is_dir() and (path / ADAPTER_CONFIG).is_file()):
        return _describe_adapter(path)
    return _describe_weights(path)


def _find_elsewhere(text: str) -> Path:
    """The folder of a hub name that was downloaded. Raises UserError for a name that is nowhere."""
    remote = hub.parse_remote(text)
    if remote and not Path(text).parent.is_dir():
        return hub.require_download(remote, hub.MODEL, "give --model {}")
    parent = Path(text).parent
    beside = [str(Path(text).parent / item.name) for item in parent.iterdir()] if parent.is_dir() else []
    names = known_configs("model_configs")
    hint = did_you_mean(text, [*beside, *names, *registered_names("models")])
    raise UserError(f"model: {text}: no such folder or file, and no name in model_configs/ ({', '.join(names)}){hint}")


def _describe_weights(path: Path) -> ModelDescription:
    """A Hugging Face folder, a checkpoint or a .pt file."""
    from fm9g.convert.source import open_source

    _check_weights_here(path)
    source = open_source(path)
    tokenizer = source.tokenizer or (path.parent if path.is_file() else None)
    keys: dict[str, Any] = {"pretrained_model": str(path)}
    if tokenizer and tokenizer_files(tokenizer):
        keys["tokenizer_path"] = str(tokenizer)
        if template := _chat_template(path, tokenizer):
            keys["chat_template"] = template
    where = path / "config.json" if (path / "config.json").is_file() else path
    return ModelDescription(_run_name(path), str(where), keys, source.config)


def _check_weights_here(path: Path) -> None:
    """Raises UserError for a path that is known not to be a model which can be trained."""
    if path.is_file() and (path.parent / "config.json").is_file() and kind_of(path.parent) == MODEL:
        raise UserError(f"model: {path}: is a file of a Hugging Face folder; give the folder, {path.parent}")
    check_kind(path, MODEL, CHECKPOINT, WEIGHTS)
    _check_has_config(path)
    files = [path] if path.is_file() else [path / item.name for item in path.iterdir()]
    if not any(file.suffix in (".safetensors", ".bin", ".pt") for file in files):
        for pattern, meaning in _FOREIGN_WEIGHTS.items():
            if foreign := [file for file in files if file.match(pattern)]:
                raise UserError(
                    f"model: {foreign[0]}: is {meaning}, which cannot be trained; give the Hugging Face folder that it "
                    "was made from"
                )
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "manifest.json")):
        held = ", ".join(sorted(file.name for file in files)[:5]) or "nothing"
        raise UserError(
            f"model: {path}: is neither a Hugging Face folder (it has no config.json) nor a checkpoint; it holds {held}"
        )


def _check_has_config(path: Path) -> None:
    """Raises UserError for a .pt file, which belongs to no checkpoint, without its configuration."""
    file = path.with_suffix(".json")
    if path.suffix == ".pt" and path.is_file() and not file.exists() and not (path.parent / "manifest.json").is_file():
        raise UserError(
            f"model: {path}: has no model configuration {file.name} beside it; copy it there, or give "
            f"--config NAME --pretrained_model {path} for a name in model_configs/"
        )


def _describe_adapter(path: Path) -> ModelDescription:
    """An adapter, with the model that it was trained on."""
    folder = path if path.is_dir() else path.parent
    name = str(read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    base = _find_base(name)
    if base is None:
        problem = f"its base {name!r} is not on this machine" if name else "it does not say which model it is for"
        raise UserError(f"model: {path}: is an adapter, and {problem}; give --model BASE --adapter {path}")
    if (base / ADAPTER_CONFIG).is_file() and kind_of(base) != MODEL:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path: {base} is an adapter, too; merge it with `fm9g lora "
            f"merge`, and give --model MERGED --adapter {path}"
        )
    described = describe_model(str(base))
    template = _trained_template(folder)
    keys = described.keys | {"adapter": str(path)} | ({"chat_template": template} if template else {})
    return ModelDescription(_run_name(path), str(folder / ADAPTER_CONFIG), keys, described.config, is_adapter=True)


def _find_base(name: str) -> Path | None:
    """The model that an adapter names: a path, or a name on a hub that was downloaded; None: it is not here."""
    if not name or Path(name).exists():
        return Path(name) if name else None
    remote = hub.parse_remote(name)
    return hub.find_download(remote, hub.MODEL) if remote else None


def _chat_template(path: Path, tokenizer: Path) -> str:
    """The key chat_template for a model: what it was trained with, else the tokenizer's own; empty: there is none."""
    return _trained_template(path) or (TOKENIZER_TEMPLATE if _has_chat_template(tokenizer) else "")


def _trained_template(checkpoint: Path) -> str:
    """The chat template that a checkpoint was trained with, if it is a built-in one."""
    file = checkpoint / _RUN_CONFIG
    item = read_object(file, is_input=False).get("train", {}).get("chat_template") if file.is_file() else None
    value = item.get("value") if isinstance(item, dict) else ""
    return value if value in BUILTIN_TEMPLATES else ""


def _has_chat_template(folder: Path) -> bool:
    if (folder / CHAT_TEMPLATE).is_file() or (folder / "chat_template.json").is_file():
        return True
    file = folder / TOKENIZER_CONFIG
    return file.is_file() and bool(read_object(file).get("chat_template"))


def _run_name(path: Path) -> str:
    """A name for a run that trains a model: of a checkpoint, RUN-STEP."""
    path = path.resolve()
    name = path.stem if path.is_file() else path.name
    return f"{path.parent.name}-{name}" if name.isdecimal() else name


def format_description(model: ModelConfig, config: TrainConfig) -> str:
    """A line about the model of a run, to be shown before the first step."""
    from fm9g.model.counts import count_weights

    weights = f"weights of {config.pretrained_model}" if config.pretrained_model else "random weights"
    template = "that of the tokenizer" if config.chat_template == TOKENIZER_TEMPLATE else config.chat_template
    return (
        f"model: {weights}, {count_weights(model):,} parameters, {model.dtype_name}, context of {model.max_length} "
        f"tokens; tokenizer: {config.tokenizer_path or 'not known'}; chat template: {template or _NO_TEMPLATE}; "
        f"method: {config.method or 'full'}"
    )
