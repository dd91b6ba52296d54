"""Statistics of indexed records that a user should see: keys that were left out, and unusual content."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PLACEHOLDERS = re.compile(r"\{\{\s*[^\W\d]\w*\s*\}\}")
_MAX_SHOWN = 10  # names in a message
_MAX_NAMES = 10_000  # distinct names that are counted; if keys are data (ids), their number has no limit

REASONING, TOOLS, UNTRAINED = "reasoning", "tools or calls", "nothing to train on"  # counts of records
MASKED, WEIGHTED = "masked", "weighted"  # counts of turns

logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """Counts over records.

    Args:
        dropped_keys: how often each key was left out.
        placeholders: number of texts that contain each placeholder, such as `{{name}}`.
        counts: number of records or turns by the names above.
    """

    dropped_keys: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def observe(self, record: dict[str, Any], dropped_keys: list[str]) -> None:
        """Counts a canonical record. dropped_keys: the keys that were left out of it."""
        _count_names(self.dropped_keys, dropped_keys)
        if "output" in record:
            texts, weighted_answers = [record["input"], record["output"]], [record] if "weight" in record else []
        else:
            turns = [*record["messages"], *(record[key] for key in ("chosen", "rejected") if key in record)]
            texts = [turn["content"] for turn in turns]
            unusual = [turn for turn in turns if len(turn) > 2]
            self.counts[REASONING] += any("reasoning_content" in turn for turn in unusual)
            self.counts[TOOLS] += has_tools(record)
            has_weights = any("weight" in turn or "content_weights" in turn for turn in unusual)
            weighted_answers = [turn for turn in turns if turn["role"] == "assistant"] if has_weights else []
        if weighted_answers:
            weights = [turn["weight"] for turn in weighted_answers if "weight" in turn]
            masked = weights.count(0)
            self.counts[MASKED] += masked
            self.counts[WEIGHTED] += len(weights) - masked + sum("content_weights" in turn for turn in weighted_answers)
            self.counts[UNTRAINED] += masked == len(weighted_answers)
        for text in texts:
            if "{{" in text:
                _count_names(self.placeholders, set(PLACEHOLDERS.findall(text)))

    def merge(self, other: Findings) -> None:
        for total, more in ((self.dropped_keys, other.dropped_keys), (self.placeholders, other.placeholders)):
            for name, count in more.items():
                if name in total or len(total) < _MAX_NAMES:
                    total[name] += count
        self.counts += other.counts

    def log(self) -> None:
        counts = self.counts
        if self.dropped_keys:
            logger.info(f"keys left out: {_format_counts(self.dropped_keys)}")
        if present := [f"{_count_of(counts[key], 'has', 'have')} {key}" for key in (REASONING, TOOLS) if counts[key]]:
            logger.info(f"of the records, {', '.join(present)}")
        masked, weighted = counts[MASKED], counts[WEIGHTED]
        turns = [f"{_count_of(masked, 'turn is', 'turns are')} not trained on"] if masked else []
        if weighted:
            noun = "" if masked else "turn " if weighted == 1 else "turns "
            turns.append(f"{weighted} {noun}{'has' if weighted == 1 else 'have'} a weight other than 1")
        if turns:
            logger.info(", ".join(turns))
        if counts[UNTRAINED]:
            records = _count_of(counts[UNTRAINED], "record has", "records have")
            logger.warning(f"{records} {UNTRAINED}; training skips them")
        if self.placeholders:
            logger.warning(
                f"texts contain placeholders, which are trained on literally: {_format_counts(self.placeholders)}; "
                "replace them first if they are to be filled in"
            )


def has_tools(record: dict[str, Any]) -> bool:
    """Whether a canonical record has tools or calls."""
    return "tools" in record or any("tool_calls" in turn for turn in record.get("messages", ()))


def _count_names(total: Counter[str], names: Iterable[str]) -> None:
    for name in names:
        if name in total or len(total) < _MAX_NAMES:
            total[name] += 1


def _format_counts(names: Counter[str]) -> str:
    """The most frequent names: `id (200), turn.refusal (3)`."""
    ordered = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - _MAX_SHOWN} more" if len(ordered) > _MAX_SHOWN else ""
    return ", ".join(f"{name} ({count})" for name, count in ordered[:_MAX_SHOWN]) + more


def _count_of(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
