"""The shape and arithmetic of a model: the keys of `model_configs/*.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from fm9g.config import foreign
from fm9g.config.fields import key_of, keys_of, option
from fm9g.config.load import ConfigSource, Resolved, resolve_sources
from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config_object

# Keys of published files that are accepted and ignored: key -> allowed values, and the reason.
DEPRECATED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "ffn_gated": ((True,), "every 9G model has gated feed-forward layers"),
    "flash_attn_mask_shape": (("1d", "2d"), "attention stays within a document in any case"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
_LONGEST = 2**31 - 1  # tokens; positions are int32
ROPE_SCALINGS = ("", "linear", "ntk-aware", "dynamic ntk", "ntk-by-parts", "yarn", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """Attributes have the usual names of the field; `key` is the name in 9G files if it differs."""

    FOREIGN_KEYS: ClassVar[dict[str, str]] = foreign.MODEL

    vocab_size: int = option(help="vocabulary size: number of token ids", minimum=1, maximum=2**24)
    hidden_size: int = option(help="hidden size: width of the hidden states", key="dim_model", minimum=1, maximum=2**20)
    intermediate_size: int = option(help="width inside the feed-forward layers", key="dim_ff", minimum=1, maximum=2**22)
    num_layers: int = option(help="number of transformer layers", minimum=1, maximum=2**10)
    num_heads: int = option(help="number of query heads", minimum=1, maximum=2**14)
    num_kv_heads: int = option(
        0, help="number of key and value heads (grouped-query attention); 0: num_heads", minimum=0, maximum=2**14
    )
    head_dim: int = option(
        0, help="width of an attention head; 0: dim_model / num_heads", key="dim_head", minimum=0, maximum=2**16
    )
    activation: str = option(
        "silu", help="activation function of the feed-forward gate", key="activate_fn", enum=["silu", "gelu"]
    )
    norm_eps: float = option(1e-5, help="epsilon of RMSNorm", key="eps", exclusiveMinimum=0)
    dropout: float = option(
        0.0,
        help="dropout probability of each residual branch's output in training; 0: none",
        key="dropout_p",
        minimum=0,
        exclusiveMaximum=1,
    )
    init_std: float = option(0.02, help="standard deviation of random initial weights", exclusiveMinimum=0)
    scale: bool = option(
        False, help="use width-scaled arithmetic, as the 2b and 4b models do: scale_emb and dim_model_base take effect"
    )
    scale_emb: float = option(1.0, help="factor on the embeddings if scale is true", exclusiveMinimum=0)
    scale_depth: float = option(
        -1.0, help="each residual branch is multiplied by scale_depth / sqrt(num_layers); 0 or below: not multiplied"
    )
    base_hidden_size: int = option(
        0,
        help="with scale true: hidden states are divided by dim_model / dim_model_base before the output layer",
        key="dim_model_base",
        minimum=0,
    )
    mup_lr: bool = option(
        True, help="muP: with scale true, divide the learning rate of linear layers by dim_model / dim_model_base"
    )
    qkv_bias: bool = option(False, help="add biases to the query, key and value projections")
    qk_norm: bool = option(
        False, help="apply an RMSNorm to each query and key head before the rotary embedding, as Qwen3 does"
    )
    attention_scale: float = option(
        0.0, help="factor on the products of queries and keys; 0: 1 / sqrt(dim_head)", minimum=0
    )
    tie_word_embeddings: bool = option(False, help="use the embedding as output layer", key="tie_lm_head")
    rope_theta: float = option(10000.0, help="base of the rotary embedding", key="base", exclusiveMinimum=1)
    rope_scaling: str = option(
        "",
        help="method of stretching rotary positions to longer texts; empty: none",
        key="rope_scaling_type",
        case_insensitive=True,
        enum=list(ROPE_SCALINGS),
    )
    rope_factor: float = option(
        1.0, help="factor by which rotary positions are stretched", key="rope_scaling_factor", minimum=1
    )
    rope_low_freq_factor: float = option(
        1.0,
        help="llama3: frequencies with fewer turns than this in the original length are divided by rope_scaling_factor",
        exclusiveMinimum=0,
    )
    rope_high_freq_factor: float = option(
        4.0,
        help="llama3: frequencies with more turns than this in the original length are unchanged",
        exclusiveMinimum=0,
    )
    rope_attention_factor: float = option(
        0.0, help="yarn: factor on cosines and sines; 0: 0.1 ln(rope_scaling_factor) + 1", minimum=0
    )
    rope_beta_fast: float = option(
        32.0,
        help="yarn and ntk-by-parts: frequencies with more turns than this in the original length are unchanged",
        exclusiveMinimum=0,
    )
    rope_beta_slow: float = option(
        1.0,
        help="yarn and ntk-by-parts: frequencies with fewer turns than this in the original length are divided "
        "by rope_scaling_factor",
        exclusiveMinimum=0,
    )
    sliding_window: int = option(
        0,
        help="number of tokens that a token attends to, including itself; 0: all before it",
        minimum=0,
        maximum=_LONGEST,
    )
    layer_types: list[str] = option(
        [],
        help="attention of each layer if sliding_window is set: full_attention or sliding_attention; empty: "
        "all layers slide",
        items={"enum": list(LAYER_TYPES)},
    )
    max_length: int = option(8192, help="maximum length of a text in tokens", minimum=1, maximum=_LONGEST)
    orig_max_length: int = option(
        0, help="maximum length before the stretch; 0: max_length / rope_scaling_factor", minimum=0, maximum=_LONGEST
    )
    half: bool = option(True, help="compute in half_type; false: in fp32")
    half_type: str = option(
        "bf16", help="number format of the computation and of exported weights", enum=["bf16", "fp16", "fp32"]
    )
    use_flash_attn: bool = option(True, help="allow the flash-attn kernel")
    use_checkpoint: bool = option(
        False, help="recompute whole layers in the backward pass, unless a key of the run decides it"
    )
    model_type: str = option("fm9g", help="always fm9g", const="fm9g")

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
        """Factor on cosines and sines: YaRN scales up queries and keys (Peng et al. 2023, section 3.4)."""
        if self.rope_scaling != "yarn":
            return 1.0
        return self.rope_attention_factor or 0.1 * math.log(self.rope_factor) + 1.0

    @property
    def windows(self) -> tuple[int, ...]:
        """Sliding window of each layer in tokens, the token itself included; 0: all tokens before it."""
        kinds = self.layer_types or ["sliding_attention"] * self.num_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else 0 for kind in kinds)

    @property
    def dtype_name(self) -> str:
        """bf16, fp16 or fp32."""
        return self.half_type if self.half else "fp32"

    def to_json(self) -> dict[str, Any]:
        """All keys of a 9G file with their values."""
        values = {key_of(f): getattr(self, f.name) for f in fields(self)}
        return {**values, "architectures": ["FM9GForCausalLM"]}


# Keys that do not change the output of a trained model: initial values, precision, maximum length.
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
    """The keys that decide the output of a model, in a normal form: equal models have equal values."""
    values = {key: value for key, value in config.to_json().items() if key not in _NON_ARCHITECTURE_KEYS}
    if not config.scale:
        values |= {"scale_emb": 1.0, "dim_model_base": 0}
    values["scale_depth"] = config.residual_multiplier * math.sqrt(
        config.num_layers
    )  # a model without it has a multiplier, too
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
    """Whether two values of a key differ by more than rounding; some result from a division."""
    return not math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else one != other


# Sizes in a config.json of transformers, by the key here that limits them.
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
    """Raises UserError for an impossible size in a config.json, before anything of that size is allocated.

    The config.json of a multimodal model has the sizes of its parts in nested objects such as text_config.
    """
    for part in (hf, *(value for value in hf.values() if isinstance(value, dict))):
        for size_key, names in _SIZES.items():
            maximum = keys_of(ModelConfig)[size_key].metadata["schema"]["maximum"]
            for name in names:
                value = part.get(name)
                if isinstance(value, (int, float)) and not value <= maximum:
                    raise UserError(
                        f"{where}: {name}: found {value!r:.20}, allowed: at most {maximum}; is the file damaged?"
                    )


def load_model_config(path: Path) -> ModelConfig:
    """Reads a 9G model configuration.

    Raises:
        UserError: for unknown keys, wrong types and values out of range.
    """
    return resolve_model_config(path).value


def resolve_model_config(path: Path, given: Sequence[ConfigSource] = ()) -> Resolved[ModelConfig]:
    """Does the same as `load_model_config`, and returns the origin of each value as well.

    Args:
        given: keys that take the place of those in the file.
    """
    raw = read_config_object(path)
    if raw.pop("architectures", ["FM9GForCausalLM"]) != ["FM9GForCausalLM"]:
        raise UserError(f"{path}: architectures: expected ['FM9GForCausalLM']")
    if "ori_max_length" in raw:  # a spelling in some published files
        raw.setdefault("orig_max_length", raw.pop("ori_max_length"))
    if raw.get("dim_model_base") is None:
        raw.pop("dim_model_base", None)
    sources = [ConfigSource(str(path), raw), *given]
    notes = [note for source in sources for note in _without_deprecated(source)]
    resolved = resolve_sources(ModelConfig, sources)
    unscaled = {"scale_emb": 1.0, "dim_model_base": 0}  # as in the files that fm9g writes
    ignored = [key for key, value in unscaled.items() if raw.get(key, value) != value]
    if ignored and not resolved.value.scale:
        notes.append(
            f"{path}: {' and '.join(ignored)} {'change' if ignored[1:] else 'changes'} nothing: scale is false"
        )
    return replace(resolved, notes=tuple(notes))


def override_model_config(config: ModelConfig, origin: str, given: Sequence[ConfigSource]) -> Resolved[ModelConfig]:
    """A configuration from elsewhere than a 9G file, with other values for the given keys.

    Args:
        origin: where the configuration is from.
    """
    values = {key_of(field): getattr(config, field.name) for field in fields(config)}
    return resolve_sources(ModelConfig, [ConfigSource(origin, values), *given])


def _without_deprecated(source: ConfigSource) -> list[str]:
    """Removes the deprecated keys from a source; returns a note for each."""
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
