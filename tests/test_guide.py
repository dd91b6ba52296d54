"""The guide's chapters on converting, full finetuning and LoRA, word for word, with a tiny model on real records."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers.common import ROOT, small_model
from helpers.engine_harness import needs_bmtrain
from safetensors.torch import load_file

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.steps import list_steps
from fm9g.convert.hf_export import export_folder
from fm9g.io.pt_file import read_weights, write_weights
from fm9g.lora.adapter_file import open_adapter
from fm9g.model.transformer import FM9G
from fm9g.run_files import read_metrics

Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def folder(tmp_path: Path, shared: Path) -> Path:
    """/FM9G4770B/apps/fm9g_7b with a tiny "7b": what a user has who followed the chapters before."""
    top = tmp_path / "FM9G4770B"
    ignored = shutil.ignore_patterns("data", "ckpt", "9g_models")
    for name in ("apps", "tools", "train_configs", "model_configs", "dataset_configs"):
        shutil.copytree(ROOT / name, top / name, symlinks=True, ignore=ignored)
    apps = top / "apps" / "fm9g_7b"
    config = small_model(vocab_size=2500, qkv_bias=True, max_length=512)
    model = FM9G(config)
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed=1)
    write_weights(tmp_path / "m.pt", weights := dict(model.named_parameters()), weights.items())
    (tmp_path / "m.json").write_text(json.dumps(config.to_json()))
    export_folder(tmp_path / "m.pt", apps / "ckpt")
    (apps / "tokenizer").mkdir()
    records = json.loads((shared / "data" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))[:400]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([record["output"] for record in records]),
        model_prefix=str(apps / "tokenizer" / "tokenizer"),
        vocab_size=config.vocab_size,
        character_coverage=0.98,
        byte_fallback=True,
        minloglevel=2,
    )
    raw = top / "data_test" / "converted_data" / "alpaca"
    raw.mkdir(parents=True)
    with (raw / "alpaca_zh.jsonl").open("w", encoding="utf-8") as out:
        for record in records:
            line = {"input": record["instruction"] + record["input"], "output": record["output"]}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    entry = {
        "dataset_name": "ralpaca_zh",
        "task_name": "ralpaca_zh",
        "abs_weight": 0.5,
        "path": str(top / "data_test" / "indexed_data" / "data_ralpaca_zh"),
        "transforms": "./script_cpmc.py",
        "allow_repeat": True,
        "nlines": 400,
        "ave_tokens_per_line": 204,
        "total_tokens": 0.001,
    }
    (apps / "dataset_configs" / "data_test.json").write_text(json.dumps([entry]))
    return apps


@pytest.fixture
def bash(folder: Path) -> Run:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(command: str, **variables: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


def prepare(folder: Path, bash: Run) -> None:
    """The chapters on data and on converting the model, which come first."""
    bash("bash data_preprocess.sh")
    bash("python hgface_2_bmtrain.py")
    shutil.copy(folder / "9g_models" / "7b.json", folder / "model_configs" / "7b.json")


def test_the_chapter_on_data_as_typed(folder: Path, bash: Run, shared: Path) -> None:
    """Text to jsonl, and the medical example: the guide's own script and ours write the same records."""
    (folder / "pretrain.txt").write_text("中国的首都是北京。\n\n  two \n", encoding="utf-8")
    bash("cat pretrain.txt | python convert_txt2jsonl.py > pretrain.jsonl")
    lines = (folder / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"input": "", "output": "中国的首都是北京。"},
        {"input": "", "output": "two"},
    ]
    questions = ["根据以下症状判断中医证型", "What is it?", "甲 is b", "甲乙丙丁 ab"]
    samples = [
        {"Question": f"{text} {i}", "Complex_CoT": "…", "Response": f"答{i}"} for i, text in enumerate(questions * 15)
    ]
    raw = folder / "../../data_test/raw_data/medical_o1_sft_Chinese.json"
    raw.parent.mkdir()
    raw.write_text(json.dumps(samples, ensure_ascii=False), encoding="utf-8")
    stdout = bash("python prepare_data.py").stdout
    guide = next((shared / "spec").glob("002*")).read_text(encoding="utf-8")
    chapter = guide[guide.index("./prepare_data.py") :]
    typed = chapter[chapter.index("```python\n") + 10 : chapter.index("\n```\n")]
    (folder / "guides.py").write_text(
        typed.replace("/FM9G4770B/data_test/converted_data/medical", "theirs").replace(
            "/FM9G4770B", str(folder.parents[1])
        )
    )
    bash("python guides.py")
    for name in ("train", "test"):
        actual, reference = (
            [json.loads(line) for line in (folder / place / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
            for place in ("../../data_test/converted_data/medical", "theirs")
        )
        assert actual == reference
        assert f"{name}.jsonl: {len(actual)} of " in stdout


@pytest.mark.slow  # five commands, two of which start two processes each
def test_full_finetuning_and_its_resume(folder: Path, bash: Run, shared: Path) -> None:
    guide = next((shared / "spec").glob("002*")).read_text(encoding="utf-8")
    prepare(folder, bash)
    # What a user sets in train_configs/ wins over the table of parameters, which stays as the guide types it.
    settings = {"n_gpus": 2, "batch_size": 1, "max_length": 256, "train_iters": 8, "save_iters": 5}
    (folder / "train_configs" / "7b.json").write_text(json.dumps({"pretrain": settings}))
    table = guide[guide.index("## 参数详细介绍") :]
    typed = table[table.index("``` python\n") + 11 : table.index("\n```\n")]
    script = folder / "run_bmtrain.sh"
    text = script.read_text()
    script.unlink()  # a link to what all sizes share

    def write(*chapter: str) -> None:
        lines = "\n".join([typed, *chapter])
        new = text.replace("\n# All sizes share", f"\n{lines}\n# All sizes share").replace(
            "GPUS_PER_NODE=${GPUS_PER_NODE:-} ", 'GPUS_PER_NODE=${args["n_gpus"]} '
        )
        assert new.count(typed) == 1
        script.write_text(new)

    chapter = guide[guide.index("## 全量微调") :]
    blocks = re.findall(r"```python\n(.*?)```", chapter, re.DOTALL)[:2]
    assert 'args["pretrained_model"]="./9g_models/7b.pt"' in blocks[0]
    assert 'args["resume_ckpt"]="5"' in blocks[1]

    write(blocks[0])
    done = bash("bash run_bmtrain.sh")
    assert "2 processes" in done.stderr
    assert "dataloader changes nothing: indexed datasets are the only kind" in done.stderr
    assert "train_configs/7b.json overrides the launch script" in done.stderr
    assert "train_iters is 8, not '10000'" in done.stderr
    checkpoints = folder / "data" / "checkpoints" / "7b"
    assert list_steps(checkpoints) == [5, 8]
    full = Checkpoint(checkpoints / "8")
    expected = {name: tensor.clone() for name, tensor in full.weights().items()}
    lines = read_metrics(folder / "data" / "logs" / "7b" / "metrics.jsonl")
    losses = [line["Loss/train/ralpaca_zh"] for line in lines]
    assert sum(losses[4:]) < sum(losses[:4])  # one step's loss is that of its records more than of the model
    start = read_weights(folder / "9g_models" / "7b.pt")
    assert start.keys() == expected.keys()

    shutil.rmtree(checkpoints / "8")
    write(blocks[1])
    assert "resuming from data/checkpoints/7b/5" in bash("bash run_bmtrain.sh").stderr
    again = Checkpoint(checkpoints / "8").weights()
    assert all(torch.equal(again[name], expected[name]) for name in expected)

    # The chapter after it: to a Hugging Face folder.
    bash(
        "python bmtrain_2_hgface.py --huggingface-ref-dir ./ckpt --bmtrain-ckpt-path"
        " data/checkpoints/7b/8/fm9g_live_checkpoint-8.pt --huggingface-save-dir 9g_models/hf-8"
    )
    assert json.loads((folder / "9g_models" / "hf-8" / "config.json").read_text())["model_type"] == "qwen2"


# What `import sitecustomize` does in each process of a run by bmtrain: there is no GPU here.
STAND_IN = """import sys
if "train" in sys.argv or any("fm9g" in word for word in sys.orig_argv):
    from tools import bmtrain_over_gloo
    bmtrain_over_gloo.install()
    import fm9g.train.runner
    from fm9g.engine.dist_context import DistContext
    def init_distributed(run, rank_info, watchdog):
        store = watchdog.create_torch_store() if rank_info.world_size > 1 else None
        ranks = rank_info.rank, rank_info.world_size, rank_info.local_rank, rank_info.local_world_size
        return DistContext("cpu", *ranks, store, False)
    fm9g.train.runner._init_distributed = init_distributed
"""


@pytest.mark.slow  # two programs that import transformers
def test_the_guides_own_script_and_ours_convert_to_the_same_file(folder: Path, bash: Run, shared: Path) -> None:
    """Its script is the block of its chapter, as it stands there."""
    guide = next((shared / "spec").glob("002*")).read_text(encoding="utf-8")
    chapter = guide[guide.index("## 模型转换") :]
    (folder / "guides.py").write_text(chapter[chapter.index("``` python\n") + 11 : chapter.index("\n```\n")])
    bash("python hgface_2_bmtrain.py")
    (folder / "9g_models" / "7b.pt").rename(folder / "ours.pt")
    bash("python guides.py")
    actual, reference = read_weights(folder / "ours.pt"), read_weights(folder / "9g_models" / "7b.pt")
    assert actual.keys() == reference.keys()
    assert all(torch.equal(weight.bfloat16(), reference[name]) for name, weight in actual.items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("engine", ["torch", pytest.param("bmtrain", marks=needs_bmtrain)])
def test_lora_finetuning_its_resume_and_its_merge(
    folder: Path, bash: Run, shared: Path, tmp_path: Path, engine: str, processes: int
) -> None:
    guide = next((shared / "spec").glob("002*")).read_text(encoding="utf-8")
    prepare(folder, bash)
    shutil.copy(folder / "tokenizer" / "tokenizer.model", folder / "ckpt")
    # 1. its file of train_configs/, in which a user changes the sizes to those of this test
    settings = json.loads((ROOT / "train_configs" / "7b_lora.json").read_text())
    settings["pretrain"] |= {
        "n_gpus": processes,
        "engine": engine,
        "global_batch_size": 2,
        "max_length": 256,
        "train_iters": 10,
        "save_iters": 5,
        "warmup_iters": 2,
        "lr": 0.005,
    }
    (folder / "train_configs" / "7b_lora.json").write_text(json.dumps(settings))
    # 2. its script, with the chapter's block of parameters as typed
    chapter = guide[guide.index("### lora 新增参数详细介绍") :]
    typed = chapter[chapter.index("``` python\n") + 11 : chapter.index("\n```\n")]
    script = folder / "run_bmtrain_lora.sh"
    text = script.read_text()
    script.unlink()  # a link to what all sizes share

    def write(block: str) -> None:
        script.write_text(text.replace("\n# All sizes share", f"\n{block}\n# All sizes share"))

    variables = {}
    if engine == "bmtrain":
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(STAND_IN)
        variables["PYTHONPATH"] = f"{tmp_path / 'site'}:{ROOT}"
    write(typed)
    done = bash("bash run_bmtrain_lora.sh", **variables)
    assert "trained: 12,800 of 188,448" in done.stderr
    assert ("2 processes" in done.stderr) == (processes == 2)
    checkpoints = folder / "data" / "checkpoints" / "7b_lora"
    assert list_steps(checkpoints) == [5, 10]
    expected = (checkpoints / "10" / "fm9g_live_checkpoint-10.pt").read_bytes()
    lines = read_metrics(folder / "data" / "logs" / "7b_lora" / "metrics.jsonl")
    losses = [line["Loss/train"] for line in lines]
    assert sum(losses[5:]) < sum(losses[:5])

    # What the guide cannot: its resumption is that of full finetuning.
    shutil.rmtree(checkpoints / "10")
    write(typed.replace('args["resume_ckpt"]=""', 'args["resume_ckpt"]="5"'))
    assert "resuming from data/checkpoints/7b_lora/5" in bash("bash run_bmtrain_lora.sh", **variables).stderr
    assert (checkpoints / "10" / "fm9g_live_checkpoint-10.pt").read_bytes() == expected

    # 3. the chapter after it, whose block is a script of bash
    chapter = guide[guide.index("### lora模型格式转换") :]
    block = chapter[chapter.index("```shell\n") + 9 : chapter.rindex("```")]
    for old, new in (
        ("/FM9G4770B/apps/fm9g_7b/data/checkpoints/7b_lora/5/", "/FM9G4770B/apps/fm9g_7b/data/checkpoints/7b_lora/10/"),
        ("/FM9G4770B", str(tmp_path / "FM9G4770B")),
    ):
        assert old in block
        block = block.replace(old, new)
    stdout = bash(block.lstrip()).stdout
    assert "Qwen2ForCausalLM, with 12 layers of" in stdout
    merged = load_file(folder / "9g_models" / "hf-lora-10" / "model.safetensors")
    layer = "encoder.layers.1.ffn.ffn.w_out"
    adapter = open_adapter(checkpoints / "10")
    weight = read_weights(folder / "9g_models" / "7b.pt")[f"{layer}.weight"]
    assert torch.equal(merged["model.layers.1.mlp.down_proj.weight"], adapter.apply(layer, weight))
    assert not torch.equal(merged["model.layers.1.mlp.down_proj.weight"], weight)
