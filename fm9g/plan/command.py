"""`fm9g plan`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from fm9g.config.fields import nearest
from fm9g.config.run import load_run
from fm9g.errors import UserError
from fm9g.files import new_file
from fm9g.plan.estimate import Plan, plan, suggest
from fm9g.plan.setup import GPUS, Gpu, Setup
from fm9g.plan.show import alternatives, draw, table

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a name in train_configs/ or model_configs/, or a path"
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each (%(default)s)")
    parser.add_argument("--gpu", default="A100", metavar="NAME", help=f"{', '.join(GPUS)} (%(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=None, metavar="GIB", help="default: that of --gpu")
    parser.add_argument(
        "--gpu-flops", type=float, default=None, metavar="N", help="dense bf16 FLOPS; default: as --gpu"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of these that is reached (%(default)s)")
    parser.add_argument("--tokens", default="1000B", help="of the whole training: 300M, 1000B, 2T (%(default)s)")
    parser.add_argument("--json", action="store_true", help="figures in bytes and seconds, as JSON")
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE", help="also a picture of the memory, a PNG")
    parser.usage = f"{parser.prog} [-h] --config NAME [--nodes N] [--gpus N] [--gpu NAME] ... [--KEY VALUE ...]"
    parser.epilog = "Also --KEY VALUE and --model.KEY VALUE, as for `fm9g train`."


def run_plan(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Prints what the configured training takes; 1 where it does not fit. overrides: `--KEY VALUE` of the run."""
    gpu = _gpu(options.gpu, options.gpu_memory, options.gpu_flops)
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu: found {options.mfu}, expected a share above 0 and at most 1")
    tokens = parse_tokens(options.tokens)
    run = load_run(options.config, overrides, complete=False)
    model = run.model.value
    setup = Setup.from_run(run, options.nodes, options.gpus)
    made = plan(model, setup, gpu, options.mfu)
    found = [] if made.fits else suggest(model, setup, gpu, options.mfu)
    if run.train.value.global_batch:  # which sets grad_accum, and is what the user gives
        found = [(_in_global_batch(changes, other), other) for changes, other in found]
    if options.plot:
        better = found or suggest(model, setup, gpu, options.mfu)
        with new_file(options.plot) as temporary:
            draw({"as configured": made} | {changes or "the same": other for changes, other in better}, temporary)
    if options.json:
        others = [{"changes": changes, **other.to_json(tokens)} for changes, other in found]
        print(json.dumps({**made.to_json(tokens), "suggestions": others}, indent=1))
    else:
        print(table(made, tokens))
        if not made.fits:
            print(f"\nIt does not fit. {alternatives(made, found)}")
    return 0 if made.fits else 1


def _in_global_batch(changes: str, other: Plan) -> str:
    packs = other.setup.grad_accum * other.setup.data_parallel
    words = [word for word in changes.split("--") if word and not word.startswith("grad_accum")]
    more = [f"global_batch {packs}"] if "--batch_size" in changes else []
    return " ".join(f"--{word.strip()}" for word in [*words, *more])


def _gpu(name: str, memory: float | None, flops: float | None) -> Gpu:
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu: unknown: {name!r}{nearest(name.upper(), list(GPUS))}; known: {', '.join(GPUS)}; "
                        "another one is described by --gpu-memory and --gpu-flops")  # fmt: skip
    gpu = known[name.lower()]
    chosen = Gpu(gpu.memory if memory is None else memory, gpu.flops if flops is None else flops)
    for key, value in (("--gpu-memory", chosen.memory), ("--gpu-flops", chosen.flops)):
        if not 0 < value < float("inf"):
            raise UserError(f"{key}: found {value:g}, expected a positive number")
    return chosen


def parse_tokens(text: str) -> float:
    """300M, 1000B, 2T or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"--tokens: found {text!r}, expected a number such as 300M, 1000B or 2T")
    return float(match[1]) * _UNITS[match[2].upper()]
