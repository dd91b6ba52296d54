"""From packs to batches on the device, and sums over their targets."""

import numpy as np
import pytest
import torch
from helpers.engine_harness import CAPACITY, documents

from fm9g.data.load.packing import IGNORE_INDEX, Pack, collate
from fm9g.train.batch import sum_by_task, to_batch


@pytest.fixture
def packs() -> list[Pack]:
    return [collate(group, CAPACITY) for group in documents(1)]


def test_a_batch_has_the_targets_of_its_pack_with_their_tasks(packs: list[Pack]) -> None:
    for pack in packs:
        batch, tasks = to_batch(pack, torch.device("cpu"))
        rows = np.flatnonzero(pack.targets != IGNORE_INDEX)
        np.testing.assert_array_equal(batch.target_positions.numpy(), rows)
        np.testing.assert_array_equal(batch.targets.numpy(), pack.targets[rows])
        np.testing.assert_array_equal(tasks.numpy(), pack.task_ids[rows])
        assert batch.seqlens == np.diff(pack.cu_seqlens).tolist()


def test_sums_by_task_heed_the_weights() -> None:
    values, tasks = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1])
    assert sum_by_task(values, None, tasks, 3).tolist() == [2.0, 5.0, 0.0]
    assert sum_by_task(values, torch.tensor([1.0, 1.0, 0.5]), tasks, 3).tolist() == [2.0, 3.0, 0.0]
