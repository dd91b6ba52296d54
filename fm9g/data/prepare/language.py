"""Which language a record is in, by the letters of its prompt."""

from __future__ import annotations

import re
from typing import Any

# The published prepare_data.py counts these; English has the Latin letters without accents.
_LETTERS = {"zh": re.compile("[\u4e00-\u9fa5]"), "en": re.compile("[A-Za-z]")}
LANGUAGES = tuple(_LETTERS)


def is_in_language(text: str, language: str) -> bool:
    """Whether more than half of the characters are letters of the language; false for an empty text."""
    return 2 * len(_LETTERS[language].findall(text)) > len(text)


def prompt_of(record: dict[str, Any]) -> str:
    """What a canonical record asks: its input or the turns of the user; where there is none, all that it says."""
    if "output" in record:
        return record["input"] if record["input"].strip() else record["output"]
    turns = record["messages"]
    asked = "".join(turn["content"] for turn in turns if turn["role"] == "user")
    return asked if asked.strip() else "".join(turn["content"] for turn in turns)
