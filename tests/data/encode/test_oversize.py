"""From records to samples: shift by one, and the oversize rules."""

from __future__ import annotations

import numpy as np
import pytest

from fm9g.data.encode.encoder import Encoder
from fm9g.data.encode.oversize import EMPTY, LONG_INPUT, OVERSIZE, split_or_truncate
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.load.packing import IGNORE_INDEX


class Letters(Tokenizer):
    """One id a letter: a=97; bos 1, eos 2."""

    bos_id, eos_id, vocab_size, files = 1, 2, 128, ()
    prefix_ids, suffix_ids, special_ids, special_tokens = (1,), (2,), {}, {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        return self.encode(text), list(range(len(text)))

    def token_id(self, text: str) -> int | None:
        return ord(text) if len(text) == 1 else None

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()


def ids_and_targets(tokens: np.ndarray) -> tuple[list[int], list[int]]:
    """The ids and targets of a sample, without what packs do."""
    ids = [int(t) if t >= 0 else ~int(t) for t in tokens]
    return ids[:-1], [int(t) if t >= 0 else IGNORE_INDEX for t in tokens[1:]]


def run(record: dict, max_length: int = 100, rule: str = "segment", row_length: int = 0, loss: str = "assistant"):
    encoder = Encoder(Letters(), loss=loss)
    encoded = split_or_truncate(
        encoder.tokenize([encoder.render(record)])[0], max_length, rule, row_length or max_length
    )
    return [ids_and_targets(segment) for segment in encoded.segments], encoded.skipped


def test_targets_are_the_next_token_and_the_input_has_none() -> None:
    segments, _ = run({"input": "ab", "output": "cd"})
    assert segments == [([1, 97, 98, 99, 100], [IGNORE_INDEX, IGNORE_INDEX, 99, 100, 2])]


def test_records_without_output_and_with_too_long_an_input_are_skipped() -> None:
    assert run({"input": "ab", "output": ""}) == ([], EMPTY)
    assert run({"input": "a" * 8, "output": "b"}, max_length=10) == ([], LONG_INPUT)
    assert run({"input": "a" * 7, "output": "b"}, max_length=10)[1] == ""


def test_a_record_that_just_fits_is_whole_under_every_rule() -> None:
    for rule in ("drop", "head", "segment"):
        segments, _ = run({"output": "abcd"}, 5, rule)
        assert segments == [([1, 97, 98, 99, 100], [97, 98, 99, 100, 2])]


def test_drop_discards_and_head_keeps_the_beginning() -> None:
    assert run({"output": "abcdef"}, 5, "drop") == ([], OVERSIZE)
    assert run({"output": "abcdef"}, 5, "head")[0] == [([1, 97, 98, 99, 100], [97, 98, 99, 100, 101])]


@pytest.mark.parametrize("length", [5, 9, 10, 11, 23])
def test_segments_lose_and_double_nothing(length: int) -> None:
    text = "abcdefghijklmnopqrstuvw"[:length]
    segments, _ = run({"output": text}, 5)
    assert [i for ids, _ in segments for i in ids] == [1, *text.encode()]
    assert [t for _, targets in segments for t in targets] == [*text.encode(), 2]
    assert all(len(ids) == len(targets) <= 5 for ids, targets in segments)


def test_a_long_record_with_an_input_is_cut_at_the_end() -> None:
    assert run({"input": "a", "output": "bcdef"}, 5)[0] == [([1, 97, 98, 99, 100], [IGNORE_INDEX, 98, 99, 100, 101])]


def test_tail_keeps_the_end_of_a_record_whatever_its_input() -> None:
    ((ids, targets),) = run({"input": "a" * 20, "output": "bc"}, max_length=5, rule="tail")[0]
    assert (ids, targets) == ([97, 97, 97, 98, 99], [IGNORE_INDEX, IGNORE_INDEX, 98, 99, 2])
    assert run({"output": "abcd"}, 5, "tail") == run({"output": "abcd"}, 5, "head")
