"""The subcommands of runs: train, config, plan, doctor."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.printable import printable

_NODE_OPTIONS = ("nnodes", "node_rank", "master_addr", "master_port")


def add_run_commands(subcommand: Any, group: Any) -> None:
    """subcommand, group: put a subcommand, or a group of them, on the command line."""
    from fm9g.doctor import add_doctor_arguments
    from fm9g.plan.command import add_plan_arguments

    train = subcommand(
        "train", _train, "train a model; --KEY VALUE sets any key that `fm9g config keys` lists", accepts_overrides=True
    )
    _add_run_arguments(train)
    _add_launch_arguments(train)
    train.add_argument("--print-secret", action=_PrintSecret, help="print a new FM9G_SECRET for the machines of a run")
    add_plan_arguments(subcommand("plan", _plan, "memory, disk and days that a training takes", accepts_overrides=True))
    add_doctor_arguments(
        subcommand("doctor", _doctor, "what of this machine keeps a run from working", accepts_overrides=True)
    )

    config = group("config", "show, keys: the configuration of a run, every key there is")
    show = "every value of a run's configuration and where it came from"
    _add_run_arguments(subcommand("show", _config_show, show, parent=config, accepts_overrides=True))
    subcommand("keys", _config_keys, "every key of the three kinds of configuration file", parent=config)


class _PrintSecret(argparse.Action):
    """As --version: prints, and that is all."""

    def __init__(self, **words: Any) -> None:
        super().__init__(nargs=0, **words)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fm9g.launch.dist_env import generate_secret

        print(generate_secret())
        parser.exit()


def _add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes", "Under torchrun and srun, none of these is needed.")
    for option, kind, meaning in (
        ("nproc", int, "processes on this machine; default: GPUS_PER_NODE, else the key n_gpus"),
        ("nnodes", int, "machines; default: NNODES, else 1"),
        ("node-rank", int, "which of them this one is, from 0; default: RANK"),
        ("master-addr", str, "name or address of machine 0; default: MASTER_ENDPOINT or MASTER_ADDR"),
        ("master-port", int, "a free port of machine 0; default: MASTER_PORT"),
    ):
        group.add_argument(f"--{option}", type=kind, default=None, help=meaning)
    group.add_argument(
        "--max-restarts", type=int, default=0, help="go on from the last checkpoint after a failure, so often at most"
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a name in train_configs/ or model_configs/, or a path"
    )
    parser.usage = f"{parser.prog} [-h] --config NAME [--KEY VALUE ...]"
    parser.epilog = (
        "Also --KEY VALUE for every training key, --model.KEY VALUE for a key of the model, --data.TASK.KEY VALUE for "
        "one of a dataset, --default.KEY VALUE for a training key that the file of train_configs/ may overrule. "
        "`fm9g config keys` lists them; --some-key and --some_key are the same. Training needs dataset_config and "
        "tokenizer_path, given here or in the file of train_configs/."
    )


def _parse_overrides(options: argparse.Namespace) -> dict[str, str]:
    """`--key value` and `--key=value` pairs that the parser does not know by name."""
    pairs: dict[str, str] = {}
    rest = list(options.rest)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        section, dot, name = key.rpartition(".")  # of data.TASK.KEY, the task stays as it is
        key = section + dot + name.replace("-", "_")
        if not word.startswith("--") or not key:
            hint = f"; did you mean --{key} {value}?" if equals and key else ""
            raise UserError(f"command line: found {word!r}, expected --key value{hint}")
        if not equals:
            if not rest:
                raise UserError(f"command line: --{key}: its value is missing")
            value = rest.pop(0)
        if key in pairs:
            raise UserError(f"command line: --{key} is given twice; keep one of them")
        pairs[key] = value
    return pairs


def _train(options: argparse.Namespace) -> int:
    from fm9g.config.run import load_run
    from fm9g.launch.dist_env import detect_launcher, read_dist_env, read_launch_config
    from fm9g.launch.worker_group import set_parent_death_signal

    set_parent_death_signal()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    run = load_run(options.config, _parse_overrides(options))
    config = run.train.value
    if config.only_run_dataloader:
        from fm9g.train.data_loading import benchmark_dataloader

        _print_loader_benchmark(benchmark_dataloader(run))
        return 0
    launcher = detect_launcher()
    several = options.nproc is not None or bool(os.environ.get("GPUS_PER_NODE"))  # to be started here
    if launcher == "" or (launcher == "slurm" and several):
        nproc = options.nproc if several else config.n_gpus
        launch_config = read_launch_config(os.environ, nproc, *(getattr(options, key) for key in _NODE_OPTIONS))
        # A mistake is told before anything starts.
        config.packs_per_step(config.dp_size(launch_config.nnodes * launch_config.nproc))
        from fm9g.doctor.fit import cpu_memory_problem

        if problem := cpu_memory_problem(run, launch_config.nnodes, launch_config.nproc):
            print(f"warning: {problem}. See fm9g doctor --config {options.config}", file=sys.stderr)
        if launch_config.nnodes * launch_config.nproc > 1 or options.max_restarts:
            from fm9g.launch.agent import run_agent
            from fm9g.launch.consistency import code_fingerprint

            logs = Path(config.output_dir) / "logs" / f"{config.exp_group}{config.model_unique}"
            return run_agent(
                ["train", "--config", options.config, *options.rest],
                launch_config,
                max_restarts=options.max_restarts,
                fingerprint={"code": code_fingerprint(), "config": run.fingerprint()},
                log_dir=logs,
                timeout=config.timeout,
                step_timeout=config.step_timeout,
            )
    from fm9g.train.runner import run_training

    rank_info = replace(read_dist_env(), timeout=config.timeout, step_timeout=config.step_timeout)
    result = run_training(run, rank_info)
    if rank_info.rank == 0:
        _print_result(result)
    return 130 if result.interrupted else 0


def _print_result(result: Any) -> None:
    rate = result.tokens / max(result.seconds, 1e-9)
    print(f"step {result.step}: {result.tokens} tokens in this session, {result.seconds:.0f} s, {rate:.0f} tokens/s")
    if result.interrupted and result.checkpoint:
        print("stopped before the end; the same command with --resume auto goes on")
    print(f"checkpoint: {result.checkpoint or 'none (save is false)'}")
    if result.best_checkpoint:
        same = " (the last one)" if result.best_checkpoint == result.checkpoint else ""
        print(f"best checkpoint, by validation loss: {result.best_checkpoint}{same}")
    print(f"figures: {result.metrics_file}")
    if result.tensorboard_dir.is_dir():
        print(f"TensorBoard: {result.tensorboard_dir}")


def _plan(options: argparse.Namespace) -> int:
    from fm9g.plan.command import run_plan

    return run_plan(options, _parse_overrides(options))


def _doctor(options: argparse.Namespace) -> int:
    from fm9g.doctor import run_doctor

    return run_doctor(options, _parse_overrides(options))


def _print_loader_benchmark(result: Any) -> None:
    total = sum(result.tokens.values())
    padding = 1 - total / max(1, result.padded_tokens)
    print(
        f"{result.steps} steps, {total} tokens, {result.tokens_per_second:.0f} tokens/s, {padding:.2%} padding; "
        "nothing was trained"
    )
    for task, tokens in result.tokens.items():
        share, target = tokens / max(1, total), result.target_shares[task]
        print(f"  {printable(task)}: {tokens} tokens, {share:.2%} (wanted: {target:.2%})")
    for reason, count in result.skipped.items():
        print(f"note: {count} records were skipped: {printable(reason)}")


def _config_show(options: argparse.Namespace) -> None:
    from fm9g.config.run import load_run

    run = load_run(options.config, _parse_overrides(options), complete=False)
    if run.train.value.adapter:
        from fm9g.convert.merge import with_adapter

        run = with_adapter(run)
    for section, values in run.to_json().items():
        print(f"[{printable(section)}]")
        for key, item in values.items():
            print(f"  {key:<28} {item['value']!r:<24} {item['from']}")
    for note in run.notes:
        print(f"note: {printable(note)}")


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
    print("[names of the 9G guide that change nothing]")
    for key, why in DEPRECATED_KEYS.items():
        print(f"  {key}: {why}")
    print("[keys of published models that change nothing]")
    for key, (_, why) in model.DEPRECATED_KEYS.items():
        print(f"  {key}: {why}")


def _default(field: Any) -> Any:
    import dataclasses

    return field.default if field.default is not dataclasses.MISSING else field.default_factory()
