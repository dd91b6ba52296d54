"""Which base an adapter belongs to: a hash of a model's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from fm9g.progress import Progress

_CHUNK = 1 << 24  # values that are widened at a time
_THREADS = 4  # of them each holds one weight


def base_fingerprint(names: Iterable[str], read: Callable[[str], torch.Tensor]) -> str:
    """SHA-256 over the names, shapes and fp32 values of weights, in the order of their names.

    read: the values of a weight; it is called in threads. It is the same for a .pt file and the folder that it was
    made from, whatever type values are stored in, as long as none was rounded.
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
    for chunk in weight.detach().reshape(-1).split(_CHUNK):
        digest.update(chunk.float().numpy())  # type: ignore[arg-type]
    return digest.digest()
