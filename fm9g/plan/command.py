"""`fm9g plan`: its arguments and its output."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from fm9g.config.fields import did_you_mean
from fm9g.config.run import RunConfig
from fm9g.convert.run_adapter import with_adapter
from fm9g.errors import UserError
from fm9g.hardware import GPUS, Gpu
from fm9g.io.output import IMAGE_SUFFIXES, check_output_file
from fm9g.plan.alternatives import find_alternatives
from fm9g.plan.estimate import JobEstimate, estimate_job, suggest
from fm9g.plan.job import JobConfig
from fm9g.plan.render import format_suggestions, format_table, format_verdict, plot_memory
from fm9g.shorthand.load import RunArguments, load_run

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, help="number of machines (default: %(default)s)")
    parser.add_argument(
        "--gpus", type=int, default=None, help="number of GPUs of each machine; default: the key n_gpus of the run"
    )
    parser.add_argument(
        "--gpu", default="A100", metavar="NAME", help=f"model of GPU: {', '.join(GPUS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-memory", type=float, default=None, metavar="GIB", help="memory of a GPU in GiB; default: that of --gpu"
    )
    parser.add_argument(
        "--gpu-flops",
        type=float,
        default=None,
        metavar="N",
        help="peak speed of a GPU in dense bf16, in operations per second; default: that of --gpu",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="model FLOPs utilization: fraction of the peak speed that training reaches (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        default="",
        help="tokens of the complete training, such as 300M, 1000B or 2T; default: as train_iters or epochs say",
    )
    parser.add_argument("--json", action="store_true", help="print bytes, seconds and counts as JSON")
    parser.add_argument(
        "--plot", type=Path, default=None, metavar="FILE", help="also draw the memory into a .png, .svg or .pdf file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")
    parser.usage = (
        f"{parser.prog} [-h] [FILE] [--model MODEL | --config NAME] [--nodes N] [--gpus N] [--gpu NAME] ... "
        "[--KEY VALUE ...]"
    )
    parser.epilog = "Also FILE, --KEY VALUE and --model.KEY VALUE, as for `fm9g train`."


def run_plan(options: argparse.Namespace, arguments: RunArguments) -> int:
    """Prints what the training that the arguments describe needs; returns 1 if it does not fit."""
    gpu = _gpu(options.gpu, options.gpu_memory, options.gpu_flops)
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu: found {options.mfu}, expected a share above 0 and at most 1")
    given = parse_tokens(options.tokens) if options.tokens else None
    run = load_run(arguments, complete=False)
    if options.plot:
        check_output_file(options.plot, "--plot", IMAGE_SUFFIXES, options.overwrite)
    run = with_adapter(run)
    model = run.model
    gpus = run.train.n_gpus if options.gpus is None else options.gpus
    job = JobConfig.from_run(run, options.nodes, gpus)
    estimate = estimate_job(model, job, gpu, options.mfu)
    tokens, why = (given, "--tokens") if given else _tokens_of(run, job)
    described = options.gpu_memory is not None or options.gpu_flops is not None
    name = "GPU" if described else options.gpu.upper()
    fitting = [] if estimate.fits else suggest(model, job, gpu, options.mfu)
    if run.train.global_batch_size:  # it sets gradient_accumulation_steps
        fitting = [(with_global_batch_size(changes, other), other) for changes, other in fitting]
    if options.plot:
        better = fitting or suggest(model, job, gpu, options.mfu)
        plot_memory(
            {"as configured": estimate} | {changes or "the same": other for changes, other in better}, options.plot
        )
    if options.json:
        others = [{"changes": changes, **other.to_json(tokens)} for changes, other in fitting]
        print(json.dumps({**estimate.to_json(tokens), "suggestions": others}, indent=1))
    else:
        print(format_table(estimate))
        if not estimate.fits:
            print(f"\n{format_suggestions(fitting, [] if fitting else find_alternatives(model, job, gpu))}")
        print(f"\n{format_verdict(estimate, name, tokens, why)}")
    return 0 if estimate.fits else 1


def plan_verdict(run: RunConfig, gpu: str = "A100", mfu: float = 0.4) -> str:
    """One line: whether a run fits on one machine of these GPUs, and how long it takes."""
    run = with_adapter(run)
    job = JobConfig.from_run(run, 1, run.train.n_gpus)
    return format_verdict(estimate_job(run.model, job, GPUS[gpu], mfu), gpu, *_tokens_of(run, job))


def _tokens_of(run: RunConfig, job: JobConfig) -> tuple[float | None, str]:
    """The tokens of the run and the key that sets them; or None and the reason why they are unknown."""
    config = run.train
    if not config.epochs:
        key = "stop_iters" if config.last_step < config.train_iters else "train_iters"
        return config.last_step * job.tokens_per_step, key
    from fm9g.data.load.run_mixture import count_tokens

    try:
        tokens, records = count_tokens(run)
    except UserError as error:
        return None, f"the data of epochs {config.epochs:g} cannot be read here ({error}); --tokens gives its size"
    if not config.packing:
        iters = config.iters_for_records(records, job.tokens_per_step // config.row_tokens)
        return iters * job.tokens_per_step, f"epochs {config.epochs:g} without packing: at most these"
    return config.iters_for_epochs(tokens, job.tokens_per_step) * job.tokens_per_step, f"epochs {config.epochs:g}"


def with_global_batch_size(changes: str, other: JobEstimate) -> str:
    """Rewrites the changes of `suggest` for a run with global_batch_size instead of gradient_accumulation_steps."""
    num_packs = other.job.gradient_accumulation_steps * other.job.data_parallel
    words = [word for word in changes.split("--") if word and not word.startswith("gradient_accumulation_steps")]
    more = [f"global_batch_size {num_packs}"] if "--batch_size" in changes else []
    return " ".join(f"--{word.strip()}" for word in [*words, *more])


def _gpu(name: str, memory: float | None, flops: float | None) -> Gpu:
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu: unknown: {name!r}{did_you_mean(name.upper(), list(GPUS))}; known: {', '.join(GPUS)}; "
                        "describe another one by --gpu-memory and --gpu-flops")  # fmt: skip
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
