"""Safetensors files as lazy tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fm9g.errors import UserError
from fm9g.io.inputs import register_input
from fm9g.io.json_file import DuplicateKeyError, reject_duplicate_keys
from fm9g.io.lazy_tensor import LazyTensor

# The types that safetensors files can name and torch has.
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    The safetensors library parses the header, so it decides which files are valid. Raises UserError for the others.
    """
    register_input(path)
    try:
        with safe_open(path, "numpy") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            described = [(name, part.get_shape(), part.get_dtype()) for name, part in slices]
        with path.open("rb") as content:
            offset = 8 + int.from_bytes(content.read(8), "little")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        reason = _header_problem(path) or str(error).removeprefix("Error while deserializing header: ")
        raise UserError(
            f"{path}: not a complete safetensors file: {reason}; download or write the file again"
        ) from None
    tensors = {}
    for name, shape, dtype in described:  # without gaps, which the library refuses
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name}: found {dtype}, which cannot be read; get the model in bf16, fp16 or fp32")
        tensors[name] = LazyTensor(path, torch.Size(shape), SAFETENSORS_DTYPES[dtype], offset)
        offset += tensors[name].nbytes
    return tensors


def _header_problem(path: Path) -> str:
    """Why the safetensors library refuses a file, with the tensor's name; empty if the reason is not clear."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                return f"it has {size} bytes, fewer than its header needs"
            if length > _MAX_HEADER_BYTES:
                return f"its header has {length} bytes, more than the library accepts"
            header = json.loads(file.read(length), object_pairs_hook=reject_duplicate_keys)
        return _layout_problem(header, size - 8 - length)
    except DuplicateKeyError as error:
        return f"{error.key}: is in the header twice"
    except (OSError, ValueError, RecursionError):
        return ""


def _layout_problem(header: Any, data_bytes: int) -> str:
    """What is wrong with a parsed header; empty: nothing. data_bytes: bytes after the header."""
    if not isinstance(header, dict):
        return "its header is not a JSON object"
    header.pop("__metadata__", None)
    if invalid := next((name for name, entry in header.items() if not _is_tensor_entry(entry)), None):
        return f"{invalid}: expected a dtype, and a shape and data_offsets of integers >= 0"
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        needed = math.prod(entry["shape"]) * SAFETENSORS_DTYPES[entry["dtype"]].itemsize
        if last - first != needed:
            return f"{name}: has {last - first} bytes, but {entry['shape']} of {entry['dtype']} needs {needed}"
        if first != end:
            return f"{name}: starts at data byte {first}, but the tensor before it ends at {end}"
        end = last
    return f"its tensors have {end} bytes, but the file has {data_bytes}" if end != data_bytes else ""


def _is_tensor_entry(entry: Any) -> bool:
    """Whether a header entry has the form of a tensor's, whatever its numbers."""
    if not isinstance(entry, dict) or entry.get("dtype") not in list(SAFETENSORS_DTYPES):
        return False
    lists = entry.get("shape"), entry.get("data_offsets")
    if not all(isinstance(each, list) and all(type(n) is int and n >= 0 for n in each) for each in lists):
        return False
    return len(entry["data_offsets"]) == 2
