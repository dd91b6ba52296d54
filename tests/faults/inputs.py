"""Bad inputs for every command: files and arguments of a good command are damaged, and what it does is judged.

A command may refuse a bad input by one message that names it, or take it where nothing is wrong with it. It must not
end in a traceback, by a signal, after too long or with too much memory, and must not change or leave anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from faults.forked import EndedCommand, run
from faults.mutations import CONTENT_MUTATIONS, FILE_MUTATIONS, WORD_MUTATIONS
from faults.prepared import prepare
from helpers.common import make_records, random_text, small_model, write_jsonl

from fm9g.printable import printable

TIMEOUT_S = 60.0  # that a command may take
MAX_LINES = 6  # of a message; a schema may find more than one key wrong
MAX_CHARACTERS = 1500  # of a line of it
_LIBRARY = re.compile(r"Traceback|\b[A-Za-z_.]*[a-z](?:Error|Exception)\b|Error\(s\)|object at 0x|enforce fail")
OUTCOMES = ("as without it", "another result", "refused")
_LEFTOVER = re.compile(r"\..+\.\d+\.(?:tmp|old|new)")
_SAID_BESIDE = re.compile(
    r"^(?:note|warning): |^\s*$|%\||\r|^usage: |^ +(?:\[|\{|[a-z]+ )|^fm9g: what is written is kept"
)
_MODEL = "--config m.json --tokenizer_path tokenizer --dataset_config ./mixture.json"
_TRAIN = f"{_MODEL} --max_length 64 --device cpu --dataloader_num_workers 0 --report_to none --batch_size 1"
_LORA = "--lora_layer w_0 --lora_r 2 --lora_alpha 4"


@dataclass(frozen=True)
class Command:
    """A good command. reads: globs of what it reads. writes: what it makes. stdin: what it reads there."""

    words: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ("out",)
    stdin: str = ""

    @property
    def argv(self) -> list[str]:
        return self.words.split()

    @property
    def subcommand(self) -> str:
        """As the table of results names it."""
        words = self.argv
        return " ".join(words[:2]) if words[0] in ("data", "config", "ckpt", "lora") else words[0]


INDEXED, TOKENIZER = "indexed/*", "tokenizer/*"
MIXTURE = ("mixture.json", INDEXED, TOKENIZER)
CHECKPOINT, ADAPTER_CHECKPOINT = "data/checkpoints/m/4/**/*", "data/checkpoints/lora/1/**/*"
HF, PEFT = "hf/*", "peft/*"
RUN_FILES = ("m.json", *MIXTURE)
_INDEX = "data index --language en --output out --workers 0 --path"
_SOURCES = """
s.jsonl s.json s.csv s.tsv s.txt s.md s.parquet s.jsonl.gz s.jsonl.zst s.jsonl.xz s.jsonl.bz2 chat.jsonl
""".split()  # noqa: SIM905
COMMANDS = (
    Command("data txt2jsonl", ("s.txt",), (), stdin="s.txt"),
    *(Command(f"{_INDEX} {source}", (source,)) for source in _SOURCES),
    Command(f"{_INDEX} s.jsonl chat.jsonl --skip-bad --split 0.5", ("s.jsonl", "chat.jsonl")),
    Command(f"{_INDEX} saved", ("saved/*",)),
    Command(f"{_INDEX} other.jsonl --columns columns.json", ("other.jsonl", "columns.json")),
    Command(f"{_INDEX} dataset_info.json --dataset d", ("dataset_info.json", "other.jsonl")),
    Command("data tokenizer s.jsonl chat.jsonl --vocab_size 300 --output out", ("s.jsonl", "chat.jsonl")),
    Command(
        "data check mixture.json --tokenizer tokenizer --output out --workers 0 --max_length 64 --steps 4", MIXTURE
    ),
    Command("data show mixture.json --tokenizer tokenizer --count 2", MIXTURE, ()),
    Command(
        "data show chats.json --tokenizer tokenizer --packs --max_length 64 --count 2",
        ("chats.json", "chat/*", "t.jinja", "transform.py", TOKENIZER),
        (),
    ),
    Command(f"config show {_MODEL}", ("m.json", "mixture.json"), ()),
    Command("config show --config t.json --adapter peft", ("t.json", "m.json", PEFT), ()),
    Command(f"plan {_MODEL} --epochs 1", RUN_FILES, ()),
    Command("plan --config t.json --gpus 2 --tokens 1M --json", ("t.json", "m.json"), ()),
    Command(f"doctor {_MODEL}", ("m.json", "mixture.json"), ()),
    Command(
        f"train {_TRAIN} --train_iters 1 --val_dataset ./mixture.json --eval_batches 1 --output_dir out", RUN_FILES
    ),
    Command(f"train {_TRAIN} --only_run_dataloader true --train_iters 1", RUN_FILES, ()),
    Command(f"train {_TRAIN} --model_unique m --train_iters 5 --resume auto --save false", (CHECKPOINT,), ("data",)),
    Command(f"train {_TRAIN} --train_iters 1 --output_dir out --pretrained_model m.pt", ("m.pt",)),
    Command(f"train {_TRAIN} --train_iters 1 --output_dir out --pretrained_model m/4", (CHECKPOINT,)),
    Command(f"train {_TRAIN} --train_iters 1 --output_dir out --pretrained_model hf", (HF,)),
    Command(f"train {_TRAIN} --train_iters 1 --output_dir out --adapter peft --pretrained_model m.pt", (PEFT, "m.pt")),
    Command("convert m.pt out --verify", ("m.pt", "m.json")),
    Command("convert m.pt out --reference llama", ("m.pt", "llama/*")),
    Command("convert m/4 out --dtype bf16", (CHECKPOINT,)),
    Command("convert hf out.pt --verify", (HF,), ("out.pt", "out.json")),
    Command("convert llama out.pt", ("llama/*",), ("out.pt", "out.json")),
    Command("lora show lora/1", (ADAPTER_CHECKPOINT,), ()),
    Command("lora show a.pt --train-config t.json", ("a.pt", "t.json"), ()),
    Command("lora show peft", (PEFT,), ()),
    Command("lora merge m.pt lora/1 out", ("m.pt", "m.json", ADAPTER_CHECKPOINT)),
    Command("lora merge hf peft out.pt", (HF, PEFT), ("out.pt", "out.json")),
    Command("lora combine lora/1 peft --weights 0.5 0.5 --out out", (ADAPTER_CHECKPOINT, PEFT)),
    Command("lora export lora/1 out --base hf", (ADAPTER_CHECKPOINT, HF)),
    Command("lora import peft out --base m.pt", (PEFT, "m.pt")),
    Command("ckpt ls", (CHECKPOINT,), ()),
    Command("ckpt verify m", (CHECKPOINT,), ()),
    Command("ckpt show m/4 --weights", (CHECKPOINT,), ()),
    Command("ckpt show m.pt --json", ("m.pt", "m.json"), ()),
    Command("ckpt diff m/2 m/4", (CHECKPOINT,), ()),
    Command("report m lora --output out.html", ("data/logs/m/*",), ("out.html",)),
    Command("plot m --output out.svg", ("data/logs/m/*",), ("out.svg",)),
    Command("generate hf --prompt fox --max_new_tokens 4", (HF,), ()),
    Command("generate llama --prompt fox --max_new_tokens 4 --chat", ("llama/*",), ()),
    Command("quickstart --out out --steps 1"),
)
# What else a command may answer to what it took: weights differ, a plan or a machine does not fit.
_CODES = {"ckpt diff": (1,), "plan": (1,), "doctor": (1,)}


class InputFixture:
    """A folder of all that commands read, and what every good command leaves of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "good"
        self.folder.mkdir()
        _write_sources(self.folder)
        for words in (
            f"{_INDEX} s.jsonl".replace("--output out", "--output indexed"),
            f"{_INDEX} chat.jsonl".replace("--output out", "--output chat"),
            f"train {_TRAIN} --model_unique m --train_iters 4 --save_iters 2",
        ):
            self._make(words)
        shutil.copy(next(self.folder.glob("data/checkpoints/m/4/*.pt")), self.folder / "m.pt")
        for words in (
            "convert m/4 hf",
            f"train {_TRAIN} {_LORA} --model_unique lora --train_iters 1 --pretrained_model m.pt",
            "lora export lora/1 peft --base hf",
        ):
            self._make(words)
        shutil.copy(next(self.folder.glob("data/checkpoints/lora/1/*.pt")), self.folder / "a.pt")
        shutil.copytree(self.folder / "hf", self.folder / "llama")
        shutil.copy(self.folder / "t.jinja", self.folder / "llama" / "chat_template.jinja")

    def _make(self, words: str) -> None:
        ended = run(words.split(), self.folder, preexec_fn=prepare)
        assert ended.returncode == 0, f"{words}: {ended.stderr}"

    def files(self, command: Command) -> list[str]:
        found = {file for pattern in command.reads for file in self.folder.glob(pattern) if file.is_file()}
        return sorted(str(file.relative_to(self.folder)) for file in found)


@dataclass
class Attempt:
    """A command with one damage. kind: of the damage. what: what was damaged, in words. names: what a message has to
    name, one of these. denied: without the rights of root."""

    command: Command
    kind: str
    what: str
    names: tuple[str, ...]
    argv: list[str]
    denied: bool = False
    stderr: str = ""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    outcome: str = "refused"  # one of OUTCOMES

    def __str__(self) -> str:
        return f"fm9g {' '.join(word[:60] for word in self.argv)} [{self.kind}: {self.what}]"


class Inputs:
    """Makes attempts and judges them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.fixture, self._folder, self._random = InputFixture(folder), folder, random.Random(seed)
        self._good: dict[str, str] = {}  # what good commands leave

    def attempts(self, count: int, commands: Sequence[Command] = COMMANDS) -> Iterator[Attempt]:
        for number in range(count):
            yield self.attempt(commands[number % len(commands)])

    def attempt(self, command: Command) -> Attempt:
        work = self._folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.fixture.folder, work, symlinks=True)
        files = self.fixture.files(command)
        if files and self._random.random() < 0.75:
            attempt = self._damage_file(command, work, files)
        else:
            attempt = self._damage_words(command)
        before = tree(work)
        ended = self._run(attempt, work)
        attempt.stderr, attempt.seconds = ended.stderr, ended.seconds
        attempt.problems = problems_of(attempt, ended, before, tree(work))
        if is_taken(command, ended):
            same = attempt.argv == command.argv and _answer(ended, command, work) == self._good_answer(command)
            attempt.outcome = OUTCOMES[0 if same else 1]
        _make_removable(work)
        return attempt

    def _damage_file(self, command: Command, work: Path, files: list[str]) -> Attempt:
        for _ in range(50):
            name = self._random.choice(files)
            chosen = self._random.choice(CONTENT_MUTATIONS if command.stdin else FILE_MUTATIONS)
            if chosen.kind == "a pipe" and command.subcommand.startswith("data "):
                continue  # such as <(zcat file): who reads data from it waits for who writes
            if chosen.fits(work / name) and (what := chosen.apply(work / name, self._random)) is not None:
                path = Path(name)
                parents = [str(parent) for parent in path.parents if parent != Path()]
                parents += [parent.removeprefix("data/checkpoints/") for parent in parents]
                names = (path.name, path.stem, *parents, *what.names, *_keys_of(self.fixture.folder / name))
                return Attempt(
                    command, chosen.kind, f"{name}: {what.text}", names, command.argv, chosen.kind == "denied"
                )
        return self._damage_words(command)  # nothing fits its files

    def _damage_words(self, command: Command) -> Attempt:
        kind, argv, what, names = self._random.choice(WORD_MUTATIONS)(command.argv, self._random)
        names = (*names, *(printable(word) for word in argv if len(word) > 1), "work")  # the folder, for `.`
        return Attempt(command, kind, what, names, argv)

    def _run(self, attempt: Attempt, work: Path) -> EndedCommand:
        preexec_fn = partial(prepare, attempt.command.stdin, attempt.denied, attempt.argv[0] == "doctor")
        return run(attempt.argv, work, TIMEOUT_S, preexec_fn=preexec_fn)

    def _good_answer(self, command: Command) -> str:
        """What a good command prints and makes."""
        if command.words not in self._good:
            work = self._folder / "undamaged"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(self.fixture.folder, work, symlinks=True)
            ended = run(
                command.argv,
                work,
                TIMEOUT_S,
                preexec_fn=partial(prepare, command.stdin, False, command.subcommand == "doctor"),
            )
            self._good[command.words] = _answer(ended, command, work)
        return self._good[command.words]


def is_taken(command: Command, ended: EndedCommand) -> bool:
    """Whether a command took its input."""
    return not ended.timed_out and (ended.returncode == 0 or ended.returncode in _CODES.get(command.subcommand, ()))


def problems_of(attempt: Attempt, ended: EndedCommand, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is wrong with how a command ended. before, after: what tree gives of the folder in which it ran."""
    problems = _problems_of_end(ended)
    if not is_taken(attempt.command, ended):
        problems += [f"exit code {ended.returncode}"] * (ended.returncode not in (0, 2))
        problems += _problems_of_message(attempt, ended)
    match = _LIBRARY.search(ended.stderr)
    if match and not (match[0] == "SyntaxError" and ".py" in ended.stderr):  # of a transform of the user's
        problems.append(f"words of a library or of Python: {match[0]}")
    if "out of memory" in ended.stderr and attempt.argv == attempt.command.argv:
        problems.append("too much memory")
    shown = ended.stderr + ("" if attempt.command.subcommand in ("generate", "data txt2jsonl") else ended.stdout)
    if bad := {letter for letter in shown if not (letter.isprintable() or letter in "\n\r\t")}:
        problems.append(f"unprintable {sorted(bad)}")
    if "What is done is kept in" in ended.stderr:  # a conversion that the same command goes on with
        after = {name: value for name, value in after.items() if ".partial" not in name}
    return problems + _problems_of_files(attempt, is_taken(attempt.command, ended), before, after)


def _problems_of_end(ended: EndedCommand) -> list[str]:
    problems = [f"took more than {TIMEOUT_S:.0f} s"] * ended.timed_out
    if ended.returncode < 0 and not ended.timed_out:
        problems.append(f"ended by signal {-ended.returncode}")
    return problems + [f"{ended.orphans} processes lived on"] * bool(ended.orphans)


def _problems_of_message(attempt: Attempt, ended: EndedCommand) -> list[str]:
    lines = ended.stderr.split("\n")
    start = next((number for number, line in enumerate(lines) if line.startswith("fm9g")), 0)  # below what it logs
    lines = [line for line in lines[start:] if not _SAID_BESIDE.search(line)]
    message = "\n".join([*lines, ended.stdout]).lower()  # ckpt verify names a damage on stdout
    problems = []
    if not message.strip():
        problems.append("no message")
    if len(lines) > MAX_LINES:
        problems.append(f"{len(lines)} lines of message")
    if max(map(len, lines), default=0) > MAX_CHARACTERS + 2 * max(map(len, attempt.argv)):
        problems.append(f"a message of more than {MAX_CHARACTERS} characters")
    if not any(name and name[:60].lower() in message for name in attempt.names):
        problems.append(f"names none of {attempt.names}")
    return problems


def _problems_of_files(attempt: Attempt, taken: bool, before: dict[str, str], after: dict[str, str]) -> list[str]:
    new = [name for name in after if name not in before]
    changed = [name for name in before if after.get(name) != before[name]]
    if attempt.command.subcommand == "train":  # it keeps logs, also of a run that it cannot begin
        changed = [name for name in changed if not name.startswith("data/")]
    problems = [f"changed {changed[:3]}"] * bool(changed)
    writes = attempt.command.writes if taken or attempt.command.subcommand in ("train", "convert") else ()
    strange = [name for name in new if not any(name == path or name.startswith(f"{path}/") for path in writes)]
    if strange and not (taken and attempt.argv != attempt.command.argv):  # whose output may be another one
        problems.append(f"made {strange[:3]}")
    left = [name for name in new if any(_LEFTOVER.fullmatch(part) for part in Path(name).parts)]
    return problems + [f"left {left[:3]}"] * bool(left)


def _keys_of(path: Path) -> list[str]:
    """The keys of a configuration: a message may name one of them in place of the file."""
    return [f"{key}:" for key in re.findall(r'"([a-z_]{4,})":', path.read_text())] if path.suffix == ".json" else []


def _answer(ended: EndedCommand, command: Command, work: Path) -> str:
    outputs = {name: value for name, value in tree(work).items() if name.startswith(command.writes)}
    outputs = {name: value for name, value in outputs.items() if not name.startswith("data/")}
    printed = re.sub(r"\d+(?:\.\d+)? (?:s|tokens/s|ms)\b|\d{4}-\d\d-\d\d.\d\d:\d\d(?::\d\d)?", "", ended.stdout)
    is_run = command.subcommand in ("train", "report")
    return f"{ended.returncode} {printed} {'' if is_run else outputs}"


def tree(folder: Path) -> dict[str, str]:
    """What is in a folder: a hash of each file, the target of each link."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink():
                found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[str(path.relative_to(folder))] = hashlib.sha1(path.read_bytes()).hexdigest()
            else:
                found[str(path.relative_to(folder))] = "folder"
    return found


def _make_removable(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755)


def _write_sources(folder: Path) -> None:
    """Data in every format, a tokenizer, configurations; and what no command can read."""
    import bz2
    import csv
    import gzip
    import lzma

    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    from fm9g.data.encode.tokenizer_training import train_tokenizer

    rng = random.Random(0)
    rows = make_records(20)
    plain = write_jsonl(folder / "s.jsonl", rows).read_bytes()
    for ending, pack in (("gz", gzip), ("xz", lzma), ("bz2", bz2)):
        (folder / f"s.jsonl.{ending}").write_bytes(pack.compress(plain))
    with pyarrow.output_stream(folder / "s.jsonl.zst", compression="zstd") as stream:
        stream.write(plain)
    (folder / "s.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    for name, delimiter in (("s.csv", ","), ("s.tsv", "\t")):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["input", "output"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    for name in ("s.txt", "s.md"):
        (folder / name).write_text("\n".join(random_text(rng, 9) for _ in range(20)), encoding="utf-8")
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "s.parquet")
    (folder / "saved").mkdir()  # as datasets.save_to_disk writes it, whose import takes seconds
    with pyarrow.ipc.new_stream(folder / "saved" / "data.arrow", table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "0", "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
    chats = [
        {
            "messages": [
                {"role": "user", "content": random_text(rng, 5)},
                {"role": "assistant", "content": random_text(rng, 9)},
            ]
        }
        for _ in range(20)
    ]
    write_jsonl(folder / "chat.jsonl", chats)
    write_jsonl(folder / "other.jsonl", [{"q": row["input"], "a": row["output"]} for row in rows])
    (folder / "t.jinja").write_text(
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (folder / "transform.py").write_text("def transform(data, num_sample, r):\n    return data\n")
    columns = {"prompt": "q", "response": "a"}
    for name, content in (
        ("saved/state.json", state),
        ("saved/dataset_info.json", {}),
        ("columns.json", columns),
        ("dataset_info.json", {"d": {"file_name": "other.jsonl", "columns": columns}}),
        ("m.json", small_model().to_json()),
        ("mixture.json", [{"task_name": "t", "path": "indexed", "abs_weight": 1.0}]),
        ("chats.json", [{"task_name": "c", "path": "chat", "chat_template": "./t.jinja",
                         "transforms": "transform.py"}]),
        ("t.json", {"pretrain": {"config": "./m.json", "train_iters": 4, "max_length": 64},
                    "finetune": {"lora_layer": ["w_0"], "lora_r": 2, "lora_alpha": 4, "pretrained_model": "m.pt"}}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    train_tokenizer((random_text(rng, 30) for _ in range(200)), 320, folder / "tokenizer")
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("not_there")
