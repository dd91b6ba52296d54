"""Without packing: each record once per epoch, and an epoch ends with a step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.common import assert_same_packs, load_steps, make_records

from fm9g.config.mixture import load_mixture
from fm9g.data.load.concat_order import ConcatOrder
from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.packing import Pack
from fm9g.errors import UserError

Make = Callable[..., Path]
STREAMS, SAMPLES = 4, 3


def unpacked(path: Path, tokenizer: Path, samples: int = SAMPLES, max_length: int = 256) -> Mixture:
    configs = [
        replace(config, abs_weight=None) if config.abs_weight == 1.0 else config for config in load_mixture(path)
    ]
    return Mixture(configs, str(tokenizer), max_length, 3, samples * max_length, samples_per_pack=samples)


@pytest.fixture
def mixture(make_mixture: Make, tokenizer_path: Path) -> Mixture:
    """53 records in two datasets: five steps of 4 packs of 3 samples per epoch, the last of them with 5 samples."""
    return unpacked(make_mixture({"a": make_records(40, 1), "b": make_records(13, 2)}), tokenizer_path)


def texts(mixture: Mixture, packs: list[Pack]) -> list[str]:
    """The decoded samples of packs, in order."""
    spans = ((pack, *span) for pack in packs for span in zip(pack.cu_seqlens, pack.cu_seqlens[1:]))
    decode = mixture.tokenizer.decode
    return [decode(pack.input_ids[start + 1 : end].tolist()) for pack, start, end in spans if pack.task_ids[start] >= 0]


def test_an_epoch_has_each_record_once_and_ends_with_a_step(mixture: Mixture) -> None:
    steps, _ = load_steps(mixture, 15)
    every = Counter(record["input"] + record["output"] for record in [*make_records(40, 1), *make_records(13, 2)])
    epochs = [[text for packs in steps[start : start + 5] for text in texts(mixture, packs)] for start in (0, 5, 10)]
    assert all(Counter(epoch) == every for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [len(texts(mixture, packs)) for packs in steps[:5]] == [12, 12, 12, 12, 5]
    assert all(len(texts(mixture, [pack])) <= SAMPLES for packs in steps for pack in packs)


def test_rows_are_as_long_as_their_samples_in_few_lengths(mixture: Mixture) -> None:
    packs = [pack for packs in load_steps(mixture, 5)[0] for pack in packs]
    assert {len(pack.input_ids) % 64 for pack in packs} == {0}
    assert all(len(pack.input_ids) - pack.tokens < 64 for pack in packs if pack.tokens)


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 2)])
def test_ranks_workers_and_restarts_change_nothing(mixture: Mixture, ranks: int, workers: int) -> None:
    full, _ = load_steps(mixture, 12)
    first, position = load_steps(mixture, 7, ranks=ranks, workers=workers)
    assert_same_packs(full, first + load_steps(mixture, 5, state=position)[0])


def test_datasets_are_spread_evenly_over_an_epoch() -> None:
    order = ConcatOrder([80, 20], 2, 5)
    counts = [sum(order.slots(stream, step).count(1) for stream in range(2)) for step in range(10)]
    assert counts == [2] * 10
    assert order.steps_per_epoch == 10


def test_a_dataset_that_does_not_repeat_ends_the_run(make_mixture: Make, tokenizer_path: Path) -> None:
    path = make_mixture({"a": make_records(10)}, a={"allow_repeat": False})
    mixture = unpacked(path, tokenizer_path)
    with Loader(mixture, global_batch_size=2) as loader:
        sizes = [len(texts(mixture, loader.next_batch())) for _ in range(4)]
    assert sizes == [6, 4, 0, 0]


def test_records_without_a_sample_do_not_end_the_run(make_mixture: Make, tokenizer_path: Path) -> None:
    long = [{"output": "word " * 300} for _ in range(30)]
    path = make_mixture(
        {"a": [*make_records(30, longest=20), *long]}, a={"allow_repeat": False, "oversize_rule": "drop"}
    )
    mixture = unpacked(path, tokenizer_path, samples=1, max_length=64)
    with Loader(mixture, global_batch_size=2) as loader:
        steps = [loader.next_batch() for _ in range(31)]
    sizes = [len(texts(mixture, packs)) for packs in steps]
    assert sum(sizes) == 30
    assert sizes == sorted(sizes, reverse=True)  # nothing comes after a step without a sample


def test_records_with_several_samples_are_all_trained_on(make_mixture: Make, tokenizer_path: Path) -> None:
    path = make_mixture({"a": [{"output": "word " * 300} for _ in range(4)]})  # four times several segments
    mixture = unpacked(path, tokenizer_path, samples=2, max_length=64)
    with Loader(mixture, global_batch_size=1) as loader:
        packs = [loader.next_batch()[0] for _ in range(12)]
    assert all(0 < len(texts(mixture, [pack])) <= 2 for pack in packs)


def test_shares_are_kept_with_one_record_per_slot(make_mixture: Make, tokenizer_path: Path) -> None:
    shares = {"a": {"abs_weight": 0.5}, "b": {"abs_weight": 0.5}}
    path = make_mixture({"a": make_records(40, 1), "b": make_records(13, 2)}, **shares)
    mixture = unpacked(path, tokenizer_path)
    assert not mixture.is_concatenated
    steps, _ = load_steps(mixture, 40)
    tokens = Counter(int(task) for packs in steps for pack in packs for task in pack.task_ids if task >= 0)
    assert tokens[0] / tokens.total() == pytest.approx(0.5, abs=0.02)
    assert all(len(texts(mixture, [pack])) <= SAMPLES for packs in steps for pack in packs)


def test_a_new_dataset_restarts_the_epochs_only_if_that_is_allowed(make_mixture: Make, tokenizer_path: Path) -> None:
    first = {"a": make_records(40, 1)}
    position = json.loads(json.dumps(load_steps(unpacked(make_mixture(first), tokenizer_path), 2)[1]))
    more = unpacked(make_mixture({**first, "b": make_records(9, 2)}), tokenizer_path)
    with pytest.raises(UserError, match="b is new in the mixture") as error:
        Loader(more, global_batch_size=STREAMS, state=position)
    assert "--on_data_change allow" in str(error.value)
    with Loader(more, global_batch_size=STREAMS, state=position, allow_changes=True) as loader:
        assert loader.num_started() == [0, 0]


def test_another_number_of_samples_is_another_order(make_mixture: Make, tokenizer_path: Path) -> None:
    path = make_mixture({"a": make_records(40, 1)})
    position = json.loads(json.dumps(load_steps(unpacked(path, tokenizer_path), 2)[1]))
    with pytest.raises(UserError, match="samples per pack without packing: was 3, is 2"):
        Loader(unpacked(path, tokenizer_path, samples=2), global_batch_size=STREAMS, state=position)
    with Loader(
        unpacked(path, tokenizer_path, samples=2), global_batch_size=STREAMS, state=position, allow_changes=True
    ) as loader:
        assert loader.num_started() == [0]
