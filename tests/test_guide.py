"""The guide's chapter on full finetuning, word for word, with a tiny model on real records."""

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
from support import ROOT, small_model

from fm9g.checkpoint.folder import Checkpoint, steps_in
from fm9g.checkpoint.weights import read_weights, write_weights
from fm9g.convert.hf import export_folder
from fm9g.model.transformer import FM9G
from fm9g.report.files import read_metrics

Run = Callable[..., subprocess.CompletedProcess]
SCRIPT = """# script_cpmc.py
def transform(data, num_sample: int, r):
    return {"input": data.get("input", ""), "output": data.get("output", "")}
"""


@pytest.fixture
def folder(tmp_path: Path, shared: Path) -> Path:
    """/FM9G4770B/apps/fm9g_7b with a tiny "7b": what a user has who followed the chapters before."""
    top = tmp_path / "FM9G4770B"
    shutil.copytree(ROOT / "apps", top / "apps", symlinks=True)
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
    (apps / "dataset_configs").mkdir()
    (apps / "dataset_configs" / "script_cpmc.py").write_text(SCRIPT)
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

    def run(command: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.mark.slow  # five commands, two of which start two processes each
def test_full_finetuning_and_its_resume(folder: Path, bash: Run, shared: Path) -> None:
    guide = next((shared / "spec").glob("002*")).read_text(encoding="utf-8")
    tools = ROOT / "tools"
    bash(
        f"python {tools}/convert_json2index.py --path ../../data_test/converted_data/alpaca/alpaca_zh.jsonl"
        " --language zh --output ../../data_test/indexed_data/data_ralpaca_zh"
    )
    bash(f"python {tools}/hgface_2_bmtrain.py")
    (folder / "model_configs").mkdir()
    shutil.copy(folder / "9g_models" / "7b.json", folder / "model_configs" / "7b.json")

    # The table of parameters as the guide types it, but for the sizes of this test: shorter rows, fewer steps.
    table = guide[guide.index("## 参数详细介绍") :]
    typed = table[table.index("``` python\n") + 11 : table.index("\n```\n")]
    for key, value in (("max_length", "256"), ("train_iters", "8"), ("save_iters", "5")):
        typed, count = re.subn(rf'(args\["{key}"\]=)"\d+"', rf'\1"{value}"', typed)
        assert count == 1
    script = folder / "run_bmtrain.sh"
    text = script.read_text()
    script.unlink()  # a link to what all sizes share

    def write(*chapter: str) -> None:
        lines = "\n".join([typed, *chapter])
        new = text.replace("# Keys of the run may", f"{lines}\n# Keys of the run may").replace(
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
    assert "2 processes" in done.stdout
    assert "dataloader changes nothing: indexed datasets are the only kind" in done.stdout
    checkpoints = folder / "data" / "checkpoints" / "7b"
    assert steps_in(checkpoints) == [5, 8]
    whole = Checkpoint(checkpoints / "8")
    expected = {name: tensor.clone() for name, tensor in whole.weights().items()}
    lines = read_metrics(folder / "data" / "logs" / "7b" / "metrics.jsonl")
    assert lines[-1]["Loss/train/ralpaca_zh"] < lines[0]["Loss/train/ralpaca_zh"]
    start = read_weights(folder / "9g_models" / "7b.pt")
    assert start.keys() == expected.keys()

    shutil.rmtree(checkpoints / "8")
    write(blocks[1])
    assert "resuming from data/checkpoints/7b/5" in bash("bash run_bmtrain.sh").stdout
    again = Checkpoint(checkpoints / "8").weights()
    assert all(torch.equal(again[name], expected[name]) for name in expected)

    # The chapter after it: to a Hugging Face folder.
    bash(
        f"python {tools}/bmtrain_2_hgface.py --huggingface-ref-dir ./ckpt --bmtrain-ckpt-path"
        " data/checkpoints/7b/8/fm9g_live_checkpoint-8.pt --huggingface-save-dir 9g_models/hf-8"
    )
    assert json.loads((folder / "9g_models" / "hf-8" / "config.json").read_text())["model_type"] == "qwen2"
