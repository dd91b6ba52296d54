"""The transformer against transformers' own classes, and what packing must not change."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.common import LENGTHS, make_batch, small_model

from fm9g.config.model import ROPE_SCALINGS, ModelConfig, load_model_config
from fm9g.convert.hf import export_folder, import_folder
from fm9g.io.weights import read_weights, write_weights
from fm9g.model.loss import linear_cross_entropy
from fm9g.model.transformer import FM9G, Batch, is_mup_scaled

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


def make_model(config: ModelConfig) -> FM9G:
    model = FM9G(config)
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed=1)
        if weight.dim() == 1:  # norms and biases that do something
            weight.data += torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
    return model


def hf_logits(folder: Path, batch: Batch) -> torch.Tensor:
    """Logits of transformers' class for each document alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(document[None]).logits[0] for document in batch.input_ids.split(batch.seqlens)])


def exported(model: FM9G, folder: Path) -> Path:
    write_weights(folder / "m.pt", weights := dict(model.named_parameters()), weights.items())
    (folder / "m.json").write_text(json.dumps(model.config.to_json()))
    export_folder(folder / "m.pt", folder / "hf")
    return folder / "hf"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers_and_the_way_back_is_exact(kind: str, tmp_path: Path) -> None:
    config = small_model(**KINDS[kind])
    model, batch = make_model(config), make_batch()
    folder = exported(model, tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind.split("-")[0]
    with torch.no_grad():
        ours = model.logits(batch)
    torch.testing.assert_close(ours, hf_logits(folder, batch), rtol=0, atol=1e-5)

    import_folder(folder, tmp_path / "back.pt")
    before, after = read_weights(tmp_path / "m.pt"), read_weights(tmp_path / "back.pt")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_model_config(tmp_path / "back.json").value == config


@pytest.mark.parametrize("kind", ROPE_SCALINGS[1:])
def test_rope_scalings_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    config = small_model(rope_scaling=kind, rope_factor=4.0, max_length=64, orig_max_length=16, head_dim=16)
    model, batch = make_model(config), make_batch()
    plain = make_model(dataclasses.replace(config, rope_scaling=""))
    with torch.no_grad():
        ours = model.logits(batch)
        assert (ours - plain.logits(batch)).abs().max() > 1e-3  # the stretch does something
    torch.testing.assert_close(ours, hf_logits(exported(model, tmp_path), batch), rtol=0, atol=1e-5)


def test_a_document_does_not_see_its_neighbours() -> None:
    model = make_model(small_model())
    batch = make_batch()
    changed = batch.input_ids.clone()
    changed[: LENGTHS[0]] = 5
    with torch.no_grad():
        before = model.logits(batch)[LENGTHS[0] :]
        after = model.logits(dataclasses.replace(batch, input_ids=changed))[LENGTHS[0] :]
    assert torch.equal(before, after)


def test_a_position_sees_its_window_and_nothing_of_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, so that nothing comes through from further away. In blocks of several sizes the values are equal."""
    model, batch = make_model(small_model(num_layers=1, sliding_window=8)), make_batch()
    changed = batch.input_ids.clone()
    changed[20] = (changed[20] + 1) % 320
    with torch.no_grad():
        before = model.logits(batch)
        after = model.logits(dataclasses.replace(batch, input_ids=changed))
    moved = ((before - after).abs().amax(-1) > 0).nonzero().flatten().tolist()
    assert moved == list(range(20, 28))
    for queries in (1, 5, 8, 13):
        monkeypatch.setattr("fm9g.model.attention._QUERY_CHUNK", queries)
        with torch.no_grad():
            torch.testing.assert_close(model.logits(batch), before, rtol=0, atol=1e-5)


def test_the_cost_of_a_window_grows_with_the_length_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fm9g.model import attention

    monkeypatch.setattr(attention, "_QUERY_CHUNK", 16)
    pairs: list[int] = []
    plain = F.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        pairs.append(query.shape[-2] * key.shape[-2])
        return plain(query, key, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    costs = []
    for length in (320, 640, 1280):
        pairs.clear()
        q = torch.randn(length, 2, 8)
        attention.varlen_attention(q, q, q, torch.tensor([0, length]), [length], flash=False, window=24)
        costs.append(sum(pairs))
    assert costs[2] - costs[1] == pytest.approx(2 * (costs[1] - costs[0]))


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
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    expected = F.cross_entropy(model.logits(batch)[batch.target_positions], batch.targets, reduction="none")
    (expected.sum() / 7).backward()
    torch.testing.assert_close(rows, expected.detach())
    torch.testing.assert_close(total, expected.sum())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_works_in_chunks_and_without_any_row(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.arange(9).repeat(2)[:10]
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    monkeypatch.setattr("fm9g.model.loss._CHUNK_ROWS", 3)
    parts = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    torch.testing.assert_close(whole, parts)
    total, rows = linear_cross_entropy(hidden[:0], weight, targets[:0])
    total.backward()
    assert (total.item(), len(rows)) == (0.0, 0)


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


def test_dropout_acts_in_training_alone() -> None:
    model, batch = make_model(small_model(dropout=0.5)), make_batch()
    torch.manual_seed(0)
    assert float(model(batch)[0]) != float(model(batch)[0])
    model.eval()
    assert float(model(batch)[0]) == float(model(batch)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with flash-attn")
def test_flash_attention_equals_the_plain_one() -> None:
    from fm9g.model.attention import flash_attn_kernel, varlen_attention

    if flash_attn_kernel() is None:
        pytest.skip("flash-attn is not installed")
    query, key, value = (torch.randn(88, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    cu_seqlens = make_batch().cu_seqlens.cuda()
    for window in (0, 9):
        flash, plain = (
            varlen_attention(query, key, value, cu_seqlens, LENGTHS, which, window=window) for which in (True, False)
        )
        torch.testing.assert_close(flash, plain, rtol=2e-2, atol=2e-2)
