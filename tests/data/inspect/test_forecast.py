"""The forecast of a run is what the loader does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.common import make_records
from helpers.inspection import Make

from fm9g.data.inspect.check import open_named_mixture
from fm9g.data.load.loader import Loader


def test_padding_and_epochs_of_a_case_that_is_plain(make_mixture: Make, run_check: Callable[..., dict]) -> None:
    path = make_mixture({"ten": [{"input": "", "output": f"{'Z' * 8}{i}"} for i in range(5)]})
    report = run_check(path, steps=10, packs=2)  # a row has room for one sample of 10
    expected = {"rows": 20, "samples": 20, "padding": 6 / 16, "samples_per_row": 1.0, "steps": 10}
    assert report["packing"] == pytest.approx(expected)
    ten = report["datasets"]["ten"]
    assert (ten["run_tokens"], ten["run_records"], ten["run_epochs"]) == (200, 20, 4.0)
    assert (ten["share_wanted"], ten["share_realised"]) == (1.0, 1.0)
    assert report["notes"] == ["37.5% of the positions are padding; a larger batch_size reduces that"]
    report = run_check(path, steps=100, packs=2, max_simulated_samples=10)  # most of it is extrapolated
    assert report["packing"]["rows"] == 10
    assert report["datasets"]["ten"]["run_tokens"] == 2000
    assert "ten: is repeated for 40.0 epochs in 100 steps" in report["notes"]


def test_the_forecast_is_what_the_loader_does(
    make_mixture: Make, run_check: Callable[..., dict], tokenizer_path: Path
) -> None:
    path = make_mixture(
        {"a": make_records(60), "b": make_records(40, seed=1, longest=200), "c": make_records(30, seed=2)},
        a={"abs_weight": 3.0},
        c={"allow_repeat": False, "oversize_rule": "head"},
    )
    report = run_check(path, max_length=64, batch_size=2, steps=30, packs=4, seed=5)
    mixture, _ = open_named_mixture(str(path), tokenizer_path=str(tokenizer_path), max_length=64, batch_size=2, seed=5)
    with Loader(mixture, global_batch_size=4) as loader:
        packs = [pack for _ in range(30) for pack in loader.next_batch()]
    tokens = np.sum([np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=3) for pack in packs], axis=0)
    forecasts = list(report["datasets"].values())
    assert [item["run_tokens"] for item in forecasts] == tokens.tolist()
    assert report["packing"]["padding"] == pytest.approx(1 - tokens.sum() / (120 * 128))
    assert forecasts[0]["share_realised"] / forecasts[1]["share_realised"] == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("oversize_rule", ["drop", "head"])
def test_the_forecast_without_packing_is_what_the_loader_does(
    make_mixture: Make, run_check: Callable[..., dict], tokenizer_path: Path, oversize_rule: str
) -> None:
    path = make_mixture({"a": make_records(100, longest=200)})
    keys = {"max_length": 64, "batch_size": 3, "packing": "false", "oversize_rule": oversize_rule}
    report = run_check(path, steps=18, packs=4, **keys)
    mixture, _ = open_named_mixture(str(path), tokenizer_path=str(tokenizer_path), **keys)
    with Loader(mixture, global_batch_size=4) as loader:
        packs = [pack for _ in range(18) for pack in loader.next_batch() if pack.tokens]
    tokens = sum(pack.tokens for pack in packs)
    assert report["datasets"]["a"]["run_tokens"] == tokens
    assert report["packing"]["rows"] == len(packs)
    assert report["packing"]["padding"] == pytest.approx(1 - tokens / sum(len(pack.input_ids) for pack in packs))
    assert report["datasets"]["a"]["run_epochs"] == pytest.approx(2)  # of ceil(100 / 12) steps each
    assert report["notes"][-1].endswith("of the positions are padding; packing true reduces that")


def test_a_dataset_that_is_used_up_leaves_its_tokens_to_the_others(
    make_mixture: Make, run_check: Callable[..., dict]
) -> None:
    sixes = [{"input": "", "output": f"ZZZ{i:02}"} for i in range(50)]
    data = {"once": sixes[:20], "again": sixes}
    path = make_mixture(data, once={"allow_repeat": False}, again={"abs_weight": 2.0})
    report = run_check(path, max_length=12, steps=100, packs=1, max_simulated_samples=8)
    assert (report["datasets"]["once"]["run_epochs"], report["datasets"]["once"]["run_tokens"]) == (1.0, 120)
    assert report["datasets"]["again"]["run_tokens"] == 100 * 12 - 120
    assert report["notes"][0].startswith("once: is used up within the 100 steps")
    path = make_mixture(data, once={"allow_repeat": False}, again={"allow_repeat": False})
    report = run_check(path, max_length=12, steps=100, packs=1, max_simulated_samples=8)
    assert report["packing"]["steps"] == 35
    assert "the data is used up after about 35 of 100 steps" in report["notes"]
