"""Model cards: their statements are true, unknown facts are left out, and their code runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.common import make_records, small_model

from fm9g.config.adapter import AdapterConfig
from fm9g.config.run import load_run
from fm9g.convert.adapters import read_adapter
from fm9g.convert.hf_export import export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.convert.merge import merge
from fm9g.convert.peft import write_peft
from fm9g.io.pt_file import write_weights
from fm9g.lora.adapter_file import Adapter, combine, save_adapter
from fm9g.model.transformer import FM9G
from fm9g.train.runner import run_training

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def qwen(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A tiny Qwen2 as a hub has it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=2,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "tiny-qwen"
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_path.iterdir():
        shutil.copy(file, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "_name_or_path": "Qwen/Tiny"}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- zh\n---\n# Tiny\n")
    return folder


@pytest.fixture
def train(make_mixture: Callable[..., Path], tmp_path: Path, tokenizer_path: Path) -> Callable[..., Path]:
    """train(model, key=value, ...): the checkpoint of two steps on a few pairs."""
    mixture = make_mixture({"few": make_records(50, 1)})

    def run(model: Path, **changes: object) -> Path:
        settings: dict[str, object] = {
            "dataset_config": mixture,
            "tokenizer_path": tokenizer_path,
            "output_dir": tmp_path,
            "train_iters": 2,
            "max_length": 64,
            "dataloader_num_workers": 0,
            "report_to": "none",
            "peak_tflops": 1,
            "device": "cpu",
        }
        given = {key: str(value) for key, value in {**settings, **changes}.items()}
        checkpoint = run_training(load_run(str(model), given)).checkpoint
        assert checkpoint is not None
        return checkpoint

    return run


def parts(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the text of a card, as the hub's own reader takes it."""
    from huggingface_hub import ModelCard

    content = (folder / "README.md").read_text(encoding="utf-8")
    head, _, text = content.removeprefix("---\n").partition("---\n")
    card = ModelCard(content)
    assert card.data.to_dict() == yaml.safe_load(head)
    assert card.data.pipeline_tag == "text-generation"
    return yaml.safe_load(head), text


def execute(text: str, monkeypatch: pytest.MonkeyPatch, where: Path, capsys: pytest.CaptureFixture) -> str:
    """What the Python code of a card prints."""
    monkeypatch.chdir(where)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out


def test_a_merged_qwen_says_its_base_and_its_adapter(
    qwen: Path,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    import_folder(qwen, tmp_path / "qwen.pt")
    lora = {"lora_layer": "project_q,w_out", "lora_r": 3, "lora_alpha": 6, "quantization": "nf4"}
    checkpoint = train(
        tmp_path / "qwen.json", pretrained_model=qwen, chat_template="tokenizer", tokenizer_path=qwen, **lora
    )
    adapter = read_adapter(checkpoint)
    merge(qwen, adapter, tmp_path / "merged model")
    head, text = parts(tmp_path / "merged model")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Tiny",
        "license": "apache-2.0",
        "tags": ["causal-lm"],
    }
    assert "9G" not in text
    assert "It is tiny-qwen with a LoRA adapter (rank 3, alpha 6) merged into its weights." in text
    for row in (
        "| base model | Qwen/Tiny |",
        f"| SHA-256 of the base's weights | {adapter.config.base_sha256} |",
        "| method | LoRA on a base quantized to nf4 (QLoRA) |",
        "| rank | 3 |",
        "| alpha | 6 |",
        "| layers | project_q, w_out |",
        "| step | 2 |",
        "| chat template | the tokenizer's own |",
    ):
        assert row in text, row
    assert re.search(r"\| few \| [\d,]+ \| 100.00% \| tokenizer \| 50 \|", text)
    assert str(tmp_path) not in text
    assert "vllm serve 'merged model'" in text
    assert "apply_chat_template" in text
    assert execute(text, monkeypatch, tmp_path, capsys)

    # The same base as a .pt file has no name on a hub, and no licence.
    merge(tmp_path / "qwen.pt", adapter, tmp_path / "from_file")
    head, text = parts(tmp_path / "from_file")
    assert "base_model" not in head
    assert "license" not in head
    assert "| base model | qwen.pt |" in text

    # An adapter whose run is not known, on the same base.
    save_adapter(combine([adapter, adapter], [0.5, 0.25]), tmp_path / "sum")
    merge(qwen, read_adapter(tmp_path / "sum"), tmp_path / "summed")
    text = parts(tmp_path / "summed")[1]
    assert "| weighted sum of | 2 adapters |" in text
    assert "| method | LoRA |" in text
    assert "## Training" not in text


def test_an_adapter_of_pefts_has_a_card_like_on_pefts_pages(
    qwen: Path,
    train: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    import_folder(qwen, tmp_path / "qwen.pt")
    keys = {"lora_layer": "project_q,w_out", "lora_r": 3, "lora_alpha": 6, "init_lora_weights": "pissa"}
    start = {"pretrained_model": tmp_path / "qwen.pt", "chat_template": "tokenizer", "tokenizer_path": qwen}
    adapter = read_adapter(train(tmp_path / "qwen.json", **start, **keys))
    write_peft(adapter, tmp_path / "p", str(qwen))
    head, text = parts(tmp_path / "p")
    assert head == {
        "base_model": "Qwen/Tiny",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["lora", "transformers"],
    }
    for row in (
        "| method | LoRA, started as PiSSA |",
        "| rank | 3 (6 in the file) |",
        "| alpha | 6 (12 in the file) |",
        "| layers | down_proj, q_proj |",
        "| step | 2 |",
    ):
        assert row in text, row
    assert "apply_chat_template" in text
    assert execute(text, monkeypatch, tmp_path, capsys)

    write_peft(adapter, tmp_path / "hub", "Qwen/Qwen2.5-7B")
    head, text = parts(tmp_path / "hub")
    assert head["base_model"] == "Qwen/Qwen2.5-7B"
    assert 'base = "Qwen/Qwen2.5-7B"' in text
    # A path that a run recorded is no name on a hub, though it may look like one.
    bare = Adapter(AdapterConfig(r=3, alpha=6.0, layers=["w_out"], base="a/b", base_sha256="0" * 64), {}, tmp_path)
    layer = "encoder.layers.0.ffn.ffn.w_out"
    weights = {name: weight for name, weight in adapter.weights.items() if name.startswith(layer)}
    weights = {name: weight[:3] if name.endswith("A") else weight[:, :3] for name, weight in weights.items()}
    write_peft(Adapter(bare.config, weights, tmp_path), tmp_path / "bare")
    head, text = parts(tmp_path / "bare")
    assert "base_model" not in head
    assert 'base = "..."' in text
    assert "## Training" not in text
    assert "apply_chat_template" not in text


def test_a_model_trained_from_scratch_is_a_9g_one_and_so_is_what_is_trained_from_it(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "nine.json").write_text(json.dumps(small_model().to_json()))
    first = train(tmp_path / "nine.json", stop_iters=1)
    export_folder(first, tmp_path / "first")
    resumed = train(tmp_path / "nine.json", resume_ckpt="auto")
    export_folder(resumed, tmp_path / "resumed")
    for name in ("first", "resumed"):
        head, text = parts(tmp_path / name)
        assert head["tags"] == ["fm9g", "causal-lm"]
        assert "A 9G language model, exported by fm9g. It was trained from scratch." in text
        assert "| method | training from scratch |" in text
    assert "apply_chat_template" not in text
    assert execute(text, monkeypatch, tmp_path, capsys)

    tuned = train(tmp_path / "nine.json", model_unique="tuned", pretrained_model=resumed, stop_iters=1)
    tuned = train(tmp_path / "nine.json", model_unique="tuned", resume_ckpt=1)  # which names its base no more
    export_folder(tuned, tmp_path / "tuned")
    head, text = parts(tmp_path / "tuned")
    assert head["tags"] == ["fm9g", "causal-lm"]
    assert "It was finetuned from checkpoint 2 of nine." in text
    assert "| method | full finetuning |" in text

    # A published 9G folder, which says so itself.
    shutil.copytree(tmp_path / "first", tmp_path / "published")
    described = json.loads((tmp_path / "published" / "config.json").read_text())
    (tmp_path / "published" / "config.json").write_text(json.dumps({**described, "model_type": "fm9g"}))
    export_folder(
        train(tmp_path / "nine.json", model_unique="of", pretrained_model=tmp_path / "published"), tmp_path / "of"
    )
    head, text = parts(tmp_path / "of")
    assert head["tags"] == ["fm9g", "causal-lm"]
    assert "A 9G language model, exported by fm9g. It was finetuned from published." in text


def test_a_finetuned_import_and_a_bare_file_are_not_called_9g(
    qwen: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    import_folder(qwen, tmp_path / "qwen.pt")
    checkpoint = train(tmp_path / "qwen.json", pretrained_model=qwen)
    export_folder(checkpoint, tmp_path / "tuned", reference=qwen)
    head, text = parts(tmp_path / "tuned")
    assert head["base_model"] == "Qwen/Tiny"
    assert head["license"] == "apache-2.0"
    assert "It was finetuned from tiny-qwen." in text
    scratch = train(tmp_path / "qwen.json", model_unique="new")  # Qwen2's arithmetic
    export_folder(scratch, tmp_path / "new")
    model = FM9G(small_model())
    write_weights(tmp_path / "m.pt", weights := dict(model.named_parameters()), weights.items())
    (tmp_path / "m.json").write_text(json.dumps(small_model().to_json()))
    export_folder(tmp_path / "m.pt", tmp_path / "bare")
    for name in ("tuned", "new", "bare"):
        head, text = parts(tmp_path / name)
        assert head["tags"] == ["causal-lm"], name
        assert "9G" not in text
    assert "The folder holds no tokenizer." in text
    assert "scratch" not in text
