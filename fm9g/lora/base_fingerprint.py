"""A hash of a model's weights, by which an adapter recognizes its base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from fm9g.progress import Progress

_CHUNK = 1 << 24  # values converted to fp32 at a time
_THREADS = 4  # each holds one weight in memory


def base_fingerprint(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """SHA-256 over the names, shapes and fp32 values of weights, in the order of their names.

    A .pt file and the folder it was converted from have the same hash, whatever their dtypes, if no value was rounded.

    Args:
        read: returns the values of a weight; called from several threads.
    """
    ordered = sorted(names)
    total = hashlib.sha256()
    with (
        Progress("hashing the base", total=len(ordered), unit="weights") as progress,
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        for name, digest in zip(ordered, threads.map(lambda name: _weight_digest(read(name)), ordered)):
            total.update(name.encode() + b"\0" + digest)
            progress.advance()
    return total.hexdigest()


def _weight_digest(weight: torch.Tensor) -> bytes:
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    for chunk in torch.split(weight.detach().reshape(-1), _CHUNK):
        digest.update(chunk.float().numpy().data)
    return digest.digest()
