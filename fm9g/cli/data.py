"""The subcommands of `fm9g data`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fm9g.errors import UserError
from fm9g.printable import raw_stream

if TYPE_CHECKING:
    from fm9g.data.prepare.column_mapping import ColumnMapping

logger = logging.getLogger(__name__)


def add_data_commands(subcommand: Any, group: Any) -> None:
    """subcommand, group: add a subcommand, or a group of them, to the command line."""
    data = group("data", "prepare and inspect data: txt2jsonl, index, tokenizer, check, show, cache")
    subcommand(
        "txt2jsonl", _data_txt2jsonl, "convert plain text (stdin, a record per line) to jsonl (stdout)", parent=data
    )
    _add_index(subcommand("index", _data_index, "build an indexed dataset from files of any format", parent=data))
    tokenizer = subcommand(
        "tokenizer", _data_tokenizer, "train a byte-level BPE tokenizer on the texts of files", parent=data
    )
    tokenizer.add_argument("files", nargs="+", metavar="FILE", help="anything that `fm9g data index` reads")
    tokenizer.add_argument("--vocab_size", type=int, required=True, help="maximum number of tokens, at least 258")
    tokenizer.add_argument("--output", type=Path, required=True, help="folder of the new tokenizer")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")
    _add_check(
        subcommand(
            "check", _data_check, "measure a mixture: lengths, dropped records, shares, padding, epochs", parent=data
        )
    )
    _add_show(subcommand("show", _data_show, "print samples of a mixture as training sees them", parent=data))
    cache = subcommand("cache", _data_cache, "list the files that `fm9g train --data` has indexed", parent=data)
    cache.add_argument("--data_cache_dir", default="", help="folder of the cache; default: as `fm9g train`")
    cache.add_argument(
        "--prune", action="store_true", help="delete what is outdated: the files have changed since, or are gone"
    )


def _add_index(index: argparse.ArgumentParser) -> None:
    from fm9g.data.prepare.language import LANGUAGES
    from fm9g.data.prepare.sources import FORMATS, TEXT_UNITS

    index.add_argument(
        "--path",
        nargs="+",
        required=True,
        help="files, folders or globs: .jsonl .json .txt .md .csv .tsv .parquet, also compressed as .gz .zst .xz .bz2; "
        "a folder written by datasets.save_to_disk; LLaMA-Factory's dataset_info.json (with --dataset); - for stdin",
    )
    index.add_argument(
        "--language", required=True, choices=["zh", "en", "code"], help="of the texts; used to estimate their tokens"
    )
    index.add_argument("--output", type=Path, required=True, help="folder of the new dataset")
    index.add_argument(
        "--language-filter",
        default="",
        choices=LANGUAGES,
        help="keep only records whose prompt is in this language (more than half of its characters)",
    )
    index.add_argument("--overwrite", action="store_true", help="replace the output folder if it is not empty")
    index.add_argument("--format", default="", choices=FORMATS, help="format of all files; default: by their names")
    index.add_argument(
        "--text-unit",
        default="",
        choices=TEXT_UNITS,
        help="which part of a text is a record; default: a line of .txt, the complete .md file",
    )
    index.add_argument(
        "--columns",
        default="",
        help="which keys hold what, if they have other names: prompt=KEY,response=KEY,...; or a JSON file",
    )
    index.add_argument("--dataset", default="", metavar="NAME", help="entry of the dataset_info.json given by --path")
    index.add_argument(
        "--as-is", action="store_true", help="store objects with any keys, for a transform to convert in training"
    )
    index.add_argument(
        "--skip-bad", action="store_true", help="leave bad records out and list them in OUTPUT/rejects.jsonl"
    )
    index.add_argument(
        "--split",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the records, from 0 to 1, for OUTPUT/validation; the rest goes to OUTPUT/train",
    )
    index.add_argument("--seed", type=int, default=1234, help="random seed of --split (%(default)s)")
    index.add_argument("--workers", type=int, default=None, help=_WORKERS_HELP)


_WORKERS_HELP = "number of worker processes; default: one per core if there is enough to read"


# Training keys that these commands take under the same names.
_MIXTURE_KEYS = (
    "max_length",
    "batch_size",
    "packing",
    "oversize_rule",
    "chat_template",
    "chat_template_date",
    "system",
    "turns",
    "train_on",
    "seed",
)


def _add_mixture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixture", metavar="CONFIG", help="name of a mixture in dataset_configs/, or its path")
    parser.add_argument("--tokenizer", required=True, help="tokenizer file, or folder of a tokenizer")
    parser.add_argument("--max_length", type=int, default=4096, help="maximum tokens per sample (%(default)s)")
    parser.add_argument(
        "--batch_size", type=int, default=1, help="tokens per row = batch_size * max_length (%(default)s)"
    )
    parser.add_argument(
        "--packing",
        default="true",
        help="true: a row has as many samples as fit; false: batch_size samples, and an epoch ends with a step "
        "(%(default)s)",
    )
    parser.add_argument(
        "--oversize_rule",
        default="segment",
        help="what happens to samples longer than max_length, for datasets that have no rule: segment, head, tail, "
        "drop or whole (%(default)s)",
    )
    parser.add_argument(
        "--chat_template",
        "--template",
        default="",
        help="template of the datasets that name none; without one, pairs are trained on as they are",
    )
    parser.add_argument("--system", default="", help="system message of records that have none; needs a chat template")
    parser.add_argument(
        "--chat_template_date",
        "--template_date",
        default="",
        help="date that templates write as today's, YYYY-MM-DD (today)",
    )
    parser.add_argument(
        "--turns",
        default="auto",
        help="auto: one sample per conversation, or several if the template rewrites earlier turns; split: one sample "
        "per answer (%(default)s)",
    )
    parser.add_argument(
        "--train_on",
        "--loss",
        default="assistant",
        help="trained turns of a conversation: all of the assistant's (assistant), its last one (last), or all text "
        "(all) (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="random seed of the sample order (%(default)s)")


def _add_check(check: argparse.ArgumentParser) -> None:
    _add_mixture_arguments(check)
    check.add_argument("--steps", type=int, default=1000, help="optimizer steps of the run to forecast (%(default)s)")
    check.add_argument(
        "--packs", type=int, default=8, help="packs per step = processes * gradient_accumulation_steps (%(default)s)"
    )
    check.add_argument(
        "--sample", type=int, default=None, help="read only this many records of each dataset; default: all"
    )
    check.add_argument("--workers", type=int, default=None, help=_WORKERS_HELP)
    check.add_argument(
        "--output", type=Path, default=Path("data_check"), help="folder for check.json and lengths.png (%(default)s)"
    )
    check.add_argument(
        "--overwrite", action="store_true", help="replace the output folder even if it holds other files"
    )


def _add_show(show: argparse.ArgumentParser) -> None:
    _add_mixture_arguments(show)
    show.add_argument("--count", type=int, default=3, help="number of samples, or of rows with --packs (%(default)s)")
    show.add_argument("--task", default="", help="show only this dataset, by its task_name")
    show.add_argument("--record", type=int, default=None, help="show the record on this line, from 1")
    show.add_argument("--packs", action="store_true", help="show complete rows with their padding")
    show.add_argument("--full", action="store_true", help="do not shorten long samples")
    show.add_argument(
        "--color",
        default="auto",
        choices=["auto", "always", "never"],
        help="auto: on a terminal, unless NO_COLOR is set (%(default)s)",
    )


def _data_txt2jsonl(options: argparse.Namespace) -> None:
    from fm9g.data.prepare.records import decode_lines, text_records, to_line

    for record in text_records(decode_lines(sys.stdin.buffer, "stdin")):
        sys.stdout.buffer.write(to_line(record))
    sys.stdout.buffer.flush()


def _data_index(options: argparse.Namespace) -> None:
    from fm9g.data.prepare.index_builder import build_index
    from fm9g.data.prepare.index_worker import IndexConfig
    from fm9g.data.prepare.sources import find_sources

    paths, columns = _paths_and_columns(options)
    sources = find_sources(paths, options.format, options.text_unit, options.output)
    config = IndexConfig(
        options.language,
        columns,
        options.as_is,
        options.skip_bad,
        options.split,
        options.seed,
        options.language_filter,
    )
    report = build_index(sources, options.output, config, options.workers, options.overwrite)
    for folder, meta in report.metas.items():
        tokens = f"about {meta['avg_token_per_line']:.0f} tokens each"
        print(f"{folder}: {meta['nlines']} records, {meta['nbytes']} bytes, {tokens}")
    formats = ", ".join(f"{count} {record_format}" for record_format, count in report.record_formats.most_common())
    print(f"read from {report.sources} {'file' if report.sources == 1 else 'files'}: {formats}")


def _paths_and_columns(options: argparse.Namespace) -> tuple[list[str], ColumnMapping | None]:
    """The paths and columns that --path, --dataset and --columns select."""
    from fm9g.data.prepare.columns import columns_from_file, columns_from_text
    from fm9g.data.prepare.dataset_info import read_dataset_info

    if options.dataset:
        if len(options.path) != 1 or options.columns:
            raise UserError("--dataset: goes with one --path, a dataset_info.json, and without --columns")
        info = read_dataset_info(Path(options.path[0]), options.dataset)
        if info.path is None:
            key = next(iter(info.remotes))
            raise UserError(
                f"{info.where}: {key}: download the data first, then name its file or folder with file_name"
            )
        if info.num_samples:
            logger.info(
                f'{info.where}: num_samples: all records are indexed; in a mixture, "sample": {info.num_samples} '
                "draws as many of them"
            )
        return [str(info.path)], info.columns
    if "=" in options.columns:
        return options.path, columns_from_text(options.columns)
    return options.path, columns_from_file(Path(options.columns)) if options.columns else None


def _data_tokenizer(options: argparse.Namespace) -> None:
    from fm9g.data.encode.tokenizer_training import train_tokenizer
    from fm9g.data.prepare.sources import find_sources
    from fm9g.data.prepare.texts import iter_texts

    texts = iter_texts(find_sources(options.files))
    size = train_tokenizer(texts, options.vocab_size, options.output, options.overwrite)
    print(f"{options.output}: a tokenizer of {size} tokens")
    if size < options.vocab_size:
        logger.warning(f"the tokenizer has fewer than {options.vocab_size} tokens: the texts are too short for more")


def _mixture_settings(options: argparse.Namespace) -> dict[str, Any]:
    values = {key: getattr(options, key) for key in _MIXTURE_KEYS}
    return {"tokenizer_path": options.tokenizer, **values}


def _data_check(options: argparse.Namespace) -> None:
    from fm9g.data.inspect.check import check_mixture
    from fm9g.data.inspect.check_report import format_report

    keys = ("output", "steps", "packs", "sample", "workers", "overwrite")
    arguments = {key: getattr(options, key) for key in keys}
    report = check_mixture(options.mixture, **arguments, **_mixture_settings(options))
    print(format_report(report))
    for line in report["templates"]:
        print(line)
    print(f"{options.output}: check.json, lengths.png", flush=True)
    for warning in report["notes"]:
        logger.warning(warning)


def _data_show(options: argparse.Namespace) -> None:
    from fm9g.data.inspect.check import open_named_mixture
    from fm9g.data.inspect.show import show_samples, wants_color

    mixture, _ = open_named_mixture(options.mixture, **_mixture_settings(options))
    arguments = {key: getattr(options, key) for key in ("count", "task", "record", "packs", "full")}
    for text in show_samples(mixture, **arguments, color=wants_color(options.color)):
        print(text, file=raw_stream(sys.stdout))  # only its colour codes are not printable


def _data_cache(options: argparse.Namespace) -> None:
    from fm9g.shorthand.data_cache import DataCache
    from fm9g.text_table import text_table

    cache = DataCache(options.data_cache_dir)
    datasets = cache.prune() if options.prune else cache.datasets()
    rows = [
        (
            dataset.folder.name,
            f"{dataset.num_bytes / 1e6:.1f} MB",
            "" if dataset.is_current else "outdated",
            ", ".join(dataset.paths),
        )
        for dataset in datasets
    ]
    print(f"{cache.folder}: {len(rows)} indexed datasets{' deleted' if options.prune else ''}")
    for line in text_table([("dataset", "size", "state", "made of"), *rows], right=(1,)) if rows else ():
        print(line)
