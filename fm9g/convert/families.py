"""The families of models whose folders are read and written: an entry each, by the model_type of config.json.

A family says how its weights are called, how its configuration reads in the terms of Llama's, and, where queries, keys
and values are one weight, in which rows each of them lies. Out of these come both directions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fm9g.checkpoint.stored import Gathered, Stored
from fm9g.config.model import ModelConfig
from fm9g.convert.names import Names, Table, bare, renamed
from fm9g.errors import UserError

Blocks = list[tuple[str, int]]  # q, k or v, and how many of its rows come next
Values = dict[str, Any]


class UnfitError(Exception):
    """A key of a configuration that asks for what 9G has not. args: the key, and the reason."""


@dataclass(frozen=True)
class Family:
    """table: the names of weights. blocks: the rows of a packed weight. terms: a configuration in Llama's terms.

    defaults: what the published configuration class takes for keys that are not given; None: transformers has the
    class. normed_head: whether the model of a configuration normalizes the rows of its output weights before it
    multiplies with them.
    """

    table: Table = field(default_factory=renamed)
    blocks: Callable[[ModelConfig], Blocks] | None = None
    terms: Callable[[Values], Values] = dict
    defaults: Values | None = None
    normed_head: Callable[[Values], bool] = lambda hf: False

    @property
    def names(self) -> Names:
        return Names(self.table)


def one_after_the_other(config: ModelConfig) -> Blocks:
    """All queries, then all keys, then all values."""
    shared = config.num_kv_heads * config.head_dim
    return [("q", config.num_heads * config.head_dim), ("k", shared), ("v", shared)]


def by_key_head(config: ModelConfig) -> Blocks:
    """For each key head the queries that share it, itself, and its values."""
    group = config.num_heads // config.num_kv_heads
    return [("q", group * config.head_dim), ("k", config.head_dim), ("v", config.head_dim)] * config.num_kv_heads


def _qwen(hf: Values) -> Values:
    """Qwen of 2023: two halves of a feed-forward width, and stretches that begin beyond seq_length only."""
    if not hf.get("no_bias", True):
        raise UnfitError("no_bias", "is false: 9G has biases on queries, keys and values alone")
    return hf | {
        "intermediate_size": hf["intermediate_size"] // 2,
        "head_dim": hf["kv_channels"],
        "rms_norm_eps": hf["layer_norm_epsilon"],
        "rope_theta": hf["rotary_emb_base"],
        "max_position_embeddings": hf.get("seq_length") or hf["max_position_embeddings"],
        "hidden_act": "silu",
        "qkv_bias": True,
    }


def _baichuan(hf: Values) -> Values:
    if "max_position_embeddings" not in hf:
        raise UnfitError("max_position_embeddings", "is missing: a 13B of Baichuan, whose positions are ALiBi")
    return hf


def _internlm2(hf: Values) -> Values:
    if hf.get("bias", True):
        raise UnfitError("bias", "is not false: 9G has no biases on the output projection and the feed-forward layers")
    return hf


def _is_baichuan2(hf: Values) -> bool:
    return "z_loss_weight" in hf or hf.get("vocab_size") == 125696


_QWEN_NAMES = renamed(
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
_INTERNLM2_NAMES = renamed(
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
_BAICHUAN_NAMES = renamed(*((f"self_attn.{part}_proj", "self_attn.W_pack") for part in "qkv"))
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
_XVERSE_DEFAULTS = _COMMON | {  # those of its 13B
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
    "qwen2": Family(terms=lambda hf: hf | {"qkv_bias": True}),
    "qwen3": Family(terms=lambda hf: hf | {"qk_norm": True}),
    "granite": Family(),
    "fm9g": Family(defaults=_COMMON | {"max_position_embeddings": 8192}),
    "minicpm": Family(defaults=_MINICPM_DEFAULTS),
    "xverse": Family(defaults=_XVERSE_DEFAULTS),
    "Yi": Family(table=renamed(("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2")), defaults=_YI_DEFAULTS),
    "qwen": Family(table=_QWEN_NAMES, blocks=one_after_the_other, terms=_qwen, defaults=_QWEN_DEFAULTS),
    "baichuan": Family(
        table=_BAICHUAN_NAMES,
        blocks=one_after_the_other,
        terms=_baichuan,
        defaults=_COMMON_7B | {"vocab_size": 64000},
        normed_head=_is_baichuan2,
    ),
    "internlm2": Family(table=_INTERNLM2_NAMES, blocks=by_key_head, terms=_internlm2, defaults=_INTERNLM2_DEFAULTS),
}


def family_of(hf: Values, where: str) -> Family:
    """The family of a configuration. Raises UserError for one that is not known."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r} is not one that can be read: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def defaults_of(kind: str) -> Values:
    """What the configuration class of a model_type takes for keys that are not given."""
    if (known := FAMILIES[kind].defaults) is not None:
        return known
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parameters = inspect.signature(CONFIG_MAPPING[kind].__init__).parameters.values()
    given = {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
    # From 5 on, rope_theta has its default apart.
    return given | {"rope_theta": getattr(CONFIG_MAPPING[kind], "default_theta", given.get("rope_theta"))}


def unpack(family: Family, config: ModelConfig, tensors: Mapping[str, Stored], where: str) -> dict[str, Gathered]:
    """The weights of a folder under their 9G names. Raises UserError where one has none."""
    names = family.names
    weights: dict[str, Gathered] = {}
    unknown = []
    for stored_as, tensor in tensors.items():
        name = bare(stored_as, lambda name: bool(names.ours(name)))
        ours = names.ours(name)
        if doubled := weights.keys() & ours:
            raise UserError(f"{where}: {stored_as}: is there twice, as {min(doubled)}; remove the one that is wrong")
        if not ours and not name.endswith("rotary_emb.inv_freq"):  # a constant that old folders hold
            unknown.append(stored_as)
        elif len(ours) == 1:
            weights[ours[0]] = Gathered((tensor,), tensor.dtype)
        elif ours:
            assert family.blocks, name
            parts = _rows(tensor, family.blocks(config), f"{where}: {name}")
            weights |= {each: Gathered(tuple(parts[_kind(each)]), tensor.dtype) for each in ours}
    if unknown:
        raise UserError(f"{where}: {min(unknown)} and {len(unknown) - 1} more have no place in a 9G model")
    return weights


def pack(family: Family, config: ModelConfig, weights: Mapping[str, Gathered]) -> dict[str, Gathered]:
    """A 9G model's weights under the family's names, in their order. Those that are packed must be as in a file."""
    names = family.names
    groups: dict[str, dict[str, Gathered]] = {}
    for name, tensor in weights.items():
        theirs = names.theirs(name)
        if theirs is None:
            raise UserError(
                f"{tensor.parts[0].file}: {name}: the layout has no such weight; leave --keep-reference-config away"
            )
        groups.setdefault(theirs, {})[name] = tensor
    packed = {}
    for theirs, group in groups.items():
        if len(group) == 1:
            packed[theirs] = next(iter(group.values()))
            continue
        assert family.blocks, theirs
        assert all(tensor.change is None and len(tensor.parts) == 1 for tensor in group.values()), theirs
        rows, parts = dict.fromkeys("qkv", 0), []
        kinds = {_kind(name): tensor.parts[0] for name, tensor in group.items()}
        for kind, count in family.blocks(config):
            parts.append(kinds[kind].rows(rows[kind], rows[kind] + count))
            rows[kind] += count
        packed[theirs] = Gathered(tuple(parts), parts[0].dtype)
    return packed


def _rows(tensor: Stored, blocks: Blocks, where: str) -> dict[str, list[Stored]]:
    """The rows of queries, keys and values in a packed weight."""
    total = sum(count for _, count in blocks)
    if not tensor.shape or tensor.shape[0] != total:
        raise UserError(f"{where}: shape {list(tensor.shape)}, expected {total} rows, of queries, keys and values")
    parts: dict[str, list[Stored]] = {"q": [], "k": [], "v": []}
    start = 0
    for kind, count in blocks:
        parts[kind].append(tensor.rows(start, start + count))
        start += count
    return parts


def _kind(name: str) -> str:
    """q, k or v, of the 9G name of a projection."""
    return name.rsplit(".", 2)[1].removeprefix("project_")


def normalized(rows: torch.Tensor, first: int) -> torch.Tensor:
    """Each row divided by its length, in fp32; same type out."""
    return torch.nn.functional.normalize(rows.float()).to(rows.dtype)
