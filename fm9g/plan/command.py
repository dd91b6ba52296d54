"""`fm9g plan`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from fm9g.config.fields import nearest
from fm9g.config.run import RunConfig, load_run
from fm9g.errors import UserError
from fm9g.files import PICTURES, require_output
from fm9g.plan.estimate import Plan, plan, suggest
from fm9g.plan.lighter import other_ways
from fm9g.plan.setup import GPUS, Gpu, Setup
from fm9g.plan.show import alternatives, draw, table, verdict

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a name in train_configs/ or model_configs/, or a path"
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs of each; default: the run's n_gpus")
    parser.add_argument("--gpu", default="A100", metavar="NAME", help=f"{', '.join(GPUS)} (%(default)s)")
    parser.add_argument("--gpu-memory", type=float, default=None, metavar="GIB", help="default: that of --gpu")
    parser.add_argument(
        "--gpu-flops", type=float, default=None, metavar="N", help="dense bf16 FLOPS; default: as --gpu"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of these that is reached (%(default)s)")
    parser.add_argument(
        "--tokens", default="", help="of the whole training: 300M, 1000B, 2T; default: those of train_iters or epochs"
    )
    parser.add_argument("--json", action="store_true", help="figures in bytes and seconds, as JSON")
    parser.add_argument(
        "--plot", type=Path, default=None, metavar="FILE", help="also a picture of the memory: .png, .svg or .pdf"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it is there")
    parser.usage = f"{parser.prog} [-h] --config NAME [--nodes N] [--gpus N] [--gpu NAME] ... [--KEY VALUE ...]"
    parser.epilog = "Also --KEY VALUE and --model.KEY VALUE, as for `fm9g train`."


def run_plan(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Prints what the configured training takes; 1 where it does not fit. overrides: `--KEY VALUE` of the run."""
    gpu = _gpu(options.gpu, options.gpu_memory, options.gpu_flops)
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu: found {options.mfu}, expected a share above 0 and at most 1")
    given = parse_tokens(options.tokens) if options.tokens else None
    run = load_run(options.config, overrides, complete=False)
    if options.plot:
        require_output(options.plot, "--plot", PICTURES, options.overwrite)
    if run.train.value.adapter:
        from fm9g.convert.adapters import with_adapter

        run = with_adapter(run)
    model = run.model.value
    gpus = run.train.value.n_gpus if options.gpus is None else options.gpus
    setup = Setup.from_run(run, options.nodes, gpus)
    made = plan(model, setup, gpu, options.mfu)
    tokens, why = (given, "--tokens") if given else _tokens_of(run, setup)
    described = options.gpu_memory is not None or options.gpu_flops is not None
    name = "GPU" if described else options.gpu.upper()
    found = [] if made.fits else suggest(model, setup, gpu, options.mfu)
    if run.train.value.global_batch:  # which sets grad_accum, and is what the user gives
        found = [(in_global_batch(changes, other), other) for changes, other in found]
    if options.plot:
        better = found or suggest(model, setup, gpu, options.mfu)
        draw({"as configured": made} | {changes or "the same": other for changes, other in better}, options.plot)
    if options.json:
        others = [{"changes": changes, **other.to_json(tokens)} for changes, other in found]
        print(json.dumps({**made.to_json(tokens), "suggestions": others}, indent=1))
    else:
        print(table(made))
        if not made.fits:
            print(f"\n{alternatives(found, [] if found else other_ways(model, setup, gpu))}")
        print(f"\n{verdict(made, name, tokens, why)}")
    return 0 if made.fits else 1


def _tokens_of(run: RunConfig, setup: Setup) -> tuple[float | None, str]:
    """The tokens of the configured run and the key that sets them; or None and why they are not known."""
    config = run.train.value
    if not config.epochs:
        key = "stop_iters" if config.last_step < config.train_iters else "train_iters"
        return config.last_step * setup.tokens_a_step, key
    from fm9g.train.data import count_tokens

    try:
        tokens = count_tokens(run)
    except UserError as error:
        return None, f"the data of epochs {config.epochs:g} cannot be read here ({error}); --tokens gives its size"
    return config.iters_of_epochs(tokens, setup.tokens_a_step) * setup.tokens_a_step, f"epochs {config.epochs:g}"


def in_global_batch(changes: str, other: Plan) -> str:
    """Changes that `suggest` found, for a run whose global_batch sets its grad_accum."""
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
    if not match or not 0 < float(match[1]) < 1e30:
        raise UserError(f"--tokens: found {text!r}, expected a number such as 300M, 1000B or 2T")
    return float(match[1]) * _UNITS[match[2].upper()]
