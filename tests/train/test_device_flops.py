"""What a run says of the devices it is trained on: their names, and the share of their peak that it reaches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fm9g.report.files import read_run_info
from fm9g.run_files import read_events, read_metrics
from fm9g.train.device_flops import device_name, peak_flops
from fm9g.train.runner import TrainResult


def test_a_launch_reports_its_start_once_and_its_devices(
    train: Callable[..., TrainResult], make_mixture: Callable, capsys: pytest.CaptureFixture
) -> None:
    validation = make_mixture({"v": [{"input": "", "output": "some text"}] * 5})
    result = train("out", train_iters=2, peak_tflops=0, val_dataset=validation)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("starting at step 0") == 1
    log = result.metrics_file.parent
    start = read_events(log / "events.jsonl")[0]
    assert (start["kind"], start["text"], start["devices"]) == ("start", "starting at step 0", {"CPU": 1})
    lines = read_metrics(result.metrics_file)
    assert any("Throughput/tokens_per_second" in line for line in lines)
    assert not any("Throughput/mfu" in line for line in lines)  # nobody said what the CPU can do
    assert "mfu" not in printed.err
    assert [(item["task"], item["records"]) for item in read_run_info(log / "run.json")["validation"]] == [("v", 5)]


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA A100-SXM4-40GB", "fp16", 312e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", None),  # the data sheet's is that of bf16
        ("NVIDIA Unheard-Of", "bf16", None),
    ],
)
def test_a_peak_is_that_of_a_data_sheet(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), dtype) == peak
    assert device_name(torch.device("cuda")) == name
    assert peak_flops(torch.device("cpu"), dtype) is None
    assert device_name(torch.device("cpu")) == "CPU"
