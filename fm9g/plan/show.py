"""A plan as a table, and alternatives as a picture."""

from __future__ import annotations

from pathlib import Path

from fm9g.plan.estimate import CONTEXT, IDLE, Plan
from fm9g.plan.memory import COMPONENTS
from fm9g.plan.setup import GIB

_MEANING = {
    "weights": "this GPU's part",
    "gradients": "this GPU's part",
    "optimizer": "moments of weights, and fp32 copies where the engine has them",
    "activations": "kept for the backward pass, and its own values",
    "loss": "a chunk of logits, gradient of the output layer",
    "buffers": "gathered weights, gradients on their way",
}


def table(made: Plan, tokens: float) -> str:
    """A line a component of the fullest moment, then disk and time. tokens: of the whole training."""
    setup, memory, steps = made.setup, made.memory, tokens / made.setup.tokens_a_step
    rows = [(name, f"{getattr(memory, name) / GIB:.2f} GiB", _MEANING[name]) for name in COMPONENTS]
    rows += [
        ("tensors", f"{memory.total / GIB:.2f} GiB", f"at the fullest moment: {memory.name}"),
        ("CUDA, NCCL, gaps", f"{(CONTEXT + IDLE * memory.total) / GIB:.2f} GiB", "assumed"),
        ("free" if made.fits else "missing", f"{abs(made.free) / GIB:.2f} GiB", f"of {made.gpu.memory:g} GiB"),
        ("", "", ""),
        ("parameters", f"{made.weights / 1e9:.3f} B", f"{setup.engine}, {setup.half_type}"),
        *_adapters(made),
        ("checkpoint", f"{made.checkpoint / GIB:.1f} GiB", "on disk, with AdamW: fp32 weights and two moments"),
        ("tokens a step", f"{setup.tokens_a_step:,}", _product(made)),
        ("FLOPs a token", f"{made.flops_a_token:.3g}", f"forward and backward, texts of {setup.max_length} tokens"),
        (
            "tokens a second",
            f"{made.tokens_a_second:,.0f}",
            f"MFU {made.mfu:g} of {made.gpu.flops / 1e12:g} TFLOPS a GPU",
        ),
        ("days", f"{made.days(tokens):.1f}", f"for {tokens / 1e9:g} B tokens, {steps:,.0f} steps"),
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


def _product(made: Plan) -> str:
    setup = made.setup
    return (
        f"{setup.data_parallel} replicas x grad_accum {setup.grad_accum} x batch_size {setup.batch_size} "
        f"x max_length {setup.max_length}"
    )


def alternatives(made: Plan, found: list[tuple[str, Plan]]) -> str:
    """The changes that suggest found, with their memory and speed."""
    if not found:
        return (
            "Nothing tried fits: neither zero_level, activation_checkpoint, tp_size, optimizer_offload nor batch_size "
            "helps. Take more or larger GPUs, or a shorter max_length."
        )
    lines = ["As many tokens a step, the fastest by estimate first:"]
    for changes, other in found:
        slower = other.step_seconds / found[0][1].step_seconds
        pace = "" if slower < 1.005 else f", {slower:.2f} x the time of the first"
        lines.append(f"  {changes}: {other.needed / GIB:.1f} GiB{pace}")
    return "\n".join(lines)


def draw(plans: dict[str, Plan], picture: Path) -> None:
    """A PNG: a bar of components for each plan, by its label, and the GPU's memory."""
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
    axes.set(xlabel="GiB a GPU, at the fullest moment")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(picture, format="png", dpi=120)
