"""A worker for tests that sums over all ranks; started by torchrun, with SLURM's variables, or by our agent."""

import sys
from pathlib import Path

from fm9g.launch.dist_env import read_dist_env
from fm9g.launch.watchdog import Watchdog

rank_info = read_dist_env()
with Watchdog(rank_info) as watchdog:
    if "error" in sys.argv and rank_info.rank == 1:
        raise ValueError("a bug")
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", store=watchdog.create_torch_store(), rank=rank_info.rank, world_size=rank_info.world_size
    )
    total = torch.tensor([rank_info.rank + 1.0])
    dist.all_reduce(total)
    Path(sys.argv[1], f"sum-{rank_info.rank}").write_text(
        f"{rank_info.launcher} {rank_info.node_rank} {total.item():.0f}"
    )
    dist.destroy_process_group()
