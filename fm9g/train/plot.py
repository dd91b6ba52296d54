"""Pictures of a run's figures."""

from __future__ import annotations

from pathlib import Path

from fm9g.files import new_file
from fm9g.train.metrics import read_metrics

_SMOOTHING = 0.9  # weight of the past in the running mean


def plot_loss(metrics_file: Path, picture: Path, marks: dict[int, str] | None = None) -> None:
    """Draws the loss of every logged step, a running mean and the learning rate as a PNG.

    marks: step -> what happened there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = read_metrics(metrics_file)
    steps = [line["step"] for line in figures]
    losses = [line["Loss/train"] for line in figures]
    total, weight, smooth = 0.0, 0.0, []
    for loss in losses:
        total, weight = _SMOOTHING * total + loss, _SMOOTHING * weight + 1
        smooth.append(total / weight)
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss (nats a token)")
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="loss")
    axes.plot(steps, smooth, color="tab:blue", label="running mean")
    rates = axes.twinx()
    rates.set_ylabel("learning rate")
    rates.plot(
        steps, [line["Optimizer/lr"] for line in figures], color="tab:orange", linestyle=":", label="learning rate"
    )
    for step, text in (marks or {}).items():
        axes.axvline(step, color="grey", linestyle="--", linewidth=1)
        axes.annotate(text, (step, max(losses)), xytext=(4, -4), textcoords="offset points", va="top")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper right", ncols=3)
    with new_file(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
