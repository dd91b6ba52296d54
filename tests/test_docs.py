"""docs/finetuning.md, end to end: its commands with tiny models of the same shapes, few steps and short rows.

docs/from_*.md: their commands are understood. docs/guide.md: what it says of keys and versions.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import ROOT, WORDS, make_records, write_json, write_jsonl

from fm9g.cli import build_parser, main
from fm9g.cli.run import run_arguments
from fm9g.config.train import DEPRECATED_KEYS, TrainConfig
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.shorthand.load import load_run

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-7B-Instruct": (
        "Qwen2",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_window_layers": 2, "use_sliding_window": False},
    ),
    "Llama-3.1-8B-Instruct": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}
# What is smaller here; everything else is as it stands there.
SMALLER = (
    (r"--max_length 2048", "--max_length 64"),
    (r"--train_iters 300 --save_iters 100", "--train_iters 6 --save_iters 4"),
    (r"--warmup_iters 10", "--warmup_iters 1"),
    (r"--global_batch_size 16", "--global_batch_size 2"),
    (r"/300\b", "/6"),
    (r"/200\b", "/4"),
)


def make_folder(folder: Path, name: str) -> None:
    import transformers

    kind, changes = SHAPES[name]
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
    train_tokenizer((" ".join(WORDS) for _ in range(50)), 320, folder / name)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes)
    getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(folder / name)
    file = folder / name / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**settings, "chat_template": TEMPLATE}))


def commands(page: str) -> list[list[str]]:
    """The words of every command in the page's blocks."""
    blocks = re.findall(r"```shell\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    text = re.sub(r"(^| +)# .*", "", "".join(blocks).replace("\\\n", " "), flags=re.MULTILINE)
    for old, new in SMALLER:
        text = re.sub(old, new, text)
    return [shlex.split(line) for line in text.splitlines() if line]


@pytest.mark.parametrize("page", ["finetuning.md", pytest.param("finetuning.zh.md", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_commands_of_the_page_on_finetuning_work(
    tmp_path: Path, page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in SHAPES:
        make_folder(tmp_path, name)
    with (tmp_path / "chats.jsonl").open("w") as out:
        for record in make_records(60):
            turns = [("user", record["input"] or "go on"), ("assistant", record["output"])]
            out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    (tmp_path / "dataset_configs").mkdir()
    entry = {"task_name": "chats", "path": "../datasets/chats", "abs_weight": 1.0}
    (tmp_path / "dataset_configs" / "chats.json").write_text(json.dumps([entry]))
    output = ""
    for name, *words in commands(page):
        assert name == "fm9g"
        assert main(words) == 0, (words, capsys.readouterr().err)
        output += "".join(capsys.readouterr())
    made = (
        "my-model",
        "run.yaml",
        "qwen-chats",
        "llama-chats",
        "merged.pt",
        "merged.json",
        "both",
        "both-peft",
        "back",
    )
    for name in made:
        assert (tmp_path / name).exists(), name
    assert "Qwen2ForCausalLM" in output
    assert output.count("trained: ") == 5

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "Llama-3.1-8B-Instruct", dtype=torch.float32)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = base(ids).logits.clone()
        after = PeftModel.from_pretrained(base, tmp_path / "llama-chats")(ids).logits
    assert 0 < (before - after).abs().max() < 1


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages for people who come from other tools name."""
    folder = tmp_path_factory.mktemp("theirs")
    make_folder(folder, "Qwen2.5-7B-Instruct")
    for name in ("Qwen-7B-Chat", "ckpt"):
        (folder / name).symlink_to(folder / "Qwen2.5-7B-Instruct")
    assert main(["convert", str(folder / "ckpt"), str(folder / "9g_models" / "7b.pt")]) == 0
    for name in ("alpaca_zh", "chats", "train", "eval"):
        write_jsonl(folder / f"{name}.jsonl", make_records(20))
    (folder / "pretrain.txt").write_text("text\n" * 20)
    (folder / "dataset_configs").mkdir()
    write_json(folder / "dataset_configs" / "mine.json", [{"task_name": "mine", "path": "mine", "abs_weight": 1.0}])
    model = {"model_name_or_path": "ckpt", "learning_rate": 1e-4}
    write_json(folder / "qlora.json", {**model, "train_file": "train.jsonl", "lora_rank": 8, "max_seq_length": 64})
    llamafactory = {**model, "stage": "sft", "finetuning_type": "lora", "dataset": "chats.jsonl", "dataset_dir": "."}
    (folder / "llama3_lora_sft.yaml").write_text(json.dumps(llamafactory))
    return folder


@pytest.mark.parametrize("language", ["", ".zh"])
@pytest.mark.parametrize("page", ["from_llamafactory", "from_ms_swift", "from_9g_toolkit"])
def test_the_commands_for_people_from_other_tools_are_understood(
    theirs: Path, tmp_path: Path, page: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(theirs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = commands(f"{page}{language}.md")
    assert len(found) >= 3
    for program, *words in found:
        if program == "torchrun":  # tests/shorthand/test_finetune_tool.py runs it
            assert (ROOT / "tools" / "finetune.py").is_file()
            continue
        assert program == "fm9g"
        if words[0] != "train":
            assert main(words) == 0, words
            continue
        options, options.rest = build_parser().parse_known_args(words)
        assert load_run(run_arguments(options), complete=False, prepare_data=False).train.model, words


def parameters(page: str) -> dict[str, list[str]]:
    """The rows of the page's table of parameters: key -> the guide's value, the default, the remark."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {key: cells.split(" | ") for key, cells in rows}


@pytest.mark.parametrize(("page", "none", "empty"), [("guide.md", "none", "empty"), ("guide.zh.md", "无", "空")])
def test_the_pages_on_the_guide_give_the_defaults_of_keys(page: str, none: str, empty: str) -> None:
    for key, (_, default, remark) in parameters(page).items():
        if key in DEPRECATED_KEYS:
            assert (default, remark[:3]) in ((none, "no "), (none, "不起作")), key
        elif key not in ("config", "model_unique"):  # where the default is not a value
            value, text = getattr(TrainConfig(), key), default.strip("`")
            found = type(value)() if text == empty else text if isinstance(value, str) else json.loads(text)
            assert found == value, key


def test_the_pages_on_the_guide_list_each_of_its_parameters(shared: Path) -> None:
    guide = next((shared / "spec").glob("002*")).read_text(encoding="utf-8")
    typed: dict[str, list[str]] = {}
    for key, value in re.findall(r'^args\["(\w+)"\] *= *("[^"]*"|[\d.]+)', guide, re.MULTILINE):
        typed.setdefault(key, []).append(value)
    for page in ("guide.md", "guide.zh.md"):
        rows = parameters(page)
        assert rows.keys() == typed.keys()
        for key, (value, _, _) in rows.items():
            assert value.startswith(f"`{typed[key][0]}`") or key == "lora_layer", key


def test_the_pages_on_the_guide_name_the_versions_that_are_asked_for() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for page in ("guide.md", "guide.zh.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for name in ("torch", "transformers"):
            found = re.search(rf"^\| {name} [\d.]+ \| \*\*([\d.]+)", text, re.MULTILINE)
            assert found
            assert f'"{name}>={found[1]}"' in pyproject
