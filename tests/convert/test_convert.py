"""Converters: the guide's tools, what is refused, and what travels along."""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, small_model
from safetensors.torch import load_file, save_file

from fm9g.cli import main
from fm9g.config.model import ModelConfig
from fm9g.convert import hf
from fm9g.convert.hf import export_folder, import_folder
from fm9g.convert.hf_config import from_hf_config, native_model_type, to_hf_config
from fm9g.convert.weight_map import LLAMA_MAP, WeightMap
from fm9g.errors import UserError
from fm9g.io.weights import read_weights, write_weights
from fm9g.model.transformer import weight_shapes


def make_pt(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).to(dtype) for name, shape in weight_shapes(config).items()}
    write_weights(folder / "m.pt", weights, weights.items())
    (folder / "m.json").write_text(json.dumps(config.to_json()))
    return folder / "m.pt"


@pytest.fixture
def folder(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A Hugging Face folder with a tokenizer."""
    export_folder(make_pt(tmp_path, small_model(qkv_bias=True)), tmp_path / "hf")
    for file in tokenizer_path.iterdir():
        shutil.copy(file, tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def run_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs a script of tools/ as a command in the test's folder; returns its exit status."""

    def run(name: str, *arguments: object) -> object:
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(ROOT / "tools"))  # as Python does for a script
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        return end.value.code

    return run


def test_the_table_has_both_directions() -> None:
    names = WeightMap(LLAMA_MAP)
    for ours, theirs in LLAMA_MAP.items():
        for part in ("weight", "bias"):
            one, other = ours.format(n=12, p=part), theirs.format(n=12, p=part)
            assert (names.to_hf(one), names.from_hf(other)) == (other, [one])
    assert names.from_hf("model.layers.1.mlp.experts.0.weight") == []
    assert names.to_hf("encoder.layers.x.ffn.ffn.w_out.weight") is None


def test_the_guides_tools_go_there_and_back(
    folder: Path, tmp_path: Path, run_tool: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("hgface_2_bmtrain.py", "--huggingface-dir", folder, "--bmtrain-ckpt-path", "7b.pt") == 0
    assert read_weights(tmp_path / "7b.pt").keys() == weight_shapes(small_model(qkv_bias=True)).keys()
    back = ["--huggingface-ref-dir", folder, "--bmtrain-ckpt-path", "7b.pt", "--huggingface-save-dir", "again"]
    assert run_tool("bmtrain_2_hgface.py", *back) == 0
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert run_tool("bmtrain_2_hgface.py", *back) == 2
    assert "the folder holds something" in capsys.readouterr().err


def test_the_guides_tools_refuse_what_cannot_be_meant(
    folder: Path, tmp_path: Path, run_tool: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--huggingface-dir", folder, "--bmtrain-ckpt-path", "7b.pt"]
    assert [run_tool("hgface_2_bmtrain.py", *there, *more) for more in ([], [], ["--overwrite"])] == [0, 2, 0]
    capsys.readouterr()
    back = ["--huggingface-ref-dir", folder, "--bmtrain-ckpt-path", "7b.pt", "--huggingface-save-dir", "out.pt"]
    assert run_tool("bmtrain_2_hgface.py", *back) == 2
    assert "--huggingface-save-dir: found 'out.pt', expected the name of a folder" in capsys.readouterr().err
    assert main(["convert", str(folder), "forgotten"]) == 2
    assert "a 9G file, whose name ends in .pt" in capsys.readouterr().err
    assert main(["convert", "7b.pt", "8b.pt"]) == 2
    assert "is a file; a .pt file is made from a Hugging Face folder" in capsys.readouterr().err
    assert main(["convert", "7b.pt", "out", "--reference", "7b.pt"]) == 2
    assert "expected the Hugging Face folder that the model came from" in capsys.readouterr().err


def test_without_arguments_the_paths_of_the_guide_are_used(
    folder: Path, tmp_path: Path, run_tool: Callable[..., object]
) -> None:
    folder.rename(tmp_path / "ckpt")
    assert run_tool("hgface_2_bmtrain.py") == 0
    assert (tmp_path / "9g_models" / "7b.pt").is_file()
    assert (tmp_path / "9g_models" / "7b.json").is_file()


def test_the_dtype_is_kept_or_as_asked_for(folder: Path, tmp_path: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    export_folder(tmp_path / "m.pt", tmp_path / "wide", dtype="fp32")
    assert {tensor.dtype for tensor in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_large_models_are_written_and_read_in_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    export_folder(tmp_path / "m.pt", tmp_path / "shards")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "shards").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    import_folder(tmp_path / "shards", tmp_path / "back.pt")
    assert read_weights(tmp_path / "back.pt").keys() == read_weights(tmp_path / "m.pt").keys()


def test_old_bin_folders_are_read(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    import_folder(folder, tmp_path / "back.pt")
    before = read_weights(tmp_path / "m.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in read_weights(tmp_path / "back.pt").items())


def test_generation_settings_travel_along(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 1}')
    export_folder(tmp_path / "m.pt", tmp_path / "out", reference=folder)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7


def test_a_sentencepiece_model_is_exported_with_equal_ids(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from fm9g.convert.aux_files import write_tokenizer
    from fm9g.data.encode.tokenizer import load_tokenizer

    source = shared / "tokenizers" / "9g-2b"
    written = write_tokenizer(source, None, tmp_path).tokenizer
    text = "九格大模型 is  a model.\n 你好\t🚀 x=1"
    assert written is not None
    assert (written.bos_id, written.eos_id) == (1, 2)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == [1, *load_tokenizer(source).encode(text)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not one that can be read"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope_scaling is .*'longrope'"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_hidden_layers": 1}, "is not part of the model"),
        ({"intermediate_size": 50}, "shape .*, expected"),
        ({"hidden_act": "relu"}, "activate_fn: found 'relu'"),
    ],
)
def test_what_9g_cannot_represent_is_refused(folder: Path, tmp_path: Path, changes: dict, expected: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=expected):
        import_folder(folder, tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


def test_unknown_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.extra and 0 more have no place"):
        import_folder(folder, tmp_path / "no.pt")


def test_cut_and_malicious_files_are_refused_and_nothing_in_them_runs(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"input_embedding.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt: refused: it contains code \(__builtin__.getattr\)"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
    for file in (tmp_path / "m.pt", folder / "model.safetensors"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"m.pt: not a whole weight file"):
        export_folder(tmp_path / "m.pt", tmp_path / "out")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        import_folder(folder, tmp_path / "no.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="expected one flat dict"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "none.pt")


def test_scaled_models_with_biases_have_no_class() -> None:
    with pytest.raises(UserError, match="no transformers class has both"):
        native_model_type(small_model(qkv_bias=True, scale=True, base_hidden_size=16))


def test_a_minicpm_configuration_is_read() -> None:
    config = small_model(scale=True, scale_emb=12.0, scale_depth=1.4, base_hidden_size=16)
    values = to_hf_config(config, "bfloat16", 1, 2)
    values |= {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
    again = from_hf_config(values, "config.json")
    assert (again.scale, again.scale_emb, again.scale_depth, again.base_hidden_size) == (True, 12.0, 1.4, 16)


def test_an_unknown_configuration_asks_for_the_reference(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.json").unlink()
    with pytest.raises(UserError, match="give the folder it came from with --reference"):
        export_folder(tmp_path / "m.pt", tmp_path / "out")


def test_existing_files_are_not_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "m.json", tmp_path / "mine.json")
    with pytest.raises(UserError, match=r"mine.json: is there already"):
        import_folder(folder, tmp_path / "mine.pt")
    import_folder(folder, tmp_path / "mine.pt", overwrite=True)
    for name in ("config", "generation_config", "tokenizer"):
        (folder / f"{name}.json").touch()
        content = (folder / f"{name}.json").read_bytes()
        with pytest.raises(UserError, match=f"would replace .*{name}.json, which is no model configuration of ours"):
            import_folder(folder, folder / f"{name}.pt", overwrite=True)
        assert (folder / f"{name}.json").read_bytes() == content
    with pytest.raises(UserError, match="which is read"):
        export_folder(tmp_path / "m.pt", folder, reference=folder, overwrite=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_attention_heads": 0, "head_dim": None}, "not of the kind that belongs there"),
        ({"hidden_size": "32", "head_dim": None}, "not of the kind that belongs there"),
        ({"rope_scaling": "x"}, "not of the kind that belongs there"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_broken_configurations_get_one_message(folder: Path, tmp_path: Path, changes: dict, expected: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=expected):
        import_folder(folder, tmp_path / "no.pt")
    (folder / "config.json").write_text('{"model_type": "fm9g"}')
    with pytest.raises(UserError, match=r"config.json: num_attention_heads: missing"):
        import_folder(folder, tmp_path / "no.pt")


def test_weight_files_in_the_old_format_are_read_and_integers_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = dict(read_weights(tmp_path / "m.pt"))
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = read_weights(tmp_path / "old.pt")
    assert all(torch.equal(old[name], weights[name]) for name in weights)
    torch.save({name: tensor.to(torch.int8) for name, tensor in weights.items()}, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"found int8, expected fp32, bf16 or fp16: the model is quantized"):
        export_folder(tmp_path / "m.pt", tmp_path / "out")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int32, torch.int64, torch.bool]
)
def test_weights_of_other_types_say_what_to_do(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """Scales, zero points and packed bits lie beside quantized weights; the message is about the weights."""
    weights = load_file(folder / "model.safetensors")
    name = min(name for name in weights if name.endswith("q_proj.weight"))
    found = rf"{name}: found {str(dtype).removeprefix('torch.')}, expected fp32, bf16 or fp16: "
    found += "it is no weight" if dtype in (torch.int64, torch.bool) else "the model is quantized; take the one that it"
    more = {name: weights[name].to(dtype), f"{name}_scale_inv": torch.ones(1), "a.scales": torch.ones(1)}
    save_file(weights | more, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=found):
        import_folder(folder, tmp_path / "no.pt")
    ours = dict(read_weights(tmp_path / "m.pt"))
    name = min(ours)
    torch.save(ours | {name: ours[name].to(dtype)}, tmp_path / "q.pt")
    shutil.copy(tmp_path / "m.json", tmp_path / "q.json")
    with pytest.raises(UserError, match=found.replace(found.partition(":")[0], name)):
        export_folder(tmp_path / "q.pt", tmp_path / "out")
