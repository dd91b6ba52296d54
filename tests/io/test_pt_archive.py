"""Files of weights that somebody else made: code in them, and archives that claim what they do not have."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import small_model

from fm9g.cli import main
from fm9g.errors import UserError
from fm9g.io import pt_archive
from fm9g.io.lazy_tensor import open_pt
from fm9g.io.weights import read_weights

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


def refused(file: Path | str) -> str:
    """The one message that every reader gives."""
    said = set()
    for reader in (read_weights, open_pt):
        with pytest.raises(UserError) as raised:
            reader(Path(file))
        said.add(str(raised.value))
    assert len(said) == 1
    message = said.pop()
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{file}: ")
    assert "weights_only" not in message
    assert not Path("ran").exists()
    return message


# ---- code


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
    assert refused("a.pt") == "a.pt: not a whole weight file (torch finds no tensors in it); get or write it again"


# ---- archives


def save(a: torch.Tensor = SOME) -> dict[str, bytes]:
    """The records of a.pt, by name."""
    torch.save({"a": a, "b": torch.arange(10)}, "a.pt")
    with zipfile.ZipFile("a.pt") as read:
        return {name: read.read(name) for name in read.namelist()}


def write(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile("a.pt", "w", compression) as out:
        for name, content in records.items():
            out.writestr(name, content)


@pytest.mark.parametrize("record", ["byteorder", "version", ".format_version", ".data/serialization_id"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_small_records_are_small(record: str, compression: int) -> None:
    write({**save(), f"a/{record}": bytes(2 << 20)}, compression)
    message = refused("a.pt")
    assert message == (
        f"a.pt: refused: its record a/{record} claims {2 << 20} bytes, where {1 << 20} are the most; torch.save writes "
        "no such file. Get it again"
    )


def test_a_pickle_is_bounded_by_the_number_of_storages(monkeypatch: pytest.MonkeyPatch) -> None:
    records = save()
    most = (1 << 22) + 2 * (1 << 12)
    write({**records, "a/data.pkl": records["a/data.pkl"] + bytes(most)}, zipfile.ZIP_DEFLATED)
    assert f"a/data.pkl claims {most + len(records['a/data.pkl'])} bytes, where {most} are the most" in refused("a.pt")
    monkeypatch.setattr(pt_archive, "_MAX_PICKLE", len(records["a/data.pkl"]) - 2 * (1 << 12))
    write(records)
    assert read_weights(Path("a.pt")).keys() == {"a", "b"}


def test_compressed_values_inflate_to_no_more_than_twenty_times_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    write(save(torch.zeros(100_000)), zipfile.ZIP_DEFLATED)
    assert read_weights(Path("a.pt"))["a"].sum() == 0  # small ones do no harm
    monkeypatch.setattr(pt_archive, "_MAX_INFLATED", 200_000)
    assert "compressed bytes would inflate to 400" in refused("a.pt")
    write(save(), zipfile.ZIP_DEFLATED)
    for reader in (read_weights, lambda file: {name: part.read() for name, part in open_pt(file).items()}):
        assert torch.equal(reader(Path("a.pt"))["a"], SOME)


def claim(file: str, record: str, size: int) -> None:
    """Has the directory of an archive say another size of a record, inflated and as it is there."""
    content = bytearray(Path(file).read_bytes())
    entry = content.rindex(record.encode()) - 46
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + 20 : entry + 28] = struct.pack("<2I", size, size)
    Path(file).write_bytes(content)


@pytest.mark.parametrize("size", [5000, GIB, 2**32 - 2])
def test_a_directory_that_claims_more_than_the_file_has_is_refused(size: int) -> None:
    write(save())
    claim("a.pt", "a/data/1", size)
    message = refused("a.pt")
    assert "overlaps another one" in message or f"claims {size} bytes, more than the file has" in message


def test_records_that_share_bytes_are_refused() -> None:
    write(save())
    content = bytearray(Path("a.pt").read_bytes())
    places = [content.rindex(name) - 46 for name in (b"a/data/0", b"a/data/1")]
    content[places[1] + 42 : places[1] + 46] = content[places[0] + 42 : places[0] + 46]
    Path("a.pt").write_bytes(content)
    assert "overlaps another one" in refused("a.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_record_that_is_there_twice_is_refused() -> None:
    write(save())
    with zipfile.ZipFile("a.pt", "a") as out:
        out.writestr("a/data/0", bytes(4000))
    assert "its record a/data/0 is there twice" in refused("a.pt")


@pytest.mark.parametrize("name", ["../a", "a/../../etc/passwd", "/a/data/0", "a\\b", "a/x\x1b[2J/.."])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    write(save())
    with zipfile.ZipFile("a.pt", "a") as out:
        out.writestr(name, b"")
    assert f"it has a record called {name.replace(chr(27), '␛')}" in refused("a.pt")


@pytest.mark.parametrize("end", range(4, 1200, 97))
def test_a_file_that_is_cut_short_is_told_so(end: int) -> None:
    torch.save({"a": torch.arange(10.0)}, "a.pt")
    os.truncate("a.pt", end)
    assert refused("a.pt") == "a.pt: not a whole weight file (it is cut short); get or write it again"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_pickle_that_is_damaged_is_no_whole_file(method: int) -> None:
    """What cannot be unpacked, or has another checksum, cannot be searched for code either."""
    torch.save({"a": SOME}, "whole.pt")
    with zipfile.ZipFile("whole.pt") as old, zipfile.ZipFile("packed.pt", "w", method) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with zipfile.ZipFile("packed.pt") as packed:
        (record,) = (each for each in packed.infolist() if each.filename.endswith("/data.pkl"))
    content = bytearray(Path("packed.pt").read_bytes())
    begin = record.header_offset + 30 + len(record.filename)
    for place in range(begin, begin + min(12, record.compress_size)):
        content[place] ^= 0xFF
    Path("a.pt").write_bytes(content)
    assert "not a whole weight file" in refused("a.pt")


def test_what_torch_writes_is_accepted() -> None:
    shared = torch.randn(8, 4)
    tensors = {f"{'x' * 100}.{number}": shared[number % 8] for number in range(3000)}  # one storage, many names
    torch.save({**tensors, "own": torch.ones(3), "none": torch.empty(0)}, "a.pt")
    assert read_weights(Path("a.pt")).keys() == open_pt(Path("a.pt")).keys()
    torch.save({}, "a.pt")
    assert read_weights(Path("a.pt")) == {}


# ---- everywhere


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
