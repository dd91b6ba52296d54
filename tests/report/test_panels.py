"""The charts of the page."""

import numpy as np
import pytest
from helpers.report_page import page_of, paths_of

from fm9g.report.curves import MAX_POINTS


def test_curves_show_the_metrics(make_run, line) -> None:
    rate = [1e-4 * min(step, 20) for step in range(1, 41)]
    make_run("tiny", metrics=[line(step, **{"Optimizer/lr": rate[step - 1]}) for step in range(1, 41)])
    _, text = page_of("tiny")
    points = paths_of(text, "Learning rate")[0]
    # The picture is an affine image of the curve: straight up to step 20, then level, at places that fit.
    corner = points[np.argmin(np.abs(points[:, 0] - (points[0, 0] + (points[-1, 0] - points[0, 0]) * 19 / 39)))]
    assert corner[1] == pytest.approx(points[:, 1].min(), abs=0.02)
    assert points[-1, 1] == pytest.approx(corner[1], abs=0.02)
    assert points[0, 1] > corner[1] + 50
    for title in ("Loss of the whole run", "Loss of each dataset", "Gradient norm", "Tokens per second"):
        assert len(paths_of(text, title)[0]) >= 2, title


def test_a_long_run_makes_a_small_page(make_run) -> None:
    make_run("long", metrics=[{"step": step, "Loss/train": 3 + np.sin(step * 7.0)} for step in range(1, 9001)])
    _, text = page_of("long")
    assert max(len(path) for path in paths_of(text, "Loss of the whole run")) <= MAX_POINTS + 2
    assert len(text) < 200_000


def test_a_close_up_comes_where_the_first_fall_hides_the_rest(make_run) -> None:
    make_run("steep", metrics=[{"step": step, "Loss/train": 2 + 10 * 0.9**step} for step in range(1, 101)])
    make_run("flat", metrics=[{"step": step, "Loss/train": 2 - step / 100} for step in range(1, 101)])
    assert "without the first 10 steps" in page_of("steep")[0].within["loss"]
    assert "without the first" not in page_of("flat")[0].within["loss"]
