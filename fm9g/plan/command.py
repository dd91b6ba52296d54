"""`fm9g plan`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from fm9g.config.fields import did_you_mean
from fm9g.config.run import RunConfig, load_run
from fm9g.errors import UserError
from fm9g.io.atomic import IMAGE_SUFFIXES, check_output_file
from fm9g.plan.alternatives import find_alternatives
from fm9g.plan.estimate import JobEstimate, estimate_job, suggest
from fm9g.plan.job import GPUS, Gpu, JobConfig
from fm9g.plan.render import format_suggestions, format_table, format_verdict, plot_memory

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
        check_output_file(options.plot, "--plot", IMAGE_SUFFIXES, options.overwrite)
    if run.train.value.adapter:
        from fm9g.convert.merge import with_adapter

        run = with_adapter(run)
    model = run.model.value
    gpus = run.train.value.n_gpus if options.gpus is None else options.gpus
    job = JobConfig.from_run(run, options.nodes, gpus)
    estimate = estimate_job(model, job, gpu, options.mfu)
    tokens, why = (given, "--tokens") if given else _tokens_of(run, job)
    described = options.gpu_memory is not None or options.gpu_flops is not None
    name = "GPU" if described else options.gpu.upper()
    found = [] if estimate.fits else suggest(model, job, gpu, options.mfu)
    if run.train.value.global_batch_size:  # which sets gradient_accumulation_steps, and is what the user gives
        found = [(with_global_batch_size(changes, other), other) for changes, other in found]
    if options.plot:
        better = found or suggest(model, job, gpu, options.mfu)
        plot_memory(
            {"as configured": estimate} | {changes or "the same": other for changes, other in better}, options.plot
        )
    if options.json:
        others = [{"changes": changes, **other.to_json(tokens)} for changes, other in found]
        print(json.dumps({**estimate.to_json(tokens), "suggestions": others}, indent=1))
    else:
        print(format_table(estimate))
        if not estimate.fits:
            print(f"\n{format_suggestions(found, [] if found else find_alternatives(model, job, gpu))}")
        print(f"\n{format_verdict(estimate, name, tokens, why)}")
    return 0 if estimate.fits else 1


def _tokens_of(run: RunConfig, job: JobConfig) -> tuple[float | None, str]:
    """The tokens of the configured run and the key that sets them; or None and why they are not known."""
    config = run.train.value
    if not config.epochs:
        key = "stop_iters" if config.last_step < config.train_iters else "train_iters"
        return config.last_step * job.tokens_per_step, key
    from fm9g.train.data_loading import count_tokens

    try:
        tokens = count_tokens(run)
    except UserError as error:
        return None, f"the data of epochs {config.epochs:g} cannot be read here ({error}); --tokens gives its size"
    return config.iters_for_epochs(tokens, job.tokens_per_step) * job.tokens_per_step, f"epochs {config.epochs:g}"


def with_global_batch_size(changes: str, other: JobEstimate) -> str:
    """Changes that `suggest` found, for a run whose global_batch_size sets its gradient_accumulation_steps."""
    packs = other.job.gradient_accumulation_steps * other.job.data_parallel
    words = [word for word in changes.split("--") if word and not word.startswith("gradient_accumulation_steps")]
    more = [f"global_batch_size {packs}"] if "--batch_size" in changes else []
    return " ".join(f"--{word.strip()}" for word in [*words, *more])


def _gpu(name: str, memory: float | None, flops: float | None) -> Gpu:
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise UserError(f"--gpu: unknown: {name!r}{did_you_mean(name.upper(), list(GPUS))}; known: {', '.join(GPUS)}; "
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
