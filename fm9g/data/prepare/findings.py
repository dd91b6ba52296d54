"""What is worth telling about the records that became a dataset: what was left out, and what is unusual in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

PLACEHOLDERS = re.compile(r"\{\{\s*[^\W\d]\w*\s*\}\}")
_MAX_SHOWN = 10  # of the names in a note
_MAX_NAMES = 10_000  # names that are counted: records whose keys are data have any number of them

REASONING, TOOLS, UNTRAINED = "thoughts", "tools or calls", "nothing that is trained on"  # of records
MASKED, WEIGHTED = "masked", "weighted"  # of turns


@dataclass
class Findings:
    """dropped_keys: keys, with how often they were left out. placeholders: as `{{name}}`, with the texts that hold
    them. counts: records and turns by what is said of them."""

    dropped_keys: Counter[str] = field(default_factory=Counter)
    placeholders: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def observe(self, record: dict[str, Any], dropped_keys: list[str]) -> None:
        """Counts a record in canonical form. dropped_keys: the keys that it does not have any more."""
        _count_names(self.dropped_keys, dropped_keys)
        if "output" in record:
            texts, answers = [record["input"], record["output"]], [record] if "weight" in record else []
        else:
            turns = [*record["messages"], *(record[key] for key in ("chosen", "rejected") if key in record)]
            texts = [turn["content"] for turn in turns]
            unusual = [turn for turn in turns if len(turn) > 2]
            self.counts[REASONING] += any("reasoning_content" in turn for turn in unusual)
            self.counts[TOOLS] += has_tools(record)
            weighted = any("weight" in turn or "content_weights" in turn for turn in unusual)
            answers = [turn for turn in turns if turn["role"] == "assistant"] if weighted else []
        if answers:
            weights = [turn["weight"] for turn in answers if "weight" in turn]
            masked = weights.count(0)
            self.counts[MASKED] += masked
            self.counts[WEIGHTED] += len(weights) - masked + sum("content_weights" in turn for turn in answers)
            self.counts[UNTRAINED] += masked == len(answers)
        for text in texts:
            if "{{" in text:
                _count_names(self.placeholders, set(PLACEHOLDERS.findall(text)))

    def merge(self, other: Findings) -> None:
        for total, more in ((self.dropped_keys, other.dropped_keys), (self.placeholders, other.placeholders)):
            for name, count in more.items():
                if name in total or len(total) < _MAX_NAMES:
                    total[name] += count
        self.counts += other.counts

    def notes(self) -> Iterator[str]:
        """What there is to tell, a line each."""
        counts = self.counts
        if self.dropped_keys:
            yield f"keys left out: {_format_counts(self.dropped_keys)}"
        if beside := [f"{_count_of(counts[key], 'has', 'have')} {key}" for key in (REASONING, TOOLS) if counts[key]]:
            yield f"of the records, {', '.join(beside)}"
        masked, weighted = counts[MASKED], counts[WEIGHTED]
        turns = [f"{_count_of(masked, 'turn is', 'turns are')} not trained on"] if masked else []
        if weighted:
            noun = "" if masked else "turn " if weighted == 1 else "turns "
            turns.append(f"{weighted} {noun}{'has' if weighted == 1 else 'have'} another weight than 1")
        if turns:
            yield ", ".join(turns)
        if counts[UNTRAINED]:
            yield f"{_count_of(counts[UNTRAINED], 'record has', 'records have')} {UNTRAINED}; training skips them"
        if self.placeholders:
            yield (
                f"placeholders stand in the text and are trained on as they are: {_format_counts(self.placeholders)}; "
                "replace them first, if they are to be filled in"
            )


def has_tools(record: dict[str, Any]) -> bool:
    """Whether a canonical record has tools or calls."""
    return "tools" in record or any("tool_calls" in turn for turn in record.get("messages", ()))


def _count_names(total: Counter[str], names: Iterable[str]) -> None:
    for name in names:
        if name in total or len(total) < _MAX_NAMES:
            total[name] += 1


def _format_counts(names: Counter[str]) -> str:
    """`id (200), turn.refusal (3)`: the most frequent ones."""
    ordered = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - _MAX_SHOWN} more" if len(ordered) > _MAX_SHOWN else ""
    return ", ".join(f"{name} ({count})" for name, count in ordered[:_MAX_SHOWN]) + more


def _count_of(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
