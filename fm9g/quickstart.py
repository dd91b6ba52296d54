"""`fm9g quickstart`: from text to generation, on the sources of the Python standard library."""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from fm9g.chat.model import LocalChatModel
from fm9g.chat.terminal import run_chat
from fm9g.config.load import require_config
from fm9g.config.mixture import NO_TEMPLATE
from fm9g.config.model import load_model_config
from fm9g.config.run import load_run
from fm9g.convert.hf_export import ExportOptions, export_folder
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.data.prepare.index_builder import build_index
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.records import text_records, to_line
from fm9g.data.prepare.sources import find_sources
from fm9g.data.prepare.texts import iter_texts
from fm9g.errors import UserError
from fm9g.infer.hf_folder import OpenOptions
from fm9g.infer.open_model import open_model
from fm9g.infer.options import GenerationOptions
from fm9g.progress import Progress
from fm9g.report.plot import plot_loss
from fm9g.run_files import read_metrics
from fm9g.text_table import text_table
from fm9g.train.runner import TrainResult, run_training

CONFIG = "tiny"
_MAX_STEPS = 10**9
TOKENIZER_BYTES = 8_000_000  # of source text that the tokenizer is trained on
PROMPT = "class Queue:\n    def __init__(self, size):\n        self.size = size\n\n    def put(self, item):\n"


def quickstart(out: Path, steps: int, overwrite: bool = False) -> None:
    """Runs all steps, writes their results to `out`, and prints a table of them."""
    if not 2 <= steps <= _MAX_STEPS:
        raise UserError(f"--steps: found {steps}, expected 2 to {_MAX_STEPS}: the run stops halfway and resumes")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise UserError(f"{out}: is not empty; choose another --out, or add --overwrite")
    started = time.monotonic()
    _print_step(1, "Text: the sources and docstrings of Python's standard library")
    sources, docstrings = write_corpus(out / "text")
    _print_step(2, "Indexed datasets")
    indexed = {"sources": sources, "docstrings": docstrings}
    for name, file in indexed.items():
        language = {"sources": "code", "docstrings": "en"}[name]
        build_index(find_sources([str(file)]), out / "datasets" / name, IndexConfig(language), overwrite=overwrite)
    _print_step(3, "Tokenizer")
    vocab_size = load_model_config(require_config("model_configs", CONFIG)).vocab_size
    train_tokenizer(
        iter_texts(find_sources([str(sources), str(docstrings)]), TOKENIZER_BYTES),
        vocab_size,
        out / "tokenizer",
        overwrite,
    )
    mixture = out / "mixture.json"
    mixture.write_text(json.dumps(MIXTURE, indent=4), encoding="utf-8")

    settings = {
        "dataset_config": str(mixture.resolve()),
        "tokenizer_path": str(out / "tokenizer"),
        "output_dir": str(out / "data"),
        "train_iters": str(steps),
        "save_iters": str(steps),
    }
    half = steps // 2
    _print_step(4, f"Pretraining: {half} steps, a stop, then resuming from the checkpoint to step {steps}")
    first_half = _train({**settings, "stop_iters": str(half), "overwrite": str(overwrite)})
    print(f"stopped at step {first_half.step}; resuming from {first_half.checkpoint}")
    second_half = _train({**settings, "resume_ckpt": str(first_half.step)})
    assert second_half.checkpoint is not None
    _print_step(5, "Hugging Face folder")
    name = export_folder(second_half.checkpoint, out / "hf", options=ExportOptions(overwrite=overwrite))
    picture = out / "loss.png"
    plot_loss(second_half.metrics_file, picture, {half: "stopped, resumed"})
    _print_step(6, f"Generation: {name}, with transformers alone")
    options = GenerationOptions(120, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    model = open_model(out / "hf", OpenOptions(chat_template=NO_TEMPLATE))
    print(_indented(PROMPT + model.generate(PROMPT, options)))
    _print_table(out, second_half, [first_half, second_half], picture, time.monotonic() - started)
    _print_step(7, "Chat: it continues what you write")
    print(f"  fm9g chat {out / 'hf'} --chat_template {NO_TEMPLATE}    this chat again")
    print(f"  fm9g serve {out / 'hf'} --page    an address for programs, and a page", flush=True)
    if sys.stdin.isatty() and sys.stdout.isatty():
        run_chat([LocalChatModel(model)], options)


MIXTURE = [
    {"task_name": "sources", "path": "datasets/sources", "abs_weight": 0.9},
    {"task_name": "docstrings", "path": "datasets/docstrings", "abs_weight": 0.1},
]


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Writes sources.jsonl (one record per file) and docstrings.jsonl (one per docstring); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    sources, text = folder / "sources.jsonl", folder / "docstrings.txt"
    files = library_sources()
    with sources.open("wb") as out, text.open("w", encoding="utf-8") as lines:
        with Progress("reading the library", total=len(files), unit="files") as progress:
            for file in files:
                source = file.read_text(encoding="utf-8", errors="replace")
                out.write(to_line({"input": "", "output": source}))
                lines.writelines(f"{docstring}\n" for docstring in docstrings_of(source))
                progress.advance()
    docstrings = folder / "docstrings.jsonl"
    with text.open(encoding="utf-8") as lines, docstrings.open("wb") as out:
        out.writelines(to_line(record) for record in text_records(lines))
    return sources, docstrings


def library_sources() -> list[Path]:
    """The standard library's files, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    return sorted(
        file for file in root.rglob("*.py") if file.stat().st_size and not left_out & set(file.relative_to(root).parts)
    )


def docstrings_of(source: str) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, each on one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in the library's own sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and (docstring := ast.get_docstring(node)):  # type: ignore[arg-type]
            yield " ".join(docstring.split())


def _train(settings: dict[str, str]) -> TrainResult:
    result = run_training(load_run(CONFIG, settings))
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def _print_step(number: int, text: str) -> None:
    print(f"\n[{number}/7] {text}", flush=True)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _print_table(out: Path, last: TrainResult, parts: list[TrainResult], picture: Path, seconds: float) -> None:
    metrics = read_metrics(last.metrics_file)
    tokens, training = sum(part.tokens for part in parts), sum(part.seconds for part in parts)
    rows = [
        ("text", out / "text"),
        ("indexed datasets", out / "datasets"),
        ("tokenizer", out / "tokenizer"),
        ("mixture", out / "mixture.json"),
        ("checkpoint", last.checkpoint),
        ("Hugging Face folder", out / "hf"),
        ("metrics", last.metrics_file),
        ("TensorBoard", last.tensorboard_dir),
        ("picture of the loss", picture),
        ("loss at start and end", f"{metrics[0]['Loss/train']:.3f}, {metrics[-1]['Loss/train']:.3f}"),
        ("tokens trained on", f"{tokens:,}"),
        ("tokens per second", f"{tokens / training:,.0f}"),
        ("total time", f"{seconds:.0f} s"),
    ]
    print("", *text_table([(f"  {name}", str(value)) for name, value in rows]), sep="\n")
