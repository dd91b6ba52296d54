"""What training will make of a mixture: lengths, what is learnt and what is lost, duplicates, shares, epochs, padding.

All records are encoded once. Then the packing code of training runs over stand-ins that have the same lengths. What is
kept of a record is 28 bytes on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from fm9g.config.load import COMMAND_LINE, Layer, build, require_config
from fm9g.config.mixture import DatasetConfig, load_mixture
from fm9g.config.run import with_defaults
from fm9g.config.train import TrainConfig
from fm9g.data.encode import EMPTY, LONG_INPUT, OVERSIZE, Encoded
from fm9g.data.loader import make_plan
from fm9g.data.mixture import Mixture, finding_notes
from fm9g.data.pool import EncodingPool
from fm9g.data.report import draw
from fm9g.data.stream import Stream
from fm9g.data.tokens import join_samples, split_samples
from fm9g.data.workers import check_workers
from fm9g.errors import UserError
from fm9g.files import new_folder
from fm9g.inputs import keep_inputs
from fm9g.progress import Progress

FIGURES, PICTURE = "check.json", "lengths.png"

_MOST = 10**9  # steps, packs, records
_SIMULATED = 20_000  # samples that are packed, at least a step of them
_WORTH_WORKERS = 8 << 20  # bytes below which starting workers takes longer than encoding
_PLACES = 512  # places of a dataset that are looked up at a time
_BLOCK = 1 << 20  # elements of an array on the disk that are in memory at a time
# What is worth a note.
_LOST, _EPOCHS, _PADDING, _DIFFERENT, _FAR_SMALLER = 0.01, 4, 0.01, 0.1, 10

Report = dict[str, Any]


def open_mixture(name: str, **settings: Any) -> tuple[Mixture, Path]:
    """The mixture of a name in dataset_configs/ or a path, opened as a run with these training keys does; its file."""
    run = build(TrainConfig, [Layer(COMMAND_LINE, settings)])
    file, train = require_config("dataset_configs", name), run.value
    configs = [with_defaults(item, run).value for item in load_mixture(file)]
    capacity = train.batch_size * train.max_length
    mixture = Mixture(
        configs,
        train.tokenizer_path,
        train.max_length,
        train.seed,
        capacity,
        date=train.template_date,
        with_findings=True,
    )
    return mixture, file


@keep_inputs()
def check(
    name: str,
    output: Path,
    *,
    steps: int = 1000,
    packs: int = 8,
    sample: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Report:
    """Reads a mixture through and writes check.json and lengths.png to the folder `output`; what check.json holds.

    steps, packs: length of the run, and packs a step. sample: read only so many records of each dataset.
    workers: processes that encode; default: one a core where that pays. settings: as in open_mixture.
    Raises UserError for a mistake, a bad record, and an output folder that holds anything else.
    """
    check_workers(workers)
    for key, value in (("steps", steps), ("packs", packs), ("sample", sample)):
        if value is not None and not 1 <= value <= _MOST:
            raise UserError(f"--{key}: found {value}, expected 1 to {_MOST}")
    mixture, file = open_mixture(name, **settings)
    counts = [min(sample or len(dataset), len(dataset)) for dataset in mixture.datasets]
    if workers is None:
        size = sum(data.nbytes / len(data) * count for data, count in zip(mixture.datasets, counts))
        workers = min(os.cpu_count() or 1, 8) if size > _WORTH_WORKERS else 0
    own = output.is_dir() and {path.name for path in output.iterdir()} <= {FIGURES, PICTURE}
    with new_folder(output, overwrite or own) as folder:
        with TemporaryDirectory(dir=folder) as scratch, EncodingPool(mixture, workers) as pool:
            with Progress("checking", sum(counts), "records") as progress:
                found = [
                    _measure(pool, number, count, Path(scratch) / str(number), progress)
                    for number, count in enumerate(counts)
                ]
            report: Report = {"mixture": str(file), **settings, "sample": sample, "steps": steps, "packs": packs}
            report |= {"max_length": mixture.max_length, "capacity": mixture.capacity}
            report["templates"] = mixture.describe()
            report["buckets"] = _buckets(max(item.figures["max"] for item in found), mixture.max_length)
            report["datasets"] = {}
            for config, item in zip(mixture.configs, found):
                ends = np.searchsorted(item.ordered, np.array([0, *report["buckets"]], np.int32), side="right")
                report["datasets"][config.task_name] = {**item.figures, "histogram": np.diff(ends).tolist()}
            _forecast(report, mixture, found)
            del found  # closes the files
        report["notes"] = _notes(report, mixture)
        (folder / FIGURES).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
        draw(report, folder / PICTURE)
    return report


class _Found(NamedTuple):
    """A dataset's figures and, for each sample of the records that were read: its tokens, how many come before the
    first trained one, and once more its tokens, in order of size. bounds: (records + 1,) which samples a record has."""

    figures: dict[str, Any]
    lengths: np.ndarray
    read: np.ndarray
    ordered: np.ndarray
    bounds: np.ndarray


def _measure(pool: EncodingPool, dataset: int, count: int, file: Path, progress: Progress) -> _Found:
    """Encodes `count` records of a dataset, spread evenly over it. file: begins the names of the arrays on the disk."""
    mixture, records = pool.mixture, pool.mixture.datasets[dataset]
    size = len(records)
    names = ("lengths", "read", "hashes", "bounds")
    lengths, read, hashes, bounds = files = [file.with_suffix(f".{name}") for name in names]
    counted: Counter[str] = Counter()
    dropped = {LONG_INPUT: 0, OVERSIZE: 0, EMPTY: 0}
    with contextlib.ExitStack() as opened:
        lengths_file, read_file, hashes_file, bounds_file = (opened.enter_context(f.open("wb")) for f in files)
        bounds_file.write(np.zeros(1, np.int64).tobytes())
        for numbers, tokens in pool.tokens(dataset, (i * size // count for i in range(count)), in_file=True):
            samples = [split_samples(record) for record in tokens]
            together = list(chain.from_iterable(samples))
            for sample in together:
                _count(sample, mixture.cut(dataset, sample), counted, dropped)
            before = [int(np.argmax(sample[1:] >= 0)) if len(sample) > 1 else 0 for sample in together]
            lengths_file.write(np.array([max(0, len(sample) - 1) for sample in together], np.int32).tobytes())
            read_file.write(np.array(before, np.int32).tobytes())
            bounds_file.write(
                (counted["samples"] + np.cumsum([len(some) for some in samples], dtype=np.int64)).tobytes()
            )
            counted["samples"] += len(together)
            # The last line may lack its line end.
            lines = (records.line(number).removesuffix(b"\n") for number in numbers)
            hashes_file.write(b"".join(hashlib.blake2b(line, digest_size=8).digest() for line in lines))
            progress.advance(len(numbers))
    ordered = lengths.with_suffix(".ordered")
    shutil.copyfile(lengths, ordered)
    in_order, signs = np.memmap(ordered, np.int32, "r+"), np.memmap(hashes, np.uint64, "r+")
    in_order.sort()
    signs.sort()
    filled = in_order[np.searchsorted(in_order, np.int32(1)) :]  # without those that have nothing to learn
    total, empty = int(in_order.sum(dtype=np.int64)), dropped.pop(EMPTY)
    figures = {
        "records": size,
        "read": count,
        "samples": counted["samples"],
        "tokens": total,
        "mean": total / max(1, len(filled)),
        **{key: _quantile(filled, q) for key, q in (("min", 0.0), ("median", 0.5), ("p95", 0.95), ("max", 1.0))},
        **{key: counted[key] for key in ("kept_tokens", "learnt_tokens", "truncated", "segmented", "segments")},
        "dropped": dropped,
        "empty": empty,
        "duplicates": sum(
            int(np.count_nonzero(signs[i : i + _BLOCK][: count - 1 - i] == signs[i + 1 : i + 1 + _BLOCK]))
            for i in range(0, count, _BLOCK)
        ),
        "findings": dict(mixture.findings[dataset]),
    }
    mapped = np.memmap(lengths, np.int32, "r"), np.memmap(read, np.int32, "r")
    return _Found(figures, *mapped, in_order, np.memmap(bounds, np.int64, "r"))


def _count(sample: np.ndarray, encoded: Encoded, counted: Counter[str], dropped: dict[str, int]) -> None:
    """Counts what becomes of a sample."""
    if encoded.skipped:
        dropped[encoded.skipped] += 1
        return
    pieces = encoded.pieces
    counted["kept_tokens"] += sum(len(piece) - 1 for piece in pieces)
    counted["learnt_tokens"] += sum(int(np.count_nonzero(piece[1:] >= 0)) for piece in pieces)
    if len(pieces) > 1:
        counted["segmented"] += 1
        counted["segments"] += len(pieces)
    elif len(pieces[0]) < len(sample):
        counted["truncated"] += 1


def _quantile(ordered: np.ndarray, q: float) -> int:
    """The smallest element that a share q of all do not exceed."""
    return int(ordered[max(0, math.ceil(q * len(ordered)) - 1)]) if len(ordered) else 0


def _buckets(longest: int, max_length: int) -> list[int]:
    """Upper bounds, inclusive, of the histogram's buckets: powers of two and max_length."""
    return sorted({max_length, *(1 << power for power in range((max(longest, max_length) - 1).bit_length() + 1))})


def _forecast(report: Report, mixture: Mixture, found: Sequence[_Found]) -> None:
    """Adds what each dataset gets in the steps of the run, and how well the packs are filled."""
    plan = make_plan(mixture, report["packs"])
    usable = [item.figures["kept_tokens"] > 0 for item in found]
    shares = [share if some else 0.0 for share, some in zip(plan.shares, usable)]  # the others would end a run
    longest = max(item.figures["max"] for item in found)
    marks = np.repeat(np.array([-1, 0], np.int32), longest + 1)

    @cache  # small datasets have many epochs, and all streams go through the same ones
    def numbers(dataset: int, block: int) -> np.ndarray:
        return mixture.numbers(dataset, range(block * _PLACES, (block + 1) * _PLACES))

    def encode(dataset: int, places: Sequence[int]) -> list[Encoded]:
        """As Mixture.encode, of stand-ins that have a record's tokens in number and in what is learnt first."""
        item = found[dataset]
        # Of a sample of the records, the one that was read next to it.
        at = np.array([numbers(dataset, place // _PLACES)[place % _PLACES] for place in places])
        rows = at * (len(item.bounds) - 1) // len(mixture.datasets[dataset])
        return [mixture.cut(dataset, join_samples(list(stand_ins(item, row)))) for row in rows.tolist()]

    def stand_ins(item: _Found, row: int) -> Iterator[np.ndarray]:
        samples = slice(item.bounds[row], item.bounds[row + 1])
        for length, read in zip(item.lengths[samples].tolist(), item.read[samples].tolist()):
            yield marks[longest - read :][: length + 1]

    def read_ahead(dataset: int, places: Iterator[int]) -> Iterator[tuple[int, Encoded]]:
        while chunk := list(islice(places, 64)):
            yield from zip(chunk, encode(dataset, chunk))

    plan = replace(plan, shares=shares)
    streams = [
        Stream(s, plan, mixture.capacity, lambda dataset, place: encode(dataset, [place])[0], read_ahead)
        for s in range(plan.streams)
    ]
    tokens, rows, samples, steps, ended = np.zeros(len(found)), 0, 0, 0, False
    while steps < report["steps"] and samples < _SIMULATED and not ended:
        packs = [pack for stream in streams if (pack := stream.next_samples())]
        for sample in (sample for pack in packs for sample in pack):
            tokens[sample.dataset] += len(sample.tokens) - 1
        rows, samples = rows + len(packs), samples + sum(map(len, packs))
        ended = not packs
        steps += not ended
    filled = tokens.sum() / max(1, rows * mixture.capacity)
    epoch = np.array([item.figures["kept_tokens"] / item.figures["read"] * item.figures["records"] for item in found])
    realised = tokens / max(1.0, tokens.sum())
    if not ended and steps < report["steps"]:
        budget = report["steps"] * plan.streams * mixture.capacity * filled
        tokens = _extrapolated(realised, budget, np.where(plan.repeats, np.inf, epoch))
        steps = min(report["steps"], math.ceil(tokens.sum() / budget * report["steps"]))
    report["packing"] = {
        "rows": rows,
        "samples": samples,
        "padding": float(1 - filled) if rows else 0.0,
        "samples_per_row": samples / max(1, rows),
        "steps": steps,
    }
    wanted = mixture.shares()
    for number, figures in enumerate(report["datasets"].values()):
        epochs = float(tokens[number] / epoch[number]) if epoch[number] else 0.0
        figures |= {"share_wanted": wanted[number], "share_realised": float(realised[number])}
        figures |= {"run_tokens": round(tokens[number]), "run_records": round(epochs * figures["records"])}
        figures["run_epochs"] = epochs


def _extrapolated(shares: np.ndarray, budget: float, most: np.ndarray) -> np.ndarray:
    """A budget of tokens dealt to datasets by share; what one has no more tokens for goes to the others."""
    dealt, going = np.zeros(len(shares)), shares > 0
    while going.any() and budget > 0:
        part = np.minimum(budget * shares * going / shares[going].sum(), most - dealt)
        dealt, budget = dealt + part, budget - part.sum()
        if not (full := going & (dealt >= most)).any():
            break
        going &= ~full
    return dealt


def _notes(report: Report, mixture: Mixture) -> list[str]:
    """What the user should look at, a line each."""
    notes, datasets = [], report["datasets"]
    if report["sample"] and any(figures["read"] < figures["records"] for figures in datasets.values()):
        notes.append(f"only {report['sample']} records of each dataset were read, spread over it: estimates")
    everything = sum(figures["kept_tokens"] / figures["read"] * figures["records"] for figures in datasets.values())
    for config, (task, figures) in zip(mixture.configs, datasets.items()):
        read, records, epochs = figures["read"], figures["records"], figures["run_epochs"]

        samples = figures["samples"]  # a record has several where its template rewrites turns

        def part(count: int, of: int = read, several: bool = samples != read) -> str:
            return f"{count} of {of} {'samples' if several else 'records'} ({count / of:.1%})"

        for reason, count in {**figures["dropped"], EMPTY: figures["empty"]}.items():
            if count > _LOST * samples:
                notes.append(f"{task}: {part(count, samples)} give nothing to train on: {reason}")
        if figures["truncated"] > _LOST * samples:
            truncated = part(figures["truncated"], samples)
            notes.append(f"{task}: {truncated} lose their end at {mixture.max_length} tokens")
        if figures["duplicates"]:
            notes.append(f"{task}: {part(figures['duplicates'], several=False)} repeat another one exactly")
        notes += [f"{task}: {line}" for line in _differences(config, figures)]
        notes += finding_notes(task, Counter(figures["findings"]), read)
        if not figures["learnt_tokens"]:
            notes.append(f"{task}: nothing in it is learnt; a run that draws from it ends with an error")
            continue
        own = figures["kept_tokens"] / read * records / everything
        if not figures["share_wanted"]:
            notes.append(f"{task}: its share is 0: nothing is drawn from it")
        elif config.allow_repeat and epochs > _EPOCHS:
            notes.append(f"{task}: makes {epochs:.1f} epochs in {report['steps']} steps")
        elif not config.allow_repeat and epochs > 0.999:
            notes.append(f"{task}: is used up within the {report['steps']} steps, and not repeated (allow_repeat)")
        elif figures["share_wanted"] > _FAR_SMALLER * own:
            wanted = figures["share_wanted"]
            notes.append(f"{task}: has {own:.2%} of the mixture's tokens and is to be {wanted:.2%} of the run")
    if report["packing"]["padding"] > _PADDING:
        notes.append(f"{report['packing']['padding']:.1%} of the positions are padding; a larger batch_size has less")
    if report["packing"]["steps"] < report["steps"]:
        notes.append(f"the data is used up after about {report['packing']['steps']} of {report['steps']} steps")
    return notes + mixture.template_notes()


def _differences(config: DatasetConfig, figures: dict[str, Any]) -> list[str]:
    """The figures of a dataset's configuration that are far from those found."""
    total = figures["tokens"] / figures["read"] * figures["records"] / 1e9
    pairs = (
        ("nlines", config.nlines, figures["records"]),
        ("average tokens", config.mean_tokens, figures["mean"]),
        ("total_tokens", config.total_tokens, total),
    )
    return [
        f"{key}: {said:.6g} in the configuration, {is_:.6g} found"
        for key, said, is_ in pairs
        if said is not None and abs(said - is_) > _DIFFERENT * is_
    ]
