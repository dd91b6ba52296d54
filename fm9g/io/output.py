"""Checks on the single file that a command writes: a page or a picture."""

from __future__ import annotations

from pathlib import Path

from fm9g.errors import UserError
from fm9g.io.inputs import check_output

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")


def check_output_file(output: Path, key: str, suffixes: tuple[str, ...], overwrite: bool) -> None:
    """Raises UserError if a command must not write its page or picture to `output`.

    Args:
        output: the file to write.
        key: the option that names it.
        suffixes: the allowed suffixes.
        overwrite: whether an existing file may be replaced. An input of the command never is.
    """
    if output.suffix.lower() not in suffixes:
        raise UserError(f"{key}: found {str(output)!r}, expected a name that ends in {' or '.join(suffixes)}")
    if output.is_dir():
        raise UserError(f"{output}: a folder is in the way; choose another {key}")
    check_output(output)
    if output.exists() and not overwrite:
        raise UserError(f"{output}: already exists; choose another {key}, or replace it with --overwrite")
