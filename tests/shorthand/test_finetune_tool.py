"""tools/finetune.py, called as the templates of finetuning jobs call their script."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.common import ROOT, make_records, write_jsonl

SCRIPT = ROOT / "tools" / "finetune.py"


@pytest.fixture
def arguments(tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the template passes, with small numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "train.jsonl", make_records(12))
    text = f"""--model_name_or_path {hf_folder} --data_path train.jsonl --bf16 True --output_dir out
        --num_train_epochs 1
        --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --gradient_accumulation_steps 2
        --evaluation_strategy no --save_strategy steps --save_steps 1000 --save_total_limit 10 --learning_rate 1e-4
        --weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1
        --report_to none --model_max_length 64 --gradient_checkpointing True --lazy_preprocess True
        --use_lora True --q_lora False --deepspeed ds_config_zero2.json"""
    return text.split()


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The exit status of the script."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_a_success_is_status_0_and_a_mistake_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 0
    assert "checkpoint: out/checkpoints/qwen-lora/3" in capsys.readouterr().out
    assert run(monkeypatch, *arguments, "--learning_rat", "1") == 2
    assert capsys.readouterr().err.rstrip().endswith("did you mean 'learning_rate'?")
    arguments[arguments.index("train.jsonl")] = "gone.jsonl"
    assert run(monkeypatch, *arguments) == 2
    assert "gone.jsonl: no such file" in capsys.readouterr().err.splitlines()[-1]


def test_one_json_has_all_arguments(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "model_name_or_path": arguments[1],
        "train_file": "train.jsonl",
        "output_dir": "json",
        "max_seq_length": 64,
        "lora_rank": 4,
        "train_mode": "lora",
        "pre_device_train_batch_size": 6,
        "num_train_epochs": 1,
    }
    (tmp_path / "qlora.json").write_text(json.dumps(content))
    assert run(monkeypatch, "--train_args_file", "qlora.json") == 0
    assert "checkpoint: json/checkpoints/qwen-lora/2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_of_the_template_under_torchrun(arguments: list[str], processes: int) -> None:
    launcher = f"-m torch.distributed.run --nproc_per_node {processes} --nnodes 1 --node_rank 0 --master_addr localhost"
    command = [sys.executable, *launcher.split(), "--master_port", "19090", str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint: out/checkpoints/qwen-lora/{-(-12 // (4 * processes))}" in done.stdout
