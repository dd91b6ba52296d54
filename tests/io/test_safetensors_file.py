"""Headers of safetensors files: they are refused exactly when the safetensors library refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.weight_files import some_tensors
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fm9g.errors import UserError
from fm9g.io.safetensors_file import SAFETENSORS_DTYPES, open_safetensors


def file_of(header: str | bytes, data: int = 0, length: int | None = None) -> bytes:
    """data: bytes behind the header. length: of the header, as the file says it; default: as it is."""
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(shape: str = "[2,3]", offsets: str = "[0,24]", dtype: str = '"F32"', more: str = "") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(tensor: str, data: int = 24) -> bytes:
    return file_of(f'{{"a":{tensor}}}', data)


def two(second: str, data: int) -> bytes:
    return file_of(f'{{"a":{entry()},"b":{second}}}', data)


BIG, U8 = 2**32, '"U8"'


CASES = {
    "plain": one(entry()),
    "bytes behind the last tensor": one(entry(), 25),
    "cut": one(entry(), 23),
    "a gap": two(entry(offsets="[28,52]"), 52),
    "a gap in front": one(entry(offsets="[4,28]"), 28),
    "an overlap": two(entry(offsets="[12,36]"), 36),
    "the same bytes": two(entry(), 24),
    "another order": two(entry(offsets="[24,48]"), 48),
    "not aligned": file_of(f'{{"x":{entry("[1]", "[0,1]", U8)},"a":{entry(offsets="[1,25]")}}}', 25),
    "a name twice, the same": file_of(f'{{"a":{entry()},"a":{entry()}}}', 24),
    "a name twice, the last is whole": file_of(f'{{"a":{entry(offsets="[24,48]")},"a":{entry()}}}', 24),
    "a name twice, the first is whole": file_of(f'{{"a":{entry()},"a":{entry(offsets="[24,48]")}}}', 48),
    "a name twice, in between": file_of(
        f'{{"a":{entry("[1]", "[0,4]")},"b":{entry(offsets="[24,48]")},"a":{entry()}}}', 48
    ),
    "a list": file_of("[]"),
    "null": file_of("null"),
    "a text": file_of('"a"'),
    "a number": file_of("1"),
    "no JSON": file_of("{{{{{"),
    "no end": file_of("{"),
    "nothing": file_of("", 8),
    "deep": file_of("[" * 10_000),
    "float offsets": one(entry(offsets="[0.0,24.0]")),
    "offsets with exponents": one(entry(offsets="[0,24e0]")),
    "negative offsets": one(entry(offsets="[-24,0]")),
    "minus zero": one(entry(offsets="[-0,24]")),
    "backwards": one(entry(offsets="[24,0]")),
    "three offsets": one(entry(offsets="[0,24,1]")),
    "one offset": one(entry(offsets="[0]")),
    "offsets as an object": one(entry(offsets='{"0":0}')),
    "float shape": one(entry("[2.0,3]")),
    "negative shape": one(entry("[-2,-3]")),
    "true in a shape": one(entry("[true,6]")),
    "text in a shape": one(entry('["2","3"]')),
    "no shape": one(entry("null")),
    "another product": one(entry("[2,4]")),
    "a size beyond 64 bits": one(entry("[18446744073709551616,0]", "[0,0]"), 0),
    "a product beyond 64 bits": one(entry(f"[{BIG},{BIG},{BIG}]", "[0,0]"), 0),
    "a product beyond 64 bits, times 0": one(entry(f"[{BIG},{BIG},{BIG},0]", "[0,0]"), 0),
    "0 times a product beyond 64 bits": one(entry(f"[0,{BIG},{BIG},{BIG}]", "[0,0]"), 0),
    "empty": one(entry("[0,3]", "[0,0]"), 0),
    "empty between": two(entry("[0]", "[24,24]"), 24),
    "empty within": two(entry("[0]", "[12,12]"), 24),
    "empty beyond": two(entry("[0]", "[30,30]"), 24),
    "scalar": one(entry("[]", "[0,4]"), 4),
    "no tensors": file_of("{}"),
    "no tensors, and bytes": file_of("{}", 3),
    "metadata": file_of(f'{{"__metadata__":{{"format":"pt"}},"a":{entry()}}}', 24),
    "metadata with a number": file_of(f'{{"__metadata__":{{"format":1}},"a":{entry()}}}', 24),
    "metadata null": file_of(f'{{"__metadata__":null,"a":{entry()}}}', 24),
    "metadata as a list": file_of(f'{{"__metadata__":[],"a":{entry()}}}', 24),
    "metadata twice": file_of(f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{entry()}}}', 24),
    "metadata with a key twice": file_of(f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{entry()}}}', 24),
    "metadata as a tensor": file_of(f'{{"__metadata__":{entry()}}}', 24),
    "spaces before": file_of(f' {{"a":{entry()}}}', 24),
    "spaces behind": file_of(f'{{"a":{entry()}}} \n\t', 24),
    "NUL behind": file_of(f'{{"a":{entry()}}}\0', 24),
    "a mark of byte order": file_of(f'\ufeff{{"a":{entry()}}}', 24),
    "UTF-16": file_of(f'{{"a":{entry()}}}'.encode("utf-16-le"), 24),
    "Latin-1": file_of(f'{{"\xe9":{entry()}}}'.encode("latin-1"), 24),
    "half a character": file_of(f'{{"\\ud800":{entry()}}}', 24),
    "a character in two": file_of(f'{{"\\ud83d\\ude00":{entry()}}}', 24),
    "a control character": file_of(f'{{"\x01":{entry()}}}', 24),
    "a control character, written out": file_of(f'{{"\\u0001":{entry()}}}', 24),
    "no name": file_of(f'{{"":{entry()}}}', 24),
    "another key": one(entry(more=',"x":1')),
    "another key twice": one(entry(more=',"x":1,"x":2')),
    "a key twice": one(entry(more=',"shape":[2,3]')),
    "NaN": one(entry(more=',"x":NaN')),
    "1e999": one(entry(more=',"x":1e999')),
    "5000 digits": one(entry(more=f',"x":{"9" * 5000}')),
    "100 deep": one(entry(more=f',"x":{"[" * 100 + "]" * 100}')),
    "200 deep": one(entry(more=f',"x":{"[" * 200 + "]" * 200}')),
    "an entry as a list": file_of('{"a":["F32",[2,3],[0,24]]}', 24),
    "an entry as a longer list": file_of('{"a":["F32",[2,3],[0,24],1]}', 24),
    "no entry": file_of('{"a":null}'),
    "no type": file_of('{"a":{"shape":[2,3],"data_offsets":[0,24]}}', 24),
    "a type in lower case": one(entry(dtype='"f32"')),
    "a type as a number": one(entry(dtype="1")),
    "a type as an object": one(entry(dtype='{"F32":null}')),
    "half of a byte": one(entry("[3]", "[0,1]", '"F4"'), 1),
    "no bytes": b"",
    "two bytes": b"\x01\x00",
    "a header longer than the file": file_of("{}", length=3),
    "a header of 100 million bytes": file_of("{}", length=100_000_001),
    "a header of 2^63 bytes": file_of("{}", length=2**63),
}


CASES |= {
    f"of type {name}": one(entry("[2,8]", f"[0,{16 * dtype.itemsize}]", f'"{name}"'), 16 * dtype.itemsize)
    for name, dtype in SAFETENSORS_DTYPES.items()
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_refused_exactly_when_the_library_refuses_it(case: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(CASES[case])
    try:
        with safe_open(file, "pt") as opened:
            names = opened.offset_keys()
            reference = {name: (opened.get_slice(name).get_shape(), opened.get_tensor(name)) for name in names}
    except SafetensorError:
        with pytest.raises(UserError) as raised:
            open_safetensors(file)
        assert str(raised.value).startswith(f"{file}: not a complete safetensors file: ")
        assert len(str(raised.value).splitlines()) == 1
        return
    actual = open_safetensors(file)
    assert {name: (list(tensor.shape), tensor.dtype) for name, tensor in actual.items()} == {
        name: (shape, tensor.dtype) for name, (shape, tensor) in reference.items()
    }
    assert all(0 <= tensor.offset <= file.stat().st_size - tensor.nbytes for tensor in actual.values())


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bytes behind the last tensor", "its tensors have 24 bytes, but the file has 25"),
        ("cut", "its tensors have 24 bytes, but the file has 23"),
        ("a gap", "b: starts at data byte 28, but the tensor before it ends at 24"),
        ("an overlap", "b: starts at data byte 12, but the tensor before it ends at 24"),
        ("a name twice, the first is whole", "a: is in the header twice"),
        ("a list", "its header is not a JSON object"),
        ("negative offsets", "a: expected a dtype, and a shape and data_offsets of integers >= 0"),
        ("float offsets", "a: expected a dtype, and a shape and data_offsets of integers >= 0"),
        ("another product", r"a: has 24 bytes, but \[2, 4\] of F32 needs 32"),
        ("no bytes", "it has 0 bytes, fewer than its header needs"),
    ],
)
def test_the_message_names_the_tensor(case: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(CASES[case])
    with pytest.raises(UserError, match=message):
        open_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E4M3FNUZ", "C64"])
def test_types_that_cannot_be_read_are_named(dtype: str, tmp_path: Path) -> None:
    bytes_of_8 = {"F4": 4, "F6_E2M3": 6, "F8_E4M3FNUZ": 8, "C64": 64}[dtype]
    (tmp_path / "a.safetensors").write_bytes(one(entry("[8]", f"[0,{bytes_of_8}]", f'"{dtype}"'), bytes_of_8))
    with pytest.raises(UserError, match=f"a: found {dtype}, which cannot be read; get the model in bf16, fp16 or fp32"):
        open_safetensors(tmp_path / "a.safetensors")


def test_safetensors_files_are_read_as_the_library_does(tmp_path: Path) -> None:
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored = open_safetensors(tmp_path / "a.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name].read(), tensor) for name, tensor in tensors.items())
