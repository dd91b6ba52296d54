"""A run that starts from an adapter takes layers, rank, alpha and kind from it. Imports torch only for such a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.checkpoint.find import resolve_checkpoint_path
from fm9g.config.adapter import ADAPTER_CONFIG
from fm9g.config.model import ModelConfig
from fm9g.config.run import RunConfig
from fm9g.data.encode.new_tokens import NEW_TOKENS, check_same_tokens
from fm9g.errors import UserError

if TYPE_CHECKING:
    from fm9g.lora.adapter_file import Adapter


def with_adapter(run: RunConfig) -> RunConfig:
    """Completes a run's configuration from the adapter that it starts from; a run without one stays as it is.

    The adapter's base becomes `pretrained_model` if it exists on this machine and the run names none.

    Raises:
        UserError: the adapter is for another model, or given keys contradict it.
    """
    if not run.train.adapter:
        return run
    from fm9g.convert.adapters import read_adapter

    path = resolve_checkpoint_path(Path(run.train.adapter))
    if path.is_file() and not (path.parent / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"adapter {path}: r and alpha are unknown, since {ADAPTER_CONFIG} is not beside it; `fm9g lora export "
            f"{path} FOLDER --train-config FILE` writes a folder that has them"
        )
    adapter = read_adapter(path)
    config = adapter.config
    values: dict[str, Any] = {
        "lora_layer": _layer_names(adapter, run.model, run.origins["model"]["dim_model"]),
        "lora_r": config.r,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "init_lora_weights": "default",  # any other acts on new adapters alone
        "modules_to_save": config.modules_to_save,
    }
    origin = str((path if path.is_dir() else path.parent) / ADAPTER_CONFIG)
    _check_given_keys(run, adapter, values, origin)
    if not run.train.pretrained_model and config.base and Path(config.base).exists():
        values["pretrained_model"] = config.base
    if adapter.tokenizer and (file := adapter.tokenizer / NEW_TOKENS).is_file():
        if run.train.new_tokens:
            check_same_tokens(run.train.new_tokens, file, str(path))
        values["new_tokens"] = str(file)
    run = run.changed("train", values, origin)
    vocab_size = adapter.vocab_size(run.model.vocab_size)
    return run.changed("model", {"vocab_size": vocab_size}, origin) if vocab_size > run.model.vocab_size else run


def _layer_names(adapter: Adapter, model: ModelConfig, model_file: str) -> list[str]:
    """lora_layer for the adapter: short names if they select its layers exactly, else full ones."""
    from fm9g.model.transformer import weight_shapes

    adapter.check_fits(weight_shapes(model), f"the model of {model_file}")
    names = adapter.config.layers
    return names if _selected(model, names) == set(adapter.layers) else adapter.layers


def _check_given_keys(run: RunConfig, adapter: Adapter, values: dict[str, Any], origin: str) -> None:
    """Raises UserError for keys of the run that were given and differ from the adapter's values."""
    contradictions = []
    for key, value in values.items():
        given, given_in = getattr(run.train, key), run.origins["train"][key]
        same = _selected(run.model, given) == set(adapter.layers) if key == "lora_layer" else given == value
        if given_in != "default" and not same:
            contradictions.append(f"{key} is {given!r} ({given_in}), but {value!r} in {origin}")
    if contradictions:
        raise UserError(
            f"adapter {run.train.adapter}: given keys contradict it: {'; '.join(contradictions)}; leave them out"
        )


def _selected(model: ModelConfig, names: list[str]) -> set[str]:
    """The linear layers of a model that the names of lora_layer select."""
    from fm9g.lora.inject import select_target_layers
    from fm9g.model.transformer import weight_shapes

    linear = [name.removesuffix(".weight") for name, shape in weight_shapes(model).items() if len(shape) == 2]
    return set(select_target_layers(linear, names))
