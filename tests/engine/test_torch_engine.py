"""The plain torch engine against torch used by hand."""

import pytest
import torch
from support import small_model

from fm9g.engine.base import AdamW
from fm9g.engine.torch import TorchEngine
from fm9g.errors import UserError
from fm9g.model.transformer import FM9G, Batch, is_width_scaled


def batch() -> Batch:
    ids = torch.arange(20) * 7 % 320
    rows = torch.arange(19)
    return Batch(ids, torch.arange(20), torch.tensor([0, 20], dtype=torch.int32), [20], rows, ids[1:])


def prepared(scales: float = 0.5, weight_decay: float = 0.1) -> TorchEngine:
    engine = TorchEngine("cpu", seed=1)
    with torch.device("meta"):
        model = FM9G(small_model())
    names = [name for name, _ in model.named_parameters()]
    optimizer = AdamW({n: scales if is_width_scaled(n) else 1.0 for n in names}, (0.9, 0.95), 1e-6, weight_decay)
    engine.prepare(model, lambda name, weight: model.init_weight(name, weight, 3), optimizer, torch.float32, [])
    return engine


def test_steps_equal_adamw_by_hand_with_scaled_rates_and_clipping() -> None:
    engine = prepared()
    plain = FM9G(small_model())
    plain.load_state_dict(dict(engine.weights()))
    groups = [
        {"params": [w for n, w in plain.named_parameters() if is_width_scaled(n)], "lr": 0.05},
        {"params": [w for n, w in plain.named_parameters() if not is_width_scaled(n)], "lr": 0.1},
    ]
    by_hand = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True)
    for _ in range(3):
        engine.backward(engine.forward(batch())[0] / 19)
        norm = engine.step(lr=0.1, max_norm=0.5)
        (plain(batch())[0] / 19).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        assert torch.equal(norm, expected)
        assert norm > 0.5  # clipping acts
        by_hand.step()
        by_hand.zero_grad()
    expected_weights = dict(plain.named_parameters())
    assert all(torch.equal(weight, expected_weights[name]) for name, weight in engine.weights())


def test_without_clipping_the_norm_is_still_reported() -> None:
    one, other = prepared(), prepared()
    for engine in (one, other):
        engine.backward(engine.forward(batch())[0])
    assert torch.equal(one.step(0.1, 0.0), other.step(0.1, 1e9))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one.weights(), other.weights()))


def test_the_optimizer_state_is_by_name_and_must_match() -> None:
    engine = prepared()
    engine.backward(engine.forward(batch())[0])
    engine.step(0.1, 1.0)
    state = engine.optimizer_state()
    assert state.keys() == dict(engine.weights()).keys()
    state["other"] = state.pop("lm_head.weight")
    with pytest.raises(UserError, match=r"do not hold the same weights: lm_head.weight, other"):
        prepared().load_optimizer_state(state)
