"""Adapters in PEFT's layout: a folder of adapter_config.json and adapter_model.safetensors, for the exported base.

9G:    encoder.layers.0.self_att.self_attention.project_q.lora.lora_A
PEFT:  base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

Complete weights of modules_to_save have the base's names behind base_model.model. A weight that embedding and output
share is there under both names, as PEFT writes it with ensure_weight_tying.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fm9g.checkpoint.layout import MANIFEST
from fm9g.config.adapter import ADAPTER_CONFIG, AdapterConfig
from fm9g.config.load import ConfigSource, build
from fm9g.config.train_rules import EMBEDDING, LM_HEAD, canonical_modules
from fm9g.convert.hf_reader import open_hf_folder, open_hf_tensors
from fm9g.convert.model_card import HUB_NAME, peft_card
from fm9g.convert.native_tokenizer import write_json
from fm9g.convert.weight_map import LLAMA_MAP, WeightMap, strip_wrappers
from fm9g.data.encode.tokenizer_files import tokenizer_files
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir
from fm9g.io.inputs import protect_inputs
from fm9g.io.json_file import read_object
from fm9g.io.pt_file import open_pt
from fm9g.io.safetensors_file import open_safetensors
from fm9g.lora.adapter_file import EMBEDDING_WEIGHT, LM_HEAD_WEIGHT, Adapter, check_adapter, copy_tokenizer
from fm9g.lora.base_fingerprint import base_fingerprint
from fm9g.lora.inject import MAGNITUDE, A, B

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."
_EMBEDDING, _HEAD = f"{_PREFIX}model.embed_tokens.weight", f"{_PREFIX}lm_head.weight"
_PEFT_MODULES = {EMBEDDING: "embed_tokens", LM_HEAD: "lm_head"}
_PARTS = {A: ".lora_A.weight", B: ".lora_B.weight", MAGNITUDE: ".lora_magnitude_vector"}
_WEIGHT_MAP = WeightMap(LLAMA_MAP)
# Values of PEFT's keys that our adapters can express. Keys that are not listed have no effect on a trained adapter.
_SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
_MODULE_KEYS = ("target_modules", "exclude_modules", "layers_to_transform")
_LINEAR = {suffix.split(".")[-2] for suffix in LLAMA_MAP.values() if "_proj." in suffix}  # q_proj, gate_proj and so on
_UNSUPPORTED_KEYS = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "mica",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's layout, not in ours."""
    return (folder / ADAPTER_CONFIG).is_file() and "peft_type" in read_object(folder / ADAPTER_CONFIG)


@protect_inputs()
def write_peft(adapter: Adapter, target: Path, base: str = "", overwrite: bool = False) -> None:
    """Writes an adapter as a folder that PEFT loads on the exported base.

    Args:
        base: named as the base in the folder: a Hugging Face folder or a name on a hub (ORG/NAME); default: the base
            it was trained on.

    Raises:
        UserError: PEFT could not load the adapter on that folder.
    """
    modules = {layer: _hf_layer(layer, adapter.path) for layer in adapter.layers}
    if base:
        _check_base(base, adapter, modules)
    tensors = {}
    for name, weight in adapter.weights.items():
        layer, dot, _ = name.rpartition(".lora.")
        hf_name = f"{modules[layer]}{_PARTS[name.removeprefix(layer)]}" if dot else _WEIGHT_MAP.to_hf(name)
        tensors[f"{_PREFIX}{hf_name}"] = weight.float().contiguous()
    if adapter.config.ensure_weight_tying:
        tensors[_HEAD] = tensors[_EMBEDDING].clone()
    base_name = base or adapter.config.base
    config = _peft_config(adapter.config, base_name, sorted(modules.values()))
    adapter.register_inputs()
    with atomic_dir(target, overwrite) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_model.safetensors").chmod(folder.stat().st_mode & 0o666)
        write_json(folder / ADAPTER_CONFIG, config)
        if adapter.tokenizer:
            copy_tokenizer(adapter.tokenizer, folder)
        card = peft_card(adapter, target.resolve().name, base_name, modules.values())
        (folder / "README.md").write_text(card, encoding="utf-8")


def _peft_config(config: AdapterConfig, base: str, modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": modules,  # full names, which select no layer without an adapter
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": [_PEFT_MODULES[name] for name in config.modules_to_save] or None,
        "ensure_weight_tying": config.ensure_weight_tying,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _check_base(base: str, adapter: Adapter, modules: Mapping[str, str]) -> None:
    """Raises UserError if a local base has not each of the adapter's modules as a weight of its own, or was not the
    base in training. A name on a hub passes unchecked.

    Args:
        modules: layer of the adapter -> its name in PEFT's layout.
    """
    folder = Path(base)
    if not folder.exists():
        if HUB_NAME.fullmatch(base) and not folder.parent.exists():
            logger.info(f"--base {base}: no such folder here, so it is taken for a name on a hub and not checked")
            return
        raise UserError(f"--base {base}: no such folder; give a Hugging Face folder, or a name on a hub (ORG/NAME)")
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        kind = "a 9G checkpoint" if folder.is_dir() else "a file"
        raise UserError(f"--base {base}: is {kind}; PEFT loads Hugging Face folders, which `fm9g convert` writes")
    if not (folder / "config.json").is_file():
        raise UserError(f"--base {base}: not a Hugging Face folder (config.json is missing)")
    _check_modules(base, adapter, modules)
    wanted = adapter.config.base_sha256
    if wanted or adapter.config.modules_to_save:
        _, weights = open_hf_folder(folder)
        adapter.check_fits({name: weight.shape for name, weight in weights.items()}, f"--base {base}")
        if wanted and base_fingerprint(weights, lambda name: weights[name].read()) != wanted:
            raise UserError(
                f"--base {base}: is not the base that the adapter was trained on ({adapter.config.base}, SHA-256 "
                f"{wanted[:16]}): its values differ. Any folder with the same values would do"
            )


def _check_modules(base: str, adapter: Adapter, modules: Mapping[str, str]) -> None:
    tensors = open_hf_tensors(Path(base))
    if missing := sorted(module for module in modules.values() if f"{module}.weight" not in tensors):
        raise UserError(
            f"--base {base}: PEFT cannot load the adapter on it: {missing[0]}.weight is missing ({len(missing)} of "
            f"{len(modules)} modules are), since its weights have other names or are packed. Merge the adapter (fm9g "
            "lora merge), or name a folder in the native layout (fm9g convert to a .pt file and back)"
        )
    for layer, module in modules.items():
        if (shape := tensors[f"{module}.weight"].shape) != adapter.shape(layer):
            raise UserError(
                f"--base {base}: {module}.weight is {list(shape)}, the adapter is for {list(adapter.shape(layer))}: it "
                "is of another model"
            )


def _hf_layer(layer: str, path: Path) -> str:
    name = _WEIGHT_MAP.to_hf(f"{layer}.weight")
    if name is None:
        raise UserError(f"{path}: {layer}: is no layer of a 9G model")
    return name.removesuffix(".weight")


def read_peft(folder: Path) -> Adapter:
    """Reads the adapter of a PEFT folder, trained on a model with Llama's names of weights.

    Raises UserError for anything but LoRA, rsLoRA and DoRA, ranks that differ between layers, biases, complete modules
    other than embedding and output, and initializations that changed the base.
    """
    file = folder / ADAPTER_CONFIG
    content = read_object(file)
    for key, supported in _SUPPORTED_VALUES.items():
        if key in content and content[key] not in supported:
            raise UserError(f"{file}: {key}: {content[key]!r} is not supported: {_why(key)}")
    if unsupported := [key for key in _UNSUPPORTED_KEYS if content.get(key)]:
        raise UserError(f"{file}: {unsupported[0]}: this variant of LoRA is not supported")
    weights = {}
    for name, tensor in _read_tensors(folder).items():
        native = _native_name(name)
        if native is None:
            raise UserError(f"{folder}: {name}: has no place in an adapter of a 9G model")
        weights[native] = tensor
    modules_to_save, tied = _saved_modules(content, weights, file)
    if tied:
        del weights[LM_HEAD_WEIGHT]
    keys = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "base_model_name_or_path")
    values = {key: content[key] for key in keys if content.get(key) is not None}
    layers = [name.rpartition(".lora.")[0] for name in weights if ".lora." in name]
    values["target_modules"] = sorted({layer.rpartition(".")[2] for layer in layers})
    values |= {"modules_to_save": modules_to_save, "ensure_weight_tying": tied}
    config = build(AdapterConfig, [ConfigSource(str(file), values)])
    check_adapter(weights, config, folder)
    modules = [_hf_layer(name.removesuffix(A), folder) for name in weights if name.endswith(A)]
    for problem in _contradictions(content, modules):
        raise UserError(f"{file}: {problem}; it does not belong to the weights beside it; get both again")
    return Adapter(config, weights, folder, folder if modules_to_save and tokenizer_files(folder) else None)


def _saved_modules(content: dict[str, Any], weights: Mapping[str, torch.Tensor], file: Path) -> tuple[list[str], bool]:
    """The modules whose complete weights a folder holds, and whether they are one weight under two names.

    PEFT also saves them, without naming them, where their number of tokens was changed.
    """
    named = content.get("modules_to_save") or []
    try:
        modules = canonical_modules(named)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    found = [name for name in (EMBEDDING, LM_HEAD) if f"{name}.weight" in weights]
    if missing := [name for name in modules if name not in found]:
        raise UserError(f"{file}: modules_to_save names {_PEFT_MODULES[missing[0]]}, but its weight is missing")
    may_be_tied = len(found) > 1 and (content.get("ensure_weight_tying") or not modules)
    if may_be_tied and torch.equal(weights[EMBEDDING_WEIGHT], weights[LM_HEAD_WEIGHT]):
        return [EMBEDDING], True
    return found, False


def _contradictions(content: dict[str, Any], modules: list[str]) -> Iterator[str]:
    """Where the keys that select modules disagree with the modules that have weights.

    A string among their values is a regular expression, which only PEFT evaluates.
    """
    targets, excluded, numbers = (content.get(key) for key in _MODULE_KEYS)
    if isinstance(targets, list):
        yield from (f"target_modules does not name {module}" for module in modules if not _is_named(module, targets))
        for target in targets:
            is_known = str(target).rpartition(".")[2] in _LINEAR
            if is_known and not any(_is_named(module, [target]) for module in modules):
                yield f"target_modules names {target}, but the weights hold no adapter for it"
    if isinstance(excluded, list):
        yield from (f"exclude_modules names {module}" for module in modules if _is_named(module, excluded))
    if isinstance(numbers, (int, list)) and numbers != []:
        for module in modules:
            number = int(module.removeprefix("model.layers.").partition(".")[0])
            if number not in (numbers if isinstance(numbers, list) else [numbers]):
                yield f"layers_to_transform leaves out {module}"


def _is_named(module: str, names: list[Any]) -> bool:
    """Whether one of the names selects a module, by PEFT's rule."""
    return any(f".{module}".endswith(f".{name}") for name in names)


def _why(key: str) -> str:
    if key == "init_lora_weights":
        return (
            "its initialization subtracted the adapter's start from the base; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it a plain adapter"
        )
    return "our adapters consist of A and B of one rank for all layers, and nothing else"


def _native_name(name: str) -> str | None:
    if name in (_EMBEDDING, _HEAD):
        return EMBEDDING_WEIGHT if name == _EMBEDDING else LM_HEAD_WEIGHT
    for part, suffix in _PARTS.items():
        if _PREFIX in name and name.endswith(suffix):
            weight = name.partition(_PREFIX)[2].removesuffix(suffix) + ".weight"
            if native := _WEIGHT_MAP.from_hf(strip_wrappers(weight, lambda name: bool(_WEIGHT_MAP.from_hf(name)))):
                return native[0].removesuffix(".weight") + part
    return None


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    for name, reader in (("adapter_model.safetensors", open_safetensors), ("adapter_model.bin", open_pt)):
        if (folder / name).is_file():
            return {key: tensor.read() for key, tensor in reader(folder / name).items()}
    raise UserError(f"{folder}: has no weights; expected adapter_model.safetensors or adapter_model.bin")
