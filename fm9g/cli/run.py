"""The commands of a run: train, config, plan, doctor."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fm9g.out_of_memory import TRAINING_OOM_ADVICE
from fm9g.printable import printable
from fm9g.text_table import text_table

if TYPE_CHECKING:
    from fm9g.config.run import RunConfig
    from fm9g.shorthand.load import RunArguments
    from fm9g.train.loader_benchmark import LoaderBenchmark
    from fm9g.train.memory_probe import MemoryProbe
    from fm9g.train.runner import TrainResult

logger = logging.getLogger(__name__)

_NODE_OPTIONS = ("nnodes", "node_rank", "master_addr", "master_port")


def add_run_commands(subcommand: Any, group: Any) -> None:
    """Args: subcommand, group: functions that add a command, or a group of commands, to the command line."""
    from fm9g.cli.translate import add_translate_command
    from fm9g.doctor.command import add_doctor_arguments
    from fm9g.plan.command import add_plan_arguments

    train = subcommand(
        "train", _train, "train a model; --KEY VALUE sets any key that `fm9g config keys` lists", accepts_overrides=True
    )
    _add_run_arguments(train)
    _add_launch_arguments(train)
    train.add_argument(
        "--print-secret",
        action=_PrintSecret,
        help="print a new value for FM9G_SECRET, which all machines of a run must have, and exit",
    )
    plan = subcommand(
        "plan", _plan, "estimate the memory, disk space and time that a training needs", accepts_overrides=True
    )
    doctor = subcommand(
        "doctor", _doctor, "check this machine for problems that would stop a run", accepts_overrides=True
    )
    for parser, add_arguments in ((plan, add_plan_arguments), (doctor, add_doctor_arguments)):
        add_run_options(parser)
        add_arguments(parser)

    config = group("config", "show: the configuration of a run; keys: every configuration key")
    show = "print every value of a run's configuration and its origin"
    _add_run_arguments(subcommand("show", _config_show, show, parent=config, accepts_overrides=True))
    subcommand("keys", _config_keys, "print every key of the three kinds of configuration files", parent=config)
    add_translate_command(subcommand, config)


class _PrintSecret(argparse.Action):
    """Prints a secret and exits, as --version does."""

    def __init__(self, **words: Any) -> None:
        super().__init__(nargs=0, **words)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fm9g.launch.dist_env import generate_secret

        print(generate_secret())
        parser.exit()


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes", "Under torchrun and srun, none of these is needed.")
    for option, kind, meaning in (
        ("nproc", int, "number of processes on this machine; default: the variable GPUS_PER_NODE, else the key n_gpus"),
        ("nnodes", int, "number of machines; default: the variable NNODES, else 1"),
        ("node-rank", int, "number of this machine, from 0; default: the variable RANK"),
        ("master-addr", str, "host name or address of machine 0; default: the variable MASTER_ENDPOINT or MASTER_ADDR"),
        ("master-port", int, "a free port of machine 0; default: the variable MASTER_PORT"),
    ):
        group.add_argument(f"--{option}", type=kind, default=None, help=meaning)
    group.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        help="maximum number of restarts from the last checkpoint after a failure (default: %(default)s)",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    parser.usage = (
        f"{parser.prog} [-h] [FILE] [--model MODEL --data DATA --method METHOD] [--config NAME] [--KEY VALUE ...]"
    )
    parser.epilog = (
        "FILE is a run file: YAML or JSON with any keys, of fm9g or of another tool. Further options: --KEY VALUE sets "
        "a training key, --model.KEY VALUE a key of the model, --data.TASK.KEY VALUE a key of a dataset, "
        "--default.KEY VALUE a training key unless the file of train_configs/ sets it. `fm9g config keys` lists all "
        "keys; --some-key and --some_key are the same. Training needs a model and data: --model and --data, or "
        "--config with dataset_config and tokenizer_path."
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which run is meant; the keys of a run are no options of the parser."""
    parser.add_argument(
        "--config",
        default="",
        metavar="NAME",
        help="the run: a name in train_configs/ or model_configs/, or the path of such a file",
    )
    parser.add_argument(
        "--from",
        dest="dialect",
        default="",
        metavar="TOOL",
        help="the tool whose arguments FILE and the other words are; default: recognized by their names",
    )


def run_arguments(options: argparse.Namespace) -> RunArguments:
    """What the options and words of a command say about a run."""
    from fm9g.shorthand.load import RunArguments, split_file

    file, words = split_file(list(options.rest))
    return RunArguments(options.config, file, options.dialect, tuple(words))


def _train(options: argparse.Namespace) -> int:
    from fm9g.convert.run_adapter import with_adapter
    from fm9g.launch.worker_group import set_parent_death_signal
    from fm9g.shorthand.load import load_run

    set_parent_death_signal()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # ignored until the run can save a checkpoint
    starts_workers = _starts_workers(options)
    if not starts_workers:
        _quiet_other_ranks()
    run = load_run(run_arguments(options))
    if run.train.test_oom_error:
        from fm9g.errors import UserError
        from fm9g.train.memory_probe import probe_memory

        if (options.nproc or 1) > 1:
            raise UserError(
                f"test_oom_error measures one process with the whole model; leave out --nproc {options.nproc}"
            )
        return _print_memory_probe(probe_memory(with_adapter(run)), run)
    if run.train.only_run_dataloader:
        from fm9g.train.loader_benchmark import benchmark_dataloader

        _print_loader_benchmark(benchmark_dataloader(run))
        return 0
    if starts_workers:
        status = _launch(options, run)
        if status is not None:
            return status
    return _train_here(run)


def _starts_workers(options: argparse.Namespace) -> bool:
    """Whether this process may start others: no launcher did, or srun started one process per machine for that."""
    from fm9g.launch.dist_env import detect_launcher

    launcher = detect_launcher()
    asked = options.nproc is not None or bool(os.environ.get("GPUS_PER_NODE"))
    return launcher == "" or (launcher == "slurm" and asked)


def _quiet_other_ranks() -> None:
    """Silences all ranks but 0, and the configuration's messages if our agent has shown them already."""
    from fm9g.launch.dist_env import read_dist_env
    from fm9g.log import log_only_errors

    rank_info = read_dist_env()
    if rank_info.rank:
        log_only_errors()
    elif rank_info.has_agent:
        for name in ("fm9g.config", "fm9g.shorthand"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _launch(options: argparse.Namespace, run: RunConfig) -> int | None:
    """Runs the training in processes that this one starts; returns their exit status, None if one process suffices."""
    from fm9g.config.resolved import DeviceFacts, resolve
    from fm9g.doctor.fit import cpu_memory_problem
    from fm9g.launch.dist_env import read_launch_config

    config = run.train
    asked = options.nproc is not None or bool(os.environ.get("GPUS_PER_NODE"))
    nproc = options.nproc if asked else config.n_gpus
    launch_config = read_launch_config(os.environ, nproc, *(getattr(options, key) for key in _NODE_OPTIONS))
    world_size = launch_config.nnodes * launch_config.nproc
    resolve(run, world_size, DeviceFacts(on_gpu=True))  # reports a mistake before anything starts
    if problem := cpu_memory_problem(run, launch_config.nnodes, launch_config.nproc):
        logger.warning(f"{problem}. See fm9g doctor {shlex.join(_run_words(options))}")
    if world_size == 1 and not options.max_restarts:
        return None
    from fm9g.launch.agent import run_agent
    from fm9g.launch.consistency import code_fingerprint

    return run_agent(
        ["train", *_run_words(options)],
        launch_config,
        max_restarts=options.max_restarts,
        fingerprint={"code": code_fingerprint(), "config": run.fingerprint()},
        log_dir=config.folders.logs,
        timeout=config.timeout,
        step_timeout=config.step_timeout,
    )


def _run_words(options: argparse.Namespace) -> list[str]:
    """The words that describe the run, for another fm9g command. A run file stays the first of the rest."""
    named = {"--config": options.config, "--from": options.dialect}
    return [word for option, value in named.items() if value for word in (option, value)] + list(options.rest)


def _train_here(run: RunConfig) -> int:
    from fm9g.launch.dist_env import read_dist_env
    from fm9g.train.runner import run_training

    rank_info = replace(read_dist_env(), timeout=run.train.timeout, step_timeout=run.train.step_timeout)
    result = run_training(run, rank_info)
    if rank_info.rank == 0:
        print_result(result)
    return 130 if result.interrupted else 0


def print_result(result: TrainResult) -> None:
    rate = result.tokens / max(result.seconds, 1e-9)
    print(f"step {result.step}: {result.tokens} tokens since this start, {result.seconds:.0f} s, {rate:.0f} tokens/s")
    if result.interrupted and result.checkpoint:
        print("stopped before the end; the same command with --resume auto continues")
    print(f"checkpoint: {result.checkpoint or 'none (save is false)'}")
    if result.best_checkpoint:
        same = " (the last one)" if result.best_checkpoint == result.checkpoint else ""
        print(f"best checkpoint, by validation loss: {result.best_checkpoint}{same}")
    print(f"metrics: {result.metrics_file}")
    if result.tensorboard_dir.is_dir():
        print(f"TensorBoard: {result.tensorboard_dir}")


def _plan(options: argparse.Namespace) -> int:
    from fm9g.plan.command import run_plan

    return run_plan(options, run_arguments(options))


def _doctor(options: argparse.Namespace) -> int:
    from fm9g.doctor.command import run_doctor

    return run_doctor(options, run_arguments(options))


def _print_loader_benchmark(result: LoaderBenchmark) -> None:
    total = sum(result.tokens.values())
    padding = 1 - total / max(1, result.padded_tokens)
    print(
        f"{result.steps} steps, {total} tokens, {result.tokens_per_second:.0f} tokens/s, {padding:.2%} padding; "
        "nothing was trained"
    )
    for task, tokens in result.tokens.items():
        share, target = tokens / max(1, total), result.target_shares[task]
        print(f"  {printable(task)}: {tokens} tokens, {share:.2%} (target: {target:.2%})")
    for reason, count in result.skipped.items():
        logger.warning(f"{count} records were skipped: {reason}")


def _print_memory_probe(probe: MemoryProbe, run: RunConfig) -> int:
    """Prints what fits; returns 1 if the configured batch size does not."""
    print(
        f"longest sample: {probe.longest} tokens; one process with the whole model computed; nothing was trained or "
        "written"
    )
    if not probe.fits:
        print(f"batch_size {probe.batch_size} with max_length {run.train.max_length} does not fit")
    for size, peak in sorted(probe.peaks.items()):
        print(f"batch_size {size} with max_length {run.train.max_length} fits: {peak / 2**30:.2f} GiB of "
              f"{probe.total / 2**30:.2f}")  # fmt: skip
    if not probe.peaks:
        print(f"not even batch_size 1 fits; {TRAINING_OOM_ADVICE}")
    return 0 if probe.fits else 1


def _config_show(options: argparse.Namespace) -> None:
    from fm9g.convert.run_adapter import with_adapter
    from fm9g.shorthand.load import load_run

    run = with_adapter(load_run(run_arguments(options), complete=False, prepare_data=False))
    for section, values in run.to_json().items():
        print(f"[{printable(section)}]")
        rows = [(f"  {key}", repr(item["value"]), item["from"]) for key, item in values.items()]
        print("\n".join(text_table(rows)))


def _config_keys(options: argparse.Namespace) -> None:
    from fm9g.config import model
    from fm9g.config.fields import describe, keys_of, schema_of
    from fm9g.config.mixture import DatasetConfig
    from fm9g.config.model import ModelConfig
    from fm9g.config.train import DEPRECATED_KEYS, TrainConfig

    kinds = (
        ("train_configs", "--KEY VALUE", TrainConfig),
        ("model_configs", "--model.KEY VALUE", ModelConfig),
        ("dataset_configs", "--data.TASK.KEY VALUE", DatasetConfig),
    )
    for folder, usage, cls in kinds:
        print(f"[{folder}]  {usage}")
        properties = schema_of(cls)["properties"]
        for key, field in keys_of(cls).items():
            default = "required" if key in schema_of(cls)["required"] else f"default {_default(field)!r}"
            others = "".join(f"; also called {alias}" for alias in field.metadata["aliases"])
            print(f"  {key}: {describe(properties[key])}; {default}{others}\n      {field.metadata['help']}")
    print("[keys of the 9G guide that have no effect]")
    for key, why in DEPRECATED_KEYS.items():
        print(f"  {key}: {why}")
    print("[keys of published models that have no effect]")
    for key, (_, why) in model.DEPRECATED_KEYS.items():
        print(f"  {key}: {why}")


def _default(field: Any) -> Any:
    import dataclasses

    return field.default if field.default is not dataclasses.MISSING else field.default_factory()
