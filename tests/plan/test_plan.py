"""`fm9g plan`: its memory beside measured peaks, its arithmetic, and the settings that it suggests."""

import argparse
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from helpers.common import ROOT, make_records

from fm9g.config.load import require_config
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.config.run import load_run
from fm9g.errors import UserError
from fm9g.plan import (
    GPUS,
    Gpu,
    JobConfig,
    add_plan_arguments,
    checkpoint_bytes,
    count_weights,
    estimate_job,
    flops_per_token,
    format_table,
    peak_memory,
    run_plan,
    step_phases,
    suggest,
)
from fm9g.plan.command import parse_tokens
from fm9g.plan.job import GIB
from fm9g.train.data_loading import open_mixture

SMALL = ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4, use_flash_attn=False
)


def shipped(name: str) -> ModelConfig:
    return load_model_config(require_config("model_configs", name)).value


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "plan" / "measure.py"
    spec = importlib.util.spec_from_file_location("plan_measure", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("model", "job"),
    [
        ({}, {"half_type": "bf16", "max_length": 256}),
        (
            {"num_layers": 6},
            {
                "half_type": "fp32",
                "activation_checkpoint": "selective",
                "zero_level": 2,
                "gradient_accumulation_steps": 2,
            },
        ),
        ({"vocab_size": 6000}, {"half_type": "fp32", "activation_checkpoint": "full", "grad_ckpt_num": 2}),
        ({"vocab_size": 6000, "tie_word_embeddings": True}, {"half_type": "bf16", "max_length": 256, "zero_level": 0}),
        ({}, {"half_type": "bf16", "lora_layer": ("project_q", "project_v"), "lora_r": 8}),
        ({}, {"half_type": "fp32", "lora_layer": ("project_q", "w_0", "w_1", "w_out"), "quantization": "nf4"}),
        ({}, {"half_type": "bf16", "lora_layer": ("w_0", "w_out"), "activation_checkpoint": "selective"}),
    ],
)
def test_memory_is_what_is_measured_within_15_percent(benchmark: ModuleType, model: dict, job: dict) -> None:
    config = replace(SMALL, **model)
    chosen = JobConfig(**{"max_length": 512, "flash": False, **job})
    measured = benchmark.measure(config, chosen)
    assert peak_memory(config, chosen).total == pytest.approx(measured, rel=0.08)  # 15 % is what is promised


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("2b", 2_724_880_896),
        ("4b", 4_129_681_920),
        ("7b", 7_668_831_744),
        ("8b", 8_765_444_096),
        ("70b", 80_814_546_944),
    ],
)
def test_parameters_are_those_of_the_model(name: str, count: int) -> None:
    from fm9g.model.transformer import weight_shapes

    assert (
        count_weights(shipped(name)) == count == sum(shape.numel() for shape in weight_shapes(shipped(name)).values())
    )
    assert checkpoint_bytes(shipped(name), JobConfig()) == 12 * count


def test_planning_needs_no_torch() -> None:
    code = "import sys, fm9g.plan, fm9g.doctor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_flops_are_those_of_the_matrices_and_of_causal_attention() -> None:
    without = flops_per_token(SMALL, max_length=0)
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 512 * 128
    assert without == 6 * matrices
    # Scores and mixing: 2 products of 2 x 128 FLOPs for each of 300 tokens and layer, half masked, 3 passes.
    assert flops_per_token(SMALL, 300) - without == 3 * 4 * 2 * 2 * 128 * 300 / 2
    tied = replace(SMALL, tie_word_embeddings=True)
    assert flops_per_token(tied, 0) == without


def test_days_and_tokens() -> None:
    job = JobConfig(nodes=8, gpus=8, tp_size=4, batch_size=2, gradient_accumulation_steps=3, max_length=1000)
    estimate = estimate_job(shipped("7b"), job, Gpu(80, 312e12), mfu=0.5)
    assert job.tokens_per_step == 16 * 2 * 3 * 1000
    assert estimate.tokens_per_second == pytest.approx(64 * 156e12 / flops_per_token(shipped("7b"), 1000))
    assert estimate.days(1e12) == pytest.approx(1e12 / estimate.tokens_per_second / 86400)
    assert [parse_tokens(text) for text in ("300M", "1.5t", "1000B", "5e9")] == [3e8, 1.5e12, 1e12, 5e9]


def test_what_lasts_is_shared_by_the_ranks_and_offloaded() -> None:
    model, job = shipped("7b"), JobConfig(nodes=2, gpus=8, activation_checkpoint="full")
    weights = count_weights(model)
    last = list(step_phases(model, job))[-1]
    assert (last.weights, last.gradients, last.optimizer) == pytest.approx([w * weights / 16 for w in (4, 4, 8)])
    whole = list(step_phases(model, replace(job, zero_level=0)))[-1]
    assert whole.optimizer == pytest.approx(8 * weights)
    assert peak_memory(model, replace(job, offload_optimizer=True)).optimizer == 0
    bmtrain = list(step_phases(model, replace(job, engine="bmtrain")))[-1]
    assert (bmtrain.weights, bmtrain.gradients, bmtrain.optimizer) == pytest.approx(
        [w * weights / 16 for w in (2, 2, 12)]
    )


def test_each_setting_saves_what_it_is_for() -> None:
    model, base = shipped("7b"), JobConfig(gpus=8, batch_size=2)
    sizes = [
        peak_memory(model, replace(base, activation_checkpoint=kind)).activations
        for kind in ("none", "selective", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)
    buffers = [
        peak_memory(model, replace(base, activation_checkpoint="full", zero_level=level)).total for level in (0, 2, 3)
    ]
    assert buffers == sorted(buffers, reverse=True)
    split = replace(base, tp_size=4)
    assert (
        peak_memory(model, split).activations < peak_memory(model, replace(split, sequence_parallel=False)).activations
    )
    assert (
        peak_memory(model, replace(base, engine="bmtrain")).buffers
        > peak_memory(model, replace(base, engine="bmtrain", activation_checkpoint="full")).buffers
    )  # without checkpointing bmtrain's gathered layers stay


def test_suggestions_fit_and_keep_the_tokens_a_step() -> None:
    model, job = shipped("7b"), JobConfig(gpus=8, batch_size=4)
    assert not estimate_job(model, job).fits
    found = suggest(model, job)
    assert found
    times = [estimate.step_seconds for _, estimate in found]
    assert times == sorted(times)
    for changes, estimate in found:
        assert estimate.fits
        assert estimate.job.tokens_per_step == job.tokens_per_step
        assert replace(job, **_parsed(changes, job)) == estimate.job
    assert ("", estimate_job(model, replace(job, batch_size=1))) in suggest(model, replace(job, batch_size=1))
    assert suggest(shipped("70b"), JobConfig(batch_size=1)) == []


def _parsed(changes: str, job: JobConfig) -> dict:
    values = {}
    for key, text in zip(changes.split()[::2], changes.split()[1::2]):
        old = getattr(job, key.removeprefix("--"))
        values[key.removeprefix("--")] = text == "true" if isinstance(old, bool) else type(old)(text)
    return values


def test_norms_of_queries_and_keys_keep_a_model_from_being_split() -> None:
    with pytest.raises(UserError, match="whose qk_norm is true"):
        estimate_job(replace(SMALL, qk_norm=True), JobConfig(gpus=2, tp_size=2))
    assert (
        estimate_job(replace(SMALL, qk_norm=True), JobConfig(gpus=2)).weights
        > estimate_job(SMALL, JobConfig(gpus=2)).weights
    )


def test_heads_limit_tensor_parallelism() -> None:
    with pytest.raises(UserError, match="tp_size 8 does not divide num_kv_heads 4"):
        estimate_job(shipped("4b"), JobConfig(gpus=8, tp_size=8))
    assert all(
        estimate.job.tp_size <= 4 for _, estimate in suggest(shipped("4b"), JobConfig(gpus=8, batch_size=8), count=99)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "x"},
        {"zero_level": 1},
        {"gpus": 0},
        {"gpus": 8, "tp_size": 3},
        {"gpus": 2, "tp_size": 2, "max_length": 5},
        {"engine": "bmtrain", "zero_level": 0},
        {"engine": "bmtrain", "gpus": 2, "tp_size": 2},
    ],
)
def test_a_setup_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(UserError):
        JobConfig(**wrong)


def test_a_setup_is_read_from_a_run() -> None:
    keys = {
        "use_checkpoint": "true",
        "global_batch_size": "64",
        "max_length": "2048",
        "zero_level": "2",
        "engine": "torch",
    }
    job = JobConfig.from_run(load_run("7b", keys, complete=False), nodes=2, gpus=8)
    assert job == JobConfig(
        nodes=2,
        gpus=8,
        zero_level=2,
        activation_checkpoint="full",
        max_length=2048,
        gradient_accumulation_steps=4,
        half_type="bf16",
    )
    assert JobConfig.from_run(load_run("7b", {}, complete=False), 1, 8).engine == "bmtrain"
    assert JobConfig.from_run(load_run("7b", {"tp_size": "2"}, complete=False), 1, 8).engine == "torch"


def command(*words: str, **keys: str) -> int:
    parser = argparse.ArgumentParser()
    add_plan_arguments(parser)
    return run_plan(parser.parse_args(words), keys)


SEVEN = str(ROOT / "model_configs" / "7b.json")  # not the training settings of that name


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    keys = {"engine": "torch", "use_checkpoint": "true"}
    assert command("--config", "70b", "--nodes", "8", "--gpu", "h100", "--tokens", "2T", **keys) == 0
    text = capsys.readouterr().out
    assert "80.815 B" in text
    assert text.splitlines()[-1].startswith("It fits: ")
    assert "(--tokens, 2 T tokens)" in text
    assert f"{12 * 80_814_546_944 / GIB:.1f} GiB" in text
    picture = tmp_path / "memory.png"
    assert command("--config", SEVEN, "--json", "--plot", str(picture), batch_size="8", engine="torch") == 1
    figures = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not figures["fits"]
    assert sum(figures["memory"].values()) == pytest.approx(figures["tensors"], abs=10)
    assert figures["suggestions"][0]["fits"]
    assert command("--config", SEVEN, batch_size="8", engine="torch") == 1
    assert figures["suggestions"][0]["changes"] in capsys.readouterr().out
    assert command("--config", SEVEN, "--json", batch_size="8", engine="torch", global_batch_size="64") == 1
    changes = [other["changes"] for other in json.loads(capsys.readouterr().out)["suggestions"]]
    assert any("--global_batch_size" in text for text in changes)
    assert not any("--gradient_accumulation_steps" in text for text in changes)


@pytest.mark.parametrize(
    "words",
    [
        ("--gpu", "H10"),
        ("--gpu-memory", "0"),
        ("--gpu-flops", "nan"),
        ("--mfu", "40"),
        ("--tokens", "many"),
        ("--gpus", "0"),
    ],
)
def test_mistakes_on_the_command_line(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError):
        command("--config", "7b", *words)


def test_every_component_is_in_the_table() -> None:
    estimate = estimate_job(shipped("7b"), JobConfig(gpus=8), GPUS["H200"])
    text = format_table(estimate)
    assert f"{estimate.memory.total / GIB:.2f} GiB" in text
    assert f"{estimate.memory.activations / GIB:.2f} GiB" in text
    assert "free" in text


@pytest.mark.parametrize(
    ("keys", "steps", "words"),
    [
        ({}, 10_000, "10,000 steps of 393,216 tokens (train_iters, 3.93 B tokens) take about 2.1 days on 8 x A100"),
        ({"stop_iters": "100"}, 100, "100 steps of 393,216 tokens (stop_iters, 39.3 M tokens) take about 30.8 minutes"),
        ({"epochs": "2"}, None, "How long the run takes is not known: the data of epochs 2 cannot be read here"),
        ({"train_iters": "1", "max_length": "16"}, 1, "1 step of 1,536 tokens (train_iters, 1,536 tokens) take"),
    ],
)
def test_the_last_line_says_whether_it_fits_and_how_long_it_takes(
    keys: dict, steps: int | None, words: str, capsys: pytest.CaptureFixture
) -> None:
    assert command("--config", "7b", "--gpus", "8", **keys) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("It fits: ")
    assert " of the 80 GiB of each A100 (assumed, not measured). " in last
    assert words in last
    assert command("--config", "7b", "--gpus", "8", "--json", **keys) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["steps"] == steps
    assert (figures["days"] is None) == (steps is None)


def test_epochs_are_as_long_as_the_data(make_mixture, tokenizer_path: Path, capsys: pytest.CaptureFixture) -> None:
    mixture = make_mixture({"few": make_records(50, 1)})
    keys = {"dataset_config": str(mixture), "tokenizer_path": str(tokenizer_path), "max_length": "64"}
    tokens = []
    for epochs in (4, 8):
        assert command("--config", "tiny", "--json", **keys, epochs=str(epochs)) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=0.1)
    run = load_run("tiny", {**keys, "epochs": "4"})
    assert tokens[0] / (4 * 64) == run.train.value.iters_for_epochs(open_mixture(run)[0].count_tokens(), 4 * 64)


def test_without_gpus_the_run_has_as_many_as_its_n_gpus(capsys: pytest.CaptureFixture) -> None:
    command("--config", "7b", "--json")
    assert json.loads(capsys.readouterr().out)["setup"]["gpus"] == 4


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture) -> None:
    assert command("--config", "7b", "--gpus", "1", "--gpu", "4090", engine="torch") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(
        "It does not fit: 125.9 of the 24 GiB of each 4090 (assumed, not measured). 10,000 steps"
    )
    ways = lines[lines.index("What would fit:") + 1 : -2]
    assert [way.split(",")[0] for way in ways] == [
        "  LoRA on a pretrained model",
        "  QLoRA on a pretrained model",
        "  as it is",
    ]
    for way in ways[:2]:  # each is what it says
        size = way.rpartition(": ")[2].removesuffix(" GiB")
        words = way.rpartition(": ")[0].split(",", 1)[1].split()
        keys = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2])}
        command("--config", "7b", "--gpus", "1", "--gpu", "4090", engine="torch", pretrained_model="x", **keys)
        assert f"It fits: {size} of the 24 GiB" in capsys.readouterr().out.splitlines()[-1]


def test_a_checkpoint_on_disk_is_as_large_as_its_optimizer_makes_it() -> None:
    """Beside the elements of what each rule of the engine saves."""
    import torch

    from fm9g.engine.optimizers import OptimizerConfig, ShardLayout, build_optimizers
    from fm9g.model.transformer import is_mup_scaled, weight_shapes

    shapes = weight_shapes(SMALL)
    weights = sum(shape.numel() for shape in shapes.values())
    for name in ("adamw", "adamw8bit", "adafactor", "muon"):
        matrices = frozenset(filter(is_mup_scaled, shapes))
        config = OptimizerConfig(dict.fromkeys(shapes, 1.0), (0.9, 0.95), 1e-6, 0.1, name, matrices, 0.95, 0.0)
        optimizers = build_optimizers(shapes, config, ShardLayout(shapes.__getitem__, lambda n, t: t, lambda n, t: t))
        count = weights
        for weight, shape in shapes.items():
            optimizers[weight].init_state(
                weight, lambda shape=shape, **kind: torch.zeros(kind.pop("shape", shape), **kind)
            )
            keys = [key for key in optimizers[weight].state[weight] if not key.endswith(".scales")]
            count += sum(optimizers[weight].export_state(weight, key).numel() for key in keys)
        assert checkpoint_bytes(SMALL, JobConfig(optimizer=name)) == pytest.approx(4 * count, rel=0.02), name
    lora = JobConfig(lora_layer=("project_q",), lora_r=4, optimizer="muon")
    adapters = 4 * 2 * 128 * 4  # layers, A and B of C columns and rows, rank
    assert checkpoint_bytes(SMALL, lora) == 8 * adapters
    assert checkpoint_bytes(SMALL, replace(lora, save_model_only=True, ema_decay=0.9)) == 8 * adapters
    assert "the state of muon" in format_table(estimate_job(SMALL, lora))


def test_what_optimizers_keep(tmp_path: Path) -> None:
    model = shipped("7b")
    kept = {
        (name, ema): peak_memory(model, JobConfig(optimizer=name, ema_decay=ema)).optimizer / count_weights(model)
        for name in ("adamw", "adamw8bit", "adafactor", "muon")
        for ema in (0.0, 0.99)
    }
    assert kept["adamw", 0.0] == 8
    assert kept["adamw8bit", 0.0] == pytest.approx(2.03, abs=0.01)
    assert kept["adafactor", 0.0] == 0
    assert 4 < kept["muon", 0.0] < 4.5
    assert all(kept[name, 0.99] - kept[name, 0.0] == pytest.approx(4) for name, _ in kept)
