"""Adds LoRA adapters (Hu et al. 2021) to a model, by the modules of PEFT or OpenDelta.

Files have the same names with both: a linear layer X has X.weight, X.bias, X.lora.lora_A (r, in), X.lora.lora_B
(out, r), and for DoRA (Liu et al. 2024) X.lora.magnitude (out,).
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fm9g.config.adapter import AdapterConfig
from fm9g.errors import UserError
from fm9g.import_utils import without_bitsandbytes

A, B, MAGNITUDE = ".lora.lora_A", ".lora.lora_B", ".lora.magnitude"
_PEFT_NAME_PATTERNS = (  # parameter names of PEFT's modules -> names in files
    (re.compile(r"\.base_layer\.(weight|bias)$"), r".\1"),
    (re.compile(r"\.lora_([AB])\.default\.weight$"), r".lora.lora_\1"),
    (re.compile(r"\.lora_magnitude_vector\.default\.weight$"), MAGNITUDE),
)


def canonical_name(name: str) -> str:
    """The name in files of a parameter of a model with adapters."""
    for pattern, template in _PEFT_NAME_PATTERNS:
        name = pattern.sub(template, name)
    return name


def select_target_layers(linear: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The names of linear layers that are, or end in, one of the wanted names."""
    endings = list(wanted)
    return [name for name in linear if any(_name_matches(name, ending) for ending in endings)]


def linear_layers(layers: nn.ModuleList, prefix: str = "encoder.layers") -> dict[str, nn.Linear]:
    """The linear layers inside a model's layers, by their names in the model."""
    modules = layers.named_modules(prefix=prefix)
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def inject_adapters(model: nn.Module, layers: nn.ModuleList, config: AdapterConfig, backend: str = "peft") -> list[str]:
    """Adds adapters to linear layers of a model on the meta device, and freezes all other weights but modules_to_save.

    Args:
        layers: those of the model; only their linear layers can have adapters.
        backend: peft or opendelta.

    Returns:
        The names of the linear layers with adapters.

    Raises:
        UserError: for a name in config.layers that no linear layer has, or if the backend is not installed.
    """
    linear = linear_layers(layers)
    for wanted in config.layers:
        if not any(_name_matches(name, wanted) for name in linear):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserError(f"lora_layer: {wanted!r} is not the name of a linear layer; these are: {known}")
    targets = select_target_layers(linear, config.layers)
    for name in targets if config.pissa else ():
        if config.r > (max_rank := min(linear[name].in_features, linear[name].out_features)):
            raise UserError(
                f"lora_r {config.r}: {name} has {max_rank} singular vectors; with PiSSA, lora_r must not be larger"
            )
    model.requires_grad_(False)
    with torch.device("meta"):
        (_inject_with_opendelta if backend == "opendelta" else _inject_with_peft)(model, targets, config)
    for name, weight in model.named_parameters():
        is_saved = name.removesuffix(".weight") in config.modules_to_save
        weight.requires_grad_(is_saved or ".lora." in canonical_name(name))
    return targets


def load_adapter_into(
    module: nn.Module, prefix: str, config: AdapterConfig, weights: Mapping[str, torch.Tensor]
) -> None:
    """Adds the adapters of a file to the linear layers of a module, by PEFT.

    Args:
        module: part of a model, with real weights.
        prefix: the module's name in the model, with a dot at the end; "" for the model itself.
        weights: the content of the file.
    """
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if names := [name for name in linear if prefix + name + A in weights]:
        _inject_with_peft(module, names, replace(config, dropout=0.0))  # for inference
        in_file = {name: prefix + canonical_name(name) for name, _ in module.named_parameters()}
        values = {name: weights[key].float() for name, key in in_file.items() if key in weights}
        module.load_state_dict(values, strict=False, assign=True)


def _name_matches(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _inject_with_peft(model: nn.Module, names: list[str], config: AdapterConfig) -> None:
    with import_peft() as peft:
        lora_config = peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=names,
            use_rslora=config.rslora,
            use_dora=config.dora,
            init_lora_weights=False,  # the engine initializes them, as all weights
        )
        peft.inject_adapter_in_model(lora_config, model, low_cpu_mem_usage=True)


@contextlib.contextmanager
def import_peft() -> Iterator[Any]:
    """Imports PEFT without letting it import bitsandbytes. Raises UserError if PEFT is not installed."""
    with without_bitsandbytes():
        try:
            import peft
        except ImportError as error:
            raise UserError(f"lora_backend peft: the package cannot be used here ({error}); install peft") from None
        yield peft


def _inject_with_opendelta(model: nn.Module, names: list[str], config: AdapterConfig) -> None:
    # Without its freeze_module, which would remove frozen weights from the model's state_dict().
    import_opendelta().LoraModel(
        model,
        lora_r=config.r,
        lora_alpha=config.scaling * config.r,
        lora_dropout=config.dropout,
        modified_modules=names,
    )


def import_opendelta() -> Any:
    """Imports OpenDelta 0.3.2, with stubs for modules that it imports and that are gone or not needed here."""
    if "opendelta" in sys.modules:
        return sys.modules["opendelta"]
    try:
        with _stub_modules():
            import opendelta
    except ImportError as error:
        raise UserError(
            f"lora_backend opendelta: the package cannot be used here ({error}); `pip install --no-deps "
            "opendelta==0.3.2` installs it; --lora_backend peft gives the same adapters"
        ) from None
    return opendelta


@contextlib.contextmanager
def _stub_modules() -> Iterator[None]:
    """Within the block, empty modules replace those that OpenDelta imports and that LoRA does not use."""
    stubs: dict[str, tuple[str, ...]] = {
        "turtle": ("back",),
        "DeltaCenter": ("OssClient",),
        "opendelta.utils.interactive.web": ("interactive",),
        "transformers.deepspeed": ("deepspeed_config", "is_deepspeed_zero3_enabled"),
        "opendelta.delta_models.prefix": ("PrefixModel", "PrefixConfig"),
    }
    import transformers  # noqa: F401 (before the stubs, as it checks whether some of these are installed)

    before = {name: sys.modules.get(name) for name in stubs}
    for name, contents in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        for content in contents:
            setattr(sys.modules[name], content, type(content, (), {}))
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
