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

from fm9g.config.load import COMMAND_LINE, ConfigSource, build, require_config
from fm9g.config.mixture import DatasetConfig, load_mixture
from fm9g.config.run import with_defaults
from fm9g.config.train import TrainConfig
from fm9g.data.encode.encoder import EMPTY, LONG_INPUT, OVERSIZE, EncodedRecord
from fm9g.data.encode.token_array import join_samples, split_samples
from fm9g.data.inspect.check_report import plot_report
from fm9g.data.load.encoding_pool import EncodingPool
from fm9g.data.load.loader import make_sampling_plan
from fm9g.data.load.mixture import Mixture, issue_notes
from fm9g.data.load.pack_stream import PackStream
from fm9g.data.workers import check_workers
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir
from fm9g.io.inputs import protect_inputs
from fm9g.progress import Progress

REPORT_FILE, PLOT_FILE = "check.json", "lengths.png"

_MAX_COUNT = 10**9  # steps, packs, records
_MAX_SIMULATED_SAMPLES = 20_000  # samples that are packed, at least a step of them
_MIN_BYTES_FOR_WORKERS = 8 << 20  # bytes below which starting workers takes longer than encoding
_LOOKUP_BLOCK = 512  # places of a dataset that are looked up at a time
_BLOCK = 1 << 20  # elements of an array on the disk that are in memory at a time
# What is worth a note.
_MAX_LOST, _MAX_EPOCHS, _MAX_PADDING, _MAX_DIFFERENCE, _MAX_OVERSAMPLING = 0.01, 4, 0.01, 0.1, 10

CheckReport = dict[str, Any]


def open_named_mixture(name: str, **settings: Any) -> tuple[Mixture, Path]:
    """The mixture of a name in dataset_configs/ or a path, opened as a run with these training keys does; its file."""
    run = build(TrainConfig, [ConfigSource(COMMAND_LINE, settings)])
    file, train = require_config("dataset_configs", name), run.value
    configs = [with_defaults(item, run).value for item in load_mixture(file)]
    row_length = train.batch_size * train.max_length
    mixture = Mixture(
        configs,
        train.tokenizer_path,
        train.max_length,
        train.seed,
        row_length,
        date=train.chat_template_date,
        collect_issues=True,
    )
    return mixture, file


@protect_inputs()
def check_mixture(
    name: str,
    output: Path,
    *,
    steps: int = 1000,
    packs: int = 8,
    sample: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> CheckReport:
    """Reads a mixture through and writes check.json and lengths.png to the folder `output`; what check.json holds.

    steps, packs: length of the run, and packs a step. sample: read only so many records of each dataset.
    workers: processes that encode; default: one a core where that pays. settings: as in open_named_mixture.
    Raises UserError for a mistake, a bad record, and an output folder that holds anything else.
    """
    check_workers(workers)
    for key, value in (("steps", steps), ("packs", packs), ("sample", sample)):
        if value is not None and not 1 <= value <= _MAX_COUNT:
            raise UserError(f"--{key}: found {value}, expected 1 to {_MAX_COUNT}")
    mixture, file = open_named_mixture(name, **settings)
    counts = [min(sample or len(dataset), len(dataset)) for dataset in mixture.datasets]
    if workers is None:
        size = sum(data.nbytes / len(data) * count for data, count in zip(mixture.datasets, counts))
        workers = min(os.cpu_count() or 1, 8) if size > _MIN_BYTES_FOR_WORKERS else 0
    own = output.is_dir() and {path.name for path in output.iterdir()} <= {REPORT_FILE, PLOT_FILE}
    with atomic_dir(output, overwrite or own) as folder:
        with TemporaryDirectory(dir=folder) as scratch, EncodingPool(mixture, workers) as pool:
            with Progress("checking", sum(counts), "records") as progress:
                found = [
                    _measure(pool, number, count, Path(scratch) / str(number), progress)
                    for number, count in enumerate(counts)
                ]
            report: CheckReport = {"mixture": str(file), **settings, "sample": sample, "steps": steps, "packs": packs}
            report |= {"max_length": mixture.max_length, "capacity": mixture.row_length}
            report["templates"] = mixture.describe()
            report["buckets"] = _buckets(max(item.stats["max"] for item in found), mixture.max_length)
            report["datasets"] = {}
            for config, item in zip(mixture.configs, found):
                ends = np.searchsorted(item.ordered, np.array([0, *report["buckets"]], np.int32), side="right")
                report["datasets"][config.task_name] = {**item.stats, "histogram": np.diff(ends).tolist()}
            _simulate_run(report, mixture, found)
            del found  # closes the files
        report["notes"] = _notes(report, mixture)
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")
        plot_report(report, folder / PLOT_FILE)
    return report


class _DatasetStats(NamedTuple):
    """A dataset's figures and, for each sample of the records that were read: its tokens, how many come before the
    first trained one, and once more its tokens, in order of size. bounds: (records + 1,) which samples a record has."""

    stats: dict[str, Any]
    lengths: np.ndarray
    prompt_lengths: np.ndarray
    ordered: np.ndarray
    bounds: np.ndarray


def _measure(pool: EncodingPool, dataset: int, count: int, file: Path, progress: Progress) -> _DatasetStats:
    """Encodes `count` records of a dataset, spread evenly over it. file: begins the names of the arrays on the disk."""
    mixture, records = pool.mixture, pool.mixture.datasets[dataset]
    size = len(records)
    names = ("lengths", "read", "hashes", "bounds")
    lengths, prompt_lengths, hashes, bounds = files = [file.with_suffix(f".{name}") for name in names]
    counted: Counter[str] = Counter()
    num_dropped = {LONG_INPUT: 0, OVERSIZE: 0, EMPTY: 0}
    with contextlib.ExitStack() as opened:
        lengths_file, prompt_lengths_file, hashes_file, bounds_file = (
            opened.enter_context(f.open("wb")) for f in files
        )
        bounds_file.write(np.zeros(1, np.int64).tobytes())
        for record_indices, tokens in pool.tokenize(
            dataset, (i * size // count for i in range(count)), in_file_order=True
        ):
            samples = [split_samples(record) for record in tokens]
            together = list(chain.from_iterable(samples))
            for sample in together:
                _count_sample(sample, mixture.split_or_truncate(dataset, sample), counted, num_dropped)
            lengths_before = [int(np.argmax(sample[1:] >= 0)) if len(sample) > 1 else 0 for sample in together]
            lengths_file.write(np.array([max(0, len(sample) - 1) for sample in together], np.int32).tobytes())
            prompt_lengths_file.write(np.array(lengths_before, np.int32).tobytes())
            bounds_file.write(
                (counted["samples"] + np.cumsum([len(some) for some in samples], dtype=np.int64)).tobytes()
            )
            counted["samples"] += len(together)
            # The last line may lack its line end.
            lines = (records.line(number).removesuffix(b"\n") for number in record_indices)
            hashes_file.write(b"".join(hashlib.blake2b(line, digest_size=8).digest() for line in lines))
            progress.advance(len(record_indices))
    ordered = lengths.with_suffix(".ordered")
    shutil.copyfile(lengths, ordered)
    in_order, signs = np.memmap(ordered, np.int32, "r+"), np.memmap(hashes, np.uint64, "r+")
    in_order.sort()
    signs.sort()
    filled = in_order[np.searchsorted(in_order, np.int32(1)) :]  # without those that have nothing to learn
    total, empty = int(in_order.sum(dtype=np.int64)), num_dropped.pop(EMPTY)
    stats = {
        "records": size,
        "read": count,
        "samples": counted["samples"],
        "tokens": total,
        "mean": total / max(1, len(filled)),
        **{key: _quantile(filled, q) for key, q in (("min", 0.0), ("median", 0.5), ("p95", 0.95), ("max", 1.0))},
        **{key: counted[key] for key in ("kept_tokens", "learnt_tokens", "truncated", "segmented", "segments")},
        "dropped": num_dropped,
        "empty": empty,
        "duplicates": sum(
            int(np.count_nonzero(signs[i : i + _BLOCK][: count - 1 - i] == signs[i + 1 : i + 1 + _BLOCK]))
            for i in range(0, count, _BLOCK)
        ),
        "findings": dict(mixture.issues[dataset]),
    }
    mapped = np.memmap(lengths, np.int32, "r"), np.memmap(prompt_lengths, np.int32, "r")
    return _DatasetStats(stats, *mapped, in_order, np.memmap(bounds, np.int64, "r"))


def _count_sample(
    sample: np.ndarray, encoded: EncodedRecord, counted: Counter[str], num_dropped: dict[str, int]
) -> None:
    """Counts what becomes of a sample."""
    if encoded.skipped:
        num_dropped[encoded.skipped] += 1
        return
    segments = encoded.segments
    counted["kept_tokens"] += sum(len(segment) - 1 for segment in segments)
    counted["learnt_tokens"] += sum(int(np.count_nonzero(segment[1:] >= 0)) for segment in segments)
    if len(segments) > 1:
        counted["segmented"] += 1
        counted["segments"] += len(segments)
    elif len(segments[0]) < len(sample):
        counted["truncated"] += 1


def _quantile(ordered: np.ndarray, q: float) -> int:
    """The smallest element that a share q of all do not exceed."""
    return int(ordered[max(0, math.ceil(q * len(ordered)) - 1)]) if len(ordered) else 0


def _buckets(longest: int, max_length: int) -> list[int]:
    """Upper bounds, inclusive, of the histogram's buckets: powers of two and max_length."""
    return sorted({max_length, *(1 << power for power in range((max(longest, max_length) - 1).bit_length() + 1))})


def _simulate_run(report: CheckReport, mixture: Mixture, found: Sequence[_DatasetStats]) -> None:
    """Adds what each dataset gets in the steps of the run, and how well the packs are filled."""
    plan = make_sampling_plan(mixture, report["packs"])
    usable = [item.stats["kept_tokens"] > 0 for item in found]
    proportions = [
        share if some else 0.0 for share, some in zip(plan.proportions, usable)
    ]  # the others would end a run
    longest = max(item.stats["max"] for item in found)
    template_tokens = np.repeat(np.array([-1, 0], np.int32), longest + 1)

    @cache  # small datasets have many epochs, and all streams go through the same ones
    def record_indices(dataset: int, block: int) -> np.ndarray:
        return mixture.record_indices(dataset, range(block * _LOOKUP_BLOCK, (block + 1) * _LOOKUP_BLOCK))

    def encode(dataset: int, sample_indices: Sequence[int]) -> list[EncodedRecord]:
        """As Mixture.encode, of stand-ins that have a record's tokens in number and in what is learnt first."""
        item = found[dataset]
        # Of a sample of the records, the one that was read next to it.
        at = np.array(
            [
                record_indices(dataset, sample_index // _LOOKUP_BLOCK)[sample_index % _LOOKUP_BLOCK]
                for sample_index in sample_indices
            ]
        )
        rows = at * (len(item.bounds) - 1) // len(mixture.datasets[dataset])
        return [
            mixture.split_or_truncate(dataset, join_samples(list(placeholders(item, row)))) for row in rows.tolist()
        ]

    def placeholders(item: _DatasetStats, row: int) -> Iterator[np.ndarray]:
        samples = slice(item.bounds[row], item.bounds[row + 1])
        for length, prompt_length in zip(item.lengths[samples].tolist(), item.prompt_lengths[samples].tolist()):
            yield template_tokens[longest - prompt_length :][: length + 1]

    def read_ahead(dataset: int, sample_indices: Iterator[int]) -> Iterator[tuple[int, EncodedRecord]]:
        while chunk := list(islice(sample_indices, 64)):
            yield from zip(chunk, encode(dataset, chunk))

    plan = replace(plan, proportions=proportions)
    streams = [
        PackStream(
            s, plan, mixture.row_length, lambda dataset, sample_index: encode(dataset, [sample_index])[0], read_ahead
        )
        for s in range(plan.num_streams)
    ]
    tokens, rows, samples, steps, ended = np.zeros(len(found)), 0, 0, 0, False
    while steps < report["steps"] and samples < _MAX_SIMULATED_SAMPLES and not ended:
        packs = [pack for stream in streams if (pack := stream.next_samples())]
        for sample in (sample for pack in packs for sample in pack):
            tokens[sample.dataset] += len(sample.tokens) - 1
        rows, samples = rows + len(packs), samples + sum(map(len, packs))
        ended = not packs
        steps += not ended
    filled = tokens.sum() / max(1, rows * mixture.row_length)
    epoch = np.array([item.stats["kept_tokens"] / item.stats["read"] * item.stats["records"] for item in found])
    realised = tokens / max(1.0, tokens.sum())
    if not ended and steps < report["steps"]:
        budget = report["steps"] * plan.num_streams * mixture.row_length * filled
        tokens = _extrapolate(realised, budget, np.where(plan.repeats, np.inf, epoch))
        steps = min(report["steps"], math.ceil(tokens.sum() / budget * report["steps"]))
    report["packing"] = {
        "rows": rows,
        "samples": samples,
        "padding": float(1 - filled) if rows else 0.0,
        "samples_per_row": samples / max(1, rows),
        "steps": steps,
    }
    wanted = mixture.proportions()
    for number, stats in enumerate(report["datasets"].values()):
        epochs = float(tokens[number] / epoch[number]) if epoch[number] else 0.0
        stats |= {"share_wanted": wanted[number], "share_realised": float(realised[number])}
        stats |= {"run_tokens": round(tokens[number]), "run_records": round(epochs * stats["records"])}
        stats["run_epochs"] = epochs


def _extrapolate(proportions: np.ndarray, budget: float, most: np.ndarray) -> np.ndarray:
    """A budget of tokens dealt to datasets by share; what one has no more tokens for goes to the others."""
    dealt, going = np.zeros(len(proportions)), proportions > 0
    while going.any() and budget > 0:
        part = np.minimum(budget * proportions * going / proportions[going].sum(), most - dealt)
        dealt, budget = dealt + part, budget - part.sum()
        if not (full := going & (dealt >= most)).any():
            break
        going &= ~full
    return dealt


def _notes(report: CheckReport, mixture: Mixture) -> list[str]:
    """What the user should look at, a line each."""
    notes, datasets = [], report["datasets"]
    if report["sample"] and any(stats["read"] < stats["records"] for stats in datasets.values()):
        notes.append(f"only {report['sample']} records of each dataset were read, spread over it: estimates")
    everything = sum(stats["kept_tokens"] / stats["read"] * stats["records"] for stats in datasets.values())
    for config, (task, stats) in zip(mixture.configs, datasets.items()):
        read, records, epochs = stats["read"], stats["records"], stats["run_epochs"]

        samples = stats["samples"]  # a record has several where its template rewrites turns

        def part(count: int, of: int = read, several: bool = samples != read) -> str:
            return f"{count} of {of} {'samples' if several else 'records'} ({count / of:.1%})"

        for reason, count in {**stats["dropped"], EMPTY: stats["empty"]}.items():
            if count > _MAX_LOST * samples:
                notes.append(f"{task}: {part(count, samples)} give nothing to train on: {reason}")
        if stats["truncated"] > _MAX_LOST * samples:
            truncated = part(stats["truncated"], samples)
            notes.append(f"{task}: {truncated} lose their end at {mixture.max_length} tokens")
        if stats["duplicates"]:
            notes.append(f"{task}: {part(stats['duplicates'], several=False)} repeat another one exactly")
        notes += [f"{task}: {line}" for line in _diff_from_config(config, stats)]
        notes += issue_notes(task, Counter(stats["findings"]), read)
        if not stats["learnt_tokens"]:
            notes.append(f"{task}: nothing in it is learnt; a run that draws from it ends with an error")
            continue
        own = stats["kept_tokens"] / read * records / everything
        if not stats["share_wanted"]:
            notes.append(f"{task}: its share is 0: nothing is drawn from it")
        elif config.allow_repeat and epochs > _MAX_EPOCHS:
            notes.append(f"{task}: makes {epochs:.1f} epochs in {report['steps']} steps")
        elif not config.allow_repeat and epochs > 0.999:
            notes.append(f"{task}: is used up within the {report['steps']} steps, and not repeated (allow_repeat)")
        elif stats["share_wanted"] > _MAX_OVERSAMPLING * own:
            wanted = stats["share_wanted"]
            notes.append(f"{task}: has {own:.2%} of the mixture's tokens and is to be {wanted:.2%} of the run")
    if report["packing"]["padding"] > _MAX_PADDING:
        notes.append(f"{report['packing']['padding']:.1%} of the positions are padding; a larger batch_size has less")
    if report["packing"]["steps"] < report["steps"]:
        notes.append(f"the data is used up after about {report['packing']['steps']} of {report['steps']} steps")
    return notes + mixture.template_notes()


def _diff_from_config(config: DatasetConfig, stats: dict[str, Any]) -> list[str]:
    """The figures of a dataset's configuration that are far from those found."""
    total = stats["tokens"] / stats["read"] * stats["records"] / 1e9
    pairs = (
        ("nlines", config.nlines, stats["records"]),
        ("average tokens", config.mean_tokens, stats["mean"]),
        ("total_tokens", config.total_tokens, total),
    )
    return [
        f"{key}: {said:.6g} in the configuration, {is_:.6g} found"
        for key, said, is_ in pairs
        if said is not None and abs(said - is_) > _MAX_DIFFERENCE * is_
    ]
