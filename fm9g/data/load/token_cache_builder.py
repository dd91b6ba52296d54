"""Building the token caches of a mixture."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from fm9g.data.encode.token_array import is_weighted
from fm9g.data.load.encoding_pool import EncodingPool
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.token_cache import cache_mismatches, write_cache
from fm9g.io.atomic import recover_interrupted

logger = logging.getLogger(__name__)


def build_token_cache(mixture: Mixture, workers: int) -> Mixture:
    """Builds the missing and stale token caches of a mixture; returns the mixture with its caches open.

    Logs which caches were stale, and which datasets cannot have one.
    """
    with EncodingPool(mixture, workers) as pool:
        for number in range(len(mixture.configs)):
            # Also beside a complete cache: a process that was killed just after the exchange leaves the old one there.
            recover_interrupted(mixture.cache_folder(number))
            if not mixture.caches[number]:
                _build(pool, number)
    return Mixture(*mixture.spec)


def _build(pool: EncodingPool, dataset: int) -> None:
    mixture = pool.mixture
    folder, key = mixture.cache_folder(dataset), mixture.cache_key(dataset)
    if changed := cache_mismatches(folder, key):
        logger.info(f"token cache {folder} is stale and built again: {'; '.join(changed)}")
    size = len(mixture.datasets[dataset])
    chunks = (tokens for _, tokens in pool.tokenize(dataset, iter(range(size)), in_file_order=True))
    try:
        write_cache(folder, key, _check_cacheable(mixture, dataset, chunks), size)
    except _NotCacheableError as reason:
        logger.warning(f"{mixture.configs[dataset].task_name}: no token cache: {reason}")


class _NotCacheableError(Exception):
    """Why a dataset cannot have a token cache."""


def _check_cacheable(mixture: Mixture, dataset: int, chunks: Iterator[list[np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """The token arrays of records as int32, as a cache stores them."""
    for chunk in chunks:
        if mixture.used_rng[dataset]:
            script = mixture.configs[dataset].transforms
            raise _NotCacheableError(f"{script} draws random numbers, so its epochs differ")
        if any(map(is_weighted, chunk)):
            raise _NotCacheableError("its tokens have loss weights, which a cache cannot store")
        yield [tokens.astype(np.int32, copy=False) for tokens in chunk]
