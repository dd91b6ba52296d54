"""The order of samples: each of the five properties that must hold, without any file."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import pytest

from fm9g.data.encode import LONG_INPUT, OVERSIZE, Encoded
from fm9g.data.order import Permutation, mix, spread
from fm9g.data.stream import OPEN, WINDOW, Plan, Stream
from fm9g.errors import UserError


def plan(sizes: list[int], streams: int, repeats: list[bool] | None = None, shares: list[float] | None = None) -> Plan:
    count = len(sizes)
    names = [f"task{i}" for i in range(count)]
    shares = shares or [1 / count] * count
    return Plan(names, [*range(count)], sizes, repeats or [True] * count, shares, [30.0] * count, streams, seed=7)


def encode(dataset: int, place: int) -> Encoded:
    """A stand-in for encoding: lengths 1 to 60 by place; every 10th record is cut into three pieces."""
    length = 1 + mix(dataset, place) % 60
    pieces = 3 if place % 10 == 9 else 1
    return Encoded([np.full(length + 1, place, np.int32) for _ in range(pieces)])


def tokens(place: int) -> int:
    return sum(len(piece) - 1 for piece in encode(0, place).pieces)


def read(dataset, places):
    return ((place, encode(dataset, place)) for place in places)


def stream(index: int, of: Plan, state: dict | None = None, capacity: int = 100) -> Stream:
    return Stream(index, of, capacity, encode, read, state)


def test_hash_and_sequence_are_what_they_always_were() -> None:
    """Another value here would change the order of samples of every run that is resumed."""
    assert mix(1, 2, 3) == 15020427595393229491
    assert spread(5, 1, 2) == pytest.approx(0.82786920, abs=1e-8)
    assert Permutation(10, 1, 2)(np.arange(10)).tolist() == [7, 8, 5, 1, 9, 2, 4, 3, 0, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_a_permutation_hits_every_number_once(size: int) -> None:
    assert sorted(Permutation(size, 3, 1)(np.arange(size)).tolist()) == list(range(size))


def test_permutations_look_random() -> None:
    values = Permutation(1000, 5)(np.arange(1000)).tolist()
    assert values != Permutation(1000, 6)(np.arange(1000)).tolist()
    assert abs(np.corrcoef(values, range(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.1


def test_the_sequence_spreads_better_than_chance() -> None:
    inside = sum(spread(n, 4, 2) < 0.3 for n in range(10_000))
    assert abs(inside - 3000) < 5


@pytest.mark.parametrize("streams", [1, 4, 7])
@pytest.mark.parametrize("size", [5, 30])
def test_every_epoch_uses_every_record_once(streams: int, size: int) -> None:
    of = plan([size], streams)  # a dataset smaller than the number of streams, too
    taken = sorted(place for s in range(streams) for place in islice(of.places(s, 0, 0), 3 * size))
    assert taken == list(range(3 * size * streams))
    assert list(islice(of.places(2, 0, 5), 2)) == [5 * streams + 2, 6 * streams + 2]


def test_datasets_without_repeat_leave_the_mixture() -> None:
    of = plan([10, 40], 3, repeats=[False, False])
    assert sorted(place for s in range(3) for place in of.places(s, 0, 0)) == list(range(10))
    one = stream(0, plan([10, 40], 1, repeats=[False, True]))
    for _ in range(50):
        one.next_pack()
    assert one.state()["begun"][0] == 10
    assert one.state()["begun"][1] > 100


@pytest.mark.parametrize("streams", [1, 8])
def test_tokens_follow_the_shares_whatever_the_lengths(streams: int) -> None:
    """10,000 samples of 1 to 2000 tokens, whose average nobody knows: shares are kept to a percentage point."""
    shares = [0.6, 0.3, 0.09, 0.01]

    def unequal(dataset: int, place: int) -> Encoded:
        length = (5, 40, 700, 2000)[dataset] if mix(dataset, place) % 7 else 1 + mix(place) % 2000
        return Encoded([np.zeros(length + 1, np.int32)])

    of = plan([50, 1000, 100, 3], streams, shares=shares)
    all_streams = [
        Stream(s, of, 2048, unequal, lambda d, places: ((p, unequal(d, p)) for p in places)) for s in range(streams)
    ]
    tokens, samples = np.zeros(4), 0
    while samples < 10_000:
        for one in all_streams:
            pack = one.next_pack()
            tokens += np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=4)
            samples += len(pack.cu_seqlens) - 1
    assert tokens / tokens.sum() == pytest.approx(shares, abs=0.01)


def test_streams_do_not_all_turn_to_a_dataset_in_the_same_step() -> None:
    of = plan([1000, 1000], 16, shares=[0.95, 0.05])
    steps = []
    for s in range(16):
        one = stream(s, of)
        steps.append(next(step for step in range(100) if 1 in one.next_pack().task_ids))
    assert len(set(steps)) > 4


@pytest.mark.parametrize("stop", [1, 3, 20])
@pytest.mark.parametrize("repeats", [[True, True], [False, True], [False, False]])
def test_a_stream_goes_on_from_its_state_as_if_it_had_never_stopped(stop: int, repeats: list[bool]) -> None:
    of = plan([50, 300], 2, repeats, shares=[0.7, 0.3])  # at 20 packs the first dataset is used up
    whole, first = stream(1, of), stream(1, of)
    for _ in range(stop):
        whole.next_pack()
        first.next_pack()
    again = stream(1, of, first.state())
    for _ in range(80):
        one, other = whole.next_pack(), again.next_pack()
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.cu_seqlens, other.cu_seqlens)
    assert whole.state() == again.state()


def test_the_state_is_a_few_integers() -> None:
    one = stream(0, plan([1000], 1))
    for _ in range(200):
        one.next_pack()
    state = one.state()
    assert set(state) == {"clocks", "begun", "open", "waiting", "skipped"}
    assert len(state["waiting"]) <= WINDOW
    assert len(state["open"][0]) <= OPEN


def test_pieces_of_long_records_take_turns_and_stay_in_order() -> None:
    def long(dataset: int, place: int) -> Encoded:
        return Encoded([np.array([place, piece, 0]) for piece in range(50)])

    one = Stream(0, plan([100], 1), 8, long, lambda dataset, places: ((p, long(dataset, p)) for p in places))
    packs = [one.next_pack().input_ids.reshape(-1, 2).tolist() for _ in range(OPEN)]
    assert all(len({place for place, _ in pack}) == 4 for pack in packs)
    order: dict[int, list[int]] = {}
    for place, piece in (pair for pack in packs for pair in pack):
        order.setdefault(place, []).append(piece)
    assert len(order) == OPEN
    assert all(pieces == [0, 1, 2, 3] for pieces in order.values())


def test_long_records_do_not_hold_up_short_ones() -> None:
    """Half of the tokens from a dataset of records of 40 pieces of 10, half from one of records of 2 tokens."""

    def mixed(dataset: int, place: int) -> Encoded:
        length, pieces = ((10, 40), (2, 1))[dataset]
        return Encoded([np.zeros(length + 1, np.int32) for _ in range(pieces)])

    of = plan([1000, 1000], 1)
    one = Stream(0, of, 100, mixed, lambda dataset, places: ((p, mixed(dataset, p)) for p in places))
    tasks = np.concatenate([one.next_pack().task_ids for _ in range(30)])
    assert (tasks == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_packs_are_full_and_no_sample_is_lost_or_doubled() -> None:
    of = plan([4000], 1, repeats=[False])
    one = stream(0, of, capacity=1000)
    packs = []
    while (pack := one.next_pack()).tokens:
        packs.append(pack)
    expected = Counter({place: tokens(place) for place in range(4000)})
    seen = Counter(int(i) for pack in packs for i in pack.input_ids[pack.task_ids >= 0])
    assert seen == expected
    assert sum(pack.tokens for pack in packs[:-3]) > 0.99 * 1000 * len(packs[:-3])
    assert one.next_pack().tokens == 0


def test_the_last_partial_pack_is_given() -> None:
    one = stream(0, plan([1], 1, repeats=[False]))
    assert one.next_pack().tokens == tokens(0)


def test_records_that_never_give_a_sample_end_the_run() -> None:
    of = plan([5], 1)
    barren = Stream(0, of, 100, encode, lambda _, places: ((place, Encoded([], "no output")) for place in places))
    with pytest.raises(UserError, match=r"task0: 1001 records in a row gave nothing to train on\nof 1001: no output"):
        barren.next_pack()

    def reasons(places: Iterable[int]) -> Iterator[tuple[int, Encoded]]:
        for place in places:
            yield place, Encoded([], OVERSIZE if place % 4 == 0 else LONG_INPUT)

    barren = Stream(0, of, 100, encode, lambda _, places: reasons(places))
    with pytest.raises(UserError) as raised:
        barren.next_pack()
    assert [line.partition(", or leave")[0] for line in str(raised.value).splitlines()] == [
        "task0: 1001 records in a row gave nothing to train on",
        "of 750: input longer than max_length; raise max_length",
        "of 251: longer than max_length; raise max_length, or set the dataset's oversize_rule to head or segment",
    ]
