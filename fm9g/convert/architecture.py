"""Which transformers class has a 9G model's arithmetic, and the two configurations in terms of each other.

Without scaling it is Qwen2's (biases on q, k, v) or Llama's (none). The scaled models are Granite's:
embedding_multiplier = scale_emb, residual_multiplier = scale_depth / sqrt(num_layers),
logits_scaling = dim_model / dim_model_base, attention_multiplier = 1 / sqrt(dim_head).
"""

from __future__ import annotations

import math
from typing import Any

from fm9g.config.load import Layer, build
from fm9g.config.model import ModelConfig
from fm9g.errors import UserError

CLASSES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "granite": "GraniteForCausalLM"}
READABLE = (*CLASSES, "minicpm", "fm9g")
_ROPE_OUT = {"linear": "linear", "dynamic ntk": "dynamic", "yarn": "yarn", "ntk-by-parts": "yarn"}


def native_type(config: ModelConfig) -> str:
    """The model_type of the transformers class with this arithmetic. Raises UserError where there is none."""
    if config.scale or config.scale_depth > 0:
        if config.qkv_bias:
            raise UserError("qkv_bias with scaled arithmetic: no transformers class has both, so it cannot be exported")
        return "granite"
    return "qwen2" if config.qkv_bias else "llama"


def to_hf_config(config: ModelConfig, dtype: str, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """The config.json of the native transformers class. dtype: of the weights, as torch names it ("bfloat16")."""
    kind = native_type(config)
    theta = config.rope_theta
    if config.rope_scaling == "ntk-aware":  # nothing but another base
        theta *= config.rope_factor ** (config.head_dim / (config.head_dim - 2))
    hf: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": theta,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }
    if kind != "qwen2":
        hf |= {"attention_bias": False, "mlp_bias": False}
    if kind == "granite":
        hf |= {
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.scale_width,
            "attention_multiplier": config.head_dim**-0.5,
        }
    if config.rope_scaling in _ROPE_OUT:
        scaling: dict[str, Any] = {"rope_type": _ROPE_OUT[config.rope_scaling], "factor": config.rope_factor}
        if scaling["rope_type"] == "yarn":
            scaling["original_max_position_embeddings"] = config.orig_max_length
        if config.rope_scaling == "ntk-by-parts":
            scaling["attention_factor"] = 1.0  # YaRN without its sharper attention
        hf["rope_scaling"] = scaling
        if config.rope_scaling == "dynamic ntk":
            # transformers stretches beyond this length, and takes no other for the original one
            hf["max_position_embeddings"] = config.orig_max_length
    return hf


def from_hf_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """The 9G configuration of a Hugging Face one. Raises UserError for arithmetic that 9G has not."""
    try:
        return _from_hf_config(hf, where)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]}: missing") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a value is not of the kind that belongs there: {error}") from None


def _from_hf_config(hf: dict[str, Any], where: str) -> ModelConfig:
    kind = hf.get("model_type", "")
    if kind not in READABLE:
        raise UserError(f"{where}: model_type {kind!r} is not one that can be read: {', '.join(READABLE)}")
    heads, layers, hidden = hf["num_attention_heads"], hf["num_hidden_layers"], hf["hidden_size"]
    head_dim = hf.get("head_dim") or hidden // heads
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    values: dict[str, Any] = {
        "vocab_size": hf["vocab_size"],
        "dim_model": hidden,
        "dim_ff": hf["intermediate_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "dim_head": head_dim,
        "activate_fn": hf.get("hidden_act", "silu"),
        "eps": hf.get("rms_norm_eps", 1e-6),
        "init_std": hf.get("initializer_range", 0.02),
        "qkv_bias": kind == "qwen2" or bool(hf.get("qkv_bias")),
        "tie_lm_head": bool(hf.get("tie_word_embeddings")),
        "base": float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        "max_length": hf.get("max_position_embeddings", 8192),
        "half_type": {"bfloat16": "bf16", "float16": "fp16"}.get(str(hf.get("dtype") or hf.get("torch_dtype")), "fp32"),
    }
    values |= _scaling_from_hf(hf, head_dim, layers, hidden, where) | _rope_from_hf(hf, rope, where)
    refused = {
        "attention_bias": bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "partial_rotary_factor": float(rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))) != 1.0,
    }
    for key, present in refused.items():
        if present:
            raise UserError(f"{where}: {key}: the 9G arithmetic has no such thing; the model cannot be read")
    return build(ModelConfig, [Layer(where, values)]).value


def _scaling_from_hf(hf: dict[str, Any], head_dim: int, layers: int, hidden: int, where: str) -> dict[str, Any]:
    if hf["model_type"] == "granite":
        if not math.isclose(hf.get("attention_multiplier", 1.0), head_dim**-0.5, rel_tol=1e-6):
            raise UserError(f"{where}: attention_multiplier is not 1/sqrt(head_dim); the model cannot be read")
        return {
            "scale": True,
            "scale_emb": float(hf.get("embedding_multiplier", 1.0)),
            "scale_depth": round(hf.get("residual_multiplier", 1.0) * math.sqrt(layers), 10),
            "dim_model_base": round(hidden / hf.get("logits_scaling", 1.0)),
        }
    if hf.get("dim_model_base") and hf["model_type"] != "qwen2" and "scale_depth" in hf:
        scaled = hf["scale_depth"] > 0
        emb = {"scale_emb": float(hf.get("scale_emb", 1.0)), "dim_model_base": hf["dim_model_base"]} if scaled else {}
        return {"scale": scaled, "scale_depth": float(hf["scale_depth"]), **emb}
    return {}


def _rope_from_hf(hf: dict[str, Any], rope: dict[str, Any], where: str) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {}
    original = rope.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 8192)
    factor = float(rope.get("factor", 1.0))
    plain_yarn = not any(rope.get(key) for key in ("mscale", "mscale_all_dim"))
    plain_yarn &= (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) == (32, 1) and rope.get("truncate", True)
    if kind == "yarn" and plain_yarn and rope.get("attention_factor") in (None, 1.0):
        name = "yarn" if rope.get("attention_factor") is None else "ntk-by-parts"
        return {"rope_scaling_type": name, "rope_scaling_factor": factor, "orig_max_length": original}
    if kind == "dynamic":
        longest = max(original, int(original * factor))
        return {
            "rope_scaling_type": "dynamic ntk",
            "rope_scaling_factor": factor,
            "orig_max_length": original,
            "max_length": longest,
        }
    if kind == "linear":
        return {"rope_scaling_type": "linear", "rope_scaling_factor": factor}
    raise UserError(f"{where}: rope_type {kind!r} with {rope}: the 9G arithmetic has no such positions")
