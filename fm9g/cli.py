"""The command `fm9g`: its verbs, each a thin function over the library.

Only what argument parsing needs is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

from fm9g import __version__
from fm9g.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):  # whatever a terminal cannot show must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.run is not _train and options.run is not _config_show:
        parser.error(f"unknown arguments: {' '.join(rest)} (see fm9g {options.verb} --help)")
    try:
        options.rest = rest
        return options.run(options) or 0
    except UserError as error:
        print(f"fm9g: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # what no room expected: the system's own words name the file
        if isinstance(error, BrokenPipeError):  # the reader of our output went away, as in `fm9g ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        print(f"fm9g: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fm9g: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fm9g", description="Pretrain and finetune the 9G language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fm9g {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, help: str, under: Any = verbs) -> argparse.ArgumentParser:
        sub = under.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    def group(name: str, help: str) -> Any:
        sub = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        return sub.add_subparsers(dest=f"{name}_verb", required=True, metavar="VERB")

    quick = verb("quickstart", _quickstart, "the whole path on this machine: text, index, training, export, generation")
    quick.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for all that is made (%(default)s)")
    quick.add_argument("--steps", type=int, default=200, help="optimizer steps (%(default)s)")
    quick.add_argument("--overwrite", action="store_true", help="replace --out if it holds something")

    train = verb("train", _train, "train a model; --KEY VALUE sets any key that `fm9g config keys` lists")
    _add_run_arguments(train)

    config = group("config", "show, keys: the configuration of a run, every key there is")
    show = verb("show", _config_show, "every value of a run's configuration and where it came from", under=config)
    _add_run_arguments(show)
    verb("keys", _config_keys, "every key of the three kinds of configuration file", under=config)

    data = group("data", "txt2jsonl, index, tokenizer, check, show: prepare data and look at it")
    verb("txt2jsonl", _data_txt2jsonl, "plain text on stdin, a record a line, to jsonl on stdout", under=data)
    _add_index(verb("index", _data_index, "make an indexed dataset from files of any kind", under=data))
    tokenizer = verb("tokenizer", _data_tokenizer, "train a byte-level BPE tokenizer on the texts of files", under=data)
    tokenizer.add_argument("files", nargs="+", metavar="FILE", help="what `fm9g data index` reads")
    tokenizer.add_argument("--vocab_size", type=int, required=True, help="most tokens it may have, at least 258")
    tokenizer.add_argument("--output", type=Path, required=True, help="folder of the new tokenizer")
    tokenizer.add_argument("--overwrite", action="store_true", help="replace a folder that holds something")
    _add_check(verb("check", _data_check, "read a mixture through: lengths, losses, shares, padding", under=data))
    _add_show(verb("show", _data_show, "print samples of a mixture as training sees them", under=data))

    convert = verb("convert", _convert, "a Hugging Face folder to a 9G .pt file, or a 9G checkpoint to such a folder")
    convert.add_argument("source", type=Path, help="a Hugging Face folder, a checkpoint folder, or a .pt file")
    convert.add_argument("target", type=Path, help="FILE.pt for a 9G file, else a new Hugging Face folder")
    convert.add_argument("--reference", type=Path, help="Hugging Face folder to take configuration and tokenizer from")
    convert.add_argument(
        "--dtype", default="", choices=["bf16", "fp16", "fp32"], help="of the exported weights; default: unchanged"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a folder or files that are there")

    generate = verb("generate", _generate, "continue a prompt with the model of a Hugging Face folder")
    generate.add_argument("folder", type=Path, help="a Hugging Face folder")
    generate.add_argument("--prompt", required=True, help="the text to continue")
    generate.add_argument("--chat", action="store_true", help="put the prompt into the folder's chat template")
    generate.add_argument("--system", default="", help="with --chat: the system message")
    for option, kind, default, meaning in (
        ("max_new_tokens", int, 100, "longest continuation"),
        ("temperature", float, 0.0, "0: always the likeliest token"),
        ("top_p", float, 1.0, "sample from the likeliest tokens that make up this share"),
        ("repetition_penalty", float, 1.0, "above 1: what was said becomes less likely"),
        ("seed", int, 1234, "of the sampling"),
    ):
        generate.add_argument(f"--{option}", type=kind, default=default, help=f"{meaning} (default: {default})")
    return parser


def _add_index(index: argparse.ArgumentParser) -> None:
    from fm9g.data.sources import FORMATS, TEXT_UNITS

    index.add_argument(
        "--path",
        nargs="+",
        required=True,
        help="files, folders or globs: .jsonl .json .txt .md .csv .tsv .parquet, each also .gz .zst .xz .bz2; a folder "
        "that datasets.save_to_disk made; LLaMA-Factory's dataset_info.json (with --dataset); - is stdin",
    )
    index.add_argument("--language", required=True, choices=["zh", "en", "code"], help="for the estimate of its tokens")
    index.add_argument("--output", type=Path, required=True, help="folder of the new dataset")
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
    parser.add_argument("--template", default="", help="chat template of the datasets that name none")
    parser.add_argument("--loss", default="assistant", help="what they learn: assistant, last or all (%(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of the order of samples (%(default)s)")


def _add_check(check: argparse.ArgumentParser) -> None:
    _add_mixture_arguments(check)
    check.add_argument("--steps", type=int, default=1000, help="length of the run to foretell (%(default)s)")
    check.add_argument("--packs", type=int, default=8, help="packs a step: processes x grad_accum (%(default)s)")
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


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a name in train_configs/ or model_configs/, or a path"
    )
    parser.usage = f"{parser.prog} [-h] --config NAME [--KEY VALUE ...]"
    parser.epilog = (
        "Also --KEY VALUE for every training key, --model.KEY VALUE for a key of the model, --data.TASK.KEY VALUE for "
        "one of a dataset. `fm9g config keys` lists them. Training needs dataset_config and tokenizer_path, given here "
        "or in the file of train_configs/."
    )


def _overrides(options: argparse.Namespace) -> dict[str, str]:
    """`--key value` and `--key=value` pairs that the parser does not know by name."""
    pairs: dict[str, str] = {}
    rest = list(options.rest)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise UserError(f"command line: found {word!r}, expected --key value")
        if not equals:
            if not rest:
                raise UserError(f"command line: --{key}: its value is missing")
            value = rest.pop(0)
        if key in pairs:
            raise UserError(f"command line: --{key} is given twice; keep one of them")
        pairs[key] = value
    return pairs


def _quickstart(options: argparse.Namespace) -> None:
    from fm9g.quickstart import quickstart

    quickstart(options.out, options.steps, options.overwrite)


def _train(options: argparse.Namespace) -> int:
    from fm9g.config.run import load_run

    run = load_run(options.config, _overrides(options))
    if run.train.value.only_run_dataloader:
        from fm9g.train.data import run_dataloader

        _print_loader(run_dataloader(run))
        return 0
    from fm9g.train.run import run_training

    result = run_training(run)
    rate = result.tokens / max(result.seconds, 1e-9)
    print(f"step {result.step}: {result.tokens} tokens in this session, {result.seconds:.0f} s, {rate:.0f} tokens/s")
    if result.interrupted and result.checkpoint:
        print(f"stopped before the end; go on with --resume_ckpt {result.step}")
    print(f"checkpoint: {result.checkpoint or 'none (save is false)'}")
    print(f"figures: {result.metrics_file}\nTensorBoard: {result.tensorboard}")
    return 130 if result.interrupted else 0


def _print_loader(result: Any) -> None:
    total = sum(result.tokens.values())
    padding = 1 - total / max(1, result.positions)
    print(
        f"{result.steps} steps, {total} tokens, {result.rate:.0f} tokens/s, {padding:.2%} padding; nothing was trained"
    )
    for task, tokens in result.tokens.items():
        print(f"  {task}: {tokens} tokens, {tokens / max(1, total):.2%} (wanted: {result.wanted[task]:.2%})")
    for reason, count in result.skipped.items():
        print(f"note: {count} records were skipped: {reason}")


def _config_show(options: argparse.Namespace) -> None:
    from fm9g.config.run import load_run

    run = load_run(options.config, _overrides(options), complete=False)
    for section, values in run.to_json().items():
        print(f"[{section}]")
        for key, item in values.items():
            print(f"  {key:<28} {item['value']!r:<24} {item['from']}")
    for note in run.notes:
        print(f"note: {note}")


def _config_keys(options: argparse.Namespace) -> None:
    from fm9g.config.fields import describe, keys_of, schema_of
    from fm9g.config.mixture import DatasetConfig
    from fm9g.config.model import ModelConfig
    from fm9g.config.train import RETIRED, TrainConfig

    kinds = (
        ("train_configs", "--KEY VALUE", TrainConfig),
        ("model_configs", "--model.KEY VALUE", ModelConfig),
        ("dataset_configs", "--data.TASK.KEY VALUE", DatasetConfig),
    )
    for folder, usage, cls in kinds:
        print(f"[{folder}]  {usage}")
        properties = schema_of(cls)["properties"]
        for key, field in keys_of(cls).items():
            default = "required" if key in schema_of(cls)["required"] else f"default {_default(field)!r}"
            print(f"  {key}: {describe(properties[key])}; {default}\n      {field.metadata['help']}")
    print("[names of the 9G guide that change nothing]")
    for key, why in RETIRED.items():
        print(f"  {key}: {why}")


def _default(field: Any) -> Any:
    import dataclasses

    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _data_txt2jsonl(options: argparse.Namespace) -> None:
    from fm9g.data.records import decoded_lines, text_records, to_line

    for record in text_records(decoded_lines(sys.stdin.buffer, "stdin")):
        sys.stdout.buffer.write(to_line(record))
    sys.stdout.buffer.flush()


def _data_index(options: argparse.Namespace) -> None:
    from fm9g.data.build import build_index
    from fm9g.data.columns import columns_from_file, columns_from_text, dataset_info_entry
    from fm9g.data.lines import Settings
    from fm9g.data.sources import find_sources

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
    sources = find_sources(paths, options.format, options.text_unit, options.output)
    settings = Settings(options.language, columns, options.as_is, options.skip_bad, options.split, options.seed)
    report = build_index(sources, options.output, settings, options.workers, options.overwrite)
    for folder, meta in report.metas.items():
        size = f"{meta['nlines']} records, {meta['nbytes']} bytes, about {meta['avg_token_per_line']:.0f} tokens each"
        print(f"{folder}: {size}")
    shapes = ", ".join(f"{count} {shape}" for shape, count in report.shapes.most_common())
    print(f"read from {report.sources} {'file' if report.sources == 1 else 'files'}: {shapes}")
    if report.empty:
        print(f"note: {report.empty} records have no output; training skips them")
    if report.rejected:
        print(f"note: {report.rejected} bad records were left out: {options.output / 'rejects.jsonl'}")


def _data_tokenizer(options: argparse.Namespace) -> None:
    from fm9g.data.build import texts_of
    from fm9g.data.sources import find_sources
    from fm9g.data.tokenizer import train_tokenizer

    sources = find_sources(options.files)
    files = tuple(Path(source.path) for source in sources)
    size = train_tokenizer(texts_of(sources), options.vocab_size, options.output, options.overwrite, files)
    less = f"; fewer than {options.vocab_size}: the text gives no more" if size < options.vocab_size else ""
    print(f"{options.output}: a tokenizer of {size} tokens{less}")


def _mixture_settings(options: argparse.Namespace) -> dict[str, Any]:
    keys = ("max_length", "batch_size", "template", "loss", "seed")
    return {"tokenizer_path": options.tokenizer, **{key: getattr(options, key) for key in keys}}


def _data_check(options: argparse.Namespace) -> None:
    from fm9g.data.check import check
    from fm9g.data.report import table

    keys = ("output", "steps", "packs", "sample", "workers", "overwrite")
    arguments = {key: getattr(options, key) for key in keys}
    report = check(options.mixture, **arguments, **_mixture_settings(options))
    print(table(report))
    for note in report["notes"]:
        print(f"note: {note}")
    print(f"{options.output}: check.json, lengths.png")


def _data_show(options: argparse.Namespace) -> None:
    from fm9g.data.check import open_mixture
    from fm9g.data.show import show, wants_color

    mixture, _ = open_mixture(options.mixture, **_mixture_settings(options))
    arguments = {key: getattr(options, key) for key in ("count", "task", "record", "packs", "full")}
    for text in show(mixture, **arguments, color=wants_color(options.color)):
        print(text)


def _convert(options: argparse.Namespace) -> None:
    from fm9g.convert.hf import export_folder, import_folder

    if options.target.suffix == ".pt":
        if options.reference or options.dtype:
            raise UserError("convert: --reference and --dtype are for the way to a Hugging Face folder")
        config = import_folder(options.source, options.target, options.overwrite)
        print(f"{options.target}: written; its model configuration is {config}")
    else:
        name = export_folder(options.source, options.target, options.reference, options.dtype, options.overwrite)
        print(f"{options.target}: {name}, loads with transformers")


def _generate(options: argparse.Namespace) -> None:
    from fm9g.infer.generate import generate

    settings = {
        key: getattr(options, key)
        for key in ("max_new_tokens", "temperature", "top_p", "repetition_penalty", "seed", "chat", "system")
    }
    print(("" if options.chat else options.prompt) + generate(options.folder, options.prompt, **settings))
