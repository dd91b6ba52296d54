"""Every optimizer against its reference on one process, on two processes against one, and through a checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.common import small_model
from helpers.engine_harness import EngineCase, documents, needs_bmtrain, prepared, train_case
from helpers.spawn import run_ranks

from fm9g.data.load.packing import collate
from fm9g.engine.dist_context import DistContext
from fm9g.engine.optimizers import SGD, AdamW8bit, OptimizerConfig, ShardLayout, StepArgs, build_optimizers
from fm9g.model.transformer import FM9G, is_mup_scaled
from fm9g.train.batch import to_batch

pytestmark = pytest.mark.xdist_group("optimizers")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
OTHERS = [pytest.param("adamw8bit", marks=needs_bitsandbytes), "adafactor", "muon", "sgd"]
STEPS = 5


@pytest.fixture
def dist_context() -> Iterator[DistContext]:
    with DistContext("cpu") as dist_context:
        yield dist_context


def _by_hand(name: str, model: FM9G) -> list[torch.optim.Optimizer]:
    """The reference classes of an optimizer. Learning rates of matrices in layers are halved."""
    matrices = [w for n, w in model.named_parameters() if is_mup_scaled(n)]
    others = [w for n, w in model.named_parameters() if not is_mup_scaled(n)]
    groups = [{"params": matrices, "lr": 0.005}, {"params": others, "lr": 0.01}]
    adam = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    if name == "adamw8bit":
        import bitsandbytes

        reference = bitsandbytes.optim.AdamW8bit(groups, **adam)
        reference.fill_qmap()
        reference.name2qmap["dynamic"][0] = -1.0  # as ours, whose codes checkpoints must restore
        return [reference]
    if name == "adafactor":
        return [torch.optim.Adafactor(groups, weight_decay=0.1, foreach=False)]
    if name == "sgd":
        return [torch.optim.SGD(groups, momentum=0.95, weight_decay=0.1)]
    muon = torch.optim.Muon(matrices, lr=0.005, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=0.01, fused=True, **adam)]


@pytest.mark.parametrize("name", OTHERS)
def test_on_one_process_an_optimizer_equals_its_reference(dist_context: DistContext, name: str) -> None:
    """The model is so wide that its embedding has more than 4096 elements, from which on moments have 8 bits."""
    engine = prepared(EngineCase(optimizer=name, model=(("hidden_size", 64),)), dist_context, {})
    plain = FM9G(small_model(hidden_size=64))
    plain.load_state_dict(dict(engine.weights()))
    ema = {n: w.clone() for n, w in engine.weights()}
    references = _by_hand(name, plain)
    for step in range(STEPS):
        batch, _ = to_batch(collate(documents(step)[0], 32), torch.device("cpu"))
        engine.backward(engine.forward(batch, step)[0] / 19, is_last_micro_batch=True)
        engine.step(0.01, 0.0)
        (plain(batch)[0] / 19).backward()
        for reference in references:
            reference.step()
            reference.zero_grad()
        for n, weight in engine.weights():
            ema[n].lerp_(weight, 0.5)
    expected = dict(plain.named_parameters())
    for n, weight in engine.weights():
        # A value between two codes of 8 bits may become either: up to 0.15 % do, depending on the CPU.
        share_off = ((weight - expected[n].detach()).abs() > 2e-5).float().mean()
        assert share_off <= (0.02 if name == "adamw8bit" else 0.0), n
    for n, mean in engine.ema_weights():
        torch.testing.assert_close(mean, ema[n], rtol=1e-5, atol=1e-6)
        assert not torch.equal(mean, expected[n])


# Importing bitsandbytes takes seconds, in each process.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("adamw8bit", marks=[needs_bitsandbytes, pytest.mark.slow]),
        "adafactor",
        "muon",
        pytest.param("sgd", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_and_resume_from_a_checkpoint(name: str) -> None:
    case = EngineCase(optimizer=name, steps=4)
    one = run_ranks(1, train_case, case)[0]
    two = run_ranks(2, train_case, case)[0]
    half = run_ranks(2, train_case, EngineCase(optimizer=name, steps=4, stop=2))[0]
    resumed = run_ranks(2, _resume, case, half)[0]
    assert two.losses == pytest.approx(one.losses, abs=2e-4 if name == "muon" else 2e-5)  # muon computes in bf16
    assert resumed.losses == two.losses[2:]
    for actual, expected in ((resumed.weights, two.weights), (resumed.ema, two.ema)):
        assert actual.keys() == expected.keys() == one.weights.keys()
        assert all(torch.equal(actual[n], expected[n]) for n in actual)
    assert all(torch.equal(resumed.optimizer[n], two.optimizer[n]) for n in two.optimizer)


@needs_bmtrain
@pytest.mark.parametrize("name", ["muon", pytest.param("sgd", marks=pytest.mark.slow)])
def test_bmtrain_runs_them_too(name: str) -> None:
    one = run_ranks(1, train_case, EngineCase(optimizer=name, steps=3))[0]
    two = run_ranks(2, train_case, EngineCase("bmtrain", optimizer=name, steps=3))[0]
    assert two.losses == pytest.approx(one.losses, abs=2e-4)


def _resume(dist_context: DistContext, case: EngineCase, before) -> object:
    return train_case(dist_context, case, first=2, before=before)


@pytest.mark.parametrize("name", ["adamw", *OTHERS])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(dist_context: DistContext, name: str, bad: float) -> None:
    engine = prepared(EngineCase(optimizer=name), dist_context, {})
    batch, _ = to_batch(collate(documents(0)[0], 32), torch.device("cpu"))

    def step(factor: float) -> torch.Tensor:
        engine.backward(engine.forward(batch, 0)[0] * factor, is_last_micro_batch=True)
        return engine.step(0.01, 1.0)

    def full_state() -> list[torch.Tensor]:
        return [t.clone() for c in (engine.weights(), engine.optimizer_state(), engine.ema_weights()) for _, t in c]

    step(0.1)
    before = full_state()
    assert not step(bad).isfinite()
    assert all(torch.equal(one, other) for one, other in zip(before, full_state()))
    assert step(0.1).isfinite()
    assert not all(torch.equal(one, other) for one, other in zip(before, full_state()))


SQUARE = torch.Size([64, 64])  # from 4096 elements on, moments have 8 bits
WHOLE = ShardLayout(lambda _: SQUARE, lambda _, local: local, lambda _, full: full)


def _updated(config: OptimizerConfig) -> dict[str, torch.Tensor]:
    """Two weights after two steps."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(SQUARE, generator=generator) for name in "ab"}
    rules = build_optimizers(dict.fromkeys("ab", SQUARE), config, WHOLE)
    for name, rule in rules.items():
        rule.init_state(name, lambda shape=SQUARE, dtype=torch.float32: torch.zeros(shape, dtype=dtype))
    for step in range(2):
        grads = {name: torch.randn(SQUARE, generator=generator) for name in "ab"}
        for rule in dict.fromkeys(rules.values()):
            rule.step(weights, grads, StepArgs(0.1, torch.tensor(float(step))))
    return weights


@pytest.mark.parametrize("name", ["adamw", *OTHERS])
def test_weight_decay_leaves_out_the_weights_of_no_decay(name: str) -> None:
    config = OptimizerConfig(dict.fromkeys("ab", 1.0), (0.9, 0.95), 1e-6, 0.5, name, frozenset("ab"))
    all_decay, none_decay = _updated(config), _updated(replace(config, weight_decay=0.0))
    some = _updated(replace(config, no_decay=frozenset("b")))
    assert not torch.equal(all_decay["b"], none_decay["b"])
    assert torch.equal(some["a"], all_decay["a"])
    assert torch.equal(some["b"], none_decay["b"])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_equals_two_groups_of_torch(name: str) -> None:
    config = OptimizerConfig(
        dict.fromkeys("ab", 1.0), (0.9, 0.95), 1e-6, 0.5, name, momentum=0.8, no_decay=frozenset("b")
    )
    updated = _updated(config)
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(SQUARE, generator=generator) for n in "ab"}
    groups = [{"params": [weights["a"]], "weight_decay": 0.5}, {"params": [weights["b"]], "weight_decay": 0.0}]
    if name == "adamw":
        reference: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-6)
    else:
        reference = torch.optim.SGD(groups, lr=0.1, momentum=0.8)
    for _ in range(2):
        for weight in weights.values():
            weight.grad = torch.randn(SQUARE, generator=generator)
        reference.step()
    for n, weight in weights.items():
        torch.testing.assert_close(updated[n], weight)


def test_sgd_without_momentum_has_no_state() -> None:
    config = OptimizerConfig({"w": 1.0}, (0.9, 0.95), 1e-6, 0.5, "sgd", momentum=0.0)
    optimizer, weight, grad = SGD(config, WHOLE), torch.randn(SQUARE), torch.randn(SQUARE)
    optimizer.init_state("w", torch.zeros)
    expected = weight - 0.1 * (grad + 0.5 * weight)
    optimizer.step({"w": weight}, {"w": grad}, StepArgs(0.1, torch.tensor(0.0)))
    torch.testing.assert_close(weight, expected)
    assert optimizer.state["w"] == {}


@needs_bitsandbytes
def test_a_checkpoint_restores_the_same_eight_bits() -> None:
    layout = ShardLayout(lambda _: torch.Size([5000]), lambda _, local: local, lambda _, full: full)
    optimizer = AdamW8bit(OptimizerConfig({"w": 1.0}, (0.9, 0.95), 1e-6, 0.1), layout)
    optimizer.init_state("w", lambda dtype=torch.float32: torch.zeros(5000, dtype=dtype))
    for key, values in (("exp_avg", torch.randn(5000)), ("exp_avg_sq", torch.rand(5000) * 1e-4)):
        optimizer.load_state("w", key, values)
        codes, scales = optimizer.state["w"][key].clone(), optimizer.state["w"][f"{key}.scales"].clone()
        assert codes.unique().numel() > 100
        torch.testing.assert_close(
            optimizer.export_state("w", key), values, rtol=0.1, atol=float(values.abs().max()) * 0.02
        )
        optimizer.load_state("w", key, optimizer.export_state("w", key))
        assert torch.equal(optimizer.state["w"][key], codes)
        assert torch.equal(optimizer.state["w"][f"{key}.scales"], scales)
