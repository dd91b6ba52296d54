"""Whether a conversion changed what the model says: logits of both sides, in fp32, on fixed prompts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fm9g.config.load import read_object
from fm9g.config.model import ModelConfig
from fm9g.convert.families import family_of
from fm9g.convert.hf_config import HF_CLASSES
from fm9g.convert.hf_reader import DTYPES, open_hf_folder, open_hf_tensors, open_pt_weights
from fm9g.convert.logits import ReadWeight, streamed_logits
from fm9g.convert.weight_map import strip_wrappers
from fm9g.data.encode.tokenizer import load_tokenizer
from fm9g.errors import UserError, error_text
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor
from fm9g.io.weights import check_weights
from fm9g.model.transformer import weight_shapes

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "九格大模型是一个用于文本生成的语言模型",
    "def add(a: int, b: int) -> int:\n    return a +",
)
_RANDOM_PROMPTS, _RANDOM_LENGTH = 3, 32  # prompts and their tokens, where no tokenizer is there
_LONG_LENGTH = 512  # tokens of a longer row, in which slow rotations show
_BEYOND = 64  # tokens of a row beyond a window, or beyond the original length
_LAST_TOKENS = 64  # tokens at the end of each prompt whose logits are compared
_MAX_WORK = 1e12  # multiplications of a longer row, for each core of this machine: about a minute for both sides
TOLERANCE = 1e-4  # of the largest logit: both sides add in another order


@dataclass(frozen=True)
class LogitDiff:
    """difference: the largest of two logits. largest: logit. reader: of the folder. given: the prompts, in words."""

    difference: float
    largest: float
    reader: str
    given: str

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE * self.largest  # false for what is not a number, too

    def __str__(self) -> str:
        found = f"logits differ by {self.difference:.2e} at most, of up to {self.largest:.2f}"
        limit = f"{'within' if self.passed else 'NOT within'} the tolerated {TOLERANCE:g} of these"
        return f"{found}, {limit}; {self.given}, in fp32; the folder read by {self.reader}"


def verify(folder: Path, file: Path, config: ModelConfig, dtype: str = "") -> LogitDiff:
    """Compares a Hugging Face folder with a 9G .pt file of the configuration.

    dtype: that the conversion rounded to; then the weights of both sides are rounded to it. Raises UserError.
    """
    weights = open_pt_weights(file)
    check_weights(weights, weight_shapes(config), str(file), strict=True)
    _, theirs = open_hf_folder(folder)
    prompts, given = make_prompts(folder, config.vocab_size)
    why_own = _why_not_transformers(folder, theirs)
    if not why_own:
        rows, about = _long_rows(config, sum(weight.shape.numel() for weight in theirs.values()))
        prompts, given = prompts + rows, f"{given}, {about}"
    found, reader = _folder_logits(folder, prompts, DTYPES.get(dtype), why_own)
    ours = streamed_logits(config, _reader(weights, DTYPES.get(dtype)), prompts, last=_LAST_TOKENS)
    gaps = [(one - other).abs().max() for one, other in zip(ours, found)]
    return LogitDiff(
        difference=float(torch.stack(gaps).max()),
        largest=float(torch.stack([logits.abs().max() for logits in found]).max()),
        reader=reader,
        given=given,
    )


def make_prompts(folder: Path | None, vocab_size: int) -> tuple[list[list[int]], str]:
    """Token ids, and what they are, in words. folder: of a tokenizer, where one is known."""
    try:
        if folder is None:
            raise UserError("no tokenizer")
        tokenizer = load_tokenizer(folder)
        prompts = [list(map(int, ids)) for ids in tokenizer.encode_batch(list(TEXTS))]
        if all(ids and max(ids) < vocab_size for ids in prompts):
            return prompts, f"{len(prompts)} texts of {sum(map(len, prompts))} tokens"
    except UserError:
        pass  # none, or one that only its own code reads
    ids = torch.randint(0, vocab_size, (_RANDOM_PROMPTS, _RANDOM_LENGTH), generator=torch.Generator().manual_seed(0))
    return ids.tolist(), f"{_RANDOM_PROMPTS} rows of {_RANDOM_LENGTH} random tokens"


def _long_rows(config: ModelConfig, weights: int) -> tuple[list[list[int]], str]:
    """Random token ids for the lengths at which the arithmetic is another one, and what they are, in words.

    weights: of the model. A length that would cost more than _MAX_WORK is left out, which the words say.
    """
    lengths = {min(_LONG_LENGTH, config.max_length): ""}
    if any(config.windows):
        lengths[config.sliding_window + _BEYOND] = f" (beyond the window of {config.sliding_window})"
    if config.rope_scaling:
        lengths[config.orig_max_length + _BEYOND] = f" (beyond the original length of {config.orig_max_length})"
    width = config.num_layers * config.num_heads * config.head_dim
    max_work = _MAX_WORK * (os.cpu_count() or 1)
    rows, tried, left = [], [], []
    for length, beyond in sorted(lengths.items()):
        if length * (weights + length * width) > max_work:
            left.append(f"{length}{beyond}")
            continue
        generator = torch.Generator().manual_seed(length)
        rows.append(torch.randint(0, config.vocab_size, (length,), generator=generator).tolist())
        tried.append(f"{length}{beyond}")
    about = [f"random rows of {' and '.join(tried)} tokens"] if tried else []
    about += (
        [f"rows of {' and '.join(left)} tokens were not tried, which are too long for this machine"] if left else []
    )
    return rows, "; ".join(about)


def _reader(weights: Mapping[str, LazyTensor | LazyConcat], dtype: torch.dtype | None) -> ReadWeight:
    return lambda name: weights[name].read().to(dtype or weights[name].dtype)


def _why_not_transformers(folder: Path, weights: Mapping[str, LazyConcat]) -> str:
    """Why fm9g itself has to read a folder; empty where transformers does."""
    hf = read_object(folder / "config.json")
    kind = hf["model_type"]
    if kind not in HF_CLASSES:
        return f"fm9g itself ({kind} needs its own code)"
    names = family_of(hf, str(folder)).names
    if any(strip_wrappers(name, lambda name: bool(names.from_hf(name))) != name for name in open_hf_tensors(folder)):
        return "fm9g itself (its weights have names that transformers does not know)"
    if 4 * sum(weight.shape.numel() for weight in weights.values()) > 0.8 * _free_memory():
        return f"fm9g itself ({HF_CLASSES[kind]} in fp32 is larger than the memory)"
    return ""


def _folder_logits(
    folder: Path, prompts: list[list[int]], dtype: torch.dtype | None, why_own: str
) -> tuple[list[torch.Tensor], str]:
    """The last logits of prompts, and who read the folder. why_own: why it is fm9g; empty: it is transformers."""
    if why_own:
        config, weights = open_hf_folder(folder)
        return streamed_logits(config, _reader(weights, dtype), prompts, last=_LAST_TOKENS), why_own
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Not "eager", which keeps the square of a row's length for every head.
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
        ).eval()
    except Exception as error:  # transformers raises whatever it meets
        raise UserError(f"{folder}: cannot be verified, for transformers refuses it: {error_text(error)}") from None
    for weight in model.parameters():
        weight.data = weight.data.to(dtype or torch.float32).float()
    with torch.no_grad():  # the short ones first: after a long one, dynamic rope stays stretched
        logits = [model(torch.tensor([ids]), use_cache=False, logits_to_keep=_LAST_TOKENS).logits[0] for ids in prompts]
    return logits, type(model).__name__


def _free_memory() -> float:
    """Bytes that the system has for new processes; infinity where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
