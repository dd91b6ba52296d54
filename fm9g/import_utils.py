"""Imports of packages that are slow to import or print while they are imported."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from fm9g.errors import UserError

_NOISY_LOGGER = (
    "bitsandbytes.backends.cpu.ops"  # on CPUs with AVX512-BF16, warns of a missing kernel that is not used here
)


def import_bitsandbytes(required_by: str) -> Any:
    """Imports bitsandbytes without its warning about a missing CPU kernel.

    required_by: the key that needs it, for the message. Raises UserError if it is not installed or does not work.
    """
    logger = logging.getLogger(_NOISY_LOGGER)
    old_level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except Exception as error:  # it looks for CUDA while it is imported, and fails in many ways
        raise UserError(f"{required_by}: bitsandbytes cannot be used here ({error}); install it") from None
    finally:
        logger.setLevel(old_level)
    return bitsandbytes


@contextlib.contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Hides bitsandbytes from packages that are imported in this block, unless it is imported already.

    PEFT would import it, which takes seconds, for layers that are not used here.
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
            for name in ("is_bnb_available", "is_bnb_4bit_available"):  # so that other code in this process finds it
                known: Any = getattr(modules.get("peft.import_utils"), name, None)
                if hasattr(known, "cache_clear"):
                    known.cache_clear()
