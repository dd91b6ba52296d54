"""What a run leaves open, decided for a device; and rules that have one message wherever they are checked."""

import pytest

from fm9g.config.resolved import DeviceFacts, ParallelLayout, resolve
from fm9g.config.run import RunConfig, load_run
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError
from fm9g.plan.job import JobConfig

GPU, CPU = DeviceFacts(on_gpu=True), DeviceFacts(on_gpu=False, has_fast_bf16=False)


def load(**keys: str) -> RunConfig:
    return load_run("tiny", keys, complete=False)


@pytest.mark.parametrize(
    ("keys", "device", "engine"),
    [
        ({}, GPU, "bmtrain"),
        ({}, DeviceFacts(on_gpu=True, has_bmtrain=False), "torch"),
        ({}, CPU, "torch"),
        ({"tp_size": "2"}, GPU, "torch"),
        ({"zero_level": "0"}, GPU, "torch"),
        ({"engine": "torch"}, GPU, "torch"),
        ({"engine": "bmtrain"}, CPU, "bmtrain"),
    ],
)
def test_the_engine_auto_is_what_the_device_and_the_settings_allow(
    keys: dict[str, str], device: DeviceFacts, engine: str
) -> None:
    assert resolve(load(**keys), 2, device).engine == engine


@pytest.mark.parametrize(
    ("half_type", "device", "dtype"),
    [
        ("bf16", GPU, "bf16"),
        ("bf16", DeviceFacts(on_gpu=True, has_fast_bf16=False), "fp32"),
        ("bf16", CPU, "fp32"),
        ("bf16", DeviceFacts(on_gpu=False), "bf16"),
        ("fp16", GPU, "fp16"),
        ("fp16", DeviceFacts(on_gpu=False), "fp32"),
        ("fp32", GPU, "fp32"),
    ],
)
def test_the_precision_is_the_models_where_it_is_fast(half_type: str, device: DeviceFacts, dtype: str) -> None:
    assert resolve(load(**{"model.half_type": half_type}), 1, device).dtype == dtype


def test_a_layout_divides_processes_and_micro_batches() -> None:
    layout = ParallelLayout.of(TrainConfig(tp_size=2, global_batch_size=12), world_size=8)
    assert (layout.dp_size, layout.ranks_per_replica, layout.gradient_accumulation_steps) == (4, 2, 3)
    run = resolve(load(batch_size="2", max_length="64", gradient_accumulation_steps="3"), 4, GPU)
    assert run.layout.packs_per_step == 12
    assert run.tokens_per_step == 2 * 64 * 12


@pytest.mark.parametrize(
    ("keys", "world_size", "message"),
    [
        ({"tp_size": "3", "sequence_parallel": "false"}, 4, "tp_size 3 does not divide the number of processes, 4"),
        ({"global_batch_size": "6"}, 4, "global_batch_size 6 cannot be divided among 4 replicas; possible: "),
        ({"tp_size": "16"}, 16, "tp_size 16 does not divide the model's num_heads, 8"),
        ({"tp_size": "2", "model.qk_norm": "true"}, 2, "cannot be used with a model whose qk_norm is true"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_training_and_planning_alike(
    keys: dict[str, str], world_size: int, message: str
) -> None:
    run = load(**keys)
    with pytest.raises(UserError) as of_training:
        resolve(run, world_size, GPU)
    assert message in str(of_training.value)
    with pytest.raises(UserError) as of_planning:
        JobConfig.from_run(run, nodes=1, gpus=world_size)
    assert str(of_planning.value) == str(of_training.value)
