"""Models of other layouts become folders for vLLM once, and again when they change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.common import small_model
from helpers.random_adapters import make_adapter, make_model

from fm9g.io.pt_file import write_weights
from fm9g.lora.adapter_file import save_adapter
from fm9g.serve.export_cache import hf_folder_of, peft_folder_of


def test_what_is_a_folder_already_stays_and_others_are_exported_once(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fm9g")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source"
    shutil.copytree(tokenizer_path, source)
    torch.manual_seed(0)
    weights = make_model().state_dict()
    write_weights(source / "m.pt", weights, weights.items())
    (source / "m.json").write_text(json.dumps(small_model().to_json()))
    folder = hf_folder_of(source / "m.pt")
    assert (folder / "model.safetensors").is_file()
    assert (folder / "tokenizer.json").is_file()
    assert folder.is_relative_to(tmp_path / "cache")
    assert hf_folder_of(folder) == folder
    before = caplog.text.count("exporting it")
    assert hf_folder_of(source / "m.pt") == folder
    assert caplog.text.count("exporting it") == before
    os.utime(source / "m.pt", ns=(1, 1))
    assert hf_folder_of(source / "m.pt") != folder

    save_adapter(make_adapter(make_model()), tmp_path / "adapter")
    peft = peft_folder_of(tmp_path / "adapter")
    assert "peft_type" in json.loads((peft / "adapter_config.json").read_text())
    assert peft_folder_of(peft) == peft
