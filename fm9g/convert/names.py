"""The names of weights in 9G files and in Hugging Face folders: one table for both directions."""

from __future__ import annotations

import re

# {n} is the number of a layer, {p} ends in weight or bias. The Hugging Face side is that of Llama, Qwen2 and Granite.
TABLE = [
    ("input_embedding.weight", "model.embed_tokens.weight"),
    ("encoder.output_layernorm.weight", "model.norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("encoder.layers.{n}.self_att.layernorm_before_attention.weight", "model.layers.{n}.input_layernorm.weight"),
    ("encoder.layers.{n}.self_att.self_attention.project_q.{p}", "model.layers.{n}.self_attn.q_proj.{p}"),
    ("encoder.layers.{n}.self_att.self_attention.project_k.{p}", "model.layers.{n}.self_attn.k_proj.{p}"),
    ("encoder.layers.{n}.self_att.self_attention.project_v.{p}", "model.layers.{n}.self_attn.v_proj.{p}"),
    ("encoder.layers.{n}.self_att.self_attention.attention_out.weight", "model.layers.{n}.self_attn.o_proj.weight"),
    ("encoder.layers.{n}.ffn.layernorm_before_ffn.weight", "model.layers.{n}.post_attention_layernorm.weight"),
    ("encoder.layers.{n}.ffn.ffn.w_in.w_0.weight", "model.layers.{n}.mlp.gate_proj.weight"),
    ("encoder.layers.{n}.ffn.ffn.w_in.w_1.weight", "model.layers.{n}.mlp.up_proj.weight"),
    ("encoder.layers.{n}.ffn.ffn.w_out.weight", "model.layers.{n}.mlp.down_proj.weight"),
]


def _compile(side: int) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for row in TABLE:
        pattern = re.escape(row[side]).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{p\}", r"(?P<p>weight|bias)")
        rules.append((re.compile(pattern), row[1 - side]))
    return rules


_TO_HF, _TO_9G = _compile(0), _compile(1)


def to_hf(name: str) -> str | None:
    """The Hugging Face name of a 9G weight, or None where the table has none."""
    return _translate(name, _TO_HF)


def to_9g(name: str) -> str | None:
    """The 9G name of a Hugging Face weight, or None where the table has none."""
    return _translate(name, _TO_9G)


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return template.format(**match.groupdict())
    return None
