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

# NCCL waits in the store for ranks that still read their data; whoever is lost, the watchdog finds out.
NO_TIMEOUT = datetime.timedelta(days=30)


def create_tcp_store(rank_info: RankInfo, port: int, is_master: bool) -> TCPStore:
    """A store at rank 0's machine. is_master: this process holds it, at a free port. Raises DistError.

    torch's stores let in whoever reaches them, so that of a single machine listens to this machine alone.
    """
    from torch.distributed import TCPStore

    timeout = datetime.timedelta(seconds=rank_info.timeout)
    single = rank_info.nnodes == 1
    listen_fd = None
    if is_master and single:
        server = socket.create_server((LOOPBACK, 0), backlog=1024)
        port, listen_fd = server.getsockname()[1], server.detach()
    store = TCPStore(
        LOOPBACK if single else rank_info.master_addr,
        port,
        is_master=is_master,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
    store.set_timeout(NO_TIMEOUT)
    return store


def bootstrap_under_torchrun(rank_info: RankInfo) -> tuple[int, str, KVServer | None, TCPStore]:
    """Under torchrun, whose own store has MASTER_PORT: rank 0 holds the KV store at a free port, and tells it there.

    Without a secret rank 0 makes one and tells it, too: then the KV store lets in those whom torchrun's store lets in.
    Returns the port; the secret; the KV store's server on rank 0; and the store, which may be this process's to keep.
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
        where = join_host_port(rank_info.master_addr, rank_info.master_port)
        raise UserError(f"the store of torchrun at {where}: {str(error).splitlines()[0]}") from None
