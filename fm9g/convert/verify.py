"""Compares the logits of a Hugging Face folder and a 9G model, in fp32, on fixed prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fm9g.config.model import ModelConfig
from fm9g.convert.families import family_of
from fm9g.convert.hf_config import HF_CLASSES
from fm9g.convert.hf_reader import DTYPES, open_hf_folder, open_hf_tensors
from fm9g.convert.logits import ReadWeight, streamed_logits
from fm9g.convert.weight_map import strip_wrappers
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError, error_text
from fm9g.io.json_file import read_object
from fm9g.io.lazy_tensor import LazyConcat
from fm9g.model.transformer import weight_shapes
from fm9g.process_memory import available_bytes

TOLERANCE = 1e-4  # of the largest logit: both sides sum in different orders
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "九格大模型是一个用于文本生成的语言模型",
    "def add(a: int, b: int) -> int:\n    return a +",
)
_NUM_RANDOM_PROMPTS, _RANDOM_LENGTH = 3, 32  # in place of TEXTS where there is no tokenizer
_LONG_LENGTH = 512  # tokens of a longer prompt, in which slow rotations show
_MARGIN = 64  # tokens of a prompt beyond a window, or beyond the original length
_NUM_LAST_TOKENS = 64  # tokens at the end of each prompt whose logits are compared
MAX_MULTIPLICATIONS = 1e12  # of a longer prompt, per core: about a minute for both sides


@dataclass(frozen=True)
class LogitDiff:
    """The result of a comparison.

    Args:
        difference: max over all logits.
        max_logit: in absolute value.
        reader: the class that read the folder, or why fm9g itself did.
        prompts: described in words.
    """

    difference: float
    max_logit: float
    reader: str
    prompts: str

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE * self.max_logit  # false for NaN, too

    def __str__(self) -> str:
        within = "within" if self.passed else "NOT within"
        return (
            f"logits differ by at most {self.difference:.2e} (largest logit {self.max_logit:.2f}), {within} the "
            f"tolerance of {TOLERANCE:g} of it; {self.prompts}, in fp32; the folder read by {self.reader}"
        )


def verify(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, LazyConcat],
    dtype: str = "",
    max_multiplications: float = MAX_MULTIPLICATIONS,
) -> LogitDiff:
    """Compares a Hugging Face folder with the weights of a 9G model.

    Args:
        dtype: that the conversion rounded weights to; the weights of both sides are rounded to it.
        max_multiplications: per core, for each longer prompt; prompts that cost more are left out.
    """
    hf_config, hf_weights = open_hf_folder(folder)
    prompts, about = make_prompts(folder, config.vocab_size)
    reader = _why_not_transformers(folder, hf_weights)
    if reader:
        hf_logits = _streamed(hf_config, hf_weights, prompts, dtype)
    else:
        long_prompts, about_long = _long_prompts(config, max_multiplications * (os.cpu_count() or 1))
        prompts, about = prompts + long_prompts, f"{about}, {about_long}"
        hf_logits, reader = _transformers_logits(folder, prompts, DTYPES.get(dtype))
    logits = _streamed(config, weights, prompts, dtype)
    return LogitDiff(
        difference=float(
            torch.stack([(actual - expected).abs().max() for actual, expected in zip(logits, hf_logits)]).max()
        ),
        max_logit=float(torch.stack([expected.abs().max() for expected in hf_logits]).max()),
        reader=reader,
        prompts=about,
    )


def make_prompts(folder: Path | None, vocab_size: int) -> tuple[list[list[int]], str]:
    """Prompts as token ids, and their description. folder: of a tokenizer; None: random ids."""
    try:
        if folder is None:
            raise UserError("no tokenizer")
        tokenizer = load_tokenizer(folder)
        prompts = [list(map(int, ids)) for ids in tokenizer.encode_batch(list(TEXTS))]
        if all(ids and max(ids) < vocab_size for ids in prompts):
            return prompts, f"{len(prompts)} texts of {sum(map(len, prompts))} tokens"
    except UserError:
        pass  # no tokenizer, or one that only its own code reads
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (_NUM_RANDOM_PROMPTS, _RANDOM_LENGTH), generator=generator)
    return ids.tolist(), f"{_NUM_RANDOM_PROMPTS} rows of {_RANDOM_LENGTH} random tokens"


def _long_prompts(config: ModelConfig, max_cost: float) -> tuple[list[list[int]], str]:
    """Random token ids at the lengths where windows and rope scaling set in, and their description.

    Leaves out lengths that cost more multiplications than max_cost; the description says so.
    """
    lengths = {min(_LONG_LENGTH, config.max_length): ""}
    if any(config.windows):
        lengths[config.sliding_window + _MARGIN] = f" (beyond the window of {config.sliding_window})"
    if config.rope_scaling:
        lengths[config.orig_max_length + _MARGIN] = f" (beyond the original length of {config.orig_max_length})"
    num_weights = sum(shape.numel() for shape in weight_shapes(config).values())
    width = config.num_layers * config.num_heads * config.head_dim
    prompts, tried, too_long = [], [], []
    for length, beyond in sorted(lengths.items()):
        if length * (num_weights + length * width) > max_cost:
            too_long.append(f"{length}{beyond}")
            continue
        generator = torch.Generator().manual_seed(length)
        prompts.append(torch.randint(0, config.vocab_size, (length,), generator=generator).tolist())
        tried.append(f"{length}{beyond}")
    about = [f"random rows of {' and '.join(tried)} tokens"] if tried else []
    if too_long:
        about.append(f"rows of {' and '.join(too_long)} tokens were not tried: they take too long on this machine")
    return prompts, "; ".join(about)


def _streamed(
    config: ModelConfig, weights: Mapping[str, LazyConcat], prompts: list[list[int]], dtype: str
) -> list[torch.Tensor]:
    read: ReadWeight = lambda name: weights[name].read().to(DTYPES.get(dtype) or weights[name].dtype)  # noqa: E731
    return streamed_logits(config, read, prompts, last=_NUM_LAST_TOKENS)


def _why_not_transformers(folder: Path, weights: Mapping[str, LazyConcat]) -> str:
    """Why fm9g itself has to read a folder; empty if transformers can."""
    hf = read_object(folder / "config.json")
    kind = hf["model_type"]
    if kind not in HF_CLASSES:
        return f"fm9g itself ({kind} needs its own code)"
    names = family_of(hf, str(folder)).names
    if any(strip_wrappers(name, lambda name: bool(names.from_hf(name))) != name for name in open_hf_tensors(folder)):
        return "fm9g itself (its weights have names that transformers does not know)"
    if 4 * sum(weight.shape.numel() for weight in weights.values()) > 0.8 * available_bytes():
        return f"fm9g itself ({HF_CLASSES[kind]} in fp32 is larger than the memory)"
    return ""


def _transformers_logits(
    folder: Path, prompts: list[list[int]], dtype: torch.dtype | None
) -> tuple[list[torch.Tensor], str]:
    """The last logits of each prompt, and the class of the model. dtype: to round weights to."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # sdpa, since "eager" stores a matrix of length x length for every head
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
        )
        model.eval()
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"{folder}: cannot be verified: transformers refuses it: {error_text(error)}") from None
    for weight in model.parameters():
        weight.data = weight.data.to(dtype or torch.float32).float()
    with torch.no_grad():  # short prompts first: after a long one, dynamic rope stays stretched
        logits = [
            model(torch.tensor([ids]), use_cache=False, logits_to_keep=_NUM_LAST_TOKENS).logits[0] for ids in prompts
        ]
    return logits, type(model).__name__
