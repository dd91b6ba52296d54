"""Looking at checkpoints without changing them: what is there, whether it is whole, what it holds, how two differ.

Tensors are mapped from the disk and looked at one at a time, in pieces, so that memory stays small.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fm9g.checkpoint.folder import MANIFEST, MODEL_CONFIG, POSITION, Checkpoint
from fm9g.checkpoint.weights import check_weights, read_weights
from fm9g.config.fields import keys_of, nearest
from fm9g.config.load import read_object
from fm9g.config.mixture import DatasetConfig
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError
from fm9g.model.transformer import weight_shapes

BASE = Path("data") / "checkpoints"  # where a run's name is looked for
RUN_CONFIG = "run_config.json"
_TENSOR_FILES = {"weights": ".pt", "ema": ".ema.pt", "optimizer": ".rank-0.opt"}
_PIECE = 1 << 22  # values that are looked at at a time: as doubles, 32 MiB
_LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.(tmp|old)")  # as fm9g.files names them
Advance = Callable[[int], None]  # told of so many bytes more that are done


@dataclass(frozen=True)
class Listed:
    """A row of a list of checkpoints.

    written: seconds since 1970. size: bytes. tokens, loss, val_loss: None where they are not known. holds: some of
    weights, optimizer, ema. damage: by the sizes of the files alone; empty: none.
    """

    folder: Path
    written: float
    size: int
    tokens: int | None
    loss: float | None
    val_loss: float | None
    holds: list[str]
    damage: str


@dataclass(frozen=True)
class Run:
    """The checkpoints of a run, in order. newest: the last whole one. best: the whole one of the least val_loss.
    leftovers: folders that a save which has not ended left, and whose they are."""

    folder: Path
    checkpoints: list[Listed]
    newest: Path | None
    best: Path | None
    leftovers: list[tuple[Path, str]]


@dataclass
class Verdict:
    """What reading a whole checkpoint gave. parameters: of its weights. damages: in words, without the folder."""

    files: int = 0
    size: int = 0
    parameters: int = 0
    damages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Statistics:
    """Of the finite values of a tensor; None where it has none. std: of the population."""

    name: str
    shape: list[int]
    dtype: str
    not_finite: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None


@dataclass(frozen=True)
class Distance:
    """Between two tensors a and b of a shape. largest: of |a - b|. relative: |a - b| / |a| in the L2 norm.

    relative, cosine: nan where a norm is 0. dtypes: of both, where they are not the same.
    """

    name: str
    largest: float
    relative: float
    cosine: float
    dtypes: str


@dataclass(frozen=True)
class TensorDifference:
    """Between two files of tensors. shapes: name, and the shapes of both. distances: largest first."""

    count: int
    only_a: list[str]
    only_b: list[str]
    shapes: list[tuple[str, list[int], list[int]]]
    distances: list[Distance]

    @property
    def equal(self) -> bool:
        """Bit for bit, in names, shapes and types too."""
        return not (self.only_a or self.only_b or self.shapes or self.distances)


@dataclass(frozen=True)
class Difference:
    """Between two checkpoints. configuration, counts: key, and the values of both (None: not there); of the sections
    that both have, and None where that is none.

    position: whether they stand at the same place in the same data; None: one of them does not tell. tensors: of the
    kinds of tensors that both have; weights are always there.
    """

    configuration: list[tuple[str, Any, Any]] | None
    counts: list[tuple[str, Any, Any]] | None
    position: bool | None
    tensors: dict[str, TensorDifference]


def find(path: Path) -> Path:
    """What a path, or a path below data/checkpoints, names. Raises UserError that lists what is there instead."""
    for there in (path, BASE / path):
        if there.exists():  # a checkpoint is known by the name of its folder: `.` and links say less
            return there if there.name == there.resolve().name else there.resolve()
    for missing in (path, BASE / path):
        while not missing.parent.exists():
            missing = missing.parent
        if steps := _steps(missing.parent):
            names = [step.name for step in steps]
            raise UserError(
                f"{path}: {missing.parent} has no checkpoint {missing.name!r}; its steps: {', '.join(names)}"
                f"{nearest(missing.name, names)}"
            )
        if runs := [run.name for run in _runs(missing.parent)]:
            raise UserError(
                f"{path}: there is no run {missing.name!r} in {missing.parent}; its runs: {', '.join(runs)}"
                f"{nearest(missing.name, runs)}"
            )
    raise UserError(f"{path}: no such file or folder, and no run in {BASE}; give the folder of a run or a checkpoint")


def runs_at(path: Path | None) -> list[Path]:
    """The run of that folder or name, or all runs of a folder of runs. None: those of data/checkpoints."""
    if path is None and not BASE.is_dir():
        raise UserError(f"{BASE}: no such folder; run this beside data/, or give the folder of a run's checkpoints")
    folder = BASE if path is None else find(path)
    if _is_checkpoint(folder):
        raise UserError(f"{folder}: one checkpoint; give the folder of its run, {folder.parent}")
    runs = [folder] if _steps(folder) or _leftovers(folder) else _runs(folder)
    if not runs:
        raise UserError(f"{folder}: holds no checkpoints (folders named by their step), nor runs with some")
    return runs


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint of that folder, or all of a run. Raises UserError where there is none."""
    folder = find(path)
    if _is_checkpoint(folder):
        return [folder]
    if folder.is_file():
        raise UserError(f"{folder}: a file; only checkpoint folders have checksums. See fm9g ckpt show --weights")
    if steps := _steps(folder):
        return steps
    runs = ", ".join(run.name for run in _runs(folder))
    more = f"; it holds the runs {runs}: give one of them" if runs else f": neither {MANIFEST} nor folders with one"
    raise UserError(f"{folder}: not a checkpoint{more}")


def list_run(folder: Path) -> Run:
    """Every checkpoint of a run, whole or not; none of their tensors is read."""
    listed = []
    for step in _steps(folder):
        with suppress(FileNotFoundError):  # a run that goes on may be deleting it
            listed.append(_listed(step))
    whole = [item for item in listed if not item.damage]
    scored = [item for item in whole if item.val_loss is not None and math.isfinite(item.val_loss)]
    best = min(scored, key=lambda item: item.val_loss or 0.0, default=None)
    return Run(folder, listed, whole[-1].folder if whole else None, best.folder if best else None, _leftovers(folder))


def work_of(folder: Path) -> int:
    """About how many bytes `verify` reads: every file, and those of tensors twice."""
    return sum(map(_size, [*_files(folder), *_tensor_files(folder).values()]))


def verify(folder: Path, advance: Advance) -> Verdict:
    """Reads all of a checkpoint and finds all that is wrong with it, values that are not finite among it."""
    verdict = Verdict()
    bad: set[str] = set()
    for name, damage in _damaged_files(folder, verdict, advance):
        bad.add(name)
        verdict.damages.append(f"{name}: {damage}")
    if MANIFEST in bad:  # then nothing is known of the others
        return verdict
    files = _tensor_files(folder)
    if "weights" not in files:
        verdict.damages.append("its weight file is missing")
    for kind, file in files.items():
        if file.name in bad:
            continue
        try:
            tensors = read_weights(file)
            if kind == "weights":
                verdict.parameters = sum(tensor.numel() for tensor in tensors.values())
            counts = {name: _count_not_finite(file, name, tensor, advance) for name, tensor in tensors.items()}
            if odd := [name for name, count in counts.items() if count]:
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                found = f"{sum(counts.values())} values are not finite, in {odd[0]}{more}"
                verdict.damages.append(f"{file.name}: {found}")
            if kind != "optimizer":
                shapes = weight_shapes(load_model_config(folder / MODEL_CONFIG).value)
                check_weights(tensors, shapes, str(file), strict=kind == "weights")
        except UserError as error:
            verdict.damages.append(_within(folder, error))
    return verdict


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint folder or a bare .pt file is, as JSON; a value is None where the file does not tell.

    configuration: what is not a default, as run_config.json holds it. data: by task, and what waits.
    """
    checkpoint, file = _one(path)
    folder, config_file = file.parent, _config_file(file)
    shown: dict[str, Any] = {"path": str(checkpoint.folder if checkpoint else file), "step": None}
    shown |= {"counts": {}, "data": None}
    configuration: dict[str, Any] = {}
    if checkpoint:
        shown |= {"step": checkpoint.step, "counts": _object(checkpoint.counts())}
        if (folder / POSITION).is_file():
            shown["data"] = _data(checkpoint.position())
        if (folder / RUN_CONFIG).is_file():
            configuration = read_object(folder / RUN_CONFIG)
    tensors = read_weights(file)
    if config_file:
        given = {key: value for key, value in read_object(config_file).items() if key != "architectures"}
        raw = {key: {"value": value, "from": str(config_file)} for key, value in given.items()}
        configuration.setdefault("model", raw)
    written = datetime.fromtimestamp(_written(folder if checkpoint else file)).astimezone()
    return shown | {
        "written": written.isoformat(timespec="seconds"),
        "model": load_model_config(config_file).value.to_json() if config_file else _model_from_shapes(tensors),
        "model_from": str(config_file or "the shapes of the weights"),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "tensors": len(tensors),
        "dtypes": dict(Counter(_dtype(tensor) for tensor in tensors.values())),
        "configuration": {
            section: _not_defaults(section, _object(values)) for section, values in configuration.items()
        },
        "files": {str(part.relative_to(folder)): _size(part) for part in (_files(folder) if checkpoint else [file])},
    }


def weight_statistics(path: Path, advance: Advance) -> Iterator[Statistics]:
    """Of every weight of a checkpoint or a .pt file, in the order of the file."""
    file = _one(path)[1]
    for name, tensor in read_weights(file).items():
        yield _statistics(file, name, tensor, advance)


def compare(a: Path, b: Path, advance: Advance) -> Difference:
    """What is different in two checkpoint folders or .pt files. advance: told of the bytes of a's tensors."""
    (one, file_a), (other, file_b) = _one(a), _one(b)
    files_a = _tensor_files(one.folder) if one else {"weights": file_a}
    files_b = _tensor_files(other.folder) if other else {"weights": file_b}
    kinds = [kind for kind in files_a if kind in files_b]
    positions = [_position(checkpoint) for checkpoint in (one, other)]
    return Difference(
        configuration=_changes(*_of_both(_configuration(one, file_a), _configuration(other, file_b))),
        counts=_changes(_counts(one), _counts(other)),
        position=None if None in positions else positions[0] == positions[1],
        tensors={kind: _compare_files(files_a[kind], files_b[kind], advance) for kind in kinds},
    )


def tensors_size(path: Path, *kinds: str) -> int:
    """Bytes of the files of tensors of a checkpoint folder, or of a .pt file. kinds: of these alone; none: of all."""
    checkpoint, file = _one(path)
    files = _tensor_files(checkpoint.folder) if checkpoint else {"weights": file}
    return sum(_size(file) for kind, file in files.items() if not kinds or kind in kinds)


# ---- folders


def _is_checkpoint(folder: Path) -> bool:
    """Also a damaged one without its manifest, but not a run that is called by a number."""
    return (folder / MANIFEST).is_file() or (folder.name.isdecimal() and bool(_tensor_files(folder)))


def _steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, in order."""
    if not folder.is_dir():
        return []
    steps = [step for step in folder.iterdir() if step.name.isdecimal() and _is_checkpoint(step)]
    return sorted(steps, key=lambda step: int(step.name))


def _runs(folder: Path) -> list[Path]:
    return sorted(run for run in folder.iterdir() if _steps(run) or _leftovers(run)) if folder.is_dir() else []


def _leftovers(folder: Path) -> list[tuple[Path, str]]:
    found = []
    for leftover in sorted(folder.glob(".*")):
        match = _LEFTOVER.fullmatch(leftover.name)
        if match and leftover.is_dir():
            name, process, kind = match.groups()
            what = "unfinished" if kind == "tmp" else f"the old {name}, moved aside"
            found.append((leftover, f"{what}: process {process} is writing {name}, or ended before it had"))
    return found


def _tensor_files(folder: Path) -> dict[str, Path]:
    """weights, ema and optimizer: those of them that are there."""
    files = {kind: folder / f"fm9g_live_checkpoint-{folder.name}{suffix}" for kind, suffix in _TENSOR_FILES.items()}
    return {kind: file for kind, file in files.items() if file.is_file()}


def _one(path: Path) -> tuple[Checkpoint | None, Path]:
    """The checkpoint, None for a bare file, and the weight file of what a path names. Raises UserError."""
    there = find(path)
    if there.is_file():
        return None, there
    if not _is_checkpoint(there) and (steps := _steps(there)):
        names = ", ".join(step.name for step in steps)
        raise UserError(f"{path}: a run with the steps {names}; give one of them: {path / steps[-1].name}")
    checkpoint = Checkpoint(checkpoints_at(there)[0], checksums=False)
    return checkpoint, checkpoint.weight_file


def _config_file(file: Path) -> Path | None:
    """The model configuration of a weight file: that of its checkpoint, or what `fm9g convert` writes beside it."""
    beside = file.parent / MODEL_CONFIG if (file.parent / MANIFEST).is_file() else file.with_suffix(".json")
    return beside if beside.is_file() else None


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _size(file: Path) -> int:
    return file.stat().st_size


def _written(path: Path) -> float:
    manifest = path / MANIFEST  # written last, and only once
    return (manifest if manifest.is_file() else path).stat().st_mtime


def _listed(folder: Path) -> Listed:
    damage = next((f"{name}: {damage}" for name, damage in _damaged_files(folder, Verdict(), None)), "")
    counts: dict[str, Any] = {}
    if not damage:
        try:
            counts = _object(Checkpoint(folder, checksums=False).counts())
        except UserError as error:
            damage = _within(folder, error)
    return Listed(
        folder=folder,
        written=_written(folder),
        size=sum(map(_size, _files(folder))),
        tokens=tokens if isinstance(tokens := counts.get("global_token_pass"), int) else None,
        loss=_number(counts.get("loss")),
        val_loss=_number(counts.get("val_loss")),
        holds=[kind for kind in ("weights", "optimizer", "ema") if kind in _tensor_files(folder)],
        damage=damage,
    )


# ---- verify


def _damaged_files(folder: Path, verdict: Verdict, advance: Advance | None) -> Iterator[tuple[str, str]]:
    """The names of damaged files, and what is wrong. advance: None: the sizes alone are compared."""
    if not (folder / MANIFEST).is_file():
        yield MANIFEST, "is missing"
        return
    try:
        manifest = read_object(folder / MANIFEST)
        step = int(manifest["step"])
        files = [(name, int(size), str(checksum)) for name, (size, checksum) in manifest["files"].items()]
    except UserError as error:
        yield MANIFEST, _within(folder, error).removeprefix(f"{MANIFEST}: ")
        return
    except (KeyError, TypeError, ValueError, AttributeError):
        yield MANIFEST, "not a manifest"
        return
    if folder.name != str(step):
        yield MANIFEST, f"is that of step {step}; give the folder its name back"
    for name, size, checksum in files:
        file = folder / name
        found = _size(file) if file.is_file() else None
        if found is None:
            yield name, "is missing"
        elif found != size:
            yield name, f"has {found} of {size} bytes"
        elif advance and _checksum(file, advance) != checksum:
            yield name, "its content has changed"
        verdict.files, verdict.size = verdict.files + 1, verdict.size + (found or 0)


def _checksum(file: Path, advance: Advance) -> str:
    value = 0
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            value = zlib.crc32(block, value)
            advance(len(block))
    return f"{value:08x}"


def _count_not_finite(file: Path, name: str, tensor: torch.Tensor, advance: Advance) -> int:
    count = 0
    for piece in _pieces(file, name, tensor):
        # Types of one byte have no isfinite of their own; float() would make infinities of large doubles.
        count += piece.numel() - int(torch.isfinite(piece.float() if piece.itemsize == 1 else piece).sum())
        advance(piece.nbytes)
    return count


def _within(folder: Path, error: UserError) -> str:
    """An error's text without the folder, which the reader knows, on one line."""
    return str(error).replace(f"{folder}/", "").replace("\n", "; ")


# ---- show


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _data(position: Any) -> dict[str, Any] | None:
    """How often each task's records have been begun, from the position of a loader; None for one of another make."""
    try:
        streams = list(position["streams"].values())
        tasks = {
            task: {
                "records": dataset["records"],
                "begun": (begun := sum(stream["begun"][number] for stream in streams)),
                "epochs": begun / dataset["records"],
            }
            for number, (task, dataset) in enumerate(position["fingerprint"]["datasets"].items())
        }
        waiting = sum(len(stream["waiting"]) + sum(map(len, stream["open"])) for stream in streams)
        skipped = sum((Counter(stream["skipped"]) for stream in streams), Counter())
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
        return None
    return {"tasks": tasks, "waiting": waiting, "skipped": dict(skipped)}


def _not_defaults(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Of a section of run_config.json what was given, and is not what it would have been anyway."""
    cls: type = {"train": TrainConfig, "model": ModelConfig}.get(section, DatasetConfig)
    defaults = {key: _default(option) for key, option in keys_of(cls).items()}
    given = {key: item for key, item in values.items() if _object(item).get("from", "default") != "default"}
    return {key: item for key, item in given.items() if key not in defaults or item.get("value") != defaults[key]}


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _model_from_shapes(weights: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The keys of a model configuration that shapes tell; None for weights of something else."""
    embedding = weights.get("input_embedding.weight")
    gate = weights.get("encoder.layers.0.ffn.ffn.w_in.w_0.weight")
    if embedding is None or gate is None or embedding.dim() != 2 or gate.dim() != 2:
        return None
    layers = {match[1] for name in weights if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    return {
        "vocab_size": embedding.shape[0],
        "dim_model": embedding.shape[1],
        "dim_ff": gate.shape[0],
        "num_layers": len(layers),
        "qkv_bias": "encoder.layers.0.self_att.self_attention.project_q.bias" in weights,
        "tie_lm_head": "lm_head.weight" not in weights,
    }


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _statistics(file: Path, name: str, tensor: torch.Tensor, advance: Advance) -> Statistics:
    """Mean and squares are merged piece by piece (Chan, Golub, LeVeque 1979), which loses no digits."""
    count, mean, squares, least, most = 0, 0.0, 0.0, math.inf, -math.inf
    for piece in _pieces(file, name, tensor):
        values = piece.double()
        values = values[values.isfinite()]
        if new := values.numel():
            variance, center = (float(value) for value in torch.var_mean(values, correction=0))
            squares += variance * new + (center - mean) ** 2 * count * new / (count + new)
            mean += (center - mean) * new / (count + new)
            least, most = min(least, float(values.min())), max(most, float(values.max()))
            count += new
        advance(piece.nbytes)
    figures = (mean, math.sqrt(squares / count), least, most) if count else (None,) * 4
    return Statistics(name, list(tensor.shape), _dtype(tensor), tensor.numel() - count, *figures)


# ---- diff


def _configuration(checkpoint: Checkpoint | None, file: Path) -> dict[str, Any]:
    """As {section.key: value}."""
    config_file = _config_file(file)
    model = load_model_config(config_file).value.to_json() if config_file else {}
    values = {f"model.{key}": value for key, value in model.items()}
    if checkpoint and (checkpoint.folder / RUN_CONFIG).is_file():
        for section, items in read_object(checkpoint.folder / RUN_CONFIG).items():
            values |= {f"{section}.{key}": _object(item).get("value") for key, item in _object(items).items()}
    return values


def _counts(checkpoint: Checkpoint | None) -> dict[str, Any]:
    counts = dict(_object(checkpoint.counts())) if checkpoint else {}
    tasks = _object(counts.pop("global_total_task_token", None))
    return counts | {f"global_total_task_token.{task}": count for task, count in tasks.items()}


def _position(checkpoint: Checkpoint | None) -> Any:
    return checkpoint.position() if checkpoint and (checkpoint.folder / POSITION).is_file() else None


def _changes(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]] | None:
    if not a or not b:
        return None
    return [(key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]


def _of_both(a: dict[str, Any], b: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is in sections that both have: a .pt file tells of the model alone."""
    sections = {key.partition(".")[0] for key in a} & {key.partition(".")[0] for key in b}
    some, others = ({key: item for key, item in c.items() if key.partition(".")[0] in sections} for c in (a, b))
    return some, others


def _compare_files(a: Path, b: Path, advance: Advance) -> TensorDifference:
    some, others = read_weights(a), read_weights(b)
    shapes, distances = [], []
    for name in (name for name in some if name in others):  # in the order of the file
        if some[name].shape != others[name].shape:
            shapes.append((name, list(some[name].shape), list(others[name].shape)))
        elif not _same_bits(a, b, name, some[name], others[name]):
            distances.append(_distance(a, b, name, some[name], others[name]))
        advance(some[name].nbytes)
    return TensorDifference(
        count=len(some.keys() | others.keys()),
        only_a=sorted(some.keys() - others.keys()),
        only_b=sorted(others.keys() - some.keys()),
        shapes=sorted(shapes),
        # What is not a number at all comes before the largest.
        distances=sorted(distances, key=lambda d: (-math.inf if math.isnan(d.largest) else -d.largest, d.name)),
    )


def _same_bits(a: Path, b: Path, name: str, one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and all(
        torch.equal(mine.view(torch.uint8), yours.view(torch.uint8))
        for mine, yours in zip(_pieces(a, name, one), _pieces(b, name, other))
    )


def _distance(a: Path, b: Path, name: str, one: torch.Tensor, other: torch.Tensor) -> Distance:
    largest, sums = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for mine, yours in zip(_pieces(a, name, one), _pieces(b, name, other)):
        x, y = mine.double(), yours.double()
        gap = x - y
        largest = torch.maximum(largest, gap.abs().max())  # which keeps a nan
        sums += torch.stack([gap.dot(gap), x.dot(x), y.dot(y), x.dot(y)])
    gaps, ours, theirs, product = sums.tolist()
    both = math.sqrt(ours) * math.sqrt(theirs)
    return Distance(
        name,
        largest=float(largest),
        relative=math.sqrt(gaps / ours) if ours else math.nan,
        cosine=product / both if both else math.nan,
        dtypes="" if one.dtype == other.dtype else f"{_dtype(one)}, {_dtype(other)}",
    )


def _pieces(file: Path, name: str, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's values in flat, contiguous pieces. Raises UserError for a kind of tensor that has none."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        raise UserError(f"{file}: {name}: found {tensor.type()}, expected a plain tensor of real numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # written out, a few bytes could fill the memory
        raise UserError(f"{file}: {name}: repeats its values ({list(tensor.shape)} of them); write it out in full")
    if tensor.numel():
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            yield piece.contiguous()
