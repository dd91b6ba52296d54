"""The order of samples: each of the five properties that must hold, without any file."""

from collections import Counter

import numpy as np
import pytest

from fm9g.data.encode import Encoded
from fm9g.data.order import Permutation, mix, spread
from fm9g.data.stream import WINDOW, Odds, Stream
from fm9g.errors import UserError


def odds(sizes: list[int], streams: int, repeats: list[bool] | None = None, chances: list[float] | None = None) -> Odds:
    count = len(sizes)
    names = [f"task{i}" for i in range(count)]
    return Odds(names, sizes, repeats or [True] * count, chances or [1.0] * count, streams, seed=7)


def encode(dataset: int, place: int) -> Encoded:
    """A stand-in for encoding: lengths 1 to 60 by place; every 10th record is cut into three pieces."""
    length = 1 + mix(dataset, place) % 60
    pieces = 3 if place % 10 == 9 else 1
    return Encoded([(np.full(length, place), np.full(length, dataset)) for _ in range(pieces)])


def read(draws):
    return ((draw, encode(*draw)) for draw in draws)


def stream(index: int, of: Odds, state: dict | None = None, capacity: int = 100) -> Stream:
    return Stream(index, of, capacity, encode, read, state)


def test_hash_and_sequence_are_what_they_always_were() -> None:
    """Another value here would change the order of samples of every run that is resumed."""
    assert mix(1, 2, 3) == 15020427595393229491
    assert spread(5, 1, 2) == pytest.approx(0.82786920, abs=1e-8)
    assert [Permutation(10, 1, 2)(i) for i in range(10)] == [7, 8, 5, 1, 9, 2, 4, 3, 0, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_a_permutation_hits_every_number_once(size: int) -> None:
    assert sorted(map(Permutation(size, 3, 1), range(size))) == list(range(size))


def test_permutations_look_random() -> None:
    values = [Permutation(1000, 5)(i) for i in range(1000)]
    assert values != [Permutation(1000, 6)(i) for i in range(1000)]
    assert abs(np.corrcoef(values, range(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.1


def test_the_sequence_spreads_better_than_chance() -> None:
    inside = sum(spread(n, 4, 2) < 0.3 for n in range(10_000))
    assert abs(inside - 3000) < 5


@pytest.mark.parametrize("streams", [1, 4, 7])
def test_every_epoch_uses_every_record_once(streams: int) -> None:
    of = odds([5, 30], streams)  # a dataset smaller than the number of streams, too
    drawn: list[tuple[int, int]] = []
    for index in range(streams):
        draws = of.draws(index, [0, 0])
        drawn += [next(draws) for _ in range(120)]
    assert len(drawn) == len(set(drawn))
    for dataset in (0, 1):
        places = sorted(place for d, place in drawn if d == dataset)
        for index in range(streams):  # stream s takes the places congruent to s, without a gap
            own = [place for place in places if place % streams == index]
            assert own == list(range(index, own[-1] + 1, streams))


def test_datasets_without_repeat_leave_the_mixture() -> None:
    of = odds([10, 40], 3, repeats=[False, False])
    drawn = [draw for index in range(3) for draw in of.draws(index, [0, 0])]
    assert Counter(d for d, _ in drawn) == {0: 10, 1: 40}
    mixed = odds([10, 40], 1, repeats=[False, True]).draws(0, [0, 0])
    assert Counter(d for d, _ in (next(mixed) for _ in range(200)))[0] == 10


def test_shares_follow_the_chances_from_the_start() -> None:
    draws = odds([1000, 1000, 1000], 1, chances=[0.6, 0.3, 0.1]).draws(0, [0, 0, 0])
    counts = Counter(next(draws)[0] for _ in range(1000))
    assert [counts[d] for d in range(3)] == pytest.approx([600, 300, 100], abs=6)


@pytest.mark.parametrize("stop", [1, 3, 20])
def test_a_stream_goes_on_from_its_state_as_if_it_had_never_stopped(stop: int) -> None:
    of = odds([50, 30], 2)
    whole, first = stream(1, of), stream(1, of)
    for _ in range(stop):
        whole.next_pack()
        first.next_pack()
    again = stream(1, of, first.state())
    for _ in range(30):
        one, other = whole.next_pack(), again.next_pack()
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.cu_seqlens, other.cu_seqlens)
    assert whole.state() == again.state()


def test_the_state_is_small_and_its_segments_are_ranges() -> None:
    one = stream(0, odds([1000], 1))
    for _ in range(200):
        one.next_pack()
    state = one.state()
    assert set(state) == {"draws", "waiting", "skipped"}
    assert len(state["waiting"]) <= WINDOW


def test_packs_are_full_and_no_sample_is_lost_or_doubled() -> None:
    of = odds([4000], 1, repeats=[False])
    one = stream(0, of, capacity=1000)
    packs = []
    while (pack := one.next_pack()).tokens:
        packs.append(pack)
    expected = Counter({place: encode(0, place).tokens for place in range(4000)})
    seen = Counter(int(i) for pack in packs for i in pack.input_ids[pack.task_ids >= 0])
    assert seen == expected
    assert sum(pack.tokens for pack in packs[:-3]) > 0.99 * 1000 * len(packs[:-3])
    assert one.next_pack().tokens == 0


def test_the_last_partial_pack_is_given() -> None:
    one = stream(0, odds([1], 1, repeats=[False]))
    assert one.next_pack().tokens == encode(0, 0).tokens


def test_records_that_never_give_a_sample_end_the_run() -> None:
    of = odds([5], 1)
    barren = Stream(0, of, 100, encode, lambda draws: ((draw, Encoded([], "no output")) for draw in draws))
    with pytest.raises(UserError, match=r"task0: 1001 records in a row gave nothing to train on.*no output"):
        barren.next_pack()
