"""The language of a record, by the letters of its prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# As in the published prepare_data.py; English counts Latin letters without accents only.
_LETTERS = {"zh": re.compile("[\u4e00-\u9fa5]"), "en": re.compile("[A-Za-z]")}
LANGUAGES = tuple(_LETTERS)
_WORDS = re.compile("[A-Za-z]+")


def is_in_language(text: str, language: str) -> bool:
    """Whether more than half of the characters are letters of the language; False for an empty text."""
    return 2 * len(_LETTERS[language].findall(text)) > len(text)


def prompt_of(record: dict[str, Any]) -> str:
    """The input or the user's turns of a canonical record; the complete text of a record without either."""
    if "output" in record:
        return str(record["input"] if record["input"].strip() else record["output"])
    turns = record["messages"]
    prompt = "".join(turn["content"] for turn in turns if turn["role"] == "user")
    return prompt if prompt.strip() else "".join(turn["content"] for turn in turns)


def detect_language(texts: Iterable[str]) -> str:
    """zh or en: the language whose part of the texts has more tokens, as `TOKENS_PER_UNIT` estimates."""
    from fm9g.data.prepare.fast_scan import TOKENS_PER_UNIT  # here, since it imports numpy

    tokens = dict.fromkeys(LANGUAGES, 0.0)
    for text in texts:
        tokens["zh"] += TOKENS_PER_UNIT["zh"] * len(_LETTERS["zh"].findall(text))
        tokens["en"] += TOKENS_PER_UNIT["en"] * len(_WORDS.findall(text))
    return max(tokens, key=tokens.__getitem__)
