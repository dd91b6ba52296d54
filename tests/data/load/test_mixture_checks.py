"""What a user is told of a mixture before a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.chat_mixtures import CHAT, open_chat_mixture
from helpers.common import make_records
from helpers.mixtures import open_mixture

from fm9g.data.load.mixture_checks import log_mixture_warnings, template_warnings

Make = Callable[..., Path]


def test_a_wrong_number_of_lines_is_noted(
    make_mixture: Make, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_mixture({"a": make_records(4)}, a={"nlines": 5})
    log_mixture_warnings(open_mixture(path, tokenizer_path))
    assert "nlines is 5 in the configuration, but" in caplog.text
    assert "has 4 lines" in caplog.text


def test_a_template_of_another_tokenizer_is_said(
    make_mixture: Make, tokenizer_path: Path, chat_tokenizer: Path
) -> None:
    path = make_mixture({"a": [CHAT]})
    assert template_warnings(open_chat_mixture(path, chat_tokenizer, chat_template="chatml")) == []
    (warning,) = template_warnings(open_chat_mixture(path, chat_tokenizer, chat_template="llama"))
    assert warning.startswith(
        "a: the template llama writes <|start_header_id|>, <|end_header_id|>, <|eot_id|>, for which"
    )
    (warning,) = template_warnings(open_chat_mixture(path, tokenizer_path, chat_template="chatml"))
    assert "<|im_start|>, <|im_end|>" in warning
