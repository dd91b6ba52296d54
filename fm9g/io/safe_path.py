"""Child processes that import nothing from the current folder, which contains data, not code.

With `-m` and `-c`, Python searches the current folder first, even for modules of its own library. So a file token.py or
inspect.py beside a dataset would be executed.
"""

from __future__ import annotations

import os
import sys
from multiprocessing import util
from pathlib import Path

# Python 3.10 has no flag for the current folder alone; -I also ignores PYTHONPATH and other variables.
SAFE_PATH_FLAG = "-P" if sys.version_info >= (3, 11) else "-I"


def python_command(code: str) -> list[str]:
    """The command line of a process that runs code with the import path of this one."""
    current = os.getcwd()
    path = [folder for folder in sys.path if os.path.abspath(folder) != current]
    if os.path.abspath(Path(__file__).parents[2]) == current:  # fm9g runs in its checkout
        path.append(current)
    return [sys.executable, SAFE_PATH_FLAG, "-c", f"import sys; sys.path[:] = {path!r}\n{code}"]


def fm9g_command() -> list[str]:
    """The command line of `fm9g` with this Python."""
    return python_command("from fm9g.cli import main; sys.exit(main())")


def set_child_safe_path() -> None:
    """Makes multiprocessing start its processes this way, too. They get the sys.path of this process."""
    util._args_from_interpreter_flags = _child_flags  # type: ignore[attr-defined]


_inherited_flags = util._args_from_interpreter_flags  # type: ignore[attr-defined]


def _child_flags() -> list[str]:
    """The flags that multiprocessing passes on from this interpreter, and SAFE_PATH_FLAG."""
    return [*dict.fromkeys([*_inherited_flags(), SAFE_PATH_FLAG])]
