"""A plan as a table, and alternatives as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from fm9g.files import new_file
from fm9g.plan.estimate import Plan
from fm9g.plan.memory import COMPONENTS
from fm9g.plan.setup import GIB, Setup

_MEANING = {
    "weights": "this GPU's part",
    "gradients": "this GPU's part",
    "optimizer": "moments of weights, and fp32 copies where the engine has them",
    "activations": "kept for the backward pass, and its own values",
    "loss": "a chunk of logits, gradient of the output layer",
    "buffers": "gathered weights, gradients on their way",
}


def table(made: Plan) -> str:
    """The components of the fullest moment, then disk and speed."""
    setup, memory = made.setup, made.memory
    rows = [(name, f"{getattr(memory, name) / GIB:.2f} GiB", _MEANING[name]) for name in COMPONENTS]
    rows += [
        ("tensors", f"{memory.total / GIB:.2f} GiB", f"at the fullest moment: {memory.name}"),
        ("CUDA, NCCL, gaps", f"{made.overhead / GIB:.2f} GiB", "assumed"),
        ("free" if made.fits else "missing", f"{abs(made.free) / GIB:.2f} GiB", f"of {made.gpu.memory:g} GiB"),
        ("", "", ""),
        ("parameters", f"{made.weights / 1e9:.3f} B", f"{setup.engine}, {setup.half_type}"),
        *_adapters(made),
        ("checkpoint", f"{made.checkpoint / GIB:.1f} GiB", f"on disk, in fp32: {_saved(setup)}"),
        ("tokens per step", f"{setup.tokens_a_step:,}", _product(made)),
        ("FLOPs per token", f"{made.flops_a_token:.3g}", f"forward and backward, texts of {setup.max_length} tokens"),
        (
            "tokens per second",
            f"{made.tokens_a_second:,.0f}",
            f"MFU {made.mfu:g} (assumed) of {made.gpu.flops / 1e12:g} TFLOPS per GPU",
        ),
    ]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{name:<{first}}  {value:>{second}}  {text}".rstrip() for name, value, text in rows)


def _adapters(made: Plan) -> list[tuple[str, str, str]]:
    setup, trained = made.setup, made.setup.adapters(made.model) * made.model.num_layers
    if not trained:
        return []
    bits = "" if setup.quantization == "none" else f", the base in {setup.quantization}, whole on every GPU"
    return [
        ("trained", f"{trained / 1e6:.3f} M", f"adapters of rank {setup.lora_r}, {trained / made.weights:.2%}{bits}")
    ]


def _saved(setup: Setup) -> str:
    weights = "adapters" if setup.lora_layer else "weights"
    mean = " and their running mean" if setup.ema_decay else ""
    return weights + mean + ("" if setup.save_model_only else f" and the state of {setup.optimizer}")


def verdict(made: Plan, device: str, tokens: float | None, why: str) -> str:
    """One line: whether it fits, and how long the run takes.

    device: what memory and speed are those of. tokens: of the whole run; None: not known. why: what sets the number of
    tokens, or why it is not known.
    """
    setup, count = made.setup, made.setup.nodes * made.setup.gpus
    fits = "It fits" if made.fits else "It does not fit"
    line = f"{fits}: {made.needed / GIB:.1f} of the {made.gpu.memory:g} GiB of each {device} (assumed, not measured). "
    if tokens is None:
        return line + f"How long the run takes is not known: {why}."
    steps = math.ceil(tokens / setup.tokens_a_step)
    what = f"{steps:,} step{'s' * (steps != 1)} of {setup.tokens_a_step:,} tokens ({why}, {_count(tokens)} tokens)"
    would = "take" if made.fits else "would take"
    days = _duration(made.days(tokens))
    return line + f"{what} {would} about {days} on {count} x {device} at an MFU of {made.mfu:g} (assumed)."


def _count(tokens: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:,.0f}"


def _duration(days: float) -> str:
    for unit, length in (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0)):
        if days * length >= 1:
            return f"{days * length:,.1f} {unit}"
    return "a minute"


def _product(made: Plan) -> str:
    setup = made.setup
    return (
        f"{setup.data_parallel} replica{'s' * (setup.data_parallel > 1)} x grad_accum {setup.grad_accum} "
        f"x batch_size {setup.batch_size} x max_length {setup.max_length}"
    )


def alternatives(found: list[tuple[str, Plan]], ways: list[str]) -> str:
    """The changes that suggest found, with their memory and speed; where there are none, the other ways."""
    if not found:
        none = "No zero_level, activation_checkpoint, tp_size, optimizer_offload or batch_size makes it fit."
        lines = ways or ["a shorter max_length, or larger GPUs"]
        return "\n".join([none, "What would fit:", *(f"  {line}" for line in lines)])
    lines = ["What would fit, with as many tokens per step, the fastest by estimate first:"]
    for changes, other in found:
        slower = other.step_seconds / found[0][1].step_seconds
        pace = "" if slower < 1.005 else f", {slower:.2f} x the time of the first"
        lines.append(f"  {changes}: {other.needed / GIB:.1f} GiB{pace}")
    return "\n".join(lines)


def draw(plans: dict[str, Plan], picture: Path) -> None:
    """A bar of components for each plan, by its label, and the GPU's memory.

    picture: its suffix, one of fm9g.files.PICTURES, says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [label.replace(" --", "\n--") for label in plans]  # a change a line
    figure = Figure(figsize=(10, 1.6 + 0.25 * len("\n\n".join(labels).split("\n"))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    start = [0.0] * len(plans)
    for component in COMPONENTS:
        sizes = [getattr(made.memory, component) / GIB for made in plans.values()]
        axes.barh(labels, sizes, left=start, label=component)
        start = [a + b for a, b in zip(start, sizes)]
    rest = [made.needed / GIB - place for made, place in zip(plans.values(), start)]
    axes.barh(labels, rest, left=start, label="CUDA, NCCL, gaps", color="lightgrey")
    limit = next(iter(plans.values())).gpu.memory
    axes.axvline(limit, color="black", linestyle="--", label=f"{limit:g} GiB")
    axes.set(xlabel="GiB per GPU, at the fullest moment")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    with new_file(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix[1:].lower(), dpi=120)
