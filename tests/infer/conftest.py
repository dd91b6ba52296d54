"""A small base model, two adapters on it, and how transformers answers with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers.common import small_model, write_json

import fm9g
from fm9g.convert.adapters import read_adapter
from fm9g.convert.peft import write_peft
from fm9g.data.encode.tokenizer_training import train_tokenizer

PROMPTS = ("the quick", "seven wizards", "学习 lazy dogs", "over", "brown fox jumps while")


@dataclass(frozen=True)
class Trained:
    """Paths. adapters: name -> checkpoint; peft: name -> the same in PEFT's layout."""

    base: Path
    folder: Path
    adapters: dict[str, Path]
    peft: dict[str, Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs of a few steps at a high rate, so that base and adapters answer differently."""
    root = tmp_path_factory.mktemp("trained")
    texts = [{"input": f"say {word}", "output": f"{word} {word[::-1]}"} for word in ("fox", "dog", "三", "mix")] * 4
    (root / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in texts), encoding="utf-8")
    train_tokenizer([json.dumps(record, ensure_ascii=False) for record in texts], 320, root / "tokenizer")
    write_json(root / "tiny.json", small_model(hidden_size=64, intermediate_size=128).to_json())
    common = {
        "data": str(root / "data.jsonl"),
        "data_cache_dir": str(root / "cache"),
        "tokenizer_path": str(root / "tokenizer"),
        "chat_template": "chatml",
        "batch_size": 2,
        "max_length": 64,
        "lr": 0.02,
        "warmup_iters": 0,
    }
    base = fm9g.train_model(model=str(root / "tiny.json"), train_iters=12, output_dir=str(root / "base"), **common)
    assert base.checkpoint
    adapters = {}
    for name, rate in (("first", 0.05), ("second", 0.2)):
        settings = common | {"lr": rate, "output_dir": str(root / name), "chat_template": "chatml"}
        run = fm9g.train_model(model=str(base.checkpoint), method="lora", train_iters=6, lora_r=4, **settings)
        assert run.checkpoint
        adapters[name] = run.checkpoint
    folder = fm9g.convert_model(base.checkpoint, root / "hf")
    peft = {}
    for name, checkpoint in adapters.items():
        peft[name] = root / f"peft-{name}"
        write_peft(read_adapter(checkpoint), peft[name], str(folder))
    return Trained(base.checkpoint, folder, adapters, peft)


def transformers_answer(folder: Path, prompt: str, peft: Path | None = None, **loading: object) -> list[int]:
    """The greedy tokens of transformers, and PEFT if there is an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, **loading)
    if peft:
        model = PeftModel.from_pretrained(model, str(peft))
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]])
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    return found[0, ids.shape[1] :].tolist()
