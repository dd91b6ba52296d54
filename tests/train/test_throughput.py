"""Rate, MFU and the share of each phase, by hand."""

import pytest
from helpers.common import small_model

from fm9g.model.counts import training_flops
from fm9g.train.throughput import FlopsModel, throughput_metrics
from fm9g.train.timer import PHASES, StepTimings


def timings(seconds: float, tokens: int = 100, **phases: float) -> StepTimings:
    return StepTimings(seconds, dict.fromkeys(PHASES, 0.0) | phases, steps=4, tokens=tokens, sum_sq_seqlens=50.0)


def test_the_slowest_rank_gives_the_rate_and_phases_are_means_per_step() -> None:
    metrics = throughput_metrics([timings(8.0, data=2.0), timings(10.0, data=4.0)], 1, FlopsModel(small_model()))
    assert metrics["Throughput/tokens_per_second"] == 20.0
    assert metrics["Time/data"] == pytest.approx(3.0 / 4)
    assert metrics["Time/compute"] == pytest.approx((10.0 - 3.0) / 4)
    assert [metrics[f"Time/{name}"] for name in PHASES if name != "data"] == [0.0, 0.0, 0.0]
    assert "Throughput/mfu" not in metrics  # the peak is unknown


def test_ranks_of_one_replica_count_their_tokens_once() -> None:
    both = [timings(10.0), timings(10.0)]
    full, half = (throughput_metrics(both, n, FlopsModel(small_model(), 0, 1e9)) for n in (1, 2))
    assert full["Throughput/tokens_per_second"] == 2 * half["Throughput/tokens_per_second"] == 20.0
    assert full["Throughput/mfu"] == pytest.approx(2 * half["Throughput/mfu"])


@pytest.mark.parametrize("adapter_params", [0, 500])
def test_mfu_is_a_share_of_the_peak_of_all_devices(adapter_params: int) -> None:
    model = small_model()
    metrics = throughput_metrics([timings(10.0)] * 2, 1, FlopsModel(model, adapter_params, peak_flops=1e9))
    expected = training_flops(model, 200, 100.0, adapter_params) / 10.0 / (2 * 1e9)
    assert metrics["Throughput/mfu"] == pytest.approx(expected)
