"""Archives of weight files that claim what they do not contain."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.weight_files import refused

from fm9g.errors import UserError
from fm9g.io.pt_archive import check_archive
from fm9g.io.pt_file import open_pt, read_weights

GIB, SOME = 1 << 30, torch.arange(1000.0)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
        f"a.pt: refused: its record a/{record} claims {2 << 20} bytes, more than the limit of {1 << 20}; torch.save "
        "does not write such files. Get it again"
    )


def test_a_pickle_is_bounded_by_the_number_of_storages() -> None:
    records = save()
    max_bytes = (1 << 22) + 2 * (1 << 12)
    write({**records, "a/data.pkl": records["a/data.pkl"] + bytes(max_bytes)}, zipfile.ZIP_DEFLATED)
    assert (
        f"a/data.pkl claims {max_bytes + len(records['a/data.pkl'])} bytes, more than the limit of {max_bytes}"
        in refused("a.pt")
    )
    write(records)
    assert check_archive(Path("a.pt"), max_pickle_bytes=len(records["a/data.pkl"]) - 2 * (1 << 12))
    assert read_weights(Path("a.pt")).keys() == {"a", "b"}


def test_compressed_values_inflate_to_no_more_than_twenty_times_their_bytes() -> None:
    write(save(torch.zeros(100_000)), zipfile.ZIP_DEFLATED)
    assert read_weights(Path("a.pt"))["a"].sum() == 0  # small ones do no harm
    with pytest.raises(UserError, match="compressed bytes would inflate to 400"):
        check_archive(Path("a.pt"), max_inflated_bytes=200_000)
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
    assert "it has two records named a/data/0" in refused("a.pt")


@pytest.mark.parametrize("name", ["../a", "a/../../etc/passwd", "/a/data/0", "a\\b", "a/x\x1b[2J/.."])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    write(save())
    with zipfile.ZipFile("a.pt", "a") as out:
        out.writestr(name, b"")
    assert f"it has a record named {name.replace(chr(27), '␛')}" in refused("a.pt")


@pytest.mark.parametrize("end", range(4, 1200, 97))
def test_a_file_that_is_cut_short_is_told_so(end: int) -> None:
    torch.save({"a": torch.arange(10.0)}, "a.pt")
    os.truncate("a.pt", end)
    assert refused("a.pt") == "a.pt: not a complete weight file (it is truncated); get or write it again"


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
    for offset in range(begin, begin + min(12, record.compress_size)):
        content[offset] ^= 0xFF
    Path("a.pt").write_bytes(content)
    assert "not a complete weight file" in refused("a.pt")


def test_what_torch_writes_is_accepted() -> None:
    shared = torch.randn(8, 4)
    tensors = {f"{'x' * 100}.{number}": shared[number % 8] for number in range(3000)}  # one storage, many names
    torch.save({**tensors, "own": torch.ones(3), "none": torch.empty(0)}, "a.pt")
    assert read_weights(Path("a.pt")).keys() == open_pt(Path("a.pt")).keys()
    torch.save({}, "a.pt")
    assert read_weights(Path("a.pt")) == {}
