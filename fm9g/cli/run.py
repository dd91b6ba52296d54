"""The verbs of runs: train, config, plan, doctor."""

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


def add_run_verbs(verb: Any, group: Any) -> None:
    """verb, group: put a verb, or a group of them, on the command line."""
    from fm9g.doctor import add_doctor_arguments
    from fm9g.plan.command import add_plan_arguments

    train = verb(
        "train", _train, "train a model; --KEY VALUE sets any key that `fm9g config keys` lists", takes_keys=True
    )
    _add_run_arguments(train)
    _add_launch_arguments(train)
    train.add_argument("--print-secret", action=_PrintSecret, help="print a new FM9G_SECRET for the machines of a run")
    add_plan_arguments(verb("plan", _plan, "memory, disk and days that a training takes", takes_keys=True))
    add_doctor_arguments(verb("doctor", _doctor, "what of this machine keeps a run from working", takes_keys=True))

    config = group("config", "show, keys: the configuration of a run, every key there is")
    show = "every value of a run's configuration and where it came from"
    _add_run_arguments(verb("show", _config_show, show, under=config, takes_keys=True))
    verb("keys", _config_keys, "every key of the three kinds of configuration file", under=config)


class _PrintSecret(argparse.Action):
    """As --version: prints, and that is all."""

    def __init__(self, **words: Any) -> None:
        super().__init__(nargs=0, **words)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fm9g.launch.place import new_secret

        print(new_secret())
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
        "`fm9g config keys` lists them. Training needs dataset_config and tokenizer_path, given here "
        "or in the file of train_configs/."
    )


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    """`--key value` and `--key=value` pairs that the parser does not know by name."""
    pairs: dict[str, str] = {}
    rest = list(options.rest)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
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
    from fm9g.launch.place import find_launcher, find_nodes, find_place
    from fm9g.launch.team import die_with_agent

    die_with_agent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    run = load_run(options.config, _overrides(options))
    config = run.train.value
    if config.only_run_dataloader:
        from fm9g.train.data import run_dataloader

        _print_loader(run_dataloader(run))
        return 0
    launcher = find_launcher()
    several = options.nproc is not None or bool(os.environ.get("GPUS_PER_NODE"))  # to be started here
    if launcher == "" or (launcher == "slurm" and several):
        nproc = options.nproc if several else config.n_gpus
        nodes = find_nodes(os.environ, nproc, *(getattr(options, key) for key in _NODE_OPTIONS))
        config.packs_a_step(config.replicas(nodes.nnodes * nodes.nproc))  # a mistake is told before anything starts
        from fm9g.doctor.fit import unfit_on_this_cpu

        if unfit := unfit_on_this_cpu(run, nodes.nnodes, nodes.nproc):
            print(f"warning: {unfit}. See fm9g doctor --config {options.config}", file=sys.stderr)
        if nodes.nnodes * nodes.nproc > 1 or options.max_restarts:
            from fm9g.launch.agent import run_agent
            from fm9g.launch.agree import code_identity

            logs = Path(config.output_dir) / "logs" / f"{config.exp_group}{config.model_unique}"
            return run_agent(
                ["train", "--config", options.config, *options.rest],
                nodes,
                max_restarts=options.max_restarts,
                identity={"code": code_identity(), "config": run.identity()},
                log_dir=logs,
                timeout=config.timeout,
                step_timeout=config.step_timeout,
            )
    from fm9g.train.run import run_training

    place = replace(find_place(), timeout=config.timeout, step_timeout=config.step_timeout)
    result = run_training(run, place)
    if place.rank == 0:
        _print_result(result)
    return 130 if result.interrupted else 0


def _print_result(result: Any) -> None:
    rate = result.tokens / max(result.seconds, 1e-9)
    print(f"step {result.step}: {result.tokens} tokens in this session, {result.seconds:.0f} s, {rate:.0f} tokens/s")
    if result.interrupted and result.checkpoint:
        print("stopped before the end; the same command with --resume auto goes on")
    print(f"checkpoint: {result.checkpoint or 'none (save is false)'}")
    if result.best:
        same = " (the last one)" if result.best == result.checkpoint else ""
        print(f"best checkpoint, by validation loss: {result.best}{same}")
    print(f"figures: {result.metrics_file}")
    if result.tensorboard.is_dir():
        print(f"TensorBoard: {result.tensorboard}")


def _plan(options: argparse.Namespace) -> int:
    from fm9g.plan.command import run_plan

    return run_plan(options, _overrides(options))


def _doctor(options: argparse.Namespace) -> int:
    from fm9g.doctor import run_doctor

    return run_doctor(options, _overrides(options))


def _print_loader(result: Any) -> None:
    total = sum(result.tokens.values())
    padding = 1 - total / max(1, result.positions)
    print(
        f"{result.steps} steps, {total} tokens, {result.rate:.0f} tokens/s, {padding:.2%} padding; nothing was trained"
    )
    for task, tokens in result.tokens.items():
        print(f"  {printable(task)}: {tokens} tokens, {tokens / max(1, total):.2%} (wanted: {result.wanted[task]:.2%})")
    for reason, count in result.skipped.items():
        print(f"note: {count} records were skipped: {printable(reason)}")


def _config_show(options: argparse.Namespace) -> None:
    from fm9g.config.run import load_run

    run = load_run(options.config, _overrides(options), complete=False)
    if run.train.value.adapter:
        from fm9g.convert.adapters import with_adapter

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
    from fm9g.config.train import RETIRED, TrainConfig

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
            print(f"  {key}: {describe(properties[key])}; {default}\n      {field.metadata['help']}")
    print("[names of the 9G guide that change nothing]")
    for key, why in RETIRED.items():
        print(f"  {key}: {why}")
    print("[keys of published models that change nothing]")
    for key, (_, why) in model.RETIRED.items():
        print(f"  {key}: {why}")


def _default(field: Any) -> Any:
    import dataclasses

    return field.default if field.default is not dataclasses.MISSING else field.default_factory()
