"""The loader: the packs of a step depend on no rank, worker or restart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.common import assert_same_packs, index_dataset, load_steps, make_records
from helpers.mixtures import open_mixture

from fm9g.config.mixture import load_mixture
from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError

Make = Callable[..., Path]


@pytest.mark.parametrize("ranks", [2, 4])
def test_packs_do_not_depend_on_the_number_of_ranks(mixture: Mixture, ranks: int) -> None:
    assert_same_packs(load_steps(mixture, 12)[0], load_steps(mixture, 12, ranks=ranks)[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_packs_do_not_depend_on_the_number_of_workers(mixture: Mixture, workers: int) -> None:
    assert_same_packs(load_steps(mixture, 12)[0], load_steps(mixture, 12, workers=workers)[0])


def test_another_number_of_ranks_and_workers_goes_on_with_the_same_packs(mixture: Mixture) -> None:
    full, _ = load_steps(mixture, 14)
    first, position = load_steps(mixture, 5, ranks=2, workers=3)
    assert_same_packs(full, first + load_steps(mixture, 9, ranks=4, state=position)[0])


def test_ranks_that_do_not_divide_the_packs_are_refused(mixture: Mixture) -> None:
    with pytest.raises(UserError, match=r"4 packs per step cannot be divided among 3 processes; possible: \[1, 2, 4\]"):
        Loader(mixture, global_batch_size=4, world_size=3)


def test_the_first_record_of_a_dataset_is_trained_on(make_mixture: Make, tokenizer_path: Path) -> None:
    mixture = open_mixture(
        make_mixture({"a": make_records(20)}, a={"allow_repeat": False}), tokenizer_path, max_length=512
    )
    seen = []
    loader = Loader(mixture, global_batch_size=1)
    while (pack := loader.next_batch()[0]).tokens:
        for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:]):
            if pack.task_ids[start] >= 0:
                seen.append(mixture.tokenizer.decode(pack.input_ids[start + 1 : end].tolist()))
    assert Counter(seen) == Counter(record["input"] + record["output"] for record in make_records(20))


def test_shares_of_tokens_follow_abs_weight_whatever_the_lengths(make_mixture: Make, tokenizer_path: Path) -> None:
    datasets = {"short": make_records(50, 1, longest=3), "long": make_records(50, 2, longest=300)}
    path = make_mixture(datasets, short={"abs_weight": 0.3}, long={"abs_weight": 0.7})
    mixture = open_mixture(path, tokenizer_path, max_length=512)
    created, _ = load_steps(mixture, 60)
    tasks = np.concatenate([pack.task_ids for step in created for pack in step])
    assert (tasks == 0).sum() / (tasks >= 0).sum() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("names", [["alpaca_zh_demo.json", "wiki_demo.txt"], ["wiki_demo.txt"]])
def test_padding_is_below_one_percent_on_real_data(shared: Path, tmp_path: Path, names: list[str]) -> None:
    """Rows of 2048 tokens, once round each dataset."""
    entries = []
    for name in names:
        index_dataset(shared / "data" / name, tmp_path / name, "zh")
        entries.append({"task_name": name, "path": name})
    (tmp_path / "mixture.json").write_text(json.dumps(entries))
    configs = load_mixture(tmp_path / "mixture.json")
    mixture = Mixture(configs, str(shared / "tokenizers" / "9g-2b"), 2048, seed=1)
    loader = Loader(mixture, global_batch_size=1)
    packs = [loader.next_batch()[0] for _ in range(150)]
    assert 1 - sum(pack.tokens for pack in packs) / (2048 * len(packs)) < 0.01
    assert all(np.diff(pack.cu_seqlens).max() <= 2048 for pack in packs)
