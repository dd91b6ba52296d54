"""Whether a conversion changed what the model says: logits of both sides, in fp32, on fixed prompts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fm9g.checkpoint.stored import Gathered, Stored
from fm9g.checkpoint.weights import check_weights
from fm9g.config.load import read_object
from fm9g.config.model import ModelConfig
from fm9g.convert.architecture import CLASSES
from fm9g.convert.families import family_of
from fm9g.convert.folder import DTYPES, open_folder, open_weights, stored_in
from fm9g.convert.logits import Read, streamed_logits
from fm9g.convert.names import bare
from fm9g.data.tokenizer import load_tokenizer
from fm9g.errors import UserError, said_by
from fm9g.model.transformer import weight_shapes

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "九格大模型是一个用于文本生成的语言模型",
    "def add(a: int, b: int) -> int:\n    return a +",
)
_IDS, _LENGTH = 3, 32  # prompts and their tokens, where no tokenizer is there
_LONG = 512  # tokens of a longer row, in which slow rotations show
_BEYOND = 64  # tokens of a row beyond a window, or beyond the original length
_LAST = 64  # tokens at the end of each prompt whose logits are compared
_WORK = 1e12  # multiplications of a longer row, for each core of this machine: about a minute for both sides
TOLERANCE = 1e-4  # of the largest logit: both sides add in another order


@dataclass(frozen=True)
class Verdict:
    """difference: the largest of two logits. largest: logit. reader: of the folder. given: the prompts, in words."""

    difference: float
    largest: float
    reader: str
    given: str

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE * self.largest  # false for what is not a number, too

    def __str__(self) -> str:
        found = f"logits differ by {self.difference:.2e} at most, of up to {self.largest:.2f}"
        limit = f"{'within' if self.holds else 'NOT within'} the tolerated {TOLERANCE:g} of these"
        return f"{found}, {limit}; {self.given}, in fp32; the folder read by {self.reader}"


def verify(folder: Path, file: Path, config: ModelConfig, dtype: str = "") -> Verdict:
    """Compares a Hugging Face folder with a 9G .pt file of the configuration.

    dtype: that the conversion rounded to; then the weights of both sides are rounded to it. Raises UserError.
    """
    weights = open_weights(file)
    check_weights(weights, weight_shapes(config), str(file), strict=True)
    _, theirs = open_folder(folder)
    prompts, given = make_prompts(folder, config.vocab_size)
    own = _why_not_transformers(folder, theirs)
    if not own:
        rows, about = _long_rows(config, sum(weight.shape.numel() for weight in theirs.values()))
        prompts, given = prompts + rows, f"{given}, {about}"
    found, reader = _folder_logits(folder, prompts, DTYPES.get(dtype), own)
    ours = streamed_logits(config, _reading(weights, DTYPES.get(dtype)), prompts, last=_LAST)
    gaps = [(one - other).abs().max() for one, other in zip(ours, found)]
    return Verdict(
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
    ids = torch.randint(0, vocab_size, (_IDS, _LENGTH), generator=torch.Generator().manual_seed(0))
    return ids.tolist(), f"{_IDS} rows of {_LENGTH} random tokens"


def _long_rows(config: ModelConfig, weights: int) -> tuple[list[list[int]], str]:
    """Random token ids for the lengths at which the arithmetic is another one, and what they are, in words.

    weights: of the model. A length that would cost more than _WORK is left out, which the words say.
    """
    lengths = {min(_LONG, config.max_length): ""}
    if any(config.windows):
        lengths[config.sliding_window + _BEYOND] = f" (beyond the window of {config.sliding_window})"
    if config.rope_scaling:
        lengths[config.orig_max_length + _BEYOND] = f" (beyond the original length of {config.orig_max_length})"
    width = config.num_layers * config.num_heads * config.head_dim
    most = _WORK * (os.cpu_count() or 1)
    rows, tried, left = [], [], []
    for length, beyond in sorted(lengths.items()):
        if length * (weights + length * width) > most:
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


def _reading(weights: Mapping[str, Stored | Gathered], dtype: torch.dtype | None) -> Read:
    return lambda name: weights[name].read().to(dtype or weights[name].dtype)


def _why_not_transformers(folder: Path, weights: Mapping[str, Gathered]) -> str:
    """Why fm9g itself has to read a folder; empty where transformers does."""
    hf = read_object(folder / "config.json")
    kind = hf["model_type"]
    if kind not in CLASSES:
        return f"fm9g itself ({kind} needs its own code)"
    names = family_of(hf, str(folder)).names
    if any(bare(name, lambda name: bool(names.ours(name))) != name for name in stored_in(folder)):
        return "fm9g itself (its weights have names that transformers does not know)"
    if 4 * sum(weight.shape.numel() for weight in weights.values()) > 0.8 * _free_memory():
        return f"fm9g itself ({CLASSES[kind]} in fp32 is larger than the memory)"
    return ""


def _folder_logits(
    folder: Path, prompts: list[list[int]], dtype: torch.dtype | None, own: str
) -> tuple[list[torch.Tensor], str]:
    """The last logits of prompts, and who read the folder. own: why it is fm9g; empty: it is transformers."""
    if own:
        config, weights = open_folder(folder)
        return streamed_logits(config, _reading(weights, dtype), prompts, last=_LAST), own
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Not "eager", which keeps the square of a row's length for every head.
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
        ).eval()
    except Exception as error:  # transformers raises whatever it meets
        raise UserError(f"{folder}: cannot be verified, for transformers refuses it: {said_by(error)}") from None
    for weight in model.parameters():
        weight.data = weight.data.to(dtype or torch.float32).float()
    with torch.no_grad():  # the short ones first: after a long one, dynamic rope stays stretched
        logits = [model(torch.tensor([ids]), use_cache=False, logits_to_keep=_LAST).logits[0] for ids in prompts]
    return logits, type(model).__name__


def _free_memory() -> float:
    """Bytes that the system has for new processes; infinity where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf
