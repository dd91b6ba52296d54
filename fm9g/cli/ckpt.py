"""The subcommands for checkpoints: ls, verify, show, diff. None of them writes anything."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.printable import printable
from fm9g.text_table import text_table

if TYPE_CHECKING:
    from fm9g.checkpoint.tensor_diff import TensorDiff

_MAX_SHOWN = 10  # lines of a list of differences, without --all


def add_ckpt_commands(subcommand: Any, group: Any) -> None:
    """Adds the subcommands. subcommand, group: functions that add a subcommand, or a group of them."""
    ckpt = group("ckpt", "ls, verify, show, diff: look at checkpoints without changing them")
    where = "a folder, or RUN/STEP, RUN/best or RUN/last in data/checkpoints/"
    ls = subcommand(
        "ls", _ls, "list the checkpoints of runs: size, loss, contents, whether they are complete", parent=ckpt
    )
    ls.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="a folder, or a name in data/checkpoints/; default: all of these",
    )
    verify = subcommand(
        "verify", _verify, "read all of a checkpoint: checksums, shapes, values; exit status 2: a problem", ckpt
    )
    verify.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help=f"a checkpoint: {where}; or a run, for all its checkpoints"
    )
    show = subcommand("show", _show, "describe a checkpoint or a 9G .pt file", parent=ckpt)
    show.add_argument("path", type=Path, metavar="PATH", help=f"a .pt file, or a checkpoint: {where}")
    show.add_argument("--weights", action="store_true", help="also shape, type and statistics of every weight")
    show.add_argument("--json", action="store_true", help="as JSON; null: unknown, or not a finite number")
    diff = subcommand(
        "diff", _diff, "compare two checkpoints or .pt files; exit status 0: equal weights, 1: different", ckpt
    )
    diff.add_argument("a", type=Path, metavar="A", help=f"a .pt file, or a checkpoint: {where}")
    diff.add_argument("b", type=Path, metavar="B", help="another one")
    diff.add_argument("--all", action="store_true", help=f"every difference, not only the {_MAX_SHOWN} largest")


def _ls(options: argparse.Namespace) -> None:
    from fm9g.checkpoint.find import find_runs
    from fm9g.checkpoint.listing import inspect_run

    folders = [run for path in options.runs or [None] for run in find_runs(path)]
    rows: list[Sequence[str]] = [("run", "step", "written", "size", "tokens", "loss", "val_loss", "contents", "state")]
    notes = []
    for run in map(inspect_run, dict.fromkeys(folders)):
        for item in run.checkpoints:
            labels = ["resume auto"] * (item.folder == run.newest) + ["best val_loss"] * (item.folder == run.best)
            state = f"damaged: {item.problem}" if item.problem else "complete"
            rows.append(
                (
                    run.folder.resolve().name,
                    item.folder.name,
                    datetime.fromtimestamp(item.written).strftime("%Y-%m-%d %H:%M"),
                    _bytes(item.size),
                    "" if item.tokens is None else f"{item.tokens:,}",
                    "" if item.loss is None else f"{item.loss:.4f}",
                    "" if item.val_loss is None else f"{item.val_loss:.4f}",
                    " +".join(item.contents),
                    f"{state}  <- {', '.join(labels)}" if labels else state,
                )
            )
        notes += [printable(f"note: {leftover}: {explanation}") for leftover, explanation in run.leftovers]
    print("\n".join([*text_table(rows, right=(1, 3, 4, 5, 6)), *notes]))


def _verify(options: argparse.Namespace) -> int:
    from fm9g.checkpoint.find import find_checkpoints
    from fm9g.checkpoint.inspect import verify, verify_bytes
    from fm9g.progress import Progress

    damaged = 0
    for folder in dict.fromkeys(folder for path in options.paths for folder in find_checkpoints(path)):
        with Progress(f"verifying {folder.name}", verify_bytes(folder), "B") as progress:
            result = verify(folder, progress.advance)
        if not folder.exists():
            print(printable(f"{folder}: was deleted meanwhile"), flush=True)
        elif result.problems:
            damaged += 1
            print("\n  ".join(map(printable, [f"{folder}: damaged", *result.problems])))
        else:
            size = f"{result.files} files, {_bytes(result.size)}, {result.parameters:,} parameters"
            print(printable(f"{folder}: complete: {size}, all values finite"), flush=True)
    return 2 if damaged else 0


def _show(options: argparse.Namespace) -> None:
    import dataclasses

    from fm9g.checkpoint.inspect import describe, tensors_size, weight_statistics
    from fm9g.progress import Progress

    shown = describe(options.path)
    if options.weights:
        with Progress("reading weights", tensors_size(options.path, "weights"), "B") as progress:
            rows = list(weight_statistics(options.path, progress.advance))
        shown["weights"] = [dataclasses.asdict(row) for row in rows]
    if options.json:
        print(json.dumps(_finite(shown), ensure_ascii=False, indent=1))
    else:
        print("\n".join(_description(shown)))


def _diff(options: argparse.Namespace) -> int:
    from fm9g.checkpoint.inspect import compare, tensors_size
    from fm9g.progress import Progress

    with Progress("comparing", tensors_size(options.a), "B") as progress:
        result = compare(options.a, options.b, progress.advance)
    print(f"A: {printable(str(options.a))}\nB: {printable(str(options.b))}")
    for title, changes in (("configuration", result.configuration), ("counts", result.trainer_state)):
        if changes is None:
            print(f"{title}: not in both")
        elif not changes:
            print(f"{title}: equal")
        else:
            rows = [("", "A", "B"), *((key, _value(a), _value(b)) for key, a, b in changes)]
            print(
                "\n  ".join(
                    [f"{title}: {len(changes)} {'differ' if len(changes) > 1 else 'differs'}", *text_table(rows)]
                )
            )
    positions = {None: "not in both", True: "equal", False: "different"}
    print(f"data position: {positions[result.loader_state]}")
    for kind, tensors in result.tensors.items():
        print("\n  ".join(_tensor_lines(kind, tensors, options.all)))
    return 0 if result.tensors["weights"].equal else 1


def _tensor_lines(kind: str, diff: TensorDiff, show_all: bool) -> Iterator[str]:
    if diff.equal:
        yield f"{kind}: {diff.count} tensors, all bits equal"
        return
    yield f"{kind}: of {diff.count} tensors, {len(diff.deltas)} differ in values, {len(diff.shapes)} in shape"
    only = [("only in A", name) for name in diff.only_a] + [("only in B", name) for name in diff.only_b]
    rows = [(name, where) for where, name in only]
    rows += [(name, f"shape {a} in A, {b} in B") for name, a, b in diff.shapes]
    yield from _shortened(text_table(rows), show_all)
    if diff.deltas:
        deltas = [(d.name, f"{d.max_abs:.3e}", f"{d.relative:.3e}", f"{d.cosine:.6f}", d.dtypes) for d in diff.deltas]
        header = ("", "largest |A - B|", "|A - B| / |A|", "cosine", "")
        yield from _shortened(text_table([header, *deltas], right=(1, 2, 3)), show_all, 1)


def _shortened(lines: list[str], show_all: bool, header: int = 0) -> Iterator[str]:
    shown = len(lines) if show_all else _MAX_SHOWN + header
    yield from lines[:shown]
    if len(lines) > shown:
        yield f"and {len(lines) - shown} more; --all shows them"


def _description(shown: dict[str, Any]) -> Iterator[str]:
    """The result of `describe` as text."""
    counts, model = shown["counts"], shown["model"] or {}
    yield printable(shown["path"])
    facts = [("written", shown["written"].replace("T", " "))]
    if shown["step"] is not None:
        tasks = counts.get("global_total_task_token")
        each = [f"{task} {_count(count)}" for task, count in tasks.items()] if isinstance(tasks, dict) else []
        facts.append(("step", str(shown["step"])))
        facts.append(("tokens", f"{_count(counts.get('global_token_pass'))}: {', '.join(each)}"))
        known = ("iteration", "global_token_pass", "global_total_task_token")
        facts += [(key, _value(value)) for key, value in counts.items() if key not in known and value is not None]
        facts += [("data", text) for text in _data_lines(shown["data"])]
    keys = ", ".join(f"{key} {_value(value)}" for key, value in _main_keys(model))
    facts += (
        [("model", keys), ("", f"from {shown['model_from']}")]
        if keys
        else [("model", "not a 9G model, by the names of the weights")]
    )
    types = ", ".join(f"{count} {dtype}" for dtype, count in shown["dtypes"].items())
    facts.append(("parameters", f"{shown['parameters']:,} in {shown['tensors']} tensors: {types}"))
    yield from (f"  {line}" for line in text_table(facts))
    for section, values in shown["configuration"].items():
        if values:
            yield f"[{printable(section)}] values that are not defaults"
            rows = [(key, _value(item.get("value")), str(item["from"])) for key, item in values.items()]
            yield from (f"  {line}" for line in text_table(rows))
    yield "files"
    files = [(name, _bytes(size)) for name, size in shown["files"].items()]
    yield from (f"  {line}" for line in text_table(files, right=(1,)))
    if "weights" in shown:
        yield "weights"
        header = ("", "shape", "type", "mean", "std", "min", "max", "")
        table = text_table([header, *map(_weight_row, shown["weights"])], right=(3, 4, 5, 6))
        yield from (f"  {line}" for line in table)


def _main_keys(model: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in ("num_layers", "dim_model", "dim_ff", "num_heads", "num_kv_heads", "dim_head", "vocab_size"):
        if key in model:
            yield key, model[key]


def _data_lines(data: dict[str, Any] | None) -> Iterator[str]:
    if data is None:
        yield "position unknown"
        return
    for task, counts in data["tasks"].items():
        yield f"{task}: {counts['begun']:,} records of {counts['records']:,} started, {counts['epochs']:.3f} epochs"
    yield f"{data['waiting']:,} of these records or samples wait for the next steps"
    for reason, count in data["skipped"].items():
        yield f"{count:,} records were skipped: {reason}"


def _weight_row(row: dict[str, Any]) -> Sequence[str]:
    statistics = ("" if row[key] is None else f"{row[key]:.4g}" for key in ("mean", "std", "min", "max"))
    remark = f"{row['not_finite']:,} not finite" if row["not_finite"] else ""
    return (row["name"], str(row["shape"]), row["dtype"], *statistics, remark)


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _finite(value: Any) -> Any:
    """Replaces nan and infinity, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
