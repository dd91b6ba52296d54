"""Model families that fm9g converts: one row of FAMILIES each, by the model_type of config.json.

A row gives the names of weights, the configuration as a Llama one, and, if queries, keys and values are fused into one
weight, their rows in it. Both directions of a conversion follow from it.

    qkv_concatenated     q0 q1 q2 q3 | k0 k1 | v0 v1        (4 query heads, 2 key heads)
    qkv_interleaved      q0 q1 k0 v0 | q2 q3 k1 v1
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fm9g.config.model import ModelConfig
from fm9g.convert.weight_map import NameTable, WeightMap, llama_map_with, strip_wrappers
from fm9g.errors import UserError
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor

QKVLayout = list[tuple[str, int]]  # (q, k or v; number of its next rows), in the order of the fused weight
HFConfig = dict[str, Any]


class UnsupportedConfigError(Exception):
    """A configuration that 9G cannot represent. args: the key, and the reason."""


@dataclass(frozen=True)
class Family:
    """How a family's folders relate to 9G models.

    Args:
        table: 9G name -> the family's name of each weight.
        qkv_layout: rows of the fused weight of queries, keys and values; None: they are three weights.
        to_llama_config: rewrites a configuration with Llama's keys. Raises UnsupportedConfigError.
        defaults: of the published configuration class, for keys that are not given; None: transformers has the class.
        has_normalized_head: whether a model normalizes the rows of its output weights before multiplying.
    """

    table: NameTable = field(default_factory=llama_map_with)
    qkv_layout: Callable[[ModelConfig], QKVLayout] | None = None
    to_llama_config: Callable[[HFConfig], HFConfig] = dict
    defaults: HFConfig | None = None
    has_normalized_head: Callable[[HFConfig], bool] = lambda hf: False

    @property
    def names(self) -> WeightMap:
        return WeightMap(self.table)


def qkv_concatenated(config: ModelConfig) -> QKVLayout:
    """All queries, then all keys, then all values."""
    kv_dim = config.num_kv_heads * config.head_dim
    return [("q", config.num_heads * config.head_dim), ("k", kv_dim), ("v", kv_dim)]


def qkv_interleaved(config: ModelConfig) -> QKVLayout:
    """For each key head its queries, its keys and its values."""
    group = config.num_heads // config.num_kv_heads
    return [("q", group * config.head_dim), ("k", config.head_dim), ("v", config.head_dim)] * config.num_kv_heads


def _qwen(hf: HFConfig) -> HFConfig:
    """Qwen of 2023: intermediate_size counts gate and up together, and rope is stretched only beyond seq_length."""
    if not hf.get("no_bias", True):
        raise UnsupportedConfigError("no_bias", "is false: 9G has biases only on queries, keys and values")
    return hf | {
        "intermediate_size": hf["intermediate_size"] // 2,
        "head_dim": hf["kv_channels"],
        "rms_norm_eps": hf["layer_norm_epsilon"],
        "rope_theta": hf["rotary_emb_base"],
        "max_position_embeddings": hf.get("seq_length") or hf["max_position_embeddings"],
        "hidden_act": "silu",
        "qkv_bias": True,
    }


def _baichuan(hf: HFConfig) -> HFConfig:
    if "max_position_embeddings" not in hf:
        raise UnsupportedConfigError(
            "max_position_embeddings", "is missing, as in Baichuan 13B, which uses ALiBi positions"
        )
    return hf


def _internlm2(hf: HFConfig) -> HFConfig:
    if hf.get("bias", True):
        raise UnsupportedConfigError(
            "bias", "is not false: 9G has no biases on the output projection and the feed-forward layers"
        )
    return hf


def _is_baichuan2(hf: HFConfig) -> bool:
    return "z_loss_weight" in hf or hf.get("vocab_size") == 125696


_QWEN_NAMES = llama_map_with(
    ("model.embed_tokens", "transformer.wte"),
    ("model.norm", "transformer.ln_f"),
    ("model.layers.{n}.", "transformer.h.{n}."),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
    ("self_attn.o_proj", "attn.c_proj"),
    *((f"self_attn.{part}_proj", "attn.c_attn") for part in "qkv"),
    ("mlp.gate_proj", "mlp.w2"),
    ("mlp.up_proj", "mlp.w1"),
    ("mlp.down_proj", "mlp.c_proj"),
)
_INTERNLM2_NAMES = llama_map_with(
    ("model.embed_tokens", "model.tok_embeddings"),
    ("lm_head", "output"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attention.wo"),
    *((f"self_attn.{part}_proj", "attention.wqkv") for part in "qkv"),
    ("mlp.gate_proj", "feed_forward.w1"),
    ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
)
_BAICHUAN_NAMES = llama_map_with(*((f"self_attn.{part}_proj", "self_attn.W_pack") for part in "qkv"))
_COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_COMMON_7B = _COMMON | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_MINICPM_DEFAULTS = _COMMON_7B | {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "scale_emb": 1,
    "scale_depth": 1,
    "dim_model_base": 1,
}
_XVERSE_DEFAULTS = _COMMON | {  # of the 13B
    "vocab_size": 100278,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 8192,
}
_YI_DEFAULTS = _COMMON_7B | {
    "vocab_size": 64000,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000000.0,
}
_QWEN_DEFAULTS = _COMMON_7B | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "max_position_embeddings": 8192,
}
_INTERNLM2_DEFAULTS = _COMMON_7B | {"vocab_size": 103168, "max_position_embeddings": 2048}

FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(to_llama_config=lambda hf: hf | {"qkv_bias": True}),
    "qwen3": Family(to_llama_config=lambda hf: hf | {"qk_norm": True}),
    "granite": Family(),
    "fm9g": Family(defaults=_COMMON | {"max_position_embeddings": 8192}),
    "minicpm": Family(defaults=_MINICPM_DEFAULTS),
    "xverse": Family(defaults=_XVERSE_DEFAULTS),
    "Yi": Family(
        table=llama_map_with(("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2")), defaults=_YI_DEFAULTS
    ),
    "qwen": Family(table=_QWEN_NAMES, qkv_layout=qkv_concatenated, to_llama_config=_qwen, defaults=_QWEN_DEFAULTS),
    "baichuan": Family(
        table=_BAICHUAN_NAMES,
        qkv_layout=qkv_concatenated,
        to_llama_config=_baichuan,
        defaults=_COMMON_7B | {"vocab_size": 64000},
        has_normalized_head=_is_baichuan2,
    ),
    "internlm2": Family(
        table=_INTERNLM2_NAMES, qkv_layout=qkv_interleaved, to_llama_config=_internlm2, defaults=_INTERNLM2_DEFAULTS
    ),
}


def family_of(hf: HFConfig, where: str) -> Family:
    """The family of a configuration. Raises UserError for an unknown model_type."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def default_config(kind: str) -> HFConfig:
    """The values that the configuration class of a model_type uses for keys that are not given."""
    if (defaults := FAMILIES[kind].defaults) is not None:
        return defaults
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parameters = inspect.signature(CONFIG_MAPPING[kind].__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    # transformers 5 keeps the default of rope_theta apart.
    return defaults | {"rope_theta": getattr(CONFIG_MAPPING[kind], "default_theta", defaults.get("rope_theta"))}


def from_hf_weights(
    family: Family, config: ModelConfig, tensors: Mapping[str, LazyTensor], where: str
) -> dict[str, LazyConcat]:
    """Splits and renames the tensors of a folder to 9G weights.

    Args:
        where: the folder, for messages.

    Raises:
        UserError: a tensor has no 9G name, two have the same, or a fused one has the wrong number of rows.
    """
    names = family.names
    weights: dict[str, LazyConcat] = {}
    unknown = []
    for raw_name, tensor in tensors.items():
        name = strip_wrappers(raw_name, lambda name: bool(names.from_hf(name)))
        native = names.from_hf(name)
        if doubled := weights.keys() & native:
            raise UserError(f"{where}: {raw_name}: is there twice, as {min(doubled)}; remove the one that is wrong")
        if not native and not name.endswith("rotary_emb.inv_freq"):  # a constant in old folders
            unknown.append(raw_name)
        elif len(native) == 1:
            weights[native[0]] = LazyConcat((tensor,), tensor.dtype)
        elif native:
            assert family.qkv_layout, name
            parts = _split_qkv(tensor, family.qkv_layout(config), f"{where}: {name}")
            weights |= {each: LazyConcat(tuple(parts[_qkv_part(each)]), tensor.dtype) for each in native}
    if unknown:
        raise UserError(f"{where}: {min(unknown)} and {len(unknown) - 1} more have no place in a 9G model")
    return weights


def to_hf_weights(family: Family, config: ModelConfig, weights: Mapping[str, LazyConcat]) -> dict[str, LazyConcat]:
    """Fuses and renames 9G weights to a family's, in the order of the 9G ones.

    Weights to be fused must be unchanged tensors of files: rows of them are put together without reading values.
    """
    names = family.names
    groups: dict[str, dict[str, LazyConcat]] = {}
    for name, tensor in weights.items():
        hf_name = names.to_hf(name)
        if hf_name is None:
            raise UserError(
                f"{tensor.parts[0].file}: {name}: the layout has no such weight; leave --keep-reference-config away"
            )
        groups.setdefault(hf_name, {})[name] = tensor
    fused = {}
    for hf_name, group in groups.items():
        if len(group) == 1:
            fused[hf_name] = next(iter(group.values()))
            continue
        assert family.qkv_layout, hf_name
        assert all(tensor.transform is None and len(tensor.parts) == 1 for tensor in group.values()), hf_name
        tensors = {_qkv_part(name): tensor.parts[0] for name, tensor in group.items()}
        next_row, parts = dict.fromkeys("qkv", 0), []
        for kind, count in family.qkv_layout(config):
            parts.append(tensors[kind].rows(next_row[kind], next_row[kind] + count))
            next_row[kind] += count
        fused[hf_name] = LazyConcat(tuple(parts), parts[0].dtype)
    return fused


def _split_qkv(tensor: LazyTensor, layout: QKVLayout, where: str) -> dict[str, list[LazyTensor]]:
    """The rows of queries, keys and values in a fused weight."""
    total = sum(count for _, count in layout)
    if not tensor.shape or tensor.shape[0] != total:
        raise UserError(f"{where}: shape {list(tensor.shape)}, expected {total} rows, for queries, keys and values")
    parts: dict[str, list[LazyTensor]] = {"q": [], "k": [], "v": []}
    start = 0
    for kind, count in layout:
        parts[kind].append(tensor.rows(start, start + count))
        start += count
    return parts


def _qkv_part(name: str) -> str:
    """q, k or v, from the 9G name of a projection."""
    return name.rsplit(".", 2)[1].removeprefix("project_")


def normalized(rows: torch.Tensor, first_row: int) -> torch.Tensor:
    """Each row divided by its norm, in fp32; the result has the type of the rows.

    Interrupted conversions resume by this function's __name__: it is part of the journal's fingerprint.
    """
    return torch.nn.functional.normalize(rows.float()).to(rows.dtype)
