"""What attempts at breaking a command came to."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from faults.forked import EndedCommand

State = dict[str, str]  # path below a folder -> checksum of the file there


@dataclass
class AttemptResults:
    """title: what was attempted, in words. count: how often. outcomes: how the attempts ended, in words -> how often.
    kills: SIGKILLs among them. problems: what should not be: a file lost, damaged or left behind, a traceback."""

    title: str
    count: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    problems: list[str] = field(default_factory=list)

    def add_outcome(self, outcome: str) -> None:
        self.count += 1
        self.outcomes[outcome] += 1

    def add_problem(self, problem: str, ended: EndedCommand | None = None) -> None:
        output = f"\n{ended.stdout[-500:]}\n{ended.stderr[-3000:]}" if ended else ""
        self.problems.append(f"{self.title}: {problem}{output}")


def state(folder: Path) -> State:
    """All files below a folder, empty folders too."""
    found = {}
    for here, folders, files in os.walk(folder):
        for name in files:
            path = Path(here, name)
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        if not folders and not files and here != str(folder):
            found[f"{Path(here).relative_to(folder)}/"] = ""
    return found


def is_temporary(path: str) -> bool:
    """Whether a path below a folder is of something that is being written, or was."""
    return any(part.startswith(".") for part in Path(path).parts)


def without_temporary(found: State) -> State:
    """Also without empty folders, such as one for what is yet to get its name."""
    return {path: checksum for path, checksum in found.items() if not is_temporary(path) and not path.endswith("/")}


def differences(found: State, wanted: State) -> str:
    """The paths in which two states differ, or that one of them has alone."""
    differing = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
    return ", ".join(
        f"{path} ({'missing' if path not in found else 'too many' if path not in wanted else 'other content'})"
        for path in differing
    )


def clear(folder: Path, content: Path | None = None) -> None:
    """Empties a folder; it then holds a copy of what `content` does."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if content is not None:
        shutil.copytree(content, folder, dirs_exist_ok=True)


def is_plain_refusal(ended: EndedCommand) -> bool:
    """Whether a command ended as it does for a user's mistake: with 2 and one message, and no traceback."""
    messages = [line for line in ended.stderr.splitlines() if line.startswith("fm9g: ")]
    return ended.returncode == 2 and len(messages) == 1 and "Traceback" not in ended.stderr and not ended.timed_out
