"""Marked tokens: token ids, and what each counts in the loss, in one array.

A token that is trained on is its id; one that is masked is the id's complement (~id, below 0). A weight other than 1 is
the float32 in the upper half of an int64. So nearly all records are arrays of int32, as large as their ids. SEPARATOR
stands between the samples of a record that has several. A sample of n + 1 tokens has the first n as its inputs and the
last n as their labels.
"""

from __future__ import annotations

import numpy as np

SEPARATOR = np.iinfo(np.int32).min
_ID = 0x7FFFFFFF


def make_token_array(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) the marked tokens of ids. weights: (n,) float; 0 masks a token."""
    ids, weights = np.asarray(ids, np.int32), np.asarray(weights, np.float32)
    token_array = np.where(weights > 0, ids, ~ids)
    other = (weights > 0) & (weights != 1)
    if not other.any():
        return token_array
    high = weights.view(np.int32).astype(np.int64) << 32
    return np.where(other, high | ids, token_array.astype(np.int64))


def token_ids(token_array: np.ndarray) -> np.ndarray:
    """(n,) int32, the ids."""
    sign = token_array >> (8 * token_array.itemsize - 1)
    return ((token_array ^ sign) & _ID).astype(np.int32)


def loss_weights(token_array: np.ndarray) -> np.ndarray:
    """(n,) float32, what each token counts in the loss; 0 for those that are masked."""
    if token_array.dtype == np.int32:
        return (token_array >= 0).astype(np.float32)
    other = (token_array >> 32).astype(np.int32).view(np.float32)
    return np.where(token_array < 0, np.float32(0), np.where(token_array >> 32 == 0, np.float32(1), other))


def is_weighted(token_array: np.ndarray) -> bool:
    """Whether a token counts neither 0 nor 1."""
    return token_array.dtype == np.int64 and bool((token_array > _ID).any())


def join_samples(samples: list[np.ndarray]) -> np.ndarray:
    """The samples of a record in one array; an empty one for none."""
    parts = [part for sample in samples for part in (np.array([SEPARATOR], np.int32), sample)]
    return np.concatenate(parts[1:]) if parts else np.empty(0, np.int32)


def split_samples(token_array: np.ndarray) -> list[np.ndarray]:
    """The samples of a record."""
    at = np.flatnonzero(token_array == SEPARATOR)
    if not len(at):
        return [token_array]
    return [token_array[start:end] for start, end in zip([0, *(at + 1)], [*at, len(token_array)])]
