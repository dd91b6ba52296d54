"""Names of weights in 9G files and in a family's folders: one table for both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

NameTable = dict[str, str]

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # anywhere in a name
_PREFIXES = ("module.", "model.")
_BASES = ("model.", "transformer.")

_ATTENTION = "encoder.layers.{n}.self_att.self_attention."
# 9G name -> Llama's name, which most families share. {n}: number of the layer; {p}: weight or bias.
LLAMA_MAP: NameTable = {
    "input_embedding.weight": "model.embed_tokens.weight",
    "encoder.output_layernorm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "encoder.layers.{n}.self_att.layernorm_before_attention.weight": "model.layers.{n}.input_layernorm.weight",
    _ATTENTION + "project_q.{p}": "model.layers.{n}.self_attn.q_proj.{p}",
    _ATTENTION + "project_k.{p}": "model.layers.{n}.self_attn.k_proj.{p}",
    _ATTENTION + "project_v.{p}": "model.layers.{n}.self_attn.v_proj.{p}",
    _ATTENTION + "q_norm.weight": "model.layers.{n}.self_attn.q_norm.weight",
    _ATTENTION + "k_norm.weight": "model.layers.{n}.self_attn.k_norm.weight",
    _ATTENTION + "attention_out.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "encoder.layers.{n}.ffn.layernorm_before_ffn.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "encoder.layers.{n}.ffn.ffn.w_in.w_0.weight": "model.layers.{n}.mlp.gate_proj.weight",
    "encoder.layers.{n}.ffn.ffn.w_in.w_1.weight": "model.layers.{n}.mlp.up_proj.weight",
    "encoder.layers.{n}.ffn.ffn.w_out.weight": "model.layers.{n}.mlp.down_proj.weight",
}


def llama_map_with(*changes: tuple[str, str]) -> NameTable:
    """Llama's table with parts of the Hugging Face names replaced, one change after the other."""
    table = dict(LLAMA_MAP)
    for old, new in changes:
        assert any(old in hf for hf in table.values()), old
        table = {native: hf.replace(old, new) for native, hf in table.items()}
    return table


def strip_wrappers(name: str, known: Callable[[str], bool]) -> str:
    """A weight's name without the prefixes of wrappers such as torch.compile and DistributedDataParallel.

    Args:
        known: whether a name is one of the model's. If no variant is known, the name is returned as it is.
    """
    inner = name
    for wrapper in _WRAPPERS:
        inner = inner.replace(wrapper, "")
    while True:
        for base in ("", *_BASES):  # a model saved without its output layer lacks the base's prefix
            if known(base + inner):
                return base + inner
        prefix = next((prefix for prefix in _PREFIXES if inner.startswith(prefix)), None)
        if prefix is None:
            return name
        inner = inner.removeprefix(prefix)


class WeightMap:
    """A compiled table. 9G weights that share one Hugging Face name are fused into one weight there (packed QKV)."""

    def __init__(self, table: NameTable) -> None:
        self._to_hf = [(_pattern(native), hf) for native, hf in table.items()]
        self._from_hf = [(_pattern(hf), native) for native, hf in table.items()]

    def to_hf(self, name: str) -> str | None:
        """The family's name of a 9G weight; None: the table has none."""
        return next(_translations(name, self._to_hf), None)

    def from_hf(self, name: str) -> list[str]:
        """The 9G names of the weights in one weight of the family; empty: the table has none."""
        return list(_translations(name, self._from_hf))


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)"))


def _translations(name: str, rules: list[tuple[re.Pattern[str], str]]) -> Iterator[str]:
    return (template.format(**match.groupdict()) for pattern, template in rules if (match := pattern.fullmatch(name)))
