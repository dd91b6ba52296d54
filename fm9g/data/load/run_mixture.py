"""The mixture of a run, from its configuration."""

from __future__ import annotations

from collections.abc import Sequence

from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.data.encode.new_tokens import read_new_tokens
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.token_estimates import estimate_total_tokens
from fm9g.errors import UserError


def open_run_tokenizer(config: TrainConfig, new_tokens: Sequence[str] | None = None) -> Tokenizer:
    """The tokenizer of a run, with its new tokens. new_tokens: the content of their file; None: it is read here."""
    if new_tokens is None:
        new_tokens = read_new_tokens(config.new_tokens) if config.new_tokens else ()
    return load_tokenizer(config.tokenizer_path, new_tokens)


def open_run_mixture(
    run: RunConfig, date: str = "", use_token_caches: bool = True, new_tokens: Sequence[str] | None = None
) -> Mixture:
    """Opens the datasets that a run trains on; writes nothing.

    Args:
        date: inserted by templates as today's; empty: today.
        use_token_caches: read the existing token caches of the run.
        new_tokens: see `open_run_tokenizer`.
    """
    config = run.train
    return Mixture(
        run.mixture,
        open_run_tokenizer(config, new_tokens),
        config.max_length,
        config.seed,
        config.row_tokens,
        config.token_cache_dir if use_token_caches else "",
        date,
        samples_per_pack=config.samples_per_pack,
    )


def count_tokens(run: RunConfig) -> tuple[float, int]:
    """Estimates the tokens of an epoch, and counts its records; writes nothing.

    Raises:
        UserError: the data cannot be read.
    """
    if not run.mixture or not run.train.tokenizer_path:
        raise UserError("data and tokenizer_path are not both given")
    mixture = open_run_mixture(run, run.train.chat_template_date, use_token_caches=False)
    return estimate_total_tokens(mixture), sum(map(len, mixture.datasets))
