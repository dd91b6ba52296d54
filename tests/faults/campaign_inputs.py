"""Bad inputs for every command, at length: `python tests/faults/campaign_inputs.py --attempts 2000 --seed 1`.

Prints a report, and writes it to docs/robustness/inputs.md. Exit code 1 where anything was a
problem.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults import reports
from faults.inputs import COMMANDS, OUTCOMES, Attempt, Inputs

REPORT = reports.FOLDER / "inputs.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="commands that contain these words")
    parser.add_argument("--minutes", type=float, default=60, help="it ends after so many, whatever it has done")
    arguments = parser.parse_args()
    commands = tuple(command for command in COMMANDS if arguments.only in command.words)
    began = time.monotonic()
    done = []
    with tempfile.TemporaryDirectory(prefix="inputs-") as folder:
        for attempt in Inputs(Path(folder), arguments.seed).attempts(arguments.attempts, commands):
            done.append(attempt)
            for problem in attempt.problems:
                print(f"{attempt}: {problem}\n{attempt.stderr[-2000:]}", flush=True)
            if time.monotonic() - began > 60 * arguments.minutes:
                break
    command = f"python tests/faults/campaign_inputs.py --attempts {len(done)} --seed {arguments.seed}"
    report = _report(command, done, (time.monotonic() - began) / 60)
    if not arguments.only:
        REPORT.write_text(report, encoding="utf-8")
    print(report)
    return int(any(attempt.problems for attempt in done))


def _table(done: list[Attempt], name: str, key: Callable[[Attempt], str]) -> str:
    """Counts of attempts by what `key` gives."""
    rows = []
    for value in [*dict.fromkeys(map(key, done)), "all"]:
        chosen = [attempt for attempt in done if value in (key(attempt), "all")]
        counts = (sum(attempt.outcome == outcome for attempt in chosen) for outcome in OUTCOMES)
        problems = sum(bool(attempt.problems) for attempt in chosen)
        rows.append([value, len(chosen), *counts, problems])
    return reports.markdown_table([name, "attempts", *OUTCOMES, "problems"], rows)


def _report(command: str, done: list[Attempt], minutes: float) -> str:
    longest = max(attempt.seconds for attempt in done)
    return f"""# Bad inputs for every command

`{command}`: {minutes:.0f} minutes.
{reports.machine()}

Each attempt is a good command whose files or words are damaged once: a file by its bytes, its place, its text, its JSON
or its tensors, or a word of the command line, as `tests/faults/mutations.py` says. The command runs in a folder of
small data, models, checkpoints, adapters and logs. Refused: it ended with exit code 2 and one message that names the
file, the key or the word. A problem is anything else that a command should not do with a bad input: a traceback, the
name of an error of Python or of a library, a message that is long or names something else, a death by a signal, more
than a minute or 3 GiB, a file that was changed, made beside the output or left behind, control characters on the
terminal. The longest attempt took {longest:.0f} s. `tests/faults/inputs.py` is the code; a short version is among the
tests.

## By command

{_table(done, "command", lambda attempt: attempt.command.subcommand)}

## By what is damaged

{_table(done, "damage", lambda attempt: attempt.kind)}

"As without it": the command printed and made what it does with the good input, as where a file holds a blank line more.
"Another result": another one, where the damage gives another valid input: other text, fewer lines, another value of a
key; a damaged checkpoint that `ckpt ls` lists as damaged, or from whose predecessor a run resumes.
"""


if __name__ == "__main__":
    sys.exit(main())
