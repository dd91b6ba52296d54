"""Random samples of records, as parts of a permutation."""

import pytest

from fm9g.data.load import record_sample
from fm9g.data.load.record_sample import ALL_RECORDS, RecordSample


def records(sample: RecordSample, num_records: int) -> list[int]:
    order = sample.order(num_records)
    return [order(position) for position in range(sample.size(num_records))]


def test_a_sample_and_what_it_leaves_out_are_all_records_once() -> None:
    drawn = records(RecordSample(30, 0, 7), 100)
    rest = records(RecordSample(0, 30, 7), 100)
    assert sorted(drawn + rest) == list(range(100))
    assert drawn != sorted(drawn)
    assert drawn == records(RecordSample(40, 0, 7), 100)[:30]
    assert drawn != records(RecordSample(30, 0, 8), 100)


def test_more_records_than_there_are_repeat_those_that_are_not_skipped() -> None:
    drawn = records(RecordSample(16, 3, 7), 10)
    assert drawn == [*records(RecordSample(0, 3, 7), 10)] * 2 + drawn[:2]
    assert not set(drawn) & set(records(RecordSample(3, 0, 7), 10))


def test_a_large_dataset_has_the_same_order_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = records(RecordSample(30, 5, 7), 100)
    monkeypatch.setattr(record_sample, "_SMALL_DATASET", 0)
    assert records(RecordSample(30, 5, 7), 100) == expected


def test_skipping_everything_leaves_nothing() -> None:
    assert RecordSample(5, 10).size(10) == 0
    assert not ALL_RECORDS
    assert RecordSample(0, 1)
