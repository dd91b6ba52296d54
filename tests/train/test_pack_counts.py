"""Tokens and targets of packs."""

import pytest
import torch
from helpers.engine_harness import CAPACITY, documents

from fm9g.data.load.packing import Pack, collate
from fm9g.train.batch import sum_by_task, to_batch
from fm9g.train.pack_counts import count_targets_by_task, count_tokens_by_task


@pytest.fixture
def packs() -> list[Pack]:
    return [collate(group, CAPACITY) for group in documents(1)]


def test_targets_counted_on_the_host_are_those_on_the_device(packs: list[Pack]) -> None:
    on_device = torch.zeros(2)
    for pack in packs:
        batch, tasks = to_batch(pack, torch.device("cpu"))
        on_device += sum_by_task(torch.ones(len(tasks)), batch.target_weights, tasks, 2)
    assert count_targets_by_task(packs, 2).tolist() == pytest.approx(on_device.tolist())
    assert count_targets_by_task(packs, 2).sum() == pytest.approx(sum(pack.total_weight for pack in packs))


def test_tokens_are_counted_without_padding(packs: list[Pack]) -> None:
    counts = count_tokens_by_task(packs, 2)
    assert counts.tolist() == [30 + 20 + 16 + 14, 3 + 5 + 1 + 1]
    assert counts.sum() == sum(pack.tokens for pack in packs)
