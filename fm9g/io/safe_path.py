"""Processes that import nothing from the folder in which they start: what lies there is data, not code.

Python looks for modules in the current folder first, its own ones included, when it runs `-m` or `-c`. A file token.py
or inspect.py beside a dataset would be executed.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import util
from pathlib import Path

import fm9g

# Python 3.10 has no flag for the current folder alone: -I leaves out PYTHONPATH and the like, too.
SAFE_PATH_FLAG = "-P" if sys.version_info >= (3, 11) else "-I"


def python_command(code: str) -> list[str]:
    """The command of a process that runs code with the packages of this one."""
    current = os.getcwd()
    path = [folder for folder in sys.path if os.path.abspath(folder) != current]
    if os.path.abspath(Path(fm9g.__file__).parents[1]) == current:  # fm9g is run in its checkout
        path.append(current)
    return [sys.executable, SAFE_PATH_FLAG, "-c", f"import sys; sys.path[:] = {path!r}\n{code}"]


def fm9g_command() -> list[str]:
    """The command `fm9g`, as a process of this Python."""
    return python_command("from fm9g.cli import main; sys.exit(main())")


def set_child_safe_path() -> None:
    """Has multiprocessing start its processes in this way, too. They are given this process's sys.path."""
    util._args_from_interpreter_flags = _child_flags  # type: ignore[attr-defined]


_inherited_flags = util._args_from_interpreter_flags  # type: ignore[attr-defined]


def _child_flags() -> list[str]:
    """The flags of this interpreter that multiprocessing passes on, and SAFE_PATH_FLAG."""
    return [*dict.fromkeys([*_inherited_flags(), SAFE_PATH_FLAG])]
