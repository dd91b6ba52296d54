"""Packages that are slow to import, or that print when they are imported."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from fm9g.errors import UserError

_NOISY_LOGGER = "bitsandbytes.backends.cpu.ops"  # warns on CPUs with AVX512-BF16 of a kernel that nothing here uses


def import_bitsandbytes(required_by: str) -> Any:
    """bitsandbytes, without its warning of a missing CPU kernel.

    required_by: the key that asks for it. Raises UserError if it is not installed or cannot be used.
    """
    logger = logging.getLogger(_NOISY_LOGGER)
    old_level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except Exception as error:  # it looks for CUDA when it is imported, and fails in many ways
        raise UserError(f"{required_by}: bitsandbytes cannot be used here ({error}); install it") from None
    finally:
        logger.setLevel(old_level)
    return bitsandbytes


@contextlib.contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Hides bitsandbytes from packages that are imported in this block, unless it is imported already.

    PEFT imports it for layers that are not used here. That takes seconds.
    """
    modules: dict[str, Any] = sys.modules
    hidden = "bitsandbytes" not in modules
    if hidden:
        modules["bitsandbytes"] = None
    try:
        yield
    finally:
        if hidden:
            del modules["bitsandbytes"]
            for name in ("is_bnb_available", "is_bnb_4bit_available"):  # others in this process are to find it
                known: Any = getattr(modules.get("peft.import_utils"), name, None)
                if hasattr(known, "cache_clear"):
                    known.cache_clear()
