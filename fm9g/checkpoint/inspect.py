"""Looking at checkpoints without changing them: what is there, whether it is whole, what it holds, how two differ."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fm9g.checkpoint.find import checkpoints_at, checkpoints_in, find, is_checkpoint, leftovers_in, tensor_files
from fm9g.checkpoint.folder import MANIFEST, MODEL_CONFIG, POSITION, Advance, Checkpoint, damaged_files, read_manifest
from fm9g.checkpoint.tensors import (
    Statistics,
    TensorDifference,
    compare_tensors,
    dtype_of,
    model_of,
    not_finite,
    statistics,
)
from fm9g.checkpoint.weights import check_weights, read_weights
from fm9g.config.fields import keys_of
from fm9g.config.load import read_object
from fm9g.config.mixture import DatasetConfig
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError
from fm9g.model.transformer import weight_shapes


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
    """What reading a whole checkpoint gave. files, size: as its manifest tells. parameters: of its weights.
    damages: in words, without the folder."""

    files: int = 0
    size: int = 0
    parameters: int = 0
    damages: list[str] = field(default_factory=list)


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


def list_run(folder: Path) -> Run:
    """Every checkpoint of a run, whole or not; none of their tensors is read."""
    listed = []
    for step in checkpoints_in(folder):
        with suppress(FileNotFoundError):  # a run that goes on may be deleting it
            listed.append(_listed(step))
    whole = [item for item in listed if not item.damage]
    scored = [(item.val_loss, item.folder) for item in whole if item.val_loss is not None]
    best = min((row for row in scored if math.isfinite(row[0])), key=lambda row: row[0], default=(None, None))
    return Run(folder, listed, whole[-1].folder if whole else None, best[1], leftovers_in(folder))


def work_of(folder: Path) -> int:
    """About how many bytes `verify` reads: every file, and those of tensors twice."""
    return sum(map(_size, [*_files(folder), *tensor_files(folder).values()]))


def verify(folder: Path, advance: Advance) -> Verdict:
    """Reads all of a checkpoint and finds all that is wrong with it, values that are not finite among it."""
    verdict = Verdict()
    bad = dict(_damaged_files(folder, verdict, advance))
    verdict.damages += [f"{name}: {damage}" for name, damage in bad.items()]
    if MANIFEST in bad:  # then nothing is known of the others
        return verdict
    files = tensor_files(folder)
    if "weights" not in files:
        verdict.damages.append("its weight file is missing")
    for kind, file in files.items():
        if file.name in bad:
            continue
        try:
            tensors = read_weights(file)
            if kind == "weights":
                verdict.parameters = sum(tensor.numel() for tensor in tensors.values())
            if odd := not_finite(file, tensors, advance):
                verdict.damages.append(f"{file.name}: {odd}")
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
    config_file, tensors = _config_file(file), read_weights(file)
    configuration = checkpoint.run_config() if checkpoint else {}
    if config_file:
        given = {key: value for key, value in read_object(config_file).items() if key != "architectures"}
        raw = {key: {"value": value, "from": str(config_file)} for key, value in given.items()}
        configuration.setdefault("model", raw)
    place = checkpoint.folder if checkpoint else file
    return {
        "path": str(place),
        "step": checkpoint.step if checkpoint else None,
        "counts": checkpoint.counts() if checkpoint else {},
        "data": _data(_position(checkpoint)),
        "written": datetime.fromtimestamp(_written(place)).astimezone().isoformat(timespec="seconds"),
        "model": load_model_config(config_file).value.to_json() if config_file else model_of(tensors),
        "model_from": str(config_file or "the shapes of the weights"),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "tensors": len(tensors),
        "dtypes": dict(Counter(map(dtype_of, tensors.values()))),
        "configuration": {section: _not_defaults(section, _object(keys)) for section, keys in configuration.items()},
        "files": {str(part.relative_to(file.parent)): _size(part) for part in _files(place)},
    }


def weight_statistics(path: Path, advance: Advance) -> Iterator[Statistics]:
    """Of every weight of a checkpoint or a .pt file, in the order of the file."""
    return statistics(_one(path)[1], advance)


def compare(a: Path, b: Path, advance: Advance) -> Difference:
    """What is different in two checkpoint folders or .pt files. advance: told of the bytes of a's tensors."""
    (one, file_a), (other, file_b) = _one(a), _one(b)
    files_a, files_b = _tensors_of(one, file_a), _tensors_of(other, file_b)
    ours, theirs = _configuration(one, file_a), _configuration(other, file_b)
    sections = [section for section in ours if section in theirs]  # a .pt file tells of the model alone
    changes = [change for section in sections for change in _changes(ours[section], theirs[section])]
    place_a, place_b = _position(one), _position(other)
    return Difference(
        configuration=changes if sections else None,
        counts=_changes(_counts(one), _counts(other)) if one and other else None,
        position=None if place_a is None or place_b is None else place_a == place_b,
        tensors={
            kind: compare_tensors(file, files_b[kind], advance) for kind, file in files_a.items() if kind in files_b
        },
    )


def tensors_size(path: Path, *kinds: str) -> int:
    """Bytes of the files of tensors of a checkpoint folder, or of a .pt file. kinds: of these alone; none: of all."""
    return sum(_size(file) for kind, file in _tensors_of(*_one(path)).items() if not kinds or kind in kinds)


# ---- folders


def _files(path: Path) -> list[Path]:
    """All below a folder; or the file itself."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _tensors_of(checkpoint: Checkpoint | None, file: Path) -> dict[str, Path]:
    return tensor_files(checkpoint.folder) if checkpoint else {"weights": file}


def _one(path: Path) -> tuple[Checkpoint | None, Path]:
    """The checkpoint, None for a bare file, and the weight file of what a path names. Raises UserError."""
    there = find(path)
    if there.is_file():
        return None, there
    if not is_checkpoint(there) and (steps := checkpoints_in(there)):
        names = ", ".join(step.name for step in steps)
        raise UserError(f"{path}: a run with the steps {names}; give one of them: {path / steps[-1].name}")
    checkpoint = Checkpoint(checkpoints_at(there)[0], checksums=False)
    return checkpoint, checkpoint.weight_file


def _config_file(file: Path) -> Path | None:
    """The model configuration of a weight file: that of its checkpoint, or what `fm9g convert` writes beside it."""
    beside = file.parent / MODEL_CONFIG if (file.parent / MANIFEST).is_file() else file.with_suffix(".json")
    return beside if beside.is_file() else None


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
            counts = Checkpoint(folder, checksums=False).counts()
        except UserError as error:
            damage = _within(folder, error)
    return Listed(
        folder=folder,
        written=_written(folder),
        size=sum(map(_size, _files(folder))),
        tokens=tokens if isinstance(tokens := counts.get("global_token_pass"), int) else None,
        loss=_number(counts.get("loss")),
        val_loss=_number(counts.get("val_loss")),
        holds=list(tensor_files(folder)),
        damage=damage,
    )


def _damaged_files(folder: Path, verdict: Verdict, advance: Advance | None) -> Iterator[tuple[str, str]]:
    """The names of damaged files, and what is wrong. advance: None: the sizes alone are compared."""
    if not (folder / MANIFEST).is_file():
        yield MANIFEST, "is missing"
        return
    try:
        step, files = read_manifest(folder)
    except UserError as error:
        yield MANIFEST, _within(folder, error).removeprefix(f"{MANIFEST}: ")
        return
    if folder.name != str(step):
        yield MANIFEST, f"is that of step {step}; give the folder its name back"
    verdict.files, verdict.size = len(files), sum(size for size, _ in files.values())
    yield from damaged_files(folder, files, advance is not None, advance)


def _within(folder: Path, error: UserError) -> str:
    """An error's text without the folder, which the reader knows, on one line."""
    return str(error).replace(f"{folder}/", "").replace("\n", "; ")


# ---- what they hold


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _position(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    return checkpoint.position() if checkpoint and (checkpoint.folder / POSITION).is_file() else None


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


def _configuration(checkpoint: Checkpoint | None, file: Path) -> dict[str, dict[str, Any]]:
    """The values of model, train and data, as {section.key: value}."""
    config_file = _config_file(file)
    model = load_model_config(config_file).value.to_json() if config_file else {}
    sections = {"model": {f"model.{key}": value for key, value in model.items()}} if model else {}
    for name, items in (checkpoint.run_config() if checkpoint else {}).items():
        section = sections.setdefault(name.partition(".")[0], {})
        section.update({f"{name}.{key}": _object(item).get("value") for key, item in _object(items).items()})
    return sections


def _counts(checkpoint: Checkpoint) -> dict[str, Any]:
    counts = checkpoint.counts()
    tasks = _object(counts.pop("global_total_task_token", None))
    return counts | {f"global_total_task_token.{task}": count for task, count in tasks.items()}


def _changes(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]
