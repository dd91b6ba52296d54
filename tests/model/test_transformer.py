"""The transformer against transformers' own classes, and what packing must not change."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.common import LENGTHS, make_batch, small_model
from helpers.hf_reference import exported, hf_logits, make_model

from fm9g.config.model import load_model_config
from fm9g.convert.hf_import import import_folder
from fm9g.io.pt_file import read_weights
from fm9g.model.transformer import FM9G, Batch, is_mup_scaled, neftune_noise

SCALED = {"scale": True, "scale_emb": 12.0, "scale_depth": 1.4, "base_hidden_size": 16, "mup_lr": False}
KINDS = {
    "llama": {},
    "llama-mha-wide-heads": {"num_kv_heads": 4, "head_dim": 16},
    "llama-tied-gelu": {"tie_word_embeddings": True, "activation": "gelu"},
    "qwen2": {"qkv_bias": True},
    "qwen2-tied": {"qkv_bias": True, "tie_word_embeddings": True},
    "granite-tied": {**SCALED, "tie_word_embeddings": True},
    "granite": {**SCALED, "num_kv_heads": 1, "norm_eps": 1e-6},
    "mistral": {"sliding_window": 10},
    "qwen2-window": {"qkv_bias": True, "sliding_window": 10},
    "qwen3-window": {
        "qk_norm": True,
        "sliding_window": 10,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers_and_the_way_back_is_exact(kind: str, tmp_path: Path) -> None:
    config = small_model(**KINDS[kind])
    model, batch = make_model(config), make_batch()
    folder = exported(model, tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind.split("-")[0]
    with torch.no_grad():
        actual = model.logits(batch)
    torch.testing.assert_close(actual, hf_logits(folder, batch), rtol=0, atol=1e-5)

    import_folder(folder, tmp_path / "back.pt")
    before, after = read_weights(tmp_path / "m.pt"), read_weights(tmp_path / "back.pt")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_model_config(tmp_path / "back.json") == config


def test_a_document_does_not_see_its_neighbours() -> None:
    model = make_model(small_model())
    batch = make_batch()
    changed = batch.input_ids.clone()
    changed[: LENGTHS[0]] = 5
    with torch.no_grad():
        before = model.logits(batch)[LENGTHS[0] :]
        after = model.logits(dataclasses.replace(batch, input_ids=changed))[LENGTHS[0] :]
    assert torch.equal(before, after)


def test_a_position_sees_its_window_and_nothing_of_its_neighbours() -> None:
    """One layer, so that nothing comes through from further away."""
    model, batch = make_model(small_model(num_layers=1, sliding_window=8)), make_batch()
    changed = batch.input_ids.clone()
    changed[20] = (changed[20] + 1) % 320
    with torch.no_grad():
        before = model.logits(batch)
        after = model.logits(dataclasses.replace(batch, input_ids=changed))
    moved = ((before - after).abs().amax(-1) > 0).nonzero().flatten().tolist()
    assert moved == list(range(20, 28))


def test_a_position_does_not_see_what_comes_later() -> None:
    model, batch = make_model(small_model()), make_batch([20])
    changed = batch.input_ids.clone()
    changed[15:] = 5
    with torch.no_grad():
        before, after = model.logits(batch), model.logits(dataclasses.replace(batch, input_ids=changed))
    torch.testing.assert_close(before[:15], after[:15], rtol=0, atol=1e-6)
    assert not torch.allclose(before[15:], after[15:])


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_those_of_plain_cross_entropy(tied: bool) -> None:
    model, batch = make_model(small_model(tie_word_embeddings=tied)), make_batch()
    total, rows = model(batch)
    (total / 7).backward()
    actual = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    expected = F.cross_entropy(model.logits(batch)[batch.target_positions], batch.targets, reduction="none")
    (expected.sum() / 7).backward()
    torch.testing.assert_close(rows, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(actual[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_bf16_compute_stays_near_fp32() -> None:
    model, batch = make_model(small_model()), make_batch()
    exact = model(batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)[0]
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)
    assert rough.item() != exact.item()


def test_accumulation_equals_one_large_batch() -> None:
    """Four rows of documents of unequal length and masked inputs, one after the other and all in one row."""
    rows = [[30, 2], [5, 5, 20], [31], [1, 15, 3]]
    batches = [make_batch(seqlens, seed=i) for i, seqlens in enumerate(rows)]
    for i, batch in enumerate(batches):  # unequal shares of targets
        keep = batch.target_positions[:: i + 1]
        batches[i] = dataclasses.replace(batch, target_positions=keep, targets=batch.input_ids.roll(-1)[keep])
    starts = [0, *torch.tensor([sum(seqlens) for seqlens in rows]).cumsum(0).tolist()]
    seqlens = [length for row in rows for length in row]
    merged = Batch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.positions for batch in batches]),
        torch.tensor([0, *seqlens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seqlens,
        torch.cat([batch.target_positions + start for batch, start in zip(batches, starts)]),
        torch.cat([batch.targets for batch in batches]),
    )
    targets = len(merged.targets)
    model = make_model(small_model(dropout=0.0))
    for batch in batches:
        (model(batch)[0] / targets).backward()
    accumulated = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    (model(merged)[0] / targets).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(accumulated[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_initial_weights_have_the_deviation_that_their_kind_asks_for() -> None:
    model = FM9G(
        small_model(hidden_size=256, intermediate_size=512, vocab_size=2000, **{**SCALED, "base_hidden_size": 16})
    )
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed=2)
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            expected = 0.1 / 4 if is_mup_scaled(name) else 0.1  # mup_width is 16
            assert float(weight.std()) == pytest.approx(expected, rel=0.05), name
    again = torch.empty_like(model.lm_head.weight)
    model.init_weight("lm_head.weight", again, seed=2)
    assert torch.equal(again, model.lm_head.weight)


def test_only_linear_weights_inside_layers_are_width_scaled() -> None:
    names = [name for name, _ in FM9G(small_model(qkv_bias=True)).named_parameters() if is_mup_scaled(name)]
    assert len(names) == 2 * 7
    assert all(
        name.split(".")[-2] in ["project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out"]
        for name in names
    )


def test_neftune_noise_depends_on_the_document_length_and_acts_in_training_alone() -> None:
    """NEFTune: uniform in +-alpha / sqrt(length * width)."""
    model = FM9G(small_model(), neftune_alpha=3.0)
    batch = make_batch([50, 2])
    x = torch.zeros(52, 32)
    noise = torch.stack([neftune_noise(x, batch.cu_seqlens, 3.0) for _ in range(200)])
    for span, length in ((slice(0, 50), 50), (slice(50, 52), 2)):
        bound = 3.0 / (length * 32) ** 0.5
        assert noise[:, span].abs().max() <= bound
        assert noise[:, span].abs().max() > 0.95 * bound
        assert noise[:, span].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(model.train().hidden_states(batch), model.hidden_states(batch))
    assert torch.equal(model.eval().hidden_states(batch), model.hidden_states(batch))


def test_dropout_acts_in_training_alone() -> None:
    model, batch = make_model(small_model(dropout=0.5)), make_batch()
    torch.manual_seed(0)
    assert float(model(batch)[0]) != float(model(batch)[0])
    model.eval()
    assert float(model(batch)[0]) == float(model(batch)[0])
