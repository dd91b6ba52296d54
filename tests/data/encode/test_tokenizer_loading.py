"""Opening tokenizers, and refusing what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("vocab.txt", '"a"\noops', "vocab.txt, line 2: not a JSON string"),
        ("vocab.txt", '"a"', "'<s>' is missing"),
        ("tokenizer.model", "junk", "not a tokenizer that can be read"),
        ("tokenizer.json", "junk", "not a tokenizer that can be read"),
        ("other.txt", "", "no tokenizer here"),
    ],
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=expected):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_and_a_missing_end_token_are_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    with pytest.raises(UserError, match="set tokenizer_path"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_path / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="eos_token: missing"):
        load_tokenizer(tmp_path)
