"""The engine of plain torch on one process against torch used by hand."""

from collections.abc import Iterator

import pytest
import torch
from helpers.common import small_model

from fm9g.engine.base import ParallelConfig
from fm9g.engine.dist_context import DistContext
from fm9g.engine.fsdp import FSDPEngine
from fm9g.engine.gradients import DynamicLossScaler
from fm9g.engine.optimizers import OptimizerConfig
from fm9g.errors import UserError
from fm9g.model.transformer import FM9G, Batch, is_mup_scaled


@pytest.fixture
def dist_context() -> Iterator[DistContext]:
    with DistContext("cpu") as dist_context:
        yield dist_context


def batch() -> Batch:
    ids = torch.arange(20) * 7 % 320
    rows = torch.arange(19)
    return Batch(ids, torch.arange(20), torch.tensor([0, 20], dtype=torch.int32), [20], rows, ids[1:])


def prepared(
    dist_context: DistContext, scale: DynamicLossScaler | None = None, **parallel_config: object
) -> FSDPEngine:
    engine = FSDPEngine(dist_context, seed=1)
    with torch.device("meta"):
        model = FM9G(small_model())
    names = [name for name, _ in model.named_parameters()]
    optimizer = OptimizerConfig({n: 0.5 if is_mup_scaled(n) else 1.0 for n in names}, (0.9, 0.95), 1e-6, 0.1)
    engine.prepare(
        model,
        model.encoder.layers,
        lambda name, weight: model.init_weight(name, weight, 3),
        optimizer,
        ParallelConfig(**parallel_config),  # type: ignore[arg-type]
        scale or DynamicLossScaler(),
    )
    return engine


def step(engine: FSDPEngine, lr: float = 0.1, max_norm: float = 1.0, number: int = 0) -> torch.Tensor:
    engine.backward(engine.forward(batch(), number)[0] / 19, is_last_micro_batch=True)
    return engine.step(lr, max_norm)


def test_steps_equal_adamw_by_hand_with_scaled_rates_and_clipping(dist_context: DistContext) -> None:
    engine = prepared(dist_context)
    plain = FM9G(small_model())
    plain.load_state_dict(dict(engine.weights()))
    groups = [
        {"params": [w for n, w in plain.named_parameters() if is_mup_scaled(n)], "lr": 0.05},
        {"params": [w for n, w in plain.named_parameters() if not is_mup_scaled(n)], "lr": 0.1},
    ]
    by_hand = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True)
    for _ in range(3):
        norm = step(engine, max_norm=0.5)
        (plain(batch())[0] / 19).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
        assert norm > 0.5  # clipping acts
        by_hand.step()
        by_hand.zero_grad()
    expected_weights = dict(plain.named_parameters())
    for name, weight in engine.weights():
        torch.testing.assert_close(weight, expected_weights[name].detach(), rtol=1e-5, atol=1e-4)


def test_without_clipping_the_norm_is_still_reported(dist_context: DistContext) -> None:
    one, other = prepared(dist_context), prepared(dist_context)
    assert torch.equal(step(one, max_norm=0.0), step(other, max_norm=1e9))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.weights(), other.weights()))


def test_the_optimizer_state_is_by_name_and_must_match(dist_context: DistContext) -> None:
    engine = prepared(dist_context)
    step(engine)
    state = dict(engine.optimizer_state())
    meta = engine.optimizer_state().meta
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in meta.items()}
    assert {name.rpartition(".")[0] for name in state} - {""} == dict(engine.weights()).keys()
    prepared(dist_context).load_optimizer_state(state)
    with pytest.raises(UserError, match=r"lm_head.weight.exp_avg has another shape"):
        prepared(dist_context).load_optimizer_state(state | {"lm_head.weight.exp_avg": torch.zeros(3)})
    state["other"] = state.pop("lm_head.weight.exp_avg")
    with pytest.raises(UserError, match=r"to other weights: lm_head.weight.exp_avg, other"):
        prepared(dist_context).load_optimizer_state(state)


def test_loss_scaling_changes_nothing_but_the_scale_until_a_gradient_overflows(dist_context: DistContext) -> None:
    plain, scaled = prepared(dist_context), prepared(dist_context, DynamicLossScaler(scale=1024.0, growth_interval=2))
    for expected in (1024.0, 2048.0, 2048.0):
        torch.testing.assert_close(step(scaled), step(plain), rtol=1e-5, atol=0)
        assert scaled.loss_scaler.scale == expected
    for (_, one), (_, other) in zip(plain.weights(), scaled.weights()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    before = [weight.clone() for _, weight in scaled.weights()]
    scaled.backward(scaled.forward(batch(), 0)[0] * float("inf"), is_last_micro_batch=True)
    assert not scaled.step(0.1, 1.0).isfinite()
    assert scaled.loss_scaler.scale == 1024.0
    assert all(torch.equal(one, other) for one, (_, other) in zip(before, scaled.weights()))
    saved = dict(scaled.optimizer_state())
    resumed = prepared(dist_context, DynamicLossScaler(scale=4.0, growth_interval=2))
    resumed.load_optimizer_state(saved)
    assert (resumed.loss_scaler.scale, resumed.loss_scaler.good_steps) == (1024.0, 0)


def test_an_offloaded_optimizer_gives_the_same_weights(dist_context: DistContext) -> None:
    on_device, offloaded = prepared(dist_context), prepared(dist_context, offload=True)
    for _ in range(3):
        assert torch.equal(step(on_device), step(offloaded))
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(on_device.weights(), offloaded.weights()))


def test_bf16_computes_in_bf16_and_updates_in_fp32(dist_context: DistContext) -> None:
    half, full = prepared(dist_context, dtype=torch.bfloat16), prepared(dist_context)
    loss = half.forward(batch(), 0)[0]
    assert loss.item() == pytest.approx(full.forward(batch(), 0)[0].item(), rel=1e-2)
    assert loss.item() != full.forward(batch(), 0)[0].item()
    step(half, lr=1e-4)
    changed = [not torch.equal(weight, weight.bfloat16().float()) for _, weight in half.weights()]
    assert sum(changed) > len(changed) / 2


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_recomputes_and_changes_nothing(dist_context: DistContext, mode: str) -> None:
    plain, checkpointed = prepared(dist_context), prepared(dist_context, checkpointing=mode, checkpointed_layers=1)
    calls = []
    norm = checkpointed.model.encoder.layers[0].self_att.layernorm_before_attention
    norm.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(step(plain), step(checkpointed))
    assert len(calls) == 2
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(plain.weights(), checkpointed.weights()))
