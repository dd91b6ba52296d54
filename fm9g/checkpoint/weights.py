"""9G weight files: `torch.save` of a flat dict from weight name to tensor."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fm9g.errors import UserError
from fm9g.files import new_file


def write_weights(path: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes a .pt file; it appears under its name only when whole."""
    with new_file(path) as temporary:
        save_tensors(dict(weights), temporary)


def save_tensors(content: dict[str, Any], path: Path) -> None:
    """torch.save to an open file: given a path, torch writes its name inside, and equal contents give unequal files."""
    with path.open("wb") as file:
        torch.save(content, file)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pt file, mapped from the disk where the file allows it.

    Raises UserError for a missing file, one that is cut short, and one that holds anything but tensors: nothing in
    it is ever executed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and cannot be mapped
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises whatever zipfile, pickle and its own reader raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole weight file ({reason}); get or write it again") from None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path}: expected one flat dict from weight names to tensors, as 9G .pt files hold")
    return weights


def check_weights(
    weights: dict[str, torch.Tensor], shapes: dict[str, torch.Size], where: str, strict: bool
) -> list[str]:
    """Compares the weights of a file with those of a model.

    strict: missing and unknown names are errors; else they come back as lines to show. A wrong shape always is one.
    """
    differences = []
    for problem, names in (
        ("is missing", shapes.keys() - weights.keys()),
        ("is not part of the model", weights.keys() - shapes.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            differences.append(f"{where}: {min(names)}{more} {problem}")
    if integers := sorted(name for name in shapes.keys() & weights.keys() if not weights[name].is_floating_point()):
        raise UserError(f"{where}: {integers[0]}: found {weights[integers[0]].dtype}, expected floating-point weights")
    wrong = [name for name in shapes.keys() & weights.keys() if weights[name].shape != shapes[name]]
    if wrong:
        name = min(wrong)
        raise UserError(
            f"{where}: {name}: shape {list(weights[name].shape)}, expected {list(shapes[name])}; "
            f"{len(wrong)} such: it was made with another model configuration"
        )
    if differences and strict:
        raise UserError("\n".join(differences))
    return differences
