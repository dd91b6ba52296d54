"""The stores of torch.distributed that a run needs beside its KV store."""

from __future__ import annotations

import datetime
import json
import os
import socket
from typing import TYPE_CHECKING

from fm9g.errors import UserError
from fm9g.launch.dist_env import RankInfo, generate_secret, join_host_port
from fm9g.launch.kv_store import LOOPBACK, KVServer

if TYPE_CHECKING:
    from torch.distributed import TCPStore


def create_tcp_store(rank_info: RankInfo, port: int, is_master: bool) -> TCPStore:
    """Creates the store on the machine of rank 0, or connects to it. Raises DistError.

    torch's stores accept every connection, so the store of a single machine listens on the loopback interface only.

    Args:
        port: of the store; ignored by the master of a single machine, which takes a free one.
        is_master: this process hosts the store.
    """
    from torch.distributed import TCPStore

    single = rank_info.nnodes == 1
    listen_fd = None
    if is_master and single:
        server = socket.create_server((LOOPBACK, 0), backlog=1024)
        port, listen_fd = server.getsockname()[1], server.detach()
    return TCPStore(
        LOOPBACK if single else rank_info.master_addr,
        port,
        is_master=is_master,
        timeout=datetime.timedelta(seconds=rank_info.timeout),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def bootstrap_under_torchrun(rank_info: RankInfo) -> tuple[int, str, KVServer | None, TCPStore]:
    """Starts the KV store under torchrun, whose own store occupies MASTER_PORT.

    Rank 0 hosts the KV store at a free port and publishes the port in torchrun's store. Without a secret, rank 0
    generates one and publishes it, too: then the KV store accepts whoever torchrun's store accepts.

    Returns the port; the secret; the KV server on rank 0, else None; torchrun's store, which this process may host.
    Raises UserError.
    """
    from torch.distributed import DistError, TCPStore

    key = f"fm9g/{rank_info.attempt}/kv_store"
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # as torch's env:// does it
    try:
        store = TCPStore(
            rank_info.master_addr,
            rank_info.master_port,
            is_master=rank_info.rank == 0 and not agent_store,
            timeout=datetime.timedelta(seconds=rank_info.timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        kv_server, shared = None, {}
        if rank_info.rank == 0:
            shared = {} if rank_info.secret else {"secret": generate_secret()}
            kv_server = KVServer(0, rank_info.secret or shared["secret"], loopback_only=rank_info.nnodes == 1)
            store.set(key, json.dumps({"port": kv_server.port, **shared}))
        shared = json.loads(store.get(key))
        return int(shared["port"]), rank_info.secret or str(shared.get("secret", "")), kv_server, store
    except DistError as error:
        address = join_host_port(rank_info.master_addr, rank_info.master_port)
        raise UserError(f"the store of torchrun at {address}: {str(error).splitlines()[0]}") from None
