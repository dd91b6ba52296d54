"""The texts that a tokenizer is trained on."""

from pathlib import Path

import pytest
from helpers.common import write_jsonl

from fm9g.data.prepare.sources import find_sources
from fm9g.data.prepare.texts import iter_texts

PAIRS = [{"input": "问题", "output": "回答一"}, {"input": "", "output": "second"}, {"input": "", "output": "最后"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return write_jsonl(tmp_path / "raw" / "a.jsonl", PAIRS)


def test_a_tokenizer_is_not_trained_on_ids(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "t", "weight": 0},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    assert list(iter_texts(find_sources([str(source)]))) == ["f", "y", "t", "3"]
