"""Code in weight files is refused by its name, and never run."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import small_model
from helpers.weight_files import refused

from fm9g.cli import main

GIB, SOME = 1 << 30, torch.arange(1000.0)


class Runs:
    """Makes a file when it is unpickled by something that runs it."""

    def __init__(self, function: Callable = os.mkdir, *arguments: Any) -> None:
        self.reduced = function, arguments or ("ran",)

    def __reduce__(self) -> tuple:
        return self.reduced


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"a": Runs()}, "posix.mkdir"),
        ({"a": torch.ones(2), "b": Runs(eval, "1")}, "__builtin__.eval"),
        (Runs(), "posix.mkdir"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": torch.ones(2).numpy()}, r"numpy\._?core\.multiarray\._reconstruct"),
    ],
    ids=["a function", "a built-in one", "alone", "a module of torch", "an array"],
)
def test_code_is_refused_by_its_name(content: Any, name: str, old: bool) -> None:
    torch.save(content, "a.pt", _use_new_zipfile_serialization=not old)
    message = refused("a.pt")
    assert re.match(rf"a\.pt: refused: it contains code \({name}\), which is never run", message), message


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_a_pickle_of_any_protocol_is_found(protocol: int) -> None:
    content = {"mkdir": 1, "b": [Runs(), Runs(os.rmdir)]}
    Path("a.bin").write_bytes(pickle.dumps(content, protocol))
    assert "refused: it contains code (posix.mkdir)" in refused("a.bin")


def test_a_name_that_a_pickle_repeats_from_before_is_found() -> None:
    """STACK_GLOBAL takes two texts, which may be copies of earlier ones."""
    Path("a.bin").write_bytes(b"\x80\x04\x8c\x05posix\x94\x8c\x05mkdir\x94\x8c\x01x\x94h\x00h\x01\x93.")
    assert "(posix.mkdir)" in refused("a.bin")


def test_a_program_of_torch_is_refused(recwarn: pytest.WarningsRecorder) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save("a.pt")
    recwarn.clear()
    assert "refused: it contains code (__torch__.torch.nn.modules.linear.Linear)" in refused("a.pt")
    assert not recwarn


@pytest.mark.parametrize(
    "content", [b"cat,1\nfoo,2\n", b"colour of\nthe sky\n.", b"{}", b"PK", b"\x80\x02.", bytes(99)]
)
def test_what_is_no_pickle_is_not_called_code(content: bytes) -> None:
    Path("a.pt").write_bytes(content)
    assert refused("a.pt") == "a.pt: not a complete weight file (torch finds no tensors in it); get or write it again"


@pytest.mark.parametrize(
    "words",
    [
        "convert e.pt out --reference hf",
        "convert hf m.pt",
        "generate hf --prompt x",
        "ckpt show e.pt",
        "ckpt diff e.pt e.pt",
        "lora show e.pt",
        "lora import peft out",
        "lora merge e.pt e.pt out",
    ],
)
def test_every_verb_refuses_code_in_the_same_words(words: str, capsys: pytest.CaptureFixture) -> None:
    torch.save({"a": Runs()}, "e.pt")
    Path("e.json").write_text(json.dumps(small_model().to_json()))
    Path("hf").mkdir()
    Path("peft").mkdir()
    torch.save({"a": Runs()}, "hf/pytorch_model.bin")
    torch.save({"a": Runs()}, "peft/adapter_model.bin")
    Path("peft/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    hf = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    Path("hf/config.json").write_text(json.dumps({**hf, "num_attention_heads": 2, "vocab_size": 320}))
    assert main(words.split()) == 2
    printed = capsys.readouterr().err
    assert "refused: it contains code (posix.mkdir), which is never run" in printed
    assert "weights_only" not in printed
    assert not Path("ran").exists()
