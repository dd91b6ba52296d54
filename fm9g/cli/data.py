"""The subcommands of `fm9g data`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fm9g.errors import UserError
from fm9g.printable import printable, raw_stream


def add_data_commands(subcommand: Any, group: Any) -> None:
    """subcommand, group: put a subcommand, or a group of them, on the command line."""
    data = group("data", "txt2jsonl, index, tokenizer, check, show: prepare data and look at it")
    subcommand("txt2jsonl", _data_txt2jsonl, "plain text on stdin, a record a line, to jsonl on stdout", parent=data)
    _add_index(subcommand("index", _data_index, "make an indexed dataset from files of any kind", parent=data))
    tokenizer = subcommand(
        "tokenizer", _data_tokenizer, "train a byte-level BPE tokenizer on the texts of files", parent=data
    )
    tokenizer.add_argument("files", nargs="+", metavar="FILE", help="what `fm9g data index` reads")
    tokenizer.add_argument("--vocab_size", type=int, required=True, help="most tokens it may have, at least 258")
    tokenizer.add_argument("--output", type=Path, required=True, help="folder of the new tokenizer")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace a folder that holds something")
    _add_check(
        subcommand("check", _data_check, "read a mixture through: lengths, losses, shares, padding", parent=data)
    )
    _add_show(subcommand("show", _data_show, "print samples of a mixture as training sees them", parent=data))


def _add_index(index: argparse.ArgumentParser) -> None:
    from fm9g.data.prepare.language import LANGUAGES
    from fm9g.data.prepare.sources import FORMATS, TEXT_UNITS

    index.add_argument(
        "--path",
        nargs="+",
        required=True,
        help="files, folders or globs: .jsonl .json .txt .md .csv .tsv .parquet, each also .gz .zst .xz .bz2; a folder "
        "that datasets.save_to_disk made; LLaMA-Factory's dataset_info.json (with --dataset); - is stdin",
    )
    index.add_argument("--language", required=True, choices=["zh", "en", "code"], help="for the estimate of its tokens")
    index.add_argument("--output", type=Path, required=True, help="folder of the new dataset")
    index.add_argument(
        "--language-filter",
        default="",
        choices=LANGUAGES,
        help="keep records whose prompt is in it: more than half of the characters",
    )
    index.add_argument("--overwrite", action="store_true", help="replace a folder that holds something")
    index.add_argument("--format", default="", choices=FORMATS, help="of all files; default: by their names")
    index.add_argument(
        "--text-unit",
        default="",
        choices=TEXT_UNITS,
        help="a record of text; default: a line of .txt, the whole of .md",
    )
    index.add_argument(
        "--columns", default="", help="prompt=KEY,response=KEY,... where the keys are not known ones; or a JSON file"
    )
    index.add_argument("--dataset", default="", metavar="NAME", help="entry of the dataset_info.json that --path names")
    index.add_argument("--as-is", action="store_true", help="keep objects of any keys, for a transform to shape")
    index.add_argument("--skip-bad", action="store_true", help="leave bad records out, and list them in rejects.jsonl")
    index.add_argument(
        "--split",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="this much to OUTPUT/validation, the rest to OUTPUT/train",
    )
    index.add_argument("--seed", type=int, default=1234, help="of the split (%(default)s)")
    index.add_argument("--workers", type=int, default=None, help="processes; default: one a core where that pays")


def _add_mixture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mixture", metavar="CONFIG", help="a name in dataset_configs/, or a path of a mixture")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer file, or a folder that holds one")
    parser.add_argument("--max_length", type=int, default=4096, help="longest sample, in tokens (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=1, help="a row is as many times max_length (%(default)s)")
    parser.add_argument(
        "--chat_template", "--template", default="", help="of the datasets that name none; none: pairs as they are"
    )
    parser.add_argument(
        "--chat_template_date", "--template_date", default="", help="what templates write as today's date (today)"
    )
    parser.add_argument("--turns", default="auto", help="texts of a conversation: auto or split (%(default)s)")
    parser.add_argument(
        "--train_on", "--loss", default="assistant", help="what they learn: assistant, last or all (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the order of samples (%(default)s)")


def _add_check(check: argparse.ArgumentParser) -> None:
    _add_mixture_arguments(check)
    check.add_argument("--steps", type=int, default=1000, help="length of the run to foretell (%(default)s)")
    check.add_argument(
        "--packs", type=int, default=8, help="packs a step: processes x gradient_accumulation_steps (%(default)s)"
    )
    check.add_argument("--sample", type=int, default=None, help="read only so many records of each dataset")
    check.add_argument("--workers", type=int, default=None, help="processes; default: one a core where that pays")
    check.add_argument(
        "--output", type=Path, default=Path("data_check"), help="folder for check.json and lengths.png (%(default)s)"
    )
    check.add_argument("--overwrite", action="store_true", help="replace a folder that holds anything else")


def _add_show(show: argparse.ArgumentParser) -> None:
    _add_mixture_arguments(show)
    show.add_argument("--count", type=int, default=3, help="how many samples, or rows (%(default)s)")
    show.add_argument("--task", default="", help="of this dataset only")
    show.add_argument("--record", type=int, default=None, help="this record, a line number from 1")
    show.add_argument("--packs", action="store_true", help="whole rows, with their padding")
    show.add_argument("--full", action="store_true", help="long texts whole")
    show.add_argument(
        "--color", default="auto", choices=["auto", "always", "never"], help="auto: on a terminal, without NO_COLOR"
    )


def _data_txt2jsonl(options: argparse.Namespace) -> None:
    from fm9g.data.prepare.records import decode_lines, text_records, to_line

    for record in text_records(decode_lines(sys.stdin.buffer, "stdin")):
        sys.stdout.buffer.write(to_line(record))
    sys.stdout.buffer.flush()


def _data_index(options: argparse.Namespace) -> None:
    from fm9g.data.prepare.columns import columns_from_file, columns_from_text, dataset_info_entry
    from fm9g.data.prepare.index_builder import build_index, drop_companion_files
    from fm9g.data.prepare.index_worker import IndexConfig
    from fm9g.data.prepare.sources import find_sources

    paths, columns = options.path, None
    if options.dataset:
        if len(paths) != 1 or options.columns:
            raise UserError("--dataset: goes with one --path, a dataset_info.json, and without --columns")
        path, columns, samples = dataset_info_entry(Path(paths[0]), options.dataset)
        if samples is not None:
            raise UserError(f"{paths[0]}: num_samples: remove it; abs_weight in a mixture says how much is trained on")
        paths = [str(path)]
    elif options.columns:
        is_file = "=" not in options.columns
        columns = columns_from_file(Path(options.columns)) if is_file else columns_from_text(options.columns)
    sources = drop_companion_files(find_sources(paths, options.format, options.text_unit, options.output), paths)
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
        size = f"{meta['nlines']} records, {meta['nbytes']} bytes, about {meta['avg_token_per_line']:.0f} tokens each"
        print(f"{folder}: {size}")
    formats = ", ".join(f"{count} {record_format}" for record_format, count in report.record_formats.most_common())
    print(f"read from {report.sources} {'file' if report.sources == 1 else 'files'}: {formats}")
    for note in report.findings.notes():
        print(f"note: {printable(note)}")
    if report.empty:
        print(f"note: {report.empty} records have no output; training skips them")
    if report.filtered:
        print(f"note: {report.filtered} records are not in {options.language_filter} and were left out")
    if report.rejected:
        print(f"note: {report.rejected} bad records were left out: {options.output / 'rejects.jsonl'}")


def _data_tokenizer(options: argparse.Namespace) -> None:
    from fm9g.data.encode.tokenizer import train_tokenizer
    from fm9g.data.prepare.index_builder import drop_companion_files, iter_texts
    from fm9g.data.prepare.sources import find_sources

    sources = drop_companion_files(find_sources(options.files), options.files)
    size = train_tokenizer(iter_texts(sources), options.vocab_size, options.output, options.overwrite)
    less = f"; fewer than {options.vocab_size}: the text gives no more" if size < options.vocab_size else ""
    print(f"{options.output}: a tokenizer of {size} tokens{less}")


def _mixture_settings(options: argparse.Namespace) -> dict[str, Any]:
    keys = ("max_length", "batch_size", "chat_template", "chat_template_date", "turns", "train_on", "seed")
    return {"tokenizer_path": options.tokenizer, **{key: getattr(options, key) for key in keys}}


def _data_check(options: argparse.Namespace) -> None:
    from fm9g.data.inspect.check import check_mixture
    from fm9g.data.inspect.check_report import format_report

    keys = ("output", "steps", "packs", "sample", "workers", "overwrite")
    arguments = {key: getattr(options, key) for key in keys}
    report = check_mixture(options.mixture, **arguments, **_mixture_settings(options))
    print(format_report(report))
    for line in report["templates"]:
        print(line)
    for note in report["notes"]:
        print(f"note: {printable(note)}")
    print(f"{options.output}: check.json, lengths.png")


def _data_show(options: argparse.Namespace) -> None:
    from fm9g.data.inspect.check import open_named_mixture
    from fm9g.data.inspect.show import show_samples, wants_color

    mixture, _ = open_named_mixture(options.mixture, **_mixture_settings(options))
    arguments = {key: getattr(options, key) for key in ("count", "task", "record", "packs", "full")}
    for text in show_samples(mixture, **arguments, color=wants_color(options.color)):
        print(text, file=raw_stream(sys.stdout))  # which is printable, but for its colours
