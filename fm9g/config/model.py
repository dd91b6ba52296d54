"""What a 9G model is: the keys of `model_configs/*.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from fm9g.config import foreign
from fm9g.config.fields import key_of, keys_of, option
from fm9g.config.load import ConfigSource, Resolved, build, read_object
from fm9g.errors import UserError

# Keys of published files that change nothing: key -> the values that they may have, and why they change nothing.
DEPRECATED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "ffn_gated": ((True,), "every 9G model has gated feed-forward layers"),
    "flash_attn_mask_shape": (("1d", "2d"), "attention stays within a document, whatever the shape of a mask"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
_LONGEST = 2**31 - 1  # tokens; positions are int32
ROPE_SCALINGS = ("", "linear", "ntk-aware", "dynamic ntk", "ntk-by-parts", "yarn", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """Attributes carry the field's names, `key` the names in 9G files."""

    FOREIGN_KEYS: ClassVar[dict[str, str]] = foreign.MODEL

    vocab_size: int = option(help="number of token ids", minimum=1, maximum=2**24)
    hidden_size: int = option(help="width of the hidden states", key="dim_model", minimum=1, maximum=2**20)
    intermediate_size: int = option(help="width inside the feed-forward layers", key="dim_ff", minimum=1, maximum=2**22)
    num_layers: int = option(help="transformer layers", minimum=1, maximum=2**10)
    num_heads: int = option(help="query heads", minimum=1, maximum=2**14)
    num_kv_heads: int = option(0, help="key and value heads; 0: as many as num_heads", minimum=0, maximum=2**14)
    head_dim: int = option(
        0, help="width of a head; 0: dim_model / num_heads", key="dim_head", minimum=0, maximum=2**16
    )
    activation: str = option("silu", help="of the feed-forward gate", key="activate_fn", enum=["silu", "gelu"])
    norm_eps: float = option(1e-5, help="epsilon of RMSNorm", key="eps", exclusiveMinimum=0)
    dropout: float = option(
        0.0, help="of each residual branch's output, in training", key="dropout_p", minimum=0, exclusiveMaximum=1
    )
    init_std: float = option(0.02, help="standard deviation of initial weights", exclusiveMinimum=0)
    scale: bool = option(False, help="width-scaled arithmetic (2b, 4b): scale_emb and dim_model_base act")
    scale_emb: float = option(1.0, help="embeddings times this, where scale is true", exclusiveMinimum=0)
    scale_depth: float = option(-1.0, help="residual branches times scale_depth/sqrt(num_layers), where > 0")
    base_hidden_size: int = option(
        0, help="hidden states are divided by dim_model/this before the output", key="dim_model_base", minimum=0
    )
    mup_lr: bool = option(
        True, help="where scale is true: lr of linear layers is divided by dim_model / dim_model_base (muP)"
    )
    qkv_bias: bool = option(False, help="biases on the query, key and value projections")
    qk_norm: bool = option(False, help="an RMSNorm on each query and key head, before the rotation (Qwen3)")
    attention_scale: float = option(0.0, help="queries times keys times this; 0: 1/sqrt(dim_head)", minimum=0)
    tie_word_embeddings: bool = option(False, help="output weights are the embedding's", key="tie_lm_head")
    rope_theta: float = option(10000.0, help="base of the rotary embedding", key="base", exclusiveMinimum=1)
    rope_scaling: str = option(
        "",
        help="how rotary positions stretch to longer texts",
        key="rope_scaling_type",
        case_insensitive=True,
        enum=list(ROPE_SCALINGS),
    )
    rope_factor: float = option(1.0, help="by how much positions stretch", key="rope_scaling_factor", minimum=1)
    rope_low_freq_factor: float = option(
        1.0, help="llama3: what turns less often within the original length is divided whole", exclusiveMinimum=0
    )
    rope_high_freq_factor: float = option(
        4.0, help="llama3: what turns more often within the original length stays", exclusiveMinimum=0
    )
    rope_attention_factor: float = option(
        0.0, help="yarn: cosines and sines times this; 0: 0.1 ln(rope_scaling_factor) + 1", minimum=0
    )
    rope_beta_fast: float = option(
        32.0, help="yarn, ntk-by-parts: what turns more often within the original length stays", exclusiveMinimum=0
    )
    rope_beta_slow: float = option(
        1.0, help="yarn, ntk-by-parts: what turns less often within the original length is divided", exclusiveMinimum=0
    )
    sliding_window: int = option(
        0, help="tokens that a token attends to, itself included; 0: all before it", minimum=0, maximum=_LONGEST
    )
    layer_types: list[str] = option(
        [],
        help="where sliding_window is set: full_attention or sliding_attention for each layer; empty: all slide",
        items={"enum": list(LAYER_TYPES)},
    )
    max_length: int = option(
        8192, help="longest text in tokens that the model is made for", minimum=1, maximum=_LONGEST
    )
    orig_max_length: int = option(
        0, help="longest text before the stretch; 0: max_length / rope_scaling_factor", minimum=0, maximum=_LONGEST
    )
    half: bool = option(True, help="false: compute in fp32 whatever half_type says")
    half_type: str = option("bf16", help="compute and export precision", enum=["bf16", "fp16", "fp32"])
    use_flash_attn: bool = option(True, help="false: never the flash-attn kernel")
    use_checkpoint: bool = option(False, help="the run's use_checkpoint, where the run says nothing of its own")
    model_type: str = option("fm9g", help="constant", const="fm9g")

    def __post_init__(self) -> None:
        # Frozen: the derived defaults are written once, here.
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise UserError(
                    f"dim_model {self.hidden_size} is not a multiple of num_heads {self.num_heads}; set dim_head"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2 or self.head_dim < 4:
            raise UserError(f"dim_head {self.head_dim}: rotary pairs need an even one, at least 4")
        if self.scale and not self.base_hidden_size:
            raise UserError("scale is true and dim_model_base is missing")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise UserError(
                f"rope_high_freq_factor {self.rope_high_freq_factor} is not above rope_low_freq_factor "
                f"{self.rope_low_freq_factor}"
            )
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise UserError(f"layer_types names {len(self.layer_types)} layers, num_layers is {self.num_layers}")
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise UserError("layer_types has sliding_attention and sliding_window is missing")
        if not self.orig_max_length:
            object.__setattr__(self, "orig_max_length", max(1, int(self.max_length / self.rope_factor)))

    @property
    def mup_width(self) -> float:
        """dim_model / dim_model_base where scale is true, else 1."""
        return self.hidden_size / self.base_hidden_size if self.scale else 1.0

    @property
    def embedding_multiplier(self) -> float:
        return self.scale_emb if self.scale else 1.0

    @property
    def residual_multiplier(self) -> float:
        return self.scale_depth / math.sqrt(self.num_layers) if self.scale_depth > 0 else 1.0

    @property
    def attention_multiplier(self) -> float:
        return self.attention_scale or self.head_dim**-0.5

    @property
    def rotary_multiplier(self) -> float:
        """Of cosines and sines. YaRN sharpens attention: queries and keys each grow (Peng et al. 2023, section 3.4)."""
        if self.rope_scaling != "yarn":
            return 1.0
        return self.rope_attention_factor or 0.1 * math.log(self.rope_factor) + 1.0

    @property
    def windows(self) -> tuple[int, ...]:
        """Of each layer: the tokens that a token attends to, itself included; 0: all before it."""
        kinds = self.layer_types or ["sliding_attention"] * self.num_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else 0 for kind in kinds)

    @property
    def dtype_name(self) -> str:
        """bf16, fp16 or fp32."""
        return self.half_type if self.half else "fp32"

    def to_json(self) -> dict[str, Any]:
        """The 9G keys, every one with its value."""
        values = {key_of(f): getattr(self, f.name) for f in fields(self)}
        return {**values, "architectures": ["FM9GForCausalLM"]}


# Keys that change no result of a trained model: how it is computed, how it starts, how long texts may be.
_NON_ARCHITECTURE_KEYS = (
    "dropout_p",
    "init_std",
    "mup_lr",
    "half",
    "half_type",
    "use_flash_attn",
    "use_checkpoint",
    "max_length",
)


def architecture_of(config: ModelConfig) -> dict[str, Any]:
    """The keys that two configurations of one model have alike, in the terms that act."""
    values = {key: value for key, value in config.to_json().items() if key not in _NON_ARCHITECTURE_KEYS}
    if not config.scale:
        values |= {"scale_emb": 1.0, "dim_model_base": 0}
    values["scale_depth"] = config.residual_multiplier * math.sqrt(config.num_layers)  # what does without it, too
    values["attention_scale"] = config.attention_multiplier
    if not config.rope_scaling:
        values |= {"rope_scaling_factor": 1.0, "orig_max_length": 0}
    if config.rope_scaling != "llama3":
        values |= {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
    if config.rope_scaling == "linear":
        values["orig_max_length"] = 0
    values["rope_attention_factor"] = config.rotary_multiplier
    if config.rope_scaling == "yarn" and config.rotary_multiplier == 1.0:
        values["rope_scaling_type"] = "ntk-by-parts"
    if config.rope_scaling not in ("yarn", "ntk-by-parts"):
        values |= {"rope_beta_fast": 32.0, "rope_beta_slow": 1.0}
    slides = [window > 0 for window in config.windows]
    values |= {"sliding_window": config.sliding_window * any(slides)}
    values |= {"layer_types": [LAYER_TYPES[slide] for slide in slides] if any(slides) else []}
    return values


def values_differ(one: Any, other: Any) -> bool:
    """Whether two values of a key are not the same; some are computed, and come back by a division."""
    return not math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else one != other


# The sizes in a config.json of transformers, and the keys of ours that say how large each may be.
_SIZES = {
    "dim_model": ("hidden_size", "n_embd", "d_model"),
    "dim_ff": ("intermediate_size", "n_inner", "d_ff"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "max_window_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
    "dim_head": ("head_dim", "kv_channels"),
    "vocab_size": ("vocab_size",),
    "max_length": ("max_position_embeddings", "n_positions", "seq_length", "sliding_window"),
}


def check_sizes(hf: dict[str, Any], where: str) -> None:
    """Raises UserError for a size in a config.json that no model has, before anything is made or counted by it.

    That of a model with images has the sizes of its parts in objects of their own, such as text_config.
    """
    for part in (hf, *(value for value in hf.values() if isinstance(value, dict))):
        for ours, names in _SIZES.items():
            most = keys_of(ModelConfig)[ours].metadata["schema"]["maximum"]
            for name in names:
                value = part.get(name)
                if isinstance(value, (int, float)) and not value <= most:
                    raise UserError(f"{where}: {name}: found {value!r:.20}, allowed: at most {most}; is it damaged?")


def load_model_config(path: Path, overrides: dict[str, Any] | None = None) -> Resolved[ModelConfig]:
    """Reads a 9G model configuration.

    overrides: `--model.KEY value` from the command line, as strings.
    Raises UserError for unknown keys, wrong types and values out of range.
    """
    raw = read_object(path)
    if raw.pop("architectures", ["FM9GForCausalLM"]) != ["FM9GForCausalLM"]:
        raise UserError(f"{path}: architectures: expected ['FM9GForCausalLM']")
    if "ori_max_length" in raw:  # a spelling that files in the wild use
        raw.setdefault("orig_max_length", raw.pop("ori_max_length"))
    if raw.get("dim_model_base") is None:
        raw.pop("dim_model_base", None)
    sources = [ConfigSource(str(path), raw), ConfigSource("command line (--model.)", dict(overrides or {}), text=True)]
    notes = [note for source in sources for note in _without_deprecated(source)]
    resolved = build(ModelConfig, sources)
    unscaled = {"scale_emb": 1.0, "dim_model_base": 0}  # what files that we write have
    scaled = [key for key, value in unscaled.items() if raw.get(key, value) != value]
    if scaled and not resolved.value.scale:
        notes.append(f"{path}: {' and '.join(scaled)} {'change' if scaled[1:] else 'changes'} nothing: scale is false")
    return replace(resolved, notes=tuple(notes))


def _without_deprecated(source: ConfigSource) -> list[str]:
    """Takes the keys that change nothing out of a source; returns a line for each."""
    notes = []
    for key in sorted(DEPRECATED_KEYS.keys() & source.values.keys()):
        allowed, why = DEPRECATED_KEYS[key]
        value = source.values.pop(key)
        if value not in allowed and str(value).lower() not in (str(each).lower() for each in allowed):
            raise UserError(
                f"{source.origin}: {key}: found {value!r}, allowed: {' or '.join(map(repr, allowed))}; {why}"
            )
        notes.append(f"{source.origin}: {key} changes nothing: {why}")
    return notes
