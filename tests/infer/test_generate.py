"""Text from exported folders: start and end of a generation, and refused folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import small_model
from safetensors.torch import load_file, save_file

from fm9g.api import generate
from fm9g.cli import main
from fm9g.convert.hf_export import export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.errors import UserError
from fm9g.infer.hf_folder import open_hf_tokenizer
from fm9g.infer.options import GenerationOptions
from fm9g.infer.prompts import Prompts
from fm9g.io.pt_file import write_weights
from fm9g.model.transformer import weight_shapes

QUESTION = [{"role": "user", "content": "the"}]


class Weights:
    """Those of a small model, one at a time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.meta = {name: torch.randn(shape) for name, shape in weight_shapes(small_model()).items()}

    def __iter__(self):
        return iter(self.meta.items())


@pytest.fixture
def folder(tmp_path: Path, tokenizer_path: Path) -> Path:
    weights = Weights()
    write_weights(tmp_path / "m.pt", weights.meta, weights)
    (tmp_path / "m.json").write_text(json.dumps(small_model().to_json()))
    export_folder(tmp_path / "m.pt", tmp_path / "hf")
    shutil.copytree(tokenizer_path, tmp_path / "hf", dirs_exist_ok=True)
    change(tmp_path / "hf" / "config.json", bos_token_id=0, eos_token_id=1)
    change(tmp_path / "hf" / "generation_config.json", bos_token_id=0, eos_token_id=1)
    return tmp_path / "hf"


def test_chatting_needs_a_chat_template_of_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "--prompt", "a", "--chat"]) == 2
    assert f"{folder}: has no chat template; leave out --chat" in capsys.readouterr().err


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_generation_stops_at_each_of_several_tokens(folder: Path, file: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([tokenizer("the")["input_ids"]])
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    ids = found[0, prompt.shape[1] :].tolist()
    assert generate(folder, "the", GenerationOptions(max_new_tokens=8)) == tokenizer.decode(ids)
    stop = next(token for token in ids if ids.index(token) > 1)
    change(folder / file, eos_token_id=[1, stop], bos_token_id=[0, 2])
    assert generate(folder, "the", GenerationOptions(max_new_tokens=8)) == tokenizer.decode(ids[: ids.index(stop)])
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", eos_token_id=[1, stop])
    assert generate(folder, "the", GenerationOptions(max_new_tokens=8)) == tokenizer.decode(ids[: ids.index(stop)])


def test_a_model_without_a_token_that_ends_it_goes_on_to_the_last(folder: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        change(folder / file, eos_token_id=None)
    assert generate(folder, "the", GenerationOptions(max_new_tokens=8))


def test_lists_of_end_tokens_are_kept_on_the_way_in_and_out(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for file in ("config.json", "generation_config.json"):
        change(folder / file, eos_token_id=[5, 1])
    import_folder(folder, tmp_path / "in.pt")
    export_folder(tmp_path / "in.pt", tmp_path / "out", folder)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text())["eos_token_id"] == [5, 1]
    change(folder / "config.json", bos_token_id=[0, 2])  # of these transformers takes one
    (folder / "generation_config.json").unlink()
    export_folder(tmp_path / "in.pt", tmp_path / "again", folder)
    settings = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert settings == {"bos_token_id": [0, 2], "eos_token_id": [5, 1]}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.bos_token_id == 0
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert generate(folder, "the", GenerationOptions(max_new_tokens=2))


def test_what_a_generation_starts_from(folder: Path, tokenizer_path: Path) -> None:
    from tokenizers import processors
    from transformers import AutoConfig, AutoTokenizer

    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    prompts = Prompts(folder, AutoConfig.from_pretrained(folder), [1])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    the = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert prompts.encode_text("the") == [0, *the]
    assert prompts.encode_chat(QUESTION) == the  # a template has written what begins it
    assert prompts.encode_text("") == [0]
    assert generate(folder, "", GenerationOptions(max_new_tokens=3))
    # One that ends each text, and one without a token that begins a text.
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    prompts.tokenizer.backend_tokenizer.post_processor = ends
    assert prompts.encode_text("the") == [0, *the]
    assert prompts.encode_text("the</s>")[-1] == 1
    prompts.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    prompts.tokenizer.bos_token = None
    assert prompts.encode_text("the") == the
    ends = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    prompts.tokenizer.backend_tokenizer.post_processor = ends
    assert prompts.encode_text("the") == the
    with pytest.raises(UserError, match="prompt: it is empty, and the tokenizer has no token that starts a text"):
        prompts.encode_text("")


def test_what_is_no_hugging_face_folder_says_how_to_make_one(folder: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    for name in ("data.jsonl", "index"):
        (dataset / name).touch()
    run = tmp_path / "run"
    for step in (2, 10):
        (run / str(step)).mkdir(parents=True)
        (run / str(step) / "manifest.json").write_text("{}")
    (run / "10" / "adapter_config.json").write_text("{}")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    for path, message in {
        run / "2": r"2/manifest.json: not a manifest; the checkpoint is damaged",
        run / "10": r"10: does not say which model it is for; give the model, and --adapter .*/10",
        run: r"run: found the checkpoints of a run.* `fm9g convert .*/last FOLDER` makes a Hugging Face",
        dataset: r"dataset: found an indexed dataset, expected a Hugging Face folder\. A mixture",
        tmp_path / "none": "none: no such folder or file",
        bare: "bare: has no weights",
    }.items():
        with pytest.raises(UserError, match=message):
            generate(path, "the")


def test_text_comes_in_pieces_as_it_is_made(folder: Path) -> None:
    pieces: list[str] = []
    full = generate(folder, "the", GenerationOptions(max_new_tokens=12, temperature=1.0), pieces.append)
    assert pieces[0] == ""
    assert len(pieces) > 5
    assert "".join(pieces) == full


def test_weights_of_half_precision_are_computed_in_what_is_fast_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    used = []
    own = LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM, "generate", lambda self, *a, **k: used.append(self.dtype) or own(self, *a, **k)
    )
    for fast in (True, False):
        monkeypatch.setattr("fm9g.infer.hf_folder.has_fast_bf16", lambda device, fast=fast: fast)
        generate(folder, "the", GenerationOptions(max_new_tokens=2))
    if not torch.cuda.is_available():
        assert used == [torch.bfloat16, torch.float32]


def test_a_9g_configuration_is_not_taken_for_one_of_transformers(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(small_model().to_json()))
    with pytest.raises(UserError, match=r"its config.json is not one of transformers.*fm9g convert FILE.pt FOLDER"):
        generate(folder, "the")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("internlm2", "config.json: bias is not false"),  # its weights are mapped, as in a conversion
        ("own", r"its model \(own\) is code in the folder, which fm9g does not run; its family is unknown"),
    ],
)
def test_code_that_lies_in_a_folder_is_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, problem: str
) -> None:
    import io

    marker = folder / "was-run"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # transformers may ask
    code = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    plain = (folder / "config.json").read_text()
    change(folder / "config.json", model_type=kind, auto_map=code)
    with pytest.raises(UserError, match=problem):
        generate(folder, "the")
    (folder / "config.json").write_text(plain)
    (folder / "tokenizer.json").rename(folder / "own.tiktoken")
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_own.T", None]},
    )
    with pytest.raises(UserError, match=r"its tokenizer \(OwnTokenizer\) is code in the folder, which .* not run"):
        generate(folder, "the")
    assert not marker.exists()


def test_the_tokenizer_is_the_one_that_is_named(folder: Path) -> None:
    """For Qwen2 models AutoTokenizer splits digits as Qwen2 does, whatever the configuration names."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig

    change(folder / "config.json", model_type="qwen2")
    text = "in 1863, e\u0301"
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert open_hf_tokenizer(folder, AutoConfig.from_pretrained(folder))(text)["input_ids"] == expected


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.slow
def test_generation_does_not_import_what_takes_seconds_and_is_not_used(folder: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from fm9g import GenerationOptions, generate
generate(Path({str(folder)!r}), "the", GenerationOptions(max_new_tokens=2))
assert "bitsandbytes" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_generation_refuses_broken_folders_and_options_out_of_range(folder: Path) -> None:
    assert isinstance(generate(folder, "the", GenerationOptions(max_new_tokens=2)), str)
    out_of_range = {"max_new_tokens": 0, "temperature": -1.0, "top_p": 5.0, "repetition_penalty": 0.0, "seed": -1}
    for option in ({key: value} for key, value in out_of_range.items()):
        with pytest.raises(UserError, match="out of range"):
            generate(folder, "the", GenerationOptions(**option))
    change(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"config.json and the weights do not match"):
        generate(folder, "the")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        generate(folder, "the")


def test_what_transformers_says_is_told_on_one_line(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"more": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    generate(folder, "the", GenerationOptions(max_new_tokens=2))
    assert caplog.messages == [f"{folder}: more has no place in the model of config.json"]
    assert capfd.readouterr().err == ""
    change(folder / "config.json", mlp_bias=["x"])
    with pytest.raises(UserError, match=r"transformers cannot load it: .*mlp_bias.* expected bool") as caught:
        generate(folder, "the")
    assert "Error" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_chat_template_that_is_not_jinja_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{")
    with pytest.raises(UserError, match=rf"chat template of {folder}, line 1"):
        generate(folder, QUESTION)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [float("inf"), ["x", "x"], "3", 1.5])
def test_a_special_token_that_is_no_id_is_named(folder: Path, name: str, value: object) -> None:
    change(folder / "generation_config.json", **{name: value})
    with pytest.raises(UserError, match=rf"generation_config.json: {name}: found .*, expected a token id") as caught:
        generate(folder, "the", GenerationOptions(max_new_tokens=1))
    assert "\n" not in str(caught.value)
