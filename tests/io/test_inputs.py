"""What a command reads is never replaced by what it writes, and no command forgets a file that it reads."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.common import ROOT, index_dataset, make_records, random_text, small_model, write_jsonl
from helpers.random_adapters import make_adapter, make_model

from fm9g.cli import main
from fm9g.convert.hf_export import export_folder
from fm9g.convert.peft import write_peft
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.errors import UserError
from fm9g.io.atomic import atomic_dir, atomic_file
from fm9g.io.inputs import check_output, protect_inputs, register_input
from fm9g.io.pt_file import write_weights
from fm9g.lora.adapter_file import save_adapter

_TRAIN = (
    "train --config tiny.json --dataset_config mixture.json --tokenizer_path tokenizer --train_iters 1 --engine torch "
    "--batch_size 1 --max_length 128 --pretrained_model m.pt --model_unique run --save_iters 1"
)
# Whoever adds a command that writes adds it here: each file that it opens must be one that it keeps.
WRITING = [
    "data index --path raw.jsonl --language en --columns columns.json --output o1",
    "data index --path raw.csv --language en --output o2",
    "data tokenizer s.jsonl --vocab_size 300 --output o3",
    "data check mixture.json --tokenizer tokenizer --steps 2 --output o4",
    "plan --config tiny.json --dataset_config mixture.json --tokenizer_path tokenizer --plot o5.png",
    _TRAIN,
    "convert hf o6.pt",
    "convert m.pt o7",
    "convert m.pt o8 --reference hf",
    "convert m.pt o9 --reference hf --keep-reference-config",
    "lora merge m.pt adapter o10",
    "lora merge hf peft o11.pt",
    "lora combine adapter adapter --out o12",
    "lora export adapter o13 --base hf",
    "lora import peft o14 --base hf",
    "report data/logs/run --output o15.html",
    "plot data/logs/run --output o16.png",
]
_PROGRAM = """
import json, os, sys
opened = set()
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and not args[2] & (os.O_WRONLY | os.O_RDWR):
        opened.add(os.path.realpath(os.fsdecode(args[0])))
sys.addaudithook(hook)
from fm9g.io import inputs
from fm9g.cli import main
for words in json.loads(sys.argv[1]):
    there = {os.path.realpath(os.path.join(folder, name)) for folder, _, names in os.walk(".") for name in names}
    opened.clear()
    with inputs.protect_inputs():
        code = main(words)
        # What a run wrote about a checkpoint goes with its weights.
        opened -= {path for path in opened if os.path.exists(os.path.join(os.path.dirname(path), "manifest.json"))}
        opened -= {path for path in opened if path.endswith(".pyc")}  # Python's own, of a transform
        forgotten = sorted(os.path.relpath(path) for path in opened & there - inputs._registered)
    print("RESULT", json.dumps([" ".join(words), code, forgotten]))
"""


def make_inputs(folder: Path) -> None:
    """Small inputs of every command."""
    source = random.Random(0)
    train_tokenizer((random_text(source, 30) for _ in range(200)), 320, folder / "tokenizer")
    index_dataset(write_jsonl(folder / "s.jsonl", make_records(20)), folder / "indexed", "en")
    write_jsonl(folder / "raw.jsonl", [{"q": f"what is {i}", "a": f"it is {i}"} for i in range(20)])
    (folder / "raw.csv").write_text("input,output\n" + "".join(f"a{i},b{i}\n" for i in range(9)), encoding="utf-8")
    (folder / "columns.json").write_text('{"prompt": "q", "response": "a"}', encoding="utf-8")
    for name in ("scripts", "out"):
        (folder / name).mkdir()
    (folder / "scripts" / "script.py").write_text(
        "def transform(data, num_sample, r):\n    return data\n", encoding="utf-8"
    )
    (folder / "own.json").write_text('[{"task_name": "t", "path": "indexed"}]', encoding="utf-8")
    shutil.copy(folder / "columns.json", folder / "out")
    for file in ("own.jinja", "out/own.jinja"):
        (folder / file).write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    (folder / "there.png").touch()
    entry = {"task_name": "t", "path": "indexed", "transforms": "scripts/script.py", "chat_template": "own.jinja"}
    (folder / "mixture.json").write_text(json.dumps([entry]), encoding="utf-8")
    model = make_model()
    write_weights(folder / "m.pt", weights := dict(model.named_parameters()), weights.items())
    config = small_model().to_json()
    (folder / "m.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tiny.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "link.png").symlink_to("tiny.json")
    export_folder(folder / "m.pt", folder / "hf")
    shutil.copytree(folder / "tokenizer", folder / "hf", dirs_exist_ok=True)
    adapter = make_adapter(model)
    save_adapter(adapter, folder / "adapter")
    write_peft(adapter, folder / "peft", base=str(folder / "hf"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.mark.xdist_group("inputs")
def test_no_command_forgets_a_file_that_it_reads(inputs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps([shlex.split(words) for words in WRITING])],
        cwd=inputs,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert found == [[words, 0, []] for words in WRITING], done.stderr


# What libraries open by themselves, out of sight of the test above, and the cases that went wrong once.
LOST = [
    ("plan --config tiny.json --plot tiny.json --overwrite", "tiny.json", "expected a name that ends in .png"),
    ("plan --config tiny.json --plot link.png --overwrite", "tiny.json", "link.png: is an input"),
    ("plan --config tiny.json --plot there.png", "there.png", "already exists; choose another --plot"),
    (
        "data index --path raw.jsonl --language en --columns out/columns.json --output out --overwrite",
        "out",
        "is an input",
    ),
    (
        "data check own.json --tokenizer tokenizer --chat_template out/own.jinja --output out --overwrite",
        "out",
        "is an input",
    ),
    (
        "data check mixture.json --tokenizer tokenizer --output scripts --overwrite",
        "scripts",
        "script.py, which is an input",
    ),
    ("data check mixture.json --tokenizer tokenizer --output tokenizer --overwrite", "tokenizer", "which is an input"),
    ("data check mixture.json --tokenizer tokenizer --output indexed --overwrite", "indexed", "which is an input"),
    ("convert hf hf/tokenizer.pt --overwrite", "hf", "no model configuration of ours"),
    ("convert hf m.pt --overwrite", "", ""),
    ("convert m.pt hf --reference hf --overwrite", "hf", "which is an input"),
    ("lora merge hf peft peft --overwrite", "peft", "is an input"),
    ("lora merge hf peft hf --overwrite", "hf", "which is an input"),
    ("lora combine adapter adapter --out adapter --overwrite", "adapter", "which is an input"),
    ("lora import peft peft --base hf --overwrite", "peft", "is an input"),
    ("lora export adapter adapter --overwrite", "adapter", "which is an input"),
]


@pytest.mark.xdist_group("inputs")
@pytest.mark.parametrize(("words", "remaining", "message"), LOST)
def test_no_command_replaces_what_it_reads(
    inputs: Path,
    words: str,
    remaining: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(inputs)
    before = contents(inputs / remaining)
    assert main(shlex.split(words)) == (2 if message else 0)
    assert message in capsys.readouterr().err
    assert contents(inputs / remaining) == before or not remaining


def contents(path: Path) -> dict[str, bytes]:
    files = [file for file in path.rglob("*") if "__pycache__" not in file.parts] if path.is_dir() else [path]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.xdist_group("inputs")
def test_a_new_run_does_not_delete_the_checkpoint_that_it_starts_from(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(inputs)
    words = [word.replace("run", "once") for word in shlex.split(_TRAIN)]
    assert main(words) == 0
    again = [*words[: words.index("m.pt")], "data/checkpoints/once/1", *words[words.index("m.pt") + 1 :]]
    before = contents(inputs / "data/checkpoints/once/1")
    assert main([*again, "--overwrite", "true"]) == 2
    assert "once/1: contains" in capsys.readouterr().err
    assert contents(inputs / "data/checkpoints/once/1") == before


@pytest.mark.parametrize("inside", ["source", "deep/er/source", "."])
def test_a_folder_that_holds_an_input_is_never_replaced(tmp_path: Path, inside: str) -> None:
    source = tmp_path / "a" / inside
    source.mkdir(parents=True)
    (source / "precious").write_text("x")
    with protect_inputs():
        register_input(source)
        with pytest.raises(UserError, match="is an input; choose another"), atomic_dir(tmp_path / "a", overwrite=True):
            raise AssertionError
    assert (source / "precious").exists()


def test_what_is_read_while_the_output_is_made_counts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with protect_inputs():
        with pytest.raises(UserError, match="file: is an input"), atomic_file(tmp_path / "file") as temporary:
            temporary.write_text("new")
            register_input(tmp_path / "file")
        with (
            pytest.raises(UserError, match=r"contains .*, which is an input"),
            atomic_dir(tmp_path, overwrite=True) as folder,
        ):
            (folder / "file").write_text("new")
    assert (tmp_path / "file").read_text() == "precious"
    assert os.listdir(tmp_path) == ["file"]


def test_other_threads_may_read_while_an_output_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def holds(folder: str, path: str) -> bool:
        register_input(f"{path}.more")
        return False

    monkeypatch.setattr("fm9g.io.inputs._contains", holds)
    with protect_inputs():
        register_input(tmp_path / "file")
        check_output(tmp_path)


def test_inputs_are_those_of_one_command(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    register_input(tmp_path / "file")  # outside any command
    with protect_inputs():
        check_output(tmp_path / "file")
        with protect_inputs():
            register_input(tmp_path / "file")
        with pytest.raises(UserError, match="file: is an input"):
            check_output(tmp_path / "file")
    check_output(tmp_path / "file")
