"""Full tensors from shards, and copies of them for a background thread."""

from __future__ import annotations

import torch
from helpers.spawn import run_ranks

from fm9g.engine.dist_context import DistContext
from fm9g.engine.gather import GatheredStateDict, GatherSpec


def test_a_staged_state_dict_does_not_change_with_its_tensors() -> None:
    weight, buffers = torch.ones(3), {}
    spec = GatherSpec(torch.Size([3]), lambda full: full, True, lambda: weight)
    for expected in (1.0, 2.0):
        weight.fill_(expected)
        state_dict = GatheredStateDict({"w": spec}, torch.device("cpu"), 1, None)
        state_dict.stage_to_host(buffers)
        weight.fill_(9.0)
        assert torch.equal(dict(state_dict)["w"], torch.full((3,), expected))
    assert list(buffers) == ["w"]


def gather(dist_context: DistContext) -> torch.Tensor:
    """Rows 0-3 on even ranks, rows 4-7 on odd ones; each pair of ranks holds all."""
    rows = slice(4 * (dist_context.rank % 2), 4 * (dist_context.rank % 2) + 4)
    local = torch.arange(16.0).view(8, 2)[rows]
    spec = GatherSpec(torch.Size([8, 2]), lambda full: full[rows], dist_context.rank < 2, lambda: local)
    specs = {"w": spec}
    return dict(GatheredStateDict(specs, torch.device("cpu"), 4, dist_context.background_group))["w"]


def test_rank_0_gets_each_part_once_from_replicated_shards() -> None:
    assert torch.equal(run_ranks(4, gather)[0], torch.arange(16.0).view(8, 2))
