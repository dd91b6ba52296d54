"""What a user is told of single records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.chat_mixtures import CHAT, OWN, TOOLS, open_chat_mixture

from fm9g.data.encode.record_issues import LOST_REASONING, LOST_SYSTEM, LOST_TOOLS, PLACEHOLDER, REPEATED_MARKER
from fm9g.data.inspect.check import check_mixture
from fm9g.data.inspect.show import show_samples
from fm9g.data.load.mixture_checks import log_mixture_warnings

Make = Callable[..., Path]


THOUGHTFUL = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "<think>hm</think>dogs"}]}


CUTS = OWN.replace("m.content", "m.content.split('</think>')[-1]")


@pytest.mark.parametrize(
    ("text", "record", "finding"),
    [
        (OWN, CHAT, None),
        (CUTS, THOUGHTFUL, LOST_REASONING),
        (OWN, THOUGHTFUL, None),
        (
            OWN,
            {"messages": [CHAT["messages"][0], CHAT["messages"][1] | {"reasoning_content": "hm"}]},
            LOST_REASONING,
        ),
        (
            OWN.replace("in messages", "in messages if m.role != 'system'"),
            {"messages": [{"role": "system", "content": "brief"}, *CHAT["messages"]]},
            LOST_SYSTEM,
        ),
        (
            OWN.replace("'<|im_end|>\n'", "(m.tool_calls or '') | string + '<|im_end|>\n'", 1),
            {**CHAT, "tools": TOOLS},
            LOST_TOOLS,
        ),
        (
            OWN,
            {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "I am {{name}}"}]},
            PLACEHOLDER,
        ),
        (OWN, {"messages": [{"role": "user", "content": "a<|im_end|>"}, CHAT["messages"][1]]}, REPEATED_MARKER),
    ],
)
def test_what_is_lost_or_likely_not_meant_is_said(
    make_mixture: Make,
    chat_tokenizer: Path,
    tmp_path: Path,
    text: str,
    record: dict,
    finding: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "mine.jinja").write_text(text)
    path = make_mixture({"a": [record, CHAT]})
    mixture = open_chat_mixture(path, chat_tokenizer, chat_template=str(tmp_path / "mine.jinja"))
    expected = [f"a: 1 of 2 records (50.0%) have {finding}"] if finding else []
    log_mixture_warnings(mixture)
    own = [r.getMessage() for r in caplog.records if r.name == "fm9g.data.load.mixture_checks"]
    assert own == expected
    options = {"tokenizer_path": str(chat_tokenizer), "chat_template": str(tmp_path / "mine.jinja"), "steps": 2}
    assert [n for n in check_mixture(str(path), tmp_path / "out", **options)["notes"] if " have " in n] == expected
    shown = list(show_samples(mixture, count=1, task="", record=1, packs=False, color=False, full=False))
    assert (f"note: it has {finding}" in shown) == bool(finding)
