"""Imports of Hugging Face folders: refused folders and protected targets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fm9g.convert.hf_export import ExportOptions, export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
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
    with pytest.raises(UserError, match=r"m.pt: not a complete weight file"):
        export_folder(tmp_path / "m.pt", tmp_path / "out")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        import_folder(folder, tmp_path / "no.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="expected one flat dict"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "none.pt")


def test_existing_files_are_not_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "m.json", tmp_path / "mine.json")
    with pytest.raises(UserError, match=r"mine.json: exists already"):
        import_folder(folder, tmp_path / "mine.pt")
    import_folder(folder, tmp_path / "mine.pt", overwrite=True)
    for name in ("config", "generation_config", "tokenizer"):
        (folder / f"{name}.json").touch()
        content = (folder / f"{name}.json").read_bytes()
        with pytest.raises(UserError, match=f"would replace .*{name}.json, which is no model configuration of ours"):
            import_folder(folder, folder / f"{name}.pt", overwrite=True)
        assert (folder / f"{name}.json").read_bytes() == content
    with pytest.raises(UserError, match="which is an input"):
        export_folder(tmp_path / "m.pt", folder, reference=folder, options=ExportOptions(overwrite=True))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_attention_heads": 0, "head_dim": None}, "a value has the wrong type"),
        ({"hidden_size": "32", "head_dim": None}, "a value has the wrong type"),
        ({"rope_scaling": "x"}, "a value has the wrong type"),
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


def test_what_is_read_is_never_replaced(sharded_folder: Path, tmp_path: Path) -> None:
    (sharded_folder / "a.pt").symlink_to(sharded_folder / "model-00001-of-00004.safetensors")
    with pytest.raises(UserError, match=r"a.pt: is an input; choose another"):
        import_folder(sharded_folder, sharded_folder / "a.pt", overwrite=True)
    with pytest.raises(UserError, match="which is an input"):
        export_folder(tmp_path / "m.pt", tmp_path, options=ExportOptions(overwrite=True))
    assert not list(tmp_path.rglob(".*"))
