"""How good inputs are damaged: files by their bytes, their place, their text, their JSON, their tensors; and words."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TEXT = (".json", ".jsonl", ".txt", ".md", ".csv", ".tsv", ".jinja", ".py", ".log_ckpt", "")
TENSORS = (".pt", ".opt")
ESCAPE = "\x1b[31mred\x07\u202e"
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    -(10**6),
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "1",
    "../..",
    "/",
    "\0",
    "\ud800",
    ESCAPE,
    "y" * 100_000,
    [],
    [1],
    [[]],
    [None],
    ["x", "x"],
    {},
    {"x": 1},
)


@dataclass(frozen=True)
class Damage:
    """What was damaged, in words. names: a message may name one of these in position of the file."""

    text: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mutation:
    """apply(path, random): damages a file; None where it cannot. fits(path): whether it is one for such a file."""

    kind: str
    apply: Callable[[Path, random.Random], Damage | None]
    fits: Callable[[Path], bool] = lambda path: True


# ---- bytes


def _bytes(kind: str, change: Callable[[bytes, random.Random], bytes]) -> Mutation:
    def apply(path: Path, rng: random.Random) -> Damage | None:
        old = path.read_bytes()
        new = change(old, rng)
        path.write_bytes(new)
        return None if new == old else Damage(f"{kind}, from {len(old)} bytes to {len(new)}")

    return Mutation(kind, apply)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 8]) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _zeroed(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 16, 512, 1 << 20]))
    return data[:start] + bytes(end - start) + data[end:]


def _cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice([1, 7, 64, 512]) :]


BYTE_MUTATIONS = [
    _bytes("truncated", lambda data, rng: data[: rng.randrange(len(data) + 1)]),
    _bytes("truncated", lambda data, rng: data[: -rng.choice([1, 2, 22, 64]) or None]),
    _bytes("bits flipped", _flipped),
    _bytes("zeros", _zeroed),
    _bytes("bytes missing", _cut_out),
    _bytes("empty", lambda data, rng: b""),
    _bytes("repeated", lambda data, rng: data * 2),
    _bytes("rubbish", lambda data, rng: data + rng.randbytes(rng.choice([1, 8, 4096]))),
    _bytes("rubbish", lambda data, rng: rng.randbytes(rng.choice([1, 8, 4096]))),
]


# ---- places


def _path_mutation(kind: str, put: Callable[[Path], object]) -> Mutation:
    def apply(path: Path, rng: random.Random) -> Damage:
        path.unlink()
        put(path)
        return Damage(kind)

    return Mutation(kind, apply)


def _denied(path: Path, rng: random.Random) -> Damage:
    path.chmod(0)
    return Damage("denied")


PATH_MUTATIONS = [
    _path_mutation("missing", lambda path: None),
    _path_mutation("a folder", Path.mkdir),
    _path_mutation("dangling link", lambda path: path.symlink_to("nowhere")),
    _path_mutation("loop of links", lambda path: path.symlink_to(path.name)),
    _path_mutation("a device", lambda path: path.symlink_to("/dev/null")),
    _path_mutation("a device", lambda path: path.symlink_to("/dev/zero")),
    _path_mutation("a pipe", os.mkfifo),
    Mutation("denied", _denied),
]


# ---- text


def _is_text(path: Path) -> bool:
    return path.suffix in TEXT


def _text(kind: str, change: Callable[[bytes, int], bytes]) -> Mutation:
    """change(data, position): a position in it where a line or a string may be."""

    def apply(path: Path, rng: random.Random) -> Damage | None:
        old = path.read_bytes()
        new = change(old, rng.randrange(len(old) + 1))
        path.write_bytes(new)
        return None if old == new else Damage(kind)

    return Mutation(kind, apply, _is_text)


def _inserted(piece: bytes) -> Callable[[bytes, int], bytes]:
    return lambda data, position: data[:position] + piece + data[position:]


TEXT_MUTATIONS = [
    _text("BOM", lambda data, position: b"\xef\xbb\xbf" + data),
    _text("CRLF", lambda data, position: data.replace(b"\n", b"\r\n")),
    _text("UTF-16", lambda data, position: data.decode().encode("utf-16")),
    _text("NUL", _inserted(b"\0")),
    _text("not UTF-8", _inserted(b"\xff\xfe")),
    _text("control characters", _inserted(ESCAPE.encode())),
    _text("deep nesting", _inserted(b"[" * 200_000)),
    _text("long line", _inserted(b"z" * 3_000_000)),
    _text("blank lines", _inserted(b"\n\n \n")),
    _text("a number of many digits", _inserted(b"1" * 6000)),
]


# ---- JSON


def _is_json(path: Path) -> bool:
    return path.suffix in (".json", ".jsonl", ".log_ckpt")


def _inner(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    pairs = []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        pairs += [(content, key), *_inner(value)]
    return pairs


def _with_value(content: Any, rng: random.Random) -> Damage | None:
    if not (pairs := _inner(content)):
        return None
    # Those near the root mean most; a tokenizer has thousands below.
    container, key = rng.choice(pairs[:40] if rng.random() < 0.7 else pairs)
    old, container[key] = container[key], (new := rng.choice(VALUES))
    if old == new and type(old) is type(new):
        return None
    quoted = new[:60] if isinstance(new, str) and len(new) > 2 else ""
    return Damage(f"{key}: {new!r:.60}", (str(key), quoted))


def _without_key(content: Any, rng: random.Random) -> Damage | None:
    if not (pairs := _inner(content)):
        return None
    container, key = rng.choice(pairs[:40] if rng.random() < 0.7 else pairs)
    del container[key]
    return Damage(f"{key} missing", (str(key),))


def _with_unknown(content: Any, rng: random.Random) -> Damage | None:
    target = rng.choice([content, *(value for value in _values(content) if isinstance(value, dict))])
    if not isinstance(target, dict):
        return None
    key = rng.choice(["unknown_key", "", ESCAPE, "k" * 5000, "\ud800", "__class__"])
    target[key] = rng.choice(VALUES)
    return Damage(f"unknown key {key!r:.40}", (key,))


def _values(content: Any) -> list[Any]:
    return [container[key] for container, key in _inner(content)]


def _json(kind: str, change: Callable[[Any, random.Random], Damage | None]) -> Mutation:
    """Changes the content of a JSON file, or of one line of a .jsonl file."""

    def apply(path: Path, rng: random.Random) -> Damage | None:
        lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
        number = rng.randrange(len(lines))
        try:
            content = json.loads(lines[number])
        except ValueError:
            return None
        damage = change(content, rng)
        if damage is None:
            return None
        lines[number] = json.dumps(content).encode()
        path.write_bytes(b"\n".join(lines) + b"\n" * (path.suffix == ".jsonl"))
        return Damage(f"line {number + 1}: {damage.text}", (*damage.names, f"line {number + 1}"))

    return Mutation(kind, apply, _is_json)


def _written(kind: str, change: Callable[[Any, random.Random], str]) -> Mutation:
    """Writes another text for the content of a JSON file."""

    def apply(path: Path, rng: random.Random) -> Damage | None:
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            return None
        path.write_text(change(content, rng), encoding="utf-8")
        return Damage(kind)

    return Mutation(kind, apply, _is_json)


def _twice(content: Any, rng: random.Random) -> str:
    text = json.dumps(content)
    if not isinstance(content, dict) or not content:
        return text + text
    key = rng.choice(list(content))
    return f"{{{json.dumps(key)}: {json.dumps(rng.choice(VALUES[:8]))}, {text[1:]}"


JSON_MUTATIONS = [
    *[_json("another value", _with_value)] * 6,
    _json("key missing", _without_key),
    _json("unknown key", _with_unknown),
    _written("key twice", _twice),
    _written("in a list", lambda content, rng: json.dumps([content])),
    _written("another root", lambda content, rng: json.dumps(rng.choice(VALUES))),
    _written("not quite JSON", lambda content, rng: json.dumps(content).replace('"', "'").replace("true", "True")),
    _written("not quite JSON", lambda content, rng: json.dumps(content, indent=1).replace("\n}", ",\n} // end")),
]


# ---- tensors


def _is_tensors(path: Path) -> bool:
    return path.suffix in (*TENSORS, ".safetensors")


def _tensors(kind: str, change: Callable[[dict[str, Any], random.Random], Any]) -> Mutation:
    """Changes the tensors of a file by name; what a change returns is written."""

    def apply(path: Path, rng: random.Random) -> Damage | None:
        from safetensors.torch import load_file, save_file

        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)
        if not isinstance(content, dict) or not content:
            return None
        names = set(content)
        new = change(content, rng)
        try:
            save_file(new, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(new, path)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return None
        names_in_message = tuple(str(name) for name in (names ^ set(new) if isinstance(new, dict) else ()))
        return Damage(kind, names_in_message)

    return Mutation(kind, apply, _is_tensors)


def _of_one(change: Callable[[torch.Tensor, random.Random], Any]) -> Callable[[dict[str, Any], random.Random], Any]:
    def changed(content: dict[str, Any], rng: random.Random) -> Any:
        found = [(holder, key) for holder, key in _inner(content) if isinstance(holder[key], torch.Tensor)]
        if not found:
            return content
        holder, key = rng.choice(found)
        holder[key] = change(holder[key].clone(), rng)
        return content

    return changed


def _poisoned(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    if tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), 1e38])
    return tensor


def _renamed(content: dict[str, Any], rng: random.Random) -> Any:
    key = rng.choice(list(content))
    content[rng.choice(["x", f"module.{key}", ESCAPE, f"{key}.weight", "layers.99.w"])] = content.pop(key)
    return content


def _dropped(content: dict[str, Any], rng: random.Random) -> Any:
    content.pop(rng.choice(list(content)))
    return content


def _added(content: dict[str, Any], rng: random.Random) -> Any:
    content[rng.choice(["extra.weight", ESCAPE, "encoder.layers.2.x", ""])] = torch.zeros(3)
    return content


_SHAPES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda tensor: tensor[None],
    lambda tensor: tensor.flatten(),
    lambda tensor: tensor[:-1] if tensor.ndim else tensor,
    lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1)) if tensor.ndim else tensor,
    lambda tensor: tensor[:0] if tensor.ndim else tensor,
    lambda tensor: torch.tensor(0.0),
)
_TYPES = (torch.int64, torch.bool, torch.float64, torch.complex64, torch.float16, torch.uint8, torch.float8_e4m3fn)
_OBJECTS: tuple[Any, ...] = (
    None,
    1,
    "x",
    [],
    {},
    [1],
    {"a": 1},
    {1: torch.zeros(1)},
    {"state_dict": {}},
    torch.zeros(3),
    {"m": [None]},
)

TENSOR_MUTATIONS = [
    _tensors("a tensor's shape", _of_one(lambda tensor, rng: rng.choice(_SHAPES)(tensor).contiguous())),
    _tensors("a tensor's type", _of_one(lambda tensor, rng: tensor.to(rng.choice(_TYPES)))),
    _tensors("not finite", _of_one(_poisoned)),
    _tensors("no tensor", _of_one(lambda tensor, rng: rng.choice([None, 1, "x", [tensor], {"a": tensor}]))),
    _tensors("a sparse tensor", _of_one(lambda tensor, rng: tensor.to_sparse())),
    _tensors("a meta tensor", _of_one(lambda tensor, rng: tensor.to("meta"))),
    _tensors("a vast tensor", _of_one(lambda tensor, rng: torch.zeros(1).expand(10**6, 10**6))),
    _tensors("renamed", _renamed),
    _tensors("tensor missing", _dropped),
    _tensors("tensor too many", _added),
    _tensors("another object", lambda content, rng: copy.deepcopy(rng.choice(_OBJECTS))),
]


class _Evil:
    """A pickle of it makes a file when it is read."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def _evil(path: Path, rng: random.Random) -> Damage:
    torch.save({"a": _Evil()}, path)
    return Damage("code in a pickle")


def _legacy(path: Path, rng: random.Random) -> Damage:
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    return Damage("torch's old format")


def _zip(kind: str, change: Callable[[dict[str, bytes], random.Random], None]) -> Mutation:
    """Changes the members of a .pt file."""

    def apply(path: Path, rng: random.Random) -> Damage | None:
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
            change(members, rng)
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w") as new:
                for name, data in members.items():
                    new.writestr(name, data)
            path.write_bytes(content.getvalue())
            return Damage(kind)
        return None

    return Mutation(kind, apply, lambda path: path.suffix in TENSORS)


def _without_member(members: dict[str, bytes], rng: random.Random) -> None:
    members.pop(rng.choice(list(members)))


def _with_shorter_member(members: dict[str, bytes], rng: random.Random) -> None:
    name = rng.choice(list(members))
    members[name] = members[name][: len(members[name]) // 2]


def _with_flipped_pickle(members: dict[str, bytes], rng: random.Random) -> None:
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = _flipped(members[name], rng)


PICKLE_MUTATIONS = [
    Mutation("code in a pickle", _evil, lambda path: path.suffix in TENSORS),
    Mutation("torch's old format", _legacy, lambda path: path.suffix in TENSORS),
    _zip("a member missing", _without_member),
    _zip("a member cut", _with_shorter_member),
    *[_zip("pickle flipped", _with_flipped_pickle)] * 2,
]


def _header(kind: str, change: Callable[[dict[str, Any], random.Random], Any]) -> Mutation:
    """Changes the header of a safetensors file."""

    def apply(path: Path, rng: random.Random) -> Damage | None:
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        names = change(header, rng)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        return Damage(f"header: {kind}", (names,) if names else ())

    return Mutation(kind, apply, lambda path: path.suffix == ".safetensors")


def _with_offsets(header: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice([name for name in header if name != "__metadata__"])
    start, end = header[name]["data_offsets"]
    choices = ([end, start], [0, end], [start, end + 4], [-8, end], [2**62, 2**63], [start + 4, end + 4], [0, 0])
    header[name]["data_offsets"] = rng.choice(choices)
    return name


def _with_entry(header: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice([name for name in header if name != "__metadata__"])
    key = rng.choice(["dtype", "shape", "data_offsets"])
    header[name][key] = rng.choice([*VALUES, "F64", "I8", [0], [2**62, 4], [-1, -1], [1.5]])
    return name


def _with_length(path: Path, rng: random.Random) -> Damage:
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", rng.choice([0, 1, 2**20, 2**31, 2**63, 2**64 - 1])) + data[8:])
    return Damage("length of the header")


HEADER_MUTATIONS = [
    _header("offsets", _with_offsets),
    *[_header("header entry", _with_entry)] * 2,
    Mutation("header length", _with_length, lambda path: path.suffix == ".safetensors"),
]

CONTENT_MUTATIONS: list[Mutation] = [*BYTE_MUTATIONS, *TEXT_MUTATIONS]
FILE_MUTATIONS: list[Mutation] = [
    *BYTE_MUTATIONS,
    *PATH_MUTATIONS,
    *TEXT_MUTATIONS,
    *JSON_MUTATIONS * 2,
    *TENSOR_MUTATIONS,
    *PICKLE_MUTATIONS,
    *HEADER_MUTATIONS,
]


# ---- words of a command line

WORD_VALUES = (
    "",
    " ",
    "abc",
    "-1",
    "0",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 40,
    "9" * 5000,
    "none",
    "null",
    "true",
    "[]",
    "[" * 100_000,
    "{}",
    "../..",
    "/",
    ".",
    "~",
    "/dev/null",
    "/proc/version",
    "x" * 300,
    "a/" * 3000,
    "数据",
    ESCAPE,
    "\udcff",
    "a\nb",
    "*",
    "[a",
    "%s",
)
PATHS = ("s.jsonl", "s.parquet", "indexed", "indexed/index.h5", "tokenizer", "tokenizer/tokenizer.json", "m.json",
         "mixture.json", "t.json", "m.pt", "a.pt", "hf", "hf/config.json", "peft", "data", "data/checkpoints/m", "m/4",
         "lora/1", "m/2", "data/logs/m", "data/logs/m/metrics.jsonl", "transform.py", "t.jinja", "hf/model.safetensors",
         "loop", "nowhere", "out", ".")  # fmt: skip
Words = tuple[str, list[str], str, tuple[str, ...]]  # kind, argv, what, names


def _value_positions(argv: list[str]) -> list[int]:
    """Where words are that are values: not the verbs in front, not options."""
    verbs = 2 if argv[0] in ("data", "config", "ckpt", "lora") else 1
    return [n for n in range(verbs, len(argv)) if not argv[n].startswith("--")]


def _names_at(argv: list[str], position: int) -> tuple[str, ...]:
    """The words by which a message may name a position."""
    option = argv[position - 1].removeprefix("--") if argv[position - 1].startswith("--") else ""
    words = [option, option.replace("_", "-"), argv[position], argv[position].encode("unicode_escape").decode()]
    return tuple(word for word in words if word)


def _replaced(kind: str, values: tuple[str, ...]) -> Callable[[list[str], random.Random], Words]:
    def change(argv: list[str], rng: random.Random) -> Words:
        new = list(argv)
        if not (positions := _value_positions(argv)):
            return kind, [*argv, value := rng.choice(values)], "a word more", (value, "argument")
        position = rng.choice(positions)
        new[position] = rng.choice(values)
        names = (*_names_at(new, position), *_names_at(argv, position), "argument", "command line")
        return kind, new, f"{argv[position - 1]} {new[position]!r:.60}", names

    return change


def _without_word(argv: list[str], rng: random.Random) -> Words:
    position = rng.randrange(1, len(argv))
    new = [*argv[:position], *argv[position + 1 :]]
    return (
        "word missing",
        new,
        f"without {argv[position]}",
        ("argument", "value", "invalid choice", argv[position], *new[1:]),
    )


def _with_option(argv: list[str], rng: random.Random) -> Words:
    option = rng.choice(["--nonsense", "--nonsense=1", "-x", "--", "--model.", "--data.t.nonsense", "--=", "--lr"])
    new = [*argv, option, *rng.choice([[], ["1"]])]
    return "unknown option", new, option, (option.removeprefix("--"), "argument", "expected", "command line")


def _with_option_twice(argv: list[str], rng: random.Random) -> Words:
    options = [n for n, word in enumerate(argv) if word.startswith("--")]
    if not options:
        return _with_option(argv, rng)
    position = rng.choice(options)
    return "option twice", [*argv, *argv[position : position + 2]], argv[position], (argv[position], "argument")


def _with_key(argv: list[str], rng: random.Random) -> Words:
    """A key of the configuration of a run, with a value that hardly fits."""
    if argv[0] not in ("train", "plan", "doctor") and argv[:2] != ["config", "show"]:
        return _replaced("another value", WORD_VALUES)(argv, rng)
    from fm9g.config.fields import keys_of
    from fm9g.config.mixture import DatasetConfig
    from fm9g.config.model import ModelConfig
    from fm9g.config.train import TrainConfig

    prefix, cls = rng.choice(
        [("", TrainConfig), ("", TrainConfig), ("model.", ModelConfig), ("data.t.", DatasetConfig)]
    )
    key = rng.choice(list(keys_of(cls)))
    option, value = f"--{prefix}{key}", rng.choice(WORD_VALUES)
    return "key of a run", [*argv, option, value], f"{option} {value!r:.60}", (key, prefix, value, "command line")


WORD_MUTATIONS: list[Callable[[list[str], random.Random], Words]] = [
    *[_replaced("another value", WORD_VALUES)] * 3,
    *[_replaced("another path", PATHS)] * 3,
    _without_word,
    _with_option,
    _with_option_twice,
    *[_with_key] * 4,
]
