"""The stores of torch.distributed that a run needs beside its board."""

from __future__ import annotations

import datetime
import json
import os
import socket
from typing import TYPE_CHECKING

from fm9g.errors import UserError
from fm9g.launch.board import LOOPBACK, Hub
from fm9g.launch.place import Place, new_secret, with_port

if TYPE_CHECKING:
    from torch.distributed import TCPStore

# NCCL waits in the store for ranks that still read their data; whoever is lost, the monitor finds out.
FOR_EVER = datetime.timedelta(days=30)


def open_store(place: Place, port: int, hosted: bool) -> TCPStore:
    """A store at rank 0's machine. hosted: this process holds it, at a free port. Raises DistError.

    torch's stores let in whoever reaches them, so that of a single machine listens to this machine alone.
    """
    from torch.distributed import TCPStore

    patience = datetime.timedelta(seconds=place.timeout)
    single = place.nodes == 1
    listening = None
    if hosted and single:
        server = socket.create_server((LOOPBACK, 0), backlog=1024)
        port, listening = server.getsockname()[1], server.detach()
    store = TCPStore(
        LOOPBACK if single else place.master_addr,
        port,
        is_master=hosted,
        timeout=patience,
        wait_for_workers=False,
        master_listen_fd=listening,
    )
    store.set_timeout(FOR_EVER)
    return store


def meet_under_torchrun(place: Place) -> tuple[int, str, Hub | None, TCPStore]:
    """Under torchrun, whose own store has MASTER_PORT: rank 0 holds the board at a free port, and tells by that store.

    Without a secret rank 0 makes one and tells it, too: then the board lets in those whom torchrun's store lets in.
    Returns the port; the secret; the board's hub on rank 0; and the store, which may be this process's to keep.
    Raises UserError.
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
        hub, told = None, {}
        if place.rank == 0:
            told = {} if place.secret else {"secret": new_secret()}
            hub = Hub(0, place.secret or told["secret"], local=place.nodes == 1)
            store.set(key, json.dumps({"port": hub.port, **told}))
        told = json.loads(store.get(key))
        return int(told["port"]), place.secret or str(told.get("secret", "")), hub, store
    except DistError as error:
        where = with_port(place.master_addr, place.master_port)
        raise UserError(f"the store of torchrun at {where}: {str(error).splitlines()[0]}") from None
