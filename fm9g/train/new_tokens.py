"""New tokens in a run: which ones it has, the rows of the model that they get, and the first values of these rows."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.layout import MANIFEST, MODEL_CONFIG, TOKENIZER
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.config.run import RunConfig
from fm9g.config.train_rules import EMBEDDING, LM_HEAD
from fm9g.data.encode.new_tokens import NEW_TOKENS, check_same_tokens, fresh_tokens
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError
from fm9g.io.lazy_tensor import LazyConcat, LazyTensor
from fm9g.lora.adapter_file import EMBEDDING_WEIGHT, LM_HEAD_WEIGHT

logger = logging.getLogger(__name__)


def inherit_new_tokens(run: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """The resumed run with the new tokens, and the vocab_size, of its checkpoint.

    Raises:
        UserError: the run was given others. A file that is gone by now does not matter.
    """
    file, given = checkpoint.tokenizer / NEW_TOKENS, run.train.new_tokens
    if not file.is_file():
        if given:
            raise UserError(f"new_tokens: {checkpoint.folder} has none, and a run cannot change its tokens")
        return run
    if given and Path(given).is_file():
        check_same_tokens(given, file, str(checkpoint.folder))
    run = run.changed("train", {"new_tokens": str(file)}, str(checkpoint.folder))
    vocab_size = load_model_config(checkpoint.folder / MODEL_CONFIG).vocab_size
    return run.changed("model", {"vocab_size": vocab_size}, str(checkpoint.folder))


def complete_modules_to_save(run: RunConfig) -> RunConfig:
    """The run of adapters with the modules that its model and its new tokens need in modules_to_save.

    Of a model whose embedding and output are one weight, the embedding stands for both. New tokens need the rows of
    both weights, which adapters do not reach.
    """
    if not run.train.lora_layer:
        return run
    tied, given = run.model.tie_word_embeddings, run.train.modules_to_save
    modules, origin = list(given), run.origins["train"]["modules_to_save"]
    if run.train.new_tokens:
        modules, origin = [EMBEDDING, LM_HEAD], "new_tokens"
    modules = [EMBEDDING] * bool(modules) if tied else modules
    if modules == given:
        return run
    if run.train.new_tokens:
        logger.info(f"modules_to_save: {', '.join(modules)}, in which the new tokens have rows")
    elif LM_HEAD in given:
        logger.info(f"modules_to_save: {EMBEDDING}, which is the weight of {LM_HEAD} in this model (tie_lm_head)")
    return run.changed("train", {"modules_to_save": modules}, origin)


def grow_vocab(run: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The run whose model has a row for each new token. Rows that the model has beyond its tokens are used first."""
    if not tokenizer.new_ids or tokenizer.new_ids.start > run.model.vocab_size:
        return run
    fresh, rows = len(fresh_tokens(tokenizer)), run.model.vocab_size
    logger.info(
        f"new_tokens: {fresh} tokens from id {tokenizer.new_ids.start} on; vocab_size {rows}"
        + (f" becomes {tokenizer.vocab_size}" if tokenizer.vocab_size > rows else " has room for them")
    )
    if tokenizer.vocab_size <= rows:
        return run
    return run.changed("model", {"vocab_size": tokenizer.vocab_size}, f"new_tokens ({run.train.new_tokens})")


@dataclass(frozen=True)
class GrownWeight:
    """A weight with a row per token of a base, and rows for new tokens, which are the mean of the others.

    Args:
        weight: of the base, (tokens, hidden size).
        num_rows: of the result.
        new_ids: rows of the base that are replaced by the mean, too: they had no token.
        num_known: the mean is that of so many rows from the first on.
    """

    weight: LazyTensor | LazyConcat
    num_rows: int
    new_ids: Sequence[int]
    num_known: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size([self.num_rows, *self.weight.shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def read(self) -> torch.Tensor:
        """Its values, in new memory."""
        values = self.weight.read()
        mean = values[: self.num_known].mean(0, dtype=torch.float32).to(values.dtype)
        grown = torch.cat([values, mean.expand(self.num_rows - len(values), -1)])
        grown[list(self.new_ids)] = mean
        return grown


Weights = Mapping[str, LazyTensor | LazyConcat | GrownWeight]


def grow_weights(
    weights: Mapping[str, LazyTensor | LazyConcat], config: ModelConfig, tokenizer: Tokenizer | None, path: Path
) -> Weights:
    """The weights of a base with rows for the new tokens of a tokenizer.

    Args:
        config: of the grown model.
        path: of the base. Tokens that its own tokenizer has keep their rows.

    Raises:
        UserError: the base has fewer rows than the tokenizer without new tokens.
    """
    grown = dict[str, LazyTensor | LazyConcat | GrownWeight](weights)
    if tokenizer is None or not tokenizer.new_ids:
        return grown
    new_ids, num_known = tokenizer.new_ids, tokenizer.new_ids.start
    known = _known_ids(tokenizer, path)
    for name in (EMBEDDING_WEIGHT, LM_HEAD_WEIGHT):
        if name not in weights:
            continue
        if weights[name].shape[0] < num_known:
            raise UserError(
                f"{path}: {name} has {weights[name].shape[0]} rows, and the tokenizer {num_known} tokens without the "
                "new ones; they do not belong together"
            )
        ids = [number for number in new_ids if number not in known]
        grown[name] = GrownWeight(weights[name], config.vocab_size, ids, num_known)
    return grown


def _known_ids(tokenizer: Tokenizer, path: Path) -> Collection[int]:
    """The ids of new tokens that a model's own tokenizer has already, since an earlier run added them."""
    checkpoint, folder = path if path.is_dir() else path.parent, path
    if (checkpoint / MANIFEST).is_file():
        folder = checkpoint / TOKENIZER
    if not folder.is_dir():
        return ()
    try:
        own = load_tokenizer(folder)
    except UserError:
        return ()  # the folder holds weights alone
    known = {number for token, number in fresh_tokens(tokenizer).items() if own.token_id(token) == number}
    if known:
        logger.info(f"new_tokens: {path} has {len(known)} of them already; their rows stay as they are")
    return known


def warn_if_frozen(model: torch.nn.Module, tokenizer: Tokenizer | None) -> None:
    """Warns if the rows of new tokens are not trained."""
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    if tokenizer and tokenizer.new_ids and (rows := sorted({EMBEDDING_WEIGHT, LM_HEAD_WEIGHT} & set(frozen))):
        logger.warning(f"new_tokens: {' and '.join(rows)} is frozen, so the new tokens keep their first values there")


def base_config(config: ModelConfig, weights: Mapping[str, LazyTensor | LazyConcat]) -> ModelConfig:
    """The configuration of a base, which may have fewer token ids than the model that is trained."""
    rows = weights[EMBEDDING_WEIGHT].shape[0] if EMBEDDING_WEIGHT in weights else config.vocab_size
    return replace(config, vocab_size=rows) if rows < config.vocab_size else config
