"""Dialects: the arguments of other tools, one table each, and their translation into keys of ours."""

from __future__ import annotations

from fm9g.config.dialects.table import Dialect


def all_dialects() -> tuple[Dialect, ...]:
    """Every dialect, in the order in which they are tried."""
    from fm9g.config.dialects.console import CONSOLE
    from fm9g.config.dialects.deepspeed import DEEPSPEED
    from fm9g.config.dialects.llamafactory import LLAMAFACTORY
    from fm9g.config.dialects.scripts import FINETUNE_JSON, JOB, NINE_G_HF
    from fm9g.config.dialects.swift import SWIFT
    from fm9g.config.dialects.swift_sft import SWIFT_SFT
    from fm9g.config.dialects.transformers import TRANSFORMERS

    return TRANSFORMERS, LLAMAFACTORY, SWIFT, SWIFT_SFT, FINETUNE_JSON, NINE_G_HF, JOB, CONSOLE, DEEPSPEED
