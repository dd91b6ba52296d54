import subprocess
import sys

import pytest

from fm9g.errors import UserError
from fm9g.launch.dist_env import (
    LaunchConfig,
    RankInfo,
    detect_launcher,
    expand_slurm_nodelist,
    join_host_port,
    read_dist_env,
    read_launch_config,
    read_secret,
)
from fm9g.launch.kv_store import KVServer, connect

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu01",
    "MASTER_PORT": "29511",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[01-02,07]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_ID": "100",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
}


def test_a_process_without_variables_is_alone():
    assert read_dist_env({}) == RankInfo()
    assert RankInfo().is_single_process
    assert not RankInfo().has_agent


def test_the_number_of_the_node_is_not_a_rank():
    guide = {"RANK": "1", "NNODES": "2", "MASTER_ENDPOINT": "gpu01", "MASTER_PORT": "29500", "GPUS_PER_NODE": "8"}
    assert read_dist_env(guide) == RankInfo()
    assert read_launch_config(guide) == LaunchConfig(8, 2, 1, "gpu01", 29500)


def test_torchrun():
    rank_info = read_dist_env(TORCHRUN)
    assert (rank_info.rank, rank_info.local_rank, rank_info.world_size, rank_info.local_world_size) == (5, 1, 8, 4)
    assert (rank_info.node_rank, rank_info.nnodes, rank_info.master_addr, rank_info.master_port) == (
        1,
        2,
        "gpu01",
        29511,
    )
    assert (rank_info.launcher, rank_info.attempt, rank_info.has_agent) == ("torchrun", 2, False)


def test_our_agent():
    actual = {**TORCHRUN, "FM9G_AGENT": "1", "FM9G_ATTEMPT": "1", "FM9G_STARTED": "17.5", "FM9G_STEP_TIMEOUT": "9"}
    rank_info = read_dist_env(actual)
    assert (rank_info.has_agent, rank_info.attempt, rank_info.start_time, rank_info.step_timeout) == (
        True,
        1,
        17.5,
        9.0,
    )


def test_slurm_step():
    rank_info = read_dist_env(SLURM)
    assert (rank_info.rank, rank_info.local_rank, rank_info.world_size, rank_info.local_world_size) == (4, 0, 5, 1)
    # Rank 0 is on the first node of the step.
    assert (rank_info.node_rank, rank_info.nnodes, rank_info.master_addr) == (2, 3, "gpu01")
    assert rank_info.master_port == read_dist_env({**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port
    assert rank_info.master_port != read_dist_env({**SLURM, "SLURM_STEP_ID": "1"}).master_port
    assert read_dist_env({**SLURM, "MASTER_PORT": "2345", "MASTER_ADDR": "other"}).master_port == 2345


def test_a_slurm_script_or_shell_is_no_step_of_several_tasks():
    assert read_dist_env({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == RankInfo()
    assert read_dist_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) == RankInfo()


def test_torchrun_inside_slurm_is_torchrun():
    assert detect_launcher({**SLURM, **TORCHRUN}) == "torchrun"


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({**TORCHRUN, "RANK": ""}, "RANK"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8, but WORLD_SIZE is 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK is 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK: found '-1'"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT: found 'http'"),
        ({**SLURM, "SLURM_PROCID": "5"}, "SLURM_PROCID is 5"),
        ({**SLURM, "SLURM_LOCALID": "1"}, "SLURM_LOCALID"),
        ({**SLURM, "SLURM_STEP_NODELIST": "gpu[01-"}, "SLURM_STEP_NODELIST"),
        ({**SLURM, "SLURM_JOB_ID": ""}, "MASTER_PORT"),
        ({"FM9G_TIMEOUT": "soon"}, "FM9G_TIMEOUT: found 'soon'"),
    ],
)
def test_variables_that_contradict_each_other_are_named(environ: dict, names: str):
    with pytest.raises(UserError) as caught:
        read_dist_env(environ)
    assert names in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login1", ["login1"]),
        ("a,b", ["a", "b"]),
        ("gpu[01-03,07],login1", ["gpu01", "gpu02", "gpu03", "gpu07", "login1"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]-ib", ["n098-ib", "n099-ib", "n100-ib", "n101-ib"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
    ],
)
def test_node_lists(text: str, names: list[str]):
    assert expand_slurm_nodelist(text) == names


@pytest.mark.parametrize("text", ["", "gpu[1-", "gpu[3-1]", "gpu[a-b]", "gpu]1["])
def test_node_lists_that_are_none(text: str):
    with pytest.raises(UserError):
        expand_slurm_nodelist(text)


def test_arguments_come_before_variables():
    environ = {"NNODES": "4", "RANK": "3", "MASTER_ENDPOINT": "a", "GPUS_PER_NODE": "8"}
    assert read_launch_config(environ, nproc=2, nnodes=2, node_rank=1, master_addr="b", master_port=99) == LaunchConfig(
        2, 2, 1, "b", 99
    )
    assert read_launch_config(environ).master_port == 29500
    assert read_launch_config({}, nproc=4) == LaunchConfig(4, 1, 0, "127.0.0.1", 0)


@pytest.mark.parametrize("address", ["[::1]", "::1", " [::1] "])
def test_an_ipv6_address_may_have_brackets(address: str) -> None:
    environ = {"NNODES": "2", "RANK": "0", "MASTER_ENDPOINT": address}
    assert read_launch_config(environ).master_addr == "::1"
    assert read_launch_config({"NNODES": "2", "RANK": "0"}, master_addr=address).master_addr == "::1"
    assert read_dist_env({**TORCHRUN, "MASTER_ADDR": address}).master_addr == "::1"
    assert read_dist_env({**SLURM, "MASTER_ADDR": address}).master_addr == "::1"
    assert (join_host_port("::1", 29500), join_host_port("node0", 29500)) == ("[::1]:29500", "node0:29500")
    kv_server = KVServer(0, "")
    try:
        connect(read_launch_config(environ).master_addr, kv_server.port, "", connect_timeout=5.0, request_timeout=5.0)
    except UserError as error:
        if "Address family not supported" not in str(error) and "Cannot assign" not in str(error):
            raise
        pytest.skip("this machine has no IPv6")
    finally:
        kv_server.close()


def test_one_agent_a_task_of_slurm():
    step = {**SLURM, "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_PROCID": "2"}
    launch_config = read_launch_config(step, nproc=8)
    assert (launch_config.nnodes, launch_config.node_rank, launch_config.master_addr) == (3, 2, "gpu01")
    with pytest.raises(UserError, match="ntasks-per-node"):
        read_launch_config({**SLURM, "SLURM_NODEID": "1", "SLURM_PROCID": "3"}, nproc=8)


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"NNODES": "2", "MASTER_ENDPOINT": "a"}, "RANK"),
        ({"NNODES": "2", "RANK": "0"}, "MASTER_ENDPOINT"),
        ({"RANK": "1"}, "NNODES"),  # else two machines would train the same, each alone
        ({"NNODES": "2", "RANK": "2", "MASTER_ENDPOINT": "a"}, "RANK"),
        ({"NNODES": "two"}, "NNODES"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE"),
        (TORCHRUN, "torchrun"),
    ],
)
def test_nodes_that_contradict_each_other_are_named(environ: dict, names: str):
    with pytest.raises(UserError) as caught:
        read_launch_config(environ)
    assert names in str(caught.value)


def test_a_secret_is_long_and_is_shown_nowhere() -> None:
    with pytest.raises(UserError, match="FM9G_SECRET: found 5 characters, expected at least 16"):
        read_secret({"FM9G_SECRET": "short"})
    secret = "the secret of a run"
    assert secret not in repr(read_dist_env({"FM9G_SECRET": secret}))
    created = subprocess.run([sys.executable, "-m", "fm9g", "train", "--print-secret"], capture_output=True, text=True)
    assert len(created.stdout.strip()) == 32
    assert read_secret({"FM9G_SECRET": created.stdout})
