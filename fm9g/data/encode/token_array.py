"""Token arrays: token ids, their weights in the loss, and the borders of samples, in one array.

    token trained on with weight 1     id                             int32 or int64
    masked token                       ~id (below 0)                  int32 or int64
    token with another weight          float32 weight | id            int64: upper and lower half
    border between two samples         SEPARATOR                      int32 or int64

So nearly all records are int32 arrays, as large as their ids. A sample of n + 1 tokens has the first n as inputs and
the last n as labels.
"""

from __future__ import annotations

import numpy as np

SEPARATOR = np.iinfo(np.int32).min
_ID = 0x7FFFFFFF


def make_token_array(ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) the token array of ids. weights: (n,) float; 0 masks a token."""
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
    ids: np.ndarray = ((token_array ^ sign) & _ID).astype(np.int32)
    return ids


def loss_weights(token_array: np.ndarray) -> np.ndarray:
    """(n,) float32, the weight of each token in the loss; 0 if masked."""
    if token_array.dtype == np.int32:
        return (token_array >= 0).astype(np.float32)
    other = (token_array >> 32).astype(np.int32).view(np.float32)
    return np.where(token_array < 0, np.float32(0), np.where(token_array >> 32 == 0, np.float32(1), other))


def is_weighted(token_array: np.ndarray) -> bool:
    """Whether any weight is neither 0 nor 1."""
    return token_array.dtype == np.int64 and bool((token_array > _ID).any())


def join_samples(samples: list[np.ndarray]) -> np.ndarray:
    """Joins the samples of a record; no samples give an empty array."""
    parts = [part for sample in samples for part in (np.array([SEPARATOR], np.int32), sample)]
    return np.concatenate(parts[1:]) if parts else np.empty(0, np.int32)


def split_samples(token_array: np.ndarray) -> list[np.ndarray]:
    """Splits the array of a record into its samples."""
    at = np.flatnonzero(token_array == SEPARATOR)
    if not len(at):
        return [token_array]
    return [token_array[start:end] for start, end in zip([0, *(at + 1)], [*at, len(token_array)])]
