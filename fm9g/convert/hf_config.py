"""Converts configurations between 9G and Hugging Face, and chooses the transformers class with the same arithmetic.

Unscaled 9G models are Qwen2 (biases on q, k, v), Qwen3 (norms of q and k), or Llama and Mistral (neither). Scaled ones
are Granite:

    embedding_multiplier = scale_emb                  logits_scaling       = dim_model / dim_model_base
    residual_multiplier  = scale_depth / sqrt(layers)  attention_multiplier = attention_scale
"""

from __future__ import annotations

import math
from typing import Any

from fm9g.config.load import ConfigSource, build
from fm9g.config.model import LAYER_TYPES, ModelConfig, check_sizes, values_differ
from fm9g.convert.families import UnsupportedConfigError, default_config, family_of
from fm9g.errors import UserError

HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
_ROPE_TYPES = {"linear": "linear", "dynamic ntk": "dynamic", "yarn": "yarn", "ntk-by-parts": "yarn", "llama3": "llama3"}
_ORIGINAL_LENGTH = "original_max_position_embeddings"
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "expert_num")


def native_model_type(config: ModelConfig) -> str:
    """The model_type of the transformers class with this arithmetic. Raises UserError if there is none."""
    windows = set(config.windows)
    scaled = config.scale or config.scale_depth > 0 or values_differ(config.attention_multiplier, config.head_dim**-0.5)
    flags = {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm, "scaled arithmetic": scaled}
    features = [name for name, is_on in flags.items() if is_on]
    if len(features) > 1:
        raise UserError(f"{' with '.join(features)}: no transformers class has both, so it cannot be exported")
    if not features:
        if windows == {0}:
            return "llama"
        if len(windows) == 1:
            return "mistral"
        raise UserError("sliding windows in some layers: no transformers class without biases or norms has them")
    if scaled and windows != {0}:
        raise UserError(
            "scaled arithmetic with sliding windows: no transformers class has both, so it cannot be exported"
        )
    return {"qkv_bias": "qwen2", "qk_norm": "qwen3", "scaled arithmetic": "granite"}[features[0]]


def to_hf_config(
    config: ModelConfig, dtype: str, bos_id: int | None, eos_id: int | None, like: str = ""
) -> dict[str, Any]:
    """The config.json of a 9G model's transformers class.

    Args:
        dtype: of the weights, as torch names it ("bfloat16").
        like: model_type of the folder that the model came from; what fits Llama may stay Mistral.
    """
    kind = native_model_type(config)
    if kind == "llama" and like == "mistral":
        kind = like
    hf: dict[str, Any] = {
        "architectures": [HF_CLASSES[kind]],
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
        "rope_theta": config.rope_theta,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }
    return hf | _class_keys(config, kind) | _hf_rope_keys(config)


def _class_keys(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Keys that only some classes have."""
    hf: dict[str, Any] = {}
    if kind in ("llama", "granite"):
        hf |= {"attention_bias": False, "mlp_bias": False}
    elif kind == "qwen3":
        hf["attention_bias"] = False
    elif kind == "mistral":
        hf["sliding_window"] = config.sliding_window or None
    if kind in ("qwen2", "qwen3") and any(config.windows):
        layer_types = [LAYER_TYPES[window > 0] for window in config.windows]
        hf |= {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": layer_types}
        hf["max_window_layers"] = layer_types.index("sliding_attention")  # for versions that ignore layer_types
    if kind == "granite":
        hf |= {
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.mup_width,
            "attention_multiplier": config.attention_multiplier,
        }
    return hf


def _hf_rope_keys(config: ModelConfig) -> dict[str, Any]:
    """rope_scaling, and the keys beside it that the kind of scaling changes."""
    if config.rope_scaling == "ntk-aware":  # is nothing but another rope_theta
        exponent = config.head_dim / (config.head_dim - 2)
        return {"rope_theta": config.rope_theta * config.rope_factor**exponent}
    if config.rope_scaling not in _ROPE_TYPES:
        return {}
    scaling: dict[str, Any] = {"rope_type": _ROPE_TYPES[config.rope_scaling], "factor": config.rope_factor}
    if scaling["rope_type"] in ("yarn", "llama3"):
        scaling[_ORIGINAL_LENGTH] = config.orig_max_length
    if scaling["rope_type"] == "llama3":
        scaling["low_freq_factor"] = config.rope_low_freq_factor
        scaling["high_freq_factor"] = config.rope_high_freq_factor
    if scaling["rope_type"] == "yarn":
        scaling |= {"beta_fast": config.rope_beta_fast, "beta_slow": config.rope_beta_slow}
        if config.rope_scaling == "ntk-by-parts" or config.rope_attention_factor:
            scaling["attention_factor"] = config.rotary_multiplier  # ntk-by-parts: attention is not sharpened
    hf: dict[str, Any] = {"rope_scaling": scaling}
    if config.rope_scaling == "dynamic ntk":  # transformers takes this as the original length, and no other key
        hf["max_position_embeddings"] = config.orig_max_length
    return hf


def from_hf_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """The 9G configuration of a Hugging Face one. Raises UserError for arithmetic that 9G lacks.

    Args:
        where: the file, for messages.
    """
    family = family_of(hf, where)
    check_sizes(hf, where)
    try:
        llama_config = family.to_llama_config(default_config(hf["model_type"]) | hf)
        return build(ModelConfig, [ConfigSource(where, _native_keys(llama_config))])
    except UserError:
        raise
    except UnsupportedConfigError as error:
        raise UserError(f"{where}: {error.args[0]} {error.args[1]}; the model cannot be converted") from None
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]}: missing") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a value has the wrong type: {error}") from None


def _native_keys(hf: dict[str, Any]) -> dict[str, Any]:
    """The 9G keys of a configuration with Llama's keys. Raises UnsupportedConfigError."""
    heads, layers, hidden = hf["num_attention_heads"], hf["num_hidden_layers"], hf["hidden_size"]
    head_dim = hf.get("head_dim") or hidden // heads
    rope = _rope_parameters(hf)
    _check_supported(hf, rope)
    values: dict[str, Any] = {
        "vocab_size": hf["vocab_size"],
        "dim_model": hidden,
        "dim_ff": hf["intermediate_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "dim_head": head_dim,
        "activate_fn": {"swish": "silu"}.get(hf["hidden_act"], hf["hidden_act"]),
        "eps": hf["rms_norm_eps"],
        "init_std": hf["initializer_range"],
        "qkv_bias": bool(hf.get("qkv_bias")),
        "qk_norm": bool(hf.get("qk_norm")),
        "tie_lm_head": bool(hf["tie_word_embeddings"]),
        "base": float(rope["rope_theta"]),
        "max_length": hf["max_position_embeddings"],
        "half_type": {"bfloat16": "bf16", "float16": "fp16"}.get(str(hf.get("dtype") or hf.get("torch_dtype")), "fp32"),
    }
    return values | _scaling_keys(hf, head_dim, layers, hidden) | _rope_keys(hf, rope) | _window_keys(hf)


def _check_supported(hf: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raises UnsupportedConfigError for features that 9G lacks, in any family."""
    for key in (key for key in _EXPERT_KEYS if (hf.get(key) or 0) > 1):
        raise UnsupportedConfigError(key, "is above 1: 9G models have no mixture of experts")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise UnsupportedConfigError(key, "is true: 9G has biases only on queries, keys and values")
    for key in ("partial_rotary_factor", "rotary_pct"):
        if float(rope.get(key, hf.get(key) or 1.0)) != 1.0:
            raise UnsupportedConfigError(key, "is not 1: 9G rotates full heads")
    for key in ("alibi", "position_embedding"):
        if hf.get(key) is True or str(hf.get(key)).lower() == "alibi":
            raise UnsupportedConfigError(key, "asks for ALiBi: 9G has rotary positions")
    if hf.get("quantization_config"):
        raise UnsupportedConfigError(
            "quantization_config", "is set: the weights are quantized; take the folder that was quantized"
        )
    if hf.get("sparse_config"):
        raise UnsupportedConfigError("sparse_config", "is set: 9G has no sparse attention")


def _window_keys(hf: dict[str, Any]) -> dict[str, Any]:
    """Windows by layer_types; without these, of all layers in Mistral, from max_window_layers on in Qwen."""
    if hf["model_type"] not in ("mistral", "qwen2", "qwen3"):
        return {}
    layers, window, first_windowed = hf["num_hidden_layers"], hf["sliding_window"], 0
    if hf["model_type"] != "mistral":
        if not isinstance(hf["use_sliding_window"], bool):
            raise UnsupportedConfigError("use_sliding_window", "is neither true nor false")
        window = window if hf["use_sliding_window"] else None
        first_windowed = layers if window is None else hf["max_window_layers"]
    if window is not None and (type(window) is not int or window < 1):
        raise UnsupportedConfigError("sliding_window", f"is {window!r}, not a number of tokens")
    given = hf.get("layer_types")
    if given is not None and (len(given) != layers or not set(given) <= set(LAYER_TYPES)):
        raise UnsupportedConfigError("layer_types", f"is not a list of {layers} times {' or '.join(LAYER_TYPES)}")
    kinds = given or [LAYER_TYPES[window is not None and number >= first_windowed] for number in range(layers)]
    if "sliding_attention" not in kinds:
        return {}
    if not window:
        raise UnsupportedConfigError(
            "layer_types", "has sliding_attention, but use_sliding_window is false or there is no window"
        )
    return {"sliding_window": window, "layer_types": kinds if len(set(kinds)) > 1 else []}


def _scaling_keys(hf: dict[str, Any], head_dim: int, layers: int, hidden: int) -> dict[str, Any]:
    if hf["model_type"] == "granite":
        base = hidden / hf["logits_scaling"]
        if values_differ(base, float(round(base))) or round(base) < 1:
            raise UnsupportedConfigError("logits_scaling", f"does not divide hidden_size {hidden}")
        multiplier = float(hf["attention_multiplier"])
        return {
            "scale": True,
            "mup_lr": False,
            "scale_emb": float(hf["embedding_multiplier"]),
            "scale_depth": round(hf["residual_multiplier"] * math.sqrt(layers), 10),
            "dim_model_base": round(base),
            "attention_scale": multiplier if values_differ(multiplier, head_dim**-0.5) else 0.0,
        }
    if hf["model_type"] in ("minicpm", "fm9g") and hf.get("dim_model_base") and "scale_depth" in hf:
        scaled = hf["scale_depth"] > 0
        emb = {"scale_emb": float(hf.get("scale_emb", 1.0)), "dim_model_base": hf["dim_model_base"]} if scaled else {}
        # The published toolkit trains its scaled models with muP learning rates.
        own = {"mup_lr": hf["model_type"] == "fm9g"}
        return {"scale": scaled, "scale_depth": float(hf["scale_depth"]), **emb, **own}
    return {}


def _rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """The rope settings of a configuration, with the precedence of transformers 5.

    rope_scaling precedes rope_parameters. Its keys precede the ones beside it, except for the original length of yarn
    and llama3.
    """
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedConfigError("rope_parameters", "differ between layers: 9G rotates all layers alike")
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", hf["rope_theta"])
    longest = hf["max_position_embeddings"]
    if rope["rope_type"] in ("yarn", "llama3"):
        rope.setdefault(_ORIGINAL_LENGTH, longest)
        rope[_ORIGINAL_LENGTH] = hf.get(_ORIGINAL_LENGTH) or rope[_ORIGINAL_LENGTH]
    elif rope["rope_type"] == "dynamic":  # which takes no other length as the original one
        rope[_ORIGINAL_LENGTH] = longest
    return rope


def _rope_keys(hf: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope_scaling_type": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind not in ("dynamic", "yarn", "llama3"):
        raise UnsupportedConfigError("rope_scaling", f"is {rope}: 9G has no such kind")
    longest, original = hf["max_position_embeddings"], rope[_ORIGINAL_LENGTH]
    factor = float(longest / original if kind == "yarn" and rope["factor"] is None else rope["factor"])
    values: dict[str, Any] = {"rope_scaling_type": kind, "rope_scaling_factor": factor, "orig_max_length": original}
    if kind == "dynamic":
        return values | {"rope_scaling_type": "dynamic ntk", "max_length": max(original, int(original * factor))}
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return values | {"rope_low_freq_factor": low, "rope_high_freq_factor": high}
    if not rope.get("truncate", True):
        raise UnsupportedConfigError("rope_scaling", f"is {rope}: 9G always rounds the bounds of YaRN (truncate)")
    values |= {
        "rope_beta_fast": float(rope.get("beta_fast") or 32),
        "rope_beta_slow": float(rope.get("beta_slow") or 1),
    }
    attention_factor = rope.get("attention_factor")
    if attention_factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    if attention_factor is not None and not attention_factor > 0:
        raise UnsupportedConfigError("rope_scaling", f"is {rope}: attention_factor is not above 0")
    if attention_factor == 1.0:
        return values | {"rope_scaling_type": "ntk-by-parts"}
    return values | ({} if attention_factor is None else {"rope_attention_factor": float(attention_factor)})


def _mscale(factor: float, weight: float) -> float:
    """YaRN's attention factor, in DeepSeek's form."""
    return 0.1 * weight * math.log(factor) + 1.0
