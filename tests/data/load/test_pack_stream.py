"""The order of samples: each of the properties that must hold, without any file."""

from collections import Counter

import numpy as np
import pytest
from helpers.sampling import FunctionSource, make_plan

from fm9g.data.encode.oversize import LONG_INPUT, OVERSIZE, EncodedRecord
from fm9g.data.load.pack_stream import BUFFER_SIZE, MAX_IN_PROGRESS, PackStream
from fm9g.data.load.packing import Pack, collate
from fm9g.data.load.sampling_plan import SamplingPlan
from fm9g.data.shuffle import splitmix64
from fm9g.errors import UserError


def encode(dataset: int, sample_index: int) -> EncodedRecord:
    """A stand-in for encoding: 1 to 60 tokens, a function of the sample index; every 10th record has three segments."""
    length = 1 + splitmix64(dataset, sample_index) % 60
    segments = 3 if sample_index % 10 == 9 else 1
    return EncodedRecord([np.full(length + 1, sample_index, np.int32) for _ in range(segments)])


def tokens(sample_index: int) -> int:
    return sum(len(segment) - 1 for segment in encode(0, sample_index).segments)


def stream(index: int, of: SamplingPlan, state: dict | None = None, row_length: int = 100) -> PackStream:
    return PackStream(index, of, row_length, FunctionSource(encode), state)


def next_pack(of: PackStream, row_length: int = 100) -> Pack:
    return collate(of.next_samples(), row_length)


def test_datasets_without_repeat_leave_the_mixture() -> None:
    one = stream(0, make_plan([10, 40], 1, repeats=[False, True]))
    for _ in range(50):
        next_pack(one)
    assert one.state_dict()["begun"][0] == 10
    assert one.state_dict()["begun"][1] > 100


@pytest.mark.parametrize("streams", [1, 8])
def test_tokens_follow_the_shares_whatever_the_lengths(streams: int) -> None:
    """10,000 samples of 1 to 2000 tokens, whose average nobody knows: shares are kept to a percentage point."""
    proportions = [0.6, 0.3, 0.09, 0.01]

    def unequal(dataset: int, sample_index: int) -> EncodedRecord:
        length = (
            (5, 40, 700, 2000)[dataset]
            if splitmix64(dataset, sample_index) % 7
            else 1 + splitmix64(sample_index) % 2000
        )
        return EncodedRecord([np.zeros(length + 1, np.int32)])

    of = make_plan([50, 1000, 100, 3], streams, proportions=proportions)
    all_streams = [PackStream(s, of, 2048, FunctionSource(unequal)) for s in range(streams)]
    tokens, samples = np.zeros(4), 0
    while samples < 10_000:
        for one in all_streams:
            pack = next_pack(one, 2048)
            tokens += np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=4)
            samples += len(pack.cu_seqlens) - 1
    assert tokens / tokens.sum() == pytest.approx(proportions, abs=0.01)


def test_streams_do_not_all_turn_to_a_dataset_in_the_same_step() -> None:
    of = make_plan([1000, 1000], 16, proportions=[0.95, 0.05])
    steps = []
    for s in range(16):
        one = stream(s, of)
        steps.append(next(step for step in range(100) if 1 in next_pack(one).task_ids))
    assert len(set(steps)) > 4


@pytest.mark.parametrize("stop", [1, 3, 20])
@pytest.mark.parametrize("repeats", [[True, True], [False, True], [False, False]])
def test_a_stream_goes_on_from_its_state_as_if_it_had_never_stopped(stop: int, repeats: list[bool]) -> None:
    of = make_plan([50, 300], 2, repeats, proportions=[0.7, 0.3])  # at 20 packs the first dataset is used up
    full, first = stream(1, of), stream(1, of)
    for _ in range(stop):
        next_pack(full)
        next_pack(first)
    again = stream(1, of, first.state_dict())
    for _ in range(80):
        one, other = next_pack(full), next_pack(again)
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.cu_seqlens, other.cu_seqlens)
    assert full.state_dict() == again.state_dict()


def test_the_state_is_a_few_integers() -> None:
    one = stream(0, make_plan([1000], 1))
    for _ in range(200):
        next_pack(one)
    state = one.state_dict()
    assert set(state) == {"clocks", "begun", "open", "waiting", "skipped"}
    assert len(state["waiting"]) <= BUFFER_SIZE
    assert len(state["open"][0]) <= MAX_IN_PROGRESS


def test_pieces_of_long_records_take_turns_and_stay_in_order() -> None:
    def long(dataset: int, sample_index: int) -> EncodedRecord:
        return EncodedRecord([np.array([sample_index, segment, 0]) for segment in range(50)])

    one = PackStream(0, make_plan([100], 1), 8, FunctionSource(long))
    packs = [next_pack(one, 8).input_ids.reshape(-1, 2).tolist() for _ in range(MAX_IN_PROGRESS)]
    assert all(len({sample_index for sample_index, _ in pack}) == 4 for pack in packs)
    order: dict[int, list[int]] = {}
    for sample_index, segment in (pair for pack in packs for pair in pack):
        order.setdefault(sample_index, []).append(segment)
    assert len(order) == MAX_IN_PROGRESS
    assert all(segments == [0, 1, 2, 3] for segments in order.values())


def test_long_records_do_not_hold_up_short_ones() -> None:
    """Half of the tokens from a dataset of records of 40 pieces of 10, half from one of records of 2 tokens."""

    def mixed(dataset: int, sample_index: int) -> EncodedRecord:
        length, segments = ((10, 40), (2, 1))[dataset]
        return EncodedRecord([np.zeros(length + 1, np.int32) for _ in range(segments)])

    of = make_plan([1000, 1000], 1)
    one = PackStream(0, of, 100, FunctionSource(mixed))
    tasks = np.concatenate([next_pack(one).task_ids for _ in range(30)])
    assert (tasks == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_packs_are_full_and_no_sample_is_lost_or_doubled() -> None:
    of = make_plan([4000], 1, repeats=[False])
    one = stream(0, of, row_length=1000)
    packs = []
    while (pack := next_pack(one, 1000)).tokens:
        packs.append(pack)
    expected = Counter({sample_index: tokens(sample_index) for sample_index in range(4000)})
    seen = Counter(int(i) for pack in packs for i in pack.input_ids[pack.task_ids >= 0])
    assert seen == expected
    assert sum(pack.tokens for pack in packs[:-3]) > 0.99 * 1000 * len(packs[:-3])
    assert next_pack(one, 1000).tokens == 0


def test_the_last_partial_pack_is_given() -> None:
    one = stream(0, make_plan([1], 1, repeats=[False]))
    assert next_pack(one).tokens == tokens(0)


def test_records_that_never_give_a_sample_end_the_run() -> None:
    of = make_plan([5], 1)
    skipping = PackStream(0, of, 100, FunctionSource(lambda _, __: EncodedRecord([], "no output")))
    with pytest.raises(UserError, match=r"task0: 1001 records in a row gave nothing to train on\nof 1001: no output"):
        skipping.next_samples()

    def reasons(dataset: int, sample_index: int) -> EncodedRecord:
        return EncodedRecord([], OVERSIZE if sample_index % 4 == 0 else LONG_INPUT)

    skipping = PackStream(0, of, 100, FunctionSource(reasons))
    with pytest.raises(UserError) as raised:
        skipping.next_samples()
    assert [line.partition(", or leave")[0] for line in str(raised.value).splitlines()] == [
        "task0: 1001 records in a row gave nothing to train on",
        "of 750: input longer than max_length; raise max_length",
        "of 251: longer than max_length; raise max_length, or set the dataset's oversize_rule to head or segment",
    ]
