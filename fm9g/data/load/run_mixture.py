"""The mixture of a run, from its configuration."""

from __future__ import annotations

from fm9g.config.run import RunConfig
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.token_estimates import estimate_total_tokens
from fm9g.errors import UserError


def open_run_mixture(run: RunConfig, date: str = "", use_token_caches: bool = True) -> Mixture:
    """Opens the datasets that a run trains on; writes nothing.

    Args:
        date: inserted by templates as today's; empty: today.
        use_token_caches: read the existing token caches of the run.
    """
    config = run.train
    return Mixture(
        run.mixture,
        config.tokenizer_path,
        config.max_length,
        config.seed,
        config.row_tokens,
        config.token_cache_dir if use_token_caches else "",
        date,
    )


def count_tokens(run: RunConfig) -> float:
    """Estimates the tokens of an epoch; writes nothing.

    Raises:
        UserError: the data cannot be read.
    """
    if not run.mixture or not run.train.tokenizer_path:
        raise UserError("dataset_config and tokenizer_path are not both given")
    return estimate_total_tokens(open_run_mixture(run, run.train.chat_template_date, use_token_caches=False))
