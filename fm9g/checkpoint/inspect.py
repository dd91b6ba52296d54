"""Examines checkpoints without changing them: whether one is complete, what it contains, how two differ."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.checkpoint.find import find_checkpoints, find_path, is_checkpoint, list_checkpoints, tensor_files
from fm9g.checkpoint.layout import LOADER_STATE, MANIFEST, MODEL_CONFIG
from fm9g.checkpoint.listing import file_size, find_problems, list_files, relative_message, timestamp_of
from fm9g.checkpoint.manifest import ProgressCallback, read_manifest
from fm9g.checkpoint.tensor_diff import (
    TensorDiff,
    WeightStats,
    compare_tensors,
    describe_nonfinite,
    dtype_name,
    infer_model_config,
    weight_stats,
)
from fm9g.checkpoint.weight_check import check_weights
from fm9g.config.fields import keys_of
from fm9g.config.model import load_model_config
from fm9g.config.run import section_class
from fm9g.errors import UserError
from fm9g.io.json_file import read_object
from fm9g.io.pt_file import open_pt
from fm9g.model.transformer import weight_shapes


@dataclass
class VerifyResult:
    """What reading all of a checkpoint found.

    Attributes:
        files, size: number of files and bytes, from the manifest.
        parameters: number of weights' elements.
        problems: a line each, without the folder.
    """

    files: int = 0
    size: int = 0
    parameters: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CheckpointDiff:
    """The differences between two checkpoints.

    Attributes:
        configuration: key and both values (None: missing), in the sections that both have; None if they share none.
        trainer_state: the same for the trainer state.
        loader_state: whether both are at the same position in the same data; None if one has no position.
        tensors: by kind, for the kinds that both have; weights are always among them.
    """

    configuration: list[tuple[str, Any, Any]] | None
    trainer_state: list[tuple[str, Any, Any]] | None
    loader_state: bool | None
    tensors: dict[str, TensorDiff]


def verify_bytes(folder: Path) -> int:
    """About how many bytes `verify` reads: every file once, and those of tensors twice."""
    return sum(map(file_size, [*list_files(folder), *tensor_files(folder).values()]))


def verify(folder: Path, on_progress: ProgressCallback) -> VerifyResult:
    """Reads all of a checkpoint and reports every problem, including values that are not finite."""
    result = VerifyResult()
    file_problems = dict(find_problems(folder, on_progress))
    result.problems += [f"{name}: {problem}" for name, problem in file_problems.items()]
    if MANIFEST in file_problems:  # which says what the other files should be
        return result
    sizes = [size for size, _ in read_manifest(folder)[1].values()]
    result.files, result.size = len(sizes), sum(sizes)
    files = tensor_files(folder)
    if "weights" not in files:
        result.problems.append("its weight file is missing")
    for kind, file in files.items():
        if file.name in file_problems:
            continue
        try:
            tensors = open_pt(file)
            if kind == "weights":
                result.parameters = sum(tensor.shape.numel() for tensor in tensors.values())
            if problem := describe_nonfinite(tensors, on_progress):
                result.problems.append(f"{file.name}: {problem}")
            if kind != "optimizer":
                shapes = weight_shapes(load_model_config(folder / MODEL_CONFIG))
                check_weights(tensors, shapes, str(file), strict=kind == "weights")
        except UserError as error:
            result.problems.append(relative_message(folder, error))
    return result


def describe(path: Path) -> dict[str, Any]:
    """Describes a checkpoint folder or a single .pt file, as JSON. A value is None if the file does not tell.

    configuration: values that are not defaults, in the form of run_config.json. data: by task.
    """
    checkpoint, file = _resolve(path)
    config_file, tensors = _config_file(file), open_pt(file)
    configuration = checkpoint.run_config() if checkpoint else {}
    if config_file:
        given = {key: value for key, value in read_object(config_file).items() if key != "architectures"}
        raw = {key: {"value": value, "from": str(config_file)} for key, value in given.items()}
        configuration.setdefault("model", raw)
    path_shown = checkpoint.folder if checkpoint else file
    return {
        "path": str(path_shown),
        "step": checkpoint.step if checkpoint else None,
        "counts": checkpoint.trainer_state() if checkpoint else {},
        "data": _data(_loader_state(checkpoint)),
        "written": datetime.fromtimestamp(timestamp_of(path_shown)).astimezone().isoformat(timespec="seconds"),
        "model": load_model_config(config_file).to_json() if config_file else infer_model_config(tensors),
        "model_from": str(config_file or "the shapes of the weights"),
        "parameters": sum(tensor.shape.numel() for tensor in tensors.values()),
        "tensors": len(tensors),
        "dtypes": dict(Counter(map(dtype_name, tensors.values()))),
        "configuration": {section: _not_defaults(section, _object(keys)) for section, keys in configuration.items()},
        "files": {str(part.relative_to(file.parent)): file_size(part) for part in list_files(path_shown)},
    }


def weight_statistics(path: Path, on_progress: ProgressCallback) -> Iterator[WeightStats]:
    """Statistics of every weight of a checkpoint or a .pt file, in the order of the file."""
    return weight_stats(_resolve(path)[1], on_progress)


def compare(a: Path, b: Path, on_progress: ProgressCallback) -> CheckpointDiff:
    """The differences between two checkpoint folders or .pt files.

    on_progress: called with a number of further bytes of a's tensors that are done.
    """
    (checkpoint_a, file_a), (checkpoint_b, file_b) = _resolve(a), _resolve(b)
    files_a, files_b = _tensors_of(checkpoint_a, file_a), _tensors_of(checkpoint_b, file_b)
    for file in (file_a, file_b):
        open_pt(file)  # raises UserError before a JSON file beside something else is taken for a configuration
    config_a, config_b = _configuration(checkpoint_a, file_a), _configuration(checkpoint_b, file_b)
    sections = [section for section in config_a if section in config_b]  # a .pt file has the model's alone
    changes = [change for section in sections for change in _changes(config_a[section], config_b[section])]
    loader_state_a, loader_state_b = _loader_state(checkpoint_a), _loader_state(checkpoint_b)
    return CheckpointDiff(
        configuration=changes if sections else None,
        trainer_state=_changes(_trainer_state(checkpoint_a), _trainer_state(checkpoint_b))
        if checkpoint_a and checkpoint_b
        else None,
        loader_state=None if loader_state_a is None or loader_state_b is None else loader_state_a == loader_state_b,
        tensors={
            kind: compare_tensors(file, files_b[kind], on_progress) for kind, file in files_a.items() if kind in files_b
        },
    )


def tensors_size(path: Path, *kinds: str) -> int:
    """Bytes of the tensor files of a checkpoint folder, or of a .pt file. kinds: of these only; none given: of all."""
    return sum(file_size(file) for kind, file in _tensors_of(*_resolve(path)).items() if not kinds or kind in kinds)


# ---- files


def _tensors_of(checkpoint: Checkpoint | None, file: Path) -> dict[str, Path]:
    return tensor_files(checkpoint.folder) if checkpoint else {"weights": file}


def _resolve(path: Path) -> tuple[Checkpoint | None, Path]:
    """The checkpoint that a path names, None for a single file, and its weight file. Raises UserError."""
    existing = find_path(path)
    if existing.is_file():
        return None, existing
    if not is_checkpoint(existing) and (steps := list_checkpoints(existing)):
        names = ", ".join(step.name for step in steps)
        raise UserError(f"{path}: is a run with the steps {names}; give one of them: {path / steps[-1].name}")
    checkpoint = Checkpoint(find_checkpoints(existing)[0], checksums=False)
    return checkpoint, checkpoint.weight_file


def _config_file(file: Path) -> Path | None:
    """The model configuration of a weight file: of its checkpoint, or the file that `fm9g convert` writes beside it."""
    config_file = file.parent / MODEL_CONFIG if (file.parent / MANIFEST).is_file() else file.with_suffix(".json")
    return config_file if config_file.is_file() else None


# ---- content


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _loader_state(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    return checkpoint.loader_state() if checkpoint and (checkpoint.folder / LOADER_STATE).is_file() else None


def _data(position: Any) -> dict[str, Any] | None:
    """How many of each task's records were started, from a loader state; None for an unknown format."""
    try:
        streams = list(position["streams"].values())
        tasks = {
            task: {
                "records": dataset["records"],
                "begun": (num_started := sum(stream["begun"][number] for stream in streams)),
                "epochs": num_started / dataset["records"],
            }
            for number, (task, dataset) in enumerate(position["fingerprint"]["datasets"].items())
        }
        waiting = sum(len(stream["waiting"]) + sum(map(len, stream["open"])) for stream in streams)
        skipped = sum((Counter(stream["skipped"]) for stream in streams), Counter())
    except (KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError):
        return None
    return {"tasks": tasks, "waiting": waiting, "skipped": dict(skipped)}


def _not_defaults(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section of run_config.json that were given and differ from the defaults."""
    defaults = {key: _default(option) for key, option in keys_of(section_class(section)).items()}
    given = {key: item for key, item in values.items() if _object(item).get("from", "default") != "default"}
    return {key: item for key, item in given.items() if key not in defaults or item.get("value") != defaults[key]}


def _default(option: dataclasses.Field[Any]) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _configuration(checkpoint: Checkpoint | None, file: Path) -> dict[str, dict[str, Any]]:
    """The values of model, train and data, as {section.key: value}."""
    config_file = _config_file(file)
    model = load_model_config(config_file).to_json() if config_file else {}
    sections = {"model": {f"model.{key}": value for key, value in model.items()}} if model else {}
    for name, items in (checkpoint.run_config() if checkpoint else {}).items():
        section = sections.setdefault(name.partition(".")[0], {})
        section.update({f"{name}.{key}": _object(item).get("value") for key, item in _object(items).items()})
    return sections


def _trainer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    trainer_state = checkpoint.trainer_state()
    tasks = _object(trainer_state.pop("global_total_task_token", None))
    return trainer_state | {f"global_total_task_token.{task}": count for task, count in tasks.items()}


def _changes(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]
