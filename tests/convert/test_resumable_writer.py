"""Conversions that are cut off and gone on with, and files that are not what they seem."""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.common import small_model
from safetensors.torch import load_file, save_file
from torch import nn

from fm9g.cli import main
from fm9g.convert import hf, resumable_writer
from fm9g.convert.hf import export_folder, import_folder
from fm9g.errors import UserError
from fm9g.io import append
from fm9g.io.lazy_tensor import LazyConcat
from fm9g.io.weights import read_weights, write_weights
from fm9g.model.transformer import weight_shapes

CONFIG = small_model(qkv_bias=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face folder of several shards; beside it m.pt, which it was made from."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in weight_shapes(CONFIG).items()}
    write_weights(tmp_path / "m.pt", weights, weights.items())
    (tmp_path / "m.json").write_text(json.dumps(CONFIG.to_json()))
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    export_folder(tmp_path / "m.pt", tmp_path / "hf")
    monkeypatch.setattr(resumable_writer, "_SYNC_EVERY", 4096)  # what is written is noted after so many bytes
    monkeypatch.setattr(resumable_writer, "_CHUNK_BYTES", 512)
    monkeypatch.setattr(append, "_COPY_BYTES", 1024)
    monkeypatch.setattr(append, "_BUFFER_BYTES", 8192)
    return tmp_path / "hf"


class Counter:
    """Counts the bytes that are written, and raises after some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.limit = 0, float("inf")
        self.error: BaseException = KeyboardInterrupt()
        advance = resumable_writer._Writer._advance

        def counted(writer: resumable_writer._Writer, count: int) -> None:
            self.bytes += count
            advance(writer, count)
            if writer._sync_point is not None:
                writer._sync_point.result()  # so that what is noted does not depend on the disk
            if self.bytes > self.limit:
                raise self.error

        monkeypatch.setattr(resumable_writer._Writer, "_advance", counted)

    def stop_after(self, limit: float, error: BaseException | None = None) -> None:
        self.bytes, self.limit, self.error = 0, limit, error or KeyboardInterrupt()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def to_pt(folder: Path, target: Path) -> None:
    import_folder(folder, target.with_suffix(".pt"))


def to_pt_fp32(folder: Path, target: Path) -> None:
    import_folder(folder, target.with_suffix(".pt"), dtype="fp32")


def to_folder(folder: Path, target: Path) -> None:
    export_folder(folder.parent / "m.pt", target)


def to_folder_fp16(folder: Path, target: Path) -> None:
    export_folder(folder.parent / "m.pt", target, dtype="fp16")


def to_bin(folder: Path, target: Path) -> None:
    export_folder(folder.parent / "m.pt", target, format="bin")


Way = Callable[[Path, Path], None]
WAYS = [to_pt, to_pt_fp32, to_folder, to_folder_fp16, to_bin]


def content(target: Path) -> dict[str, bytes]:
    """The files of a result, by name, but for the card, which names the folder."""
    if not target.is_dir():
        target = target.with_suffix(".pt")
        return {"file": target.read_bytes(), "config": target.with_suffix(".json").read_bytes()}
    return {file.name: file.read_bytes() for file in target.iterdir() if file.name != "README.md"}


def partial(way: Way, target: Path) -> Path:
    name = f"{target.name}.pt" if way in (to_pt, to_pt_fp32) else target.name
    return target.parent / f".{name}.partial"


def leftovers(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_the_same_call_goes_on_where_it_was_cut_off(
    way: Way, share: float, folder: Path, tmp_path: Path, counter: Counter
) -> None:
    counter.stop_after(float("inf"))
    way(folder, tmp_path / "a" / "whole")
    total, whole = counter.bytes, content(tmp_path / "a" / "whole")

    target = tmp_path / "b" / "whole"
    counter.stop_after(total * share)
    with pytest.raises(KeyboardInterrupt):
        way(folder, target)
    written = counter.bytes
    assert leftovers(tmp_path / "b") == [partial(way, target).name]
    assert not target.exists()
    assert not target.with_suffix(".pt").exists()
    counter.stop_after(float("inf"))
    way(folder, target)
    assert content(target) == whole
    assert leftovers(tmp_path / "b") == []
    assert total - written <= counter.bytes <= total - written + 4096 + 8192  # what was not noted yet


@pytest.mark.parametrize("way", [to_pt, to_pt_fp32, to_bin])
def test_archives_have_right_checksums(way: Way, folder: Path, tmp_path: Path) -> None:
    way(folder, tmp_path / "out" / "m")
    archives = [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".pt", ".bin")]
    assert archives
    for file in archives:
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None, file


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_keeps_what_is_done_and_says_so(way: Way, folder: Path, tmp_path: Path, counter: Counter) -> None:
    target = tmp_path / "b" / "whole"
    counter.stop_after(30_000, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=r"the disk is full.*give the same command again, and it goes on"):
        way(folder, target)
    assert partial(way, target).is_dir()
    assert leftovers(tmp_path / "b") == [partial(way, target).name]
    counter.stop_after(float("inf"))
    way(folder, target)
    assert leftovers(tmp_path / "b") == []


def test_a_changed_source_is_begun_anew(folder: Path, tmp_path: Path, counter: Counter) -> None:
    counter.stop_after(60_000)
    with pytest.raises(KeyboardInterrupt):
        to_pt(folder, tmp_path / "x")
    shard = min(folder.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + bytes(2))  # of the same length
    changed = load_file(shard)
    counter.stop_after(float("inf"))
    to_pt(folder, tmp_path / "x")
    assert counter.bytes == (tmp_path / "x.pt").stat().st_size
    made = read_weights(tmp_path / "x.pt")
    assert torch.equal(made["input_embedding.weight"], changed["model.embed_tokens.weight"])
    assert made["input_embedding.weight"][-1, -1] == 0


def test_other_options_begin_anew(folder: Path, tmp_path: Path, counter: Counter) -> None:
    counter.stop_after(30_000)
    with pytest.raises(KeyboardInterrupt):
        to_folder(folder, tmp_path / "x")
    counter.stop_after(float("inf"))
    export_folder(tmp_path / "m.pt", tmp_path / "x", dtype="fp16")
    assert {tensor.dtype for tensor in load_file(next((tmp_path / "x").glob("*.safetensors"))).values()} == {
        torch.float16
    }


@pytest.mark.parametrize("damage", ["cut", "other bytes", "no journal", "odd journal", "no file"])
def test_a_damaged_partial_is_begun_anew(damage: str, folder: Path, tmp_path: Path, counter: Counter) -> None:
    counter.stop_after(60_000)
    with pytest.raises(KeyboardInterrupt):
        to_pt(folder, tmp_path / "x")
    kept = tmp_path / ".x.pt.partial"
    file, journal = kept / "x.pt", kept / resumable_writer.JOURNAL
    noted = json.loads(journal.read_text())["files"]["x.pt"][0]
    assert noted > 50_000
    if damage == "cut":
        os.truncate(file, noted - 1)
    elif damage == "other bytes":
        with file.open("r+b") as opened:
            opened.seek(noted - 5)
            opened.write(b"other")
    elif damage == "no journal":
        journal.unlink()
    elif damage == "odd journal":
        journal.write_text('{"identity": 3, "files": []}')
    else:
        file.unlink()
    counter.stop_after(float("inf"))
    to_pt(folder, tmp_path / "x")
    assert counter.bytes == (tmp_path / "x.pt").stat().st_size
    before, after = read_weights(tmp_path / "m.pt"), read_weights(tmp_path / "x.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_at_once_do_not_write_into_one_another(folder: Path, tmp_path: Path) -> None:
    with resumable_writer.resumable_dir(tmp_path / "x.pt"):
        with pytest.raises(UserError, match="another process is writing it"):
            to_pt(folder, tmp_path / "x")
        assert (tmp_path / ".x.pt.partial").is_dir()


def test_copies_that_the_system_cannot_make_by_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    to_pt(folder, tmp_path / "x")
    assert (tmp_path / "x.pt").read_bytes()[-64:] == (tmp_path / "m.pt").read_bytes()[-64:]
    before, after = read_weights(tmp_path / "m.pt"), read_weights(tmp_path / "x.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_command_says_that_it_can_go_on(
    folder: Path, tmp_path: Path, counter: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    counter.stop_after(30_000)
    assert main(["convert", str(folder), str(tmp_path / "x.pt")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    counter.stop_after(float("inf"))
    assert main(["convert", str(folder), str(tmp_path / "x.pt"), "--verify"]) == 0
    said = capsys.readouterr()
    assert "continues after" in said.err
    assert "within the tolerated" in said.out


def test_numbers_beyond_fp16_are_refused_and_the_partial_goes(folder: Path, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in read_weights(tmp_path / "m.pt").items()}
    weights["lm_head.weight"][3, 4] = 1e5
    write_weights(tmp_path / "m.pt", weights, weights.items())
    with pytest.raises(UserError, match=r"m.pt: holds values beyond 65504"):
        to_folder_fp16(folder, tmp_path / "x")
    assert leftovers(tmp_path) == []


# ---- values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_not_finite_end_a_conversion(way: Way, value: float, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.pt"
    weights = {name: tensor.clone() for name, tensor in read_weights(file).items()}
    weights["lm_head.weight"][3, 4:6] = value
    weights["encoder.output_layernorm.weight"][1] = value
    write_weights(file, weights, weights.items())
    head, norm = "lm_head.weight", "model.norm.weight"
    if way in (to_pt, to_pt_fp32):
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if norm in tensors:
                tensors[norm][1] = value
            if head in tensors:
                tensors[head][3, 4:6] = value
            save_file(tensors, file)
        norm = "encoder.output_layernorm.weight"
    (tmp_path / "x.pt").write_text("whole")
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError) as error:
        way(folder, tmp_path / "x") if way not in (to_pt, to_pt_fp32) else import_folder(
            folder, tmp_path / "x.pt", overwrite=True, dtype="fp32" if way is to_pt_fp32 else ""
        )
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert any(f"{head}: 2 of 10,240 values are NaN or infinite" in line for line in lines)
    assert any(f"{norm}: 1 of 32 values are NaN or infinite" in line for line in lines)
    assert "Nothing was written" in lines[-1]
    assert leftovers(tmp_path) == []
    assert (tmp_path / "x.pt").read_text() == "whole"
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_type_of_weight_is_checked(dtype: torch.dtype) -> None:
    values = torch.randn(7, 5).to(dtype)
    assert resumable_writer._is_finite(values)
    assert resumable_writer._is_finite(values[:0])
    values[3, 2] = float("nan")
    assert not resumable_writer._is_finite(values)


def test_many_weights_that_are_not_finite_are_counted(folder: Path, tmp_path: Path) -> None:
    weights = {name: torch.full_like(tensor, float("nan")) for name, tensor in read_weights(tmp_path / "m.pt").items()}
    write_weights(tmp_path / "m.pt", weights, weights.items())
    with pytest.raises(UserError, match=f"and {len(weights) - 5} more weights"):
        to_folder(folder, tmp_path / "x")


# ---- verification


def test_verification_finds_a_changed_weight(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in ("fp32", "fp16", "bf16"):
        arguments = ["convert", str(tmp_path / "m.pt"), str(tmp_path / dtype), "--dtype", dtype, "--verify"]
        assert main(arguments) == 0
        assert "read by Qwen2ForCausalLM" in capsys.readouterr().out
    make = resumable_writer._load

    def wrong(content: bytes | LazyConcat) -> memoryview:
        made = make(content)
        changed = isinstance(content, LazyConcat) and content.parts[0].shape[-1:] == (48,)
        return memoryview(bytes(len(made))) if changed else made

    monkeypatch.setattr(resumable_writer, "_load", wrong)
    assert main(["convert", str(tmp_path / "m.pt"), str(tmp_path / "x"), "--dtype", "fp16", "--verify"]) == 2
    assert "NOT within the tolerated" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["zipped", "old", "bin"])
def test_models_of_odd_tensors_are_converted(kind: str, folder: Path, tmp_path: Path) -> None:
    weights = {name: nn.Parameter(tensor.clone()) for name, tensor in read_weights(tmp_path / "m.pt").items()}
    name = "encoder.layers.0.ffn.ffn.w_out.weight"
    weights[name] = weights[name].detach().t().contiguous().t()
    if kind != "bin":
        torch.save(weights, tmp_path / "m.pt", _use_new_zipfile_serialization=kind == "zipped")
        export_folder(tmp_path / "m.pt", tmp_path / "out")
        import_folder(tmp_path / "out", tmp_path / "back.pt")
    else:
        export_folder(tmp_path / "m.pt", tmp_path / "out", format="bin")
        index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert torch.equal(loaded["model.norm.weight"], weights["encoder.output_layernorm.weight"])
        import_folder(tmp_path / "out", tmp_path / "back.pt")
    back = read_weights(tmp_path / "back.pt")
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


# ---- folders


def damage(name: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shards = sorted(folder.glob("*.safetensors"))
    if name == "missing shard":
        shards[1].unlink()
    elif name == "cut shard":
        os.truncate(shards[1], shards[1].stat().st_size - 1)
    elif name == "index is no JSON":
        index.write_text("{oops")
    elif name == "index is empty":
        index.write_text("{}")
    elif name == "index leads away":
        listed["weight_map"]["model.norm.weight"] = "../m.safetensors"
        index.write_text(json.dumps(listed))
    elif name == "index of another":
        listed["weight_map"]["model.other.weight"] = shards[0].name
        index.write_text(json.dumps(listed))
    elif name == "twice":
        one, two = load_file(shards[0]), load_file(shards[1])
        save_file({**two, next(iter(one)): next(iter(one.values()))}, shards[1])
    elif name == "integers":
        save_file({key: tensor.to(torch.int8) for key, tensor in load_file(shards[1]).items()}, shards[1])
    elif name == "config":
        (folder / "config.json").write_text("[")
    else:
        assert name == "no weights"
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing shard", r"model-00002-of-0000\d.safetensors: is missing, and .*index.json lists it"),
        ("cut shard", "not a whole safetensors file"),
        ("index is no JSON", r"index.json, line 1, column 2: not JSON"),
        ("index is empty", "weight_map: expected an object"),
        ("index leads away", "expected the name of a file beside it"),
        ("index of another", r"model.other.weight: is missing, and .*index.json lists it"),
        ("twice", r"is in model-00001-of-0000\d.safetensors too"),
        ("integers", r"found int8, expected fp32, bf16 or fp16: the model is quantized"),
        ("config", "not JSON"),
        ("no weights", r"neither model\*.safetensors nor pytorch_model\*.bin is there"),
    ],
)
def test_damaged_folders_get_one_message(name: str, expected: str, folder: Path, tmp_path: Path) -> None:
    damage(name, folder)
    with pytest.raises(UserError, match=expected):
        import_folder(folder, tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()
    assert leftovers(tmp_path) == []


def test_what_is_read_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    (folder / "a.pt").symlink_to(folder / "model-00001-of-00004.safetensors")
    with pytest.raises(UserError, match=r"a.pt: is read; choose another"):
        import_folder(folder, folder / "a.pt", overwrite=True)
    with pytest.raises(UserError, match="which is read"):
        export_folder(tmp_path / "m.pt", tmp_path, overwrite=True)
    assert leftovers(folder) == leftovers(tmp_path) == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/x/chat_template.jinja: cannot be read: .*What is done is kept in"):
        with resumable_writer.resumable_dir(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", "/x/chat_template.jinja")
