"""Conversions that are interrupted and resumed, and weights that are not finite."""

from __future__ import annotations

import errno
import functools
import json
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fm9g.cli import main
from fm9g.convert import hf_export, hf_import, resumable_writer
from fm9g.convert.hf_export import ExportOptions, export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.convert.resumable_writer import resumable_dir, safetensors_output, write_resumable
from fm9g.errors import UserError
from fm9g.io.lazy_tensor import LazyConcat
from fm9g.io.pt_file import read_weights, write_weights
from fm9g.io.safetensors_file import open_safetensors

SHARD_BYTES, SYNC_BYTES, BUFFER_BYTES = 20_000, 4096, 8192


@pytest.fixture
def folder(sharded_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face folder of several shards, with m.pt beside it; conversions write in small steps."""
    small = functools.partial(write_resumable, chunk_bytes=512, sync_bytes=SYNC_BYTES, buffer_bytes=BUFFER_BYTES)
    monkeypatch.setattr(hf_import, "write_resumable", small)
    monkeypatch.setattr(hf_export, "write_resumable", small)
    return sharded_folder


class InlineExecutor(Executor):
    """Runs functions at once, in the calling thread."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)
        return future


class Counter:
    """Counts the bytes that are written, and raises after some of them. Stands in for the progress bar."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, self.limit = 0, float("inf")
        self.error: BaseException = KeyboardInterrupt()
        monkeypatch.setattr(resumable_writer, "Progress", lambda *_: self)
        # The disk does its part at once, so that the journal does not depend on its speed. The readers have options.
        executor = lambda count, **options: ThreadPoolExecutor(count, **options) if options else InlineExecutor()  # noqa: E731
        monkeypatch.setattr(resumable_writer, "ThreadPoolExecutor", executor)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self.limit:
            raise self.error

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
    export_folder(folder.parent / "m.pt", target, options=ExportOptions(shard_bytes=SHARD_BYTES))


def to_folder_fp16(folder: Path, target: Path) -> None:
    export_folder(folder.parent / "m.pt", target, options=ExportOptions(dtype="fp16", shard_bytes=SHARD_BYTES))


def to_bin(folder: Path, target: Path) -> None:
    export_folder(folder.parent / "m.pt", target, options=ExportOptions(format="bin", shard_bytes=SHARD_BYTES))


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
def test_the_same_call_resumes_where_it_was_interrupted(
    way: Way, share: float, folder: Path, tmp_path: Path, counter: Counter
) -> None:
    counter.stop_after(float("inf"))
    way(folder, tmp_path / "a" / "whole")
    total, full = counter.bytes, content(tmp_path / "a" / "whole")

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
    assert content(target) == full
    assert leftovers(tmp_path / "b") == []
    assert total - written <= counter.bytes <= total - written + SYNC_BYTES + BUFFER_BYTES  # not in the journal yet


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
    with pytest.raises(UserError, match=r"the disk is full.*give the same command again to resume"):
        way(folder, target)
    assert partial(way, target).is_dir()
    assert leftovers(tmp_path / "b") == [partial(way, target).name]
    counter.stop_after(float("inf"))
    way(folder, target)
    assert leftovers(tmp_path / "b") == []


def test_a_changed_source_starts_over(folder: Path, tmp_path: Path, counter: Counter) -> None:
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
    created = read_weights(tmp_path / "x.pt")
    assert torch.equal(created["input_embedding.weight"], changed["model.embed_tokens.weight"])
    assert created["input_embedding.weight"][-1, -1] == 0


def test_other_options_start_over(folder: Path, tmp_path: Path, counter: Counter) -> None:
    counter.stop_after(30_000)
    with pytest.raises(KeyboardInterrupt):
        to_folder(folder, tmp_path / "x")
    counter.stop_after(float("inf"))
    export_folder(tmp_path / "m.pt", tmp_path / "x", options=ExportOptions(dtype="fp16"))
    assert {tensor.dtype for tensor in load_file(next((tmp_path / "x").glob("*.safetensors"))).values()} == {
        torch.float16
    }


@pytest.mark.parametrize("damage", ["cut", "other bytes", "no journal", "odd journal", "no file"])
def test_a_damaged_partial_starts_over(damage: str, folder: Path, tmp_path: Path, counter: Counter) -> None:
    counter.stop_after(60_000)
    with pytest.raises(KeyboardInterrupt):
        to_pt(folder, tmp_path / "x")
    partial = tmp_path / ".x.pt.partial"
    file, journal = partial / "x.pt", partial / resumable_writer.JOURNAL
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
    with resumable_dir(tmp_path / "x.pt"):
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


def test_the_command_says_that_it_can_resume(
    folder: Path, tmp_path: Path, counter: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    counter.stop_after(30_000)
    assert main(["convert", str(folder), str(tmp_path / "x.pt")]) == 130
    assert "the same command resumes from there" in capsys.readouterr().err
    counter.stop_after(float("inf"))
    assert main(["convert", str(folder), str(tmp_path / "x.pt"), "--verify"]) == 0
    captured = capsys.readouterr()
    assert "resumes at" in captured.err
    assert "within the tolerance" in captured.out


def test_numbers_beyond_fp16_are_refused_and_the_partial_goes(folder: Path, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in read_weights(tmp_path / "m.pt").items()}
    weights["lm_head.weight"][3, 4] = 1e5
    write_weights(tmp_path / "m.pt", weights, weights.items())
    with pytest.raises(UserError, match=r"m.pt: has values beyond 65504"):
        to_folder_fp16(folder, tmp_path / "x")
    assert leftovers(tmp_path) == []


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
def test_every_type_of_weight_is_checked(dtype: torch.dtype, tmp_path: Path) -> None:
    def write(values: torch.Tensor) -> None:
        save_file({"a": values, "none": values[:0].clone()}, tmp_path / "source")
        tensors = {
            name: LazyConcat((each,), each.dtype) for name, each in open_safetensors(tmp_path / "source").items()
        }
        (tmp_path / "out").mkdir(exist_ok=True)
        write_resumable(tmp_path / "out", [safetensors_output("copy", tensors)], "writing")

    values = torch.randn(7, 5).to(dtype)
    write(values)
    assert torch.equal(load_file(tmp_path / "out" / "copy")["a"].double(), values.double())
    values[3, 2] = float("nan")
    with pytest.raises(UserError, match="a: 1 of 35 values are NaN or infinite"):
        write(values)


def test_many_weights_that_are_not_finite_are_counted(folder: Path, tmp_path: Path) -> None:
    weights = {name: torch.full_like(tensor, float("nan")) for name, tensor in read_weights(tmp_path / "m.pt").items()}
    write_weights(tmp_path / "m.pt", weights, weights.items())
    with pytest.raises(UserError, match=f"and {len(weights) - 5} more weights"):
        to_folder(folder, tmp_path / "x")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^/x/chat_template.jinja: cannot be read: .*What is written so far is kept"):
        with resumable_dir(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", "/x/chat_template.jinja")
