"""The families of models whose folders are read and written: an entry each, by the model_type of config.json.

A family says how its weights are called, how its configuration reads in the terms of Llama's, and, where queries, keys
and values are one weight, in which rows each of them lies. Out of these come both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fm9g.checkpoint.stored import Gathered, Stored
from fm9g.config.model import ModelConfig
from fm9g.convert.names import Names, Table, renamed
from fm9g.errors import UserError

Blocks = list[tuple[str, int]]  # q, k or v, and how many of its rows come next
Values = dict[str, Any]


class UnfitError(Exception):
    """A key of a configuration that asks for what 9G has not. args: the key, and the reason."""


@dataclass(frozen=True)
class Family:
    """table: the names of weights. blocks: the rows of a packed weight. terms: a configuration in Llama's terms.

    tied: what it means that tie_word_embeddings is not given. normed_head: whether the model of a configuration
    normalizes the rows of its output weights before it multiplies with them.
    """

    table: Table = field(default_factory=renamed)
    blocks: Callable[[ModelConfig], Blocks] | None = None
    terms: Callable[[Values], Values] = dict
    tied: bool = False
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
        "head_dim": hf.get("kv_channels"),
        "rms_norm_eps": hf.get("layer_norm_epsilon", 1e-6),
        "rope_theta": hf.get("rotary_emb_base", 10000),
        "max_position_embeddings": hf.get("seq_length") or hf.get("max_position_embeddings", 8192),
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


def _minicpm(hf: Values) -> Values:
    """Its class always scales, with these values where none are given."""
    return {"scale_emb": 1, "scale_depth": 1, "dim_model_base": 1} | hf


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

FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(terms=lambda hf: hf | {"qkv_bias": True}),
    "qwen3": Family(terms=lambda hf: hf | {"qk_norm": True}),
    "granite": Family(),
    "fm9g": Family(),
    "minicpm": Family(terms=_minicpm, tied=True),
    "xverse": Family(),
    "Yi": Family(table=renamed(("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2"))),
    "qwen": Family(table=_QWEN_NAMES, blocks=one_after_the_other, terms=_qwen),
    "baichuan": Family(table=_BAICHUAN_NAMES, blocks=one_after_the_other, terms=_baichuan, normed_head=_is_baichuan2),
    "internlm2": Family(table=_INTERNLM2_NAMES, blocks=by_key_head, terms=_internlm2),
}


def family_of(hf: Values, where: str) -> Family:
    """The family of a configuration. Raises UserError for one that is not known."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r} is not one that can be read: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def unpack(family: Family, config: ModelConfig, tensors: Mapping[str, Stored], where: str) -> dict[str, Gathered]:
    """The weights of a folder under their 9G names. Raises UserError where one has none."""
    names = family.names
    weights: dict[str, Gathered] = {}
    unknown = []
    for name, tensor in tensors.items():
        ours = names.ours(name)
        if not ours and not name.endswith("rotary_emb.inv_freq"):  # a constant that old folders hold
            unknown.append(name)
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
