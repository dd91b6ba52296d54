"""A checkpoint that was written before keys got the names that they have now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fm9g.config.fields import aliases_of
from fm9g.config.run import RunConfig
from fm9g.config.train import TrainConfig
from fm9g.train.runner import TrainResult

TO_JSON = RunConfig.to_json


def with_former_keys(run: RunConfig) -> dict[str, Any]:
    former = {key: alias for alias, key in aliases_of(TrainConfig).items() if alias not in ("load", "resume")}
    config = TO_JSON(run)
    config["train"] = {former.get(key, key): item for key, item in config["train"].items()}
    assert "grad_accum" in config["train"]
    return config


@pytest.mark.parametrize(("spikes", "differences"), [(2, []), (3, ["loss_spike_sigmas: was 2.0, is 3.0"])])
def test_it_resumes_and_only_differences_are_reported(
    train: Callable[..., TrainResult],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    spikes: int,
    differences: list[str],
) -> None:
    given = {"train_iters": 2, "save_iters": 1, "report_to": "none"}
    with monkeypatch.context() as before:
        before.setattr(RunConfig, "to_json", with_former_keys)
        train("out", stop_iters=1, loss_spike_sigmas=2, **given)
    capsys.readouterr()
    train("out", resume="auto", loss_spike_sigmas=spikes, **given)
    text = capsys.readouterr()
    lines = [line for line in f"{text.out}{text.err}".splitlines() if ": was " in line]
    assert len(lines) == len(differences)
    assert all(difference in line for difference, line in zip(differences, lines))
