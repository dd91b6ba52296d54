"""A column mapping: which keys of the user's records hold what, and what the user calls the roles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

OPENAI_KEYS, SHAREGPT_KEYS = ("role", "content"), ("from", "value")  # the keys of a turn
ColumnNames = dict[str, str]  # our name -> the user's key


def parse_mapping(text: str, keys: Iterable[str] | None = None) -> dict[str, str]:
    """Parses `a=b c` to {"a": "b", "c": "c"}. keys: leave out values that are not among them."""
    pairs = [(word.partition("=")[0], word.rpartition("=")[2]) for word in text.split()]
    return {name: key for name, key in pairs if keys is None or key in keys}


ROLES = parse_mapping(
    "system developer=system user human=user assistant gpt=assistant chatgpt=assistant bard=assistant bing=assistant "
    "tool observation=tool function=tool tool_response=tool function_call tool_call=function_call"
)
ROLE_TAGS = parse_mapping(
    "system_tag=system user_tag=user assistant_tag=assistant observation_tag=tool function_tag=function_call"
)
COLUMN_NAMES = (
    "prompt",
    "query",
    "response",
    "system",
    "history",
    "text",
    "messages",
    "tools",
    "chosen",
    "rejected",
    "label",
)


@dataclass(frozen=True)
class ColumnMapping:
    """Which keys of the user's records hold what.

    Args:
        names: one of COLUMN_NAMES -> the user's key.
        tags: as in LLaMA-Factory's dataset_info.json: role_tag and content_tag -> the user's key in a turn; user_tag,
            assistant_tag, observation_tag, function_tag, system_tag -> the user's spelling of a role, in addition to
            those in ROLES.
    """

    names: ColumnNames
    tags: dict[str, str] = field(default_factory=dict)

    @cached_property
    def roles(self) -> dict[str, str]:
        """Spelling of a role -> our role."""
        return ROLES | {self.tags[tag]: role for tag, role in ROLE_TAGS.items() if tag in self.tags}

    @cached_property
    def turn_keys(self) -> tuple[str, str] | None:
        """The user's keys of a turn's role and content; None: recognized in each turn."""
        role, content = self.tags.get("role_tag"), self.tags.get("content_tag")
        if not (role or content):
            return None
        other = SHAREGPT_KEYS if role == "from" or content == "value" else OPENAI_KEYS
        return role or other[0], content or other[1]

    @cached_property
    def is_pair(self) -> bool:
        return self.names.keys() <= {"prompt", "query", "response"}
