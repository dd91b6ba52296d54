"""A worker of the tests that sums over all ranks; started by torchrun, SLURM's variables, or our agent."""

import sys
from pathlib import Path

from fm9g.launch.monitor import Monitor
from fm9g.launch.place import find_place

place = find_place()
with Monitor(place) as monitor:
    if "error" in sys.argv and place.rank == 1:
        raise ValueError("a bug")
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=monitor.store(), rank=place.rank, world_size=place.world_size)
    total = torch.tensor([place.rank + 1.0])
    dist.all_reduce(total)
    Path(sys.argv[1], f"sum-{place.rank}").write_text(f"{place.launcher} {place.node} {total.item():.0f}")
    dist.destroy_process_group()
