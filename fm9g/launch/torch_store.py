"""The stores of torch.distributed that a run needs beside its board."""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING

from fm9g.errors import UserError
from fm9g.launch.board import Hub
from fm9g.launch.place import Place, with_port

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# NCCL waits in the store for ranks that still read their data; whoever is lost, the monitor finds out.
FOR_EVER = datetime.timedelta(days=30)


def open_store(place: Place, port: int, hosted: bool) -> TCPStore:
    """A store at rank 0's machine. hosted: this process holds it; port 0 takes a free one. Raises DistError."""
    from torch.distributed import TCPStore

    patience = datetime.timedelta(seconds=place.timeout)
    store = TCPStore(place.master_addr, port, is_master=hosted, timeout=patience, wait_for_workers=False)
    store.set_timeout(FOR_EVER)
    return store


def agree_on_port(place: Place) -> tuple[int, Hub | None, TCPStore]:
    """Under torchrun, whose own store has MASTER_PORT: rank 0 holds the board at a free port, and tells by that store.

    Returns the port; the board's hub on rank 0; and the store, which may be this process's to keep. Raises UserError.
    """
    from torch.distributed import DistError, TCPStore

    key = f"fm9g/{place.attempt}/board"
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # as torch's env:// does it
    try:
        store = TCPStore(
            place.master_addr,
            place.master_port,
            is_master=place.rank == 0 and not held,
            timeout=datetime.timedelta(seconds=place.timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        hub = Hub(0) if place.rank == 0 else None
        if hub:
            store.set(key, str(hub.port))
        return int(store.get(key)), hub, store
    except DistError as error:
        where = with_port(place.master_addr, place.master_port)
        raise UserError(f"the store of torchrun at {where}: {str(error).splitlines()[0]}") from None
