"""Conversions of one value, from the spelling of other tools to ours; ValueErrors say what is expected."""

from __future__ import annotations

from typing import Any

from fm9g.config.fields import did_you_mean

TRACKERS = ("tensorboard", "wandb", "swanlab")
# Optimizers of transformers with the update rule of one of ours.
OPTIMIZERS = {
    **dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adam", "adamw_torch_npu_fused"), "adamw"
    ),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), "adamw8bit"),
    "adafactor": "adafactor",
    "sgd": "sgd",
    "muon": "muon",
}


def optimizer(value: Any) -> str:
    """A name of transformers' `optim`."""
    name = str(value).lower()
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"expected one of {known}{did_you_mean(name, [*OPTIMIZERS])}; there is no such optimizer here")
    return OPTIMIZERS[name]


def trackers(value: Any) -> str:
    """A tracker, several of them, `all` or `none`."""
    names = [str(name).strip().lower() for name in (value if isinstance(value, list) else str(value).split(","))]
    if names in (["none"], [""]):
        return "none"
    if names == ["all"]:
        return "tensorboard"
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"there is no tracker {unknown[0]} here; write one of {', '.join(TRACKERS)}, or none")
    return ",".join(names)


def truth(value: Any) -> bool:
    """A truth value."""
    if value not in (True, False, 0, 1):
        raise ValueError("expected true or false")
    return bool(value)


def checkpointing(value: Any) -> str:
    """gradient_checkpointing."""
    return "full" if truth(value) else "none"


def attention(value: Any) -> str:
    """attn_implementation: the loop for eager, the kernels of the machine for all others."""
    if isinstance(value, bool):
        return "cuda" if value else "none"
    name = str(value).lower()
    known = ("auto", "sdpa", "fa2", "fa3", "flash_attn", "flash_attention_2", "flash_attention_3", "flex_attention")
    if name in ("eager", "disabled"):
        return "none"
    if name not in known:
        raise ValueError(f"expected one of eager, {', '.join(known)}{did_you_mean(name, [*known])}")
    return "cuda"


def no_limit(value: Any) -> Any:
    """A number of things to keep, where a negative one means all of them."""
    return 0 if isinstance(value, (int, float)) and value < 0 else value


def resume(value: Any) -> str:
    """resume_from_checkpoint: true for the newest, or the folder of a step, such as output/checkpoint-500."""
    if isinstance(value, bool):
        return "last" if value else ""
    step = str(value).rstrip("/").rpartition("/")[2].removeprefix("checkpoint-")
    if not step.isdecimal():
        raise ValueError("expected true, or a folder whose name ends in the number of a step, such as checkpoint-500")
    return step


def dtype(value: Any) -> str:
    """The number format of a model."""
    names = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "half": "fp16"}
    names |= dict.fromkeys(("fp32", "float32", "float"), "fp32")
    name = str(value).lower().removeprefix("torch.")
    if name not in names:
        raise ValueError(f"expected one of {', '.join(names)}")
    return names[name]


def comma_list(value: Any) -> str:
    """Several entries as one text."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value).replace(" ", ",")


def layers(value: Any) -> list[str]:
    """Names of linear layers: a list, or a text with commas or spaces."""
    names = value if isinstance(value, list) else str(value).replace(",", " ").split()
    return ["all" if str(name).lower() in ("all", "all-linear") else str(name) for name in names]
