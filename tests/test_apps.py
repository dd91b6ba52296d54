"""The guide's launch scripts: what they start, by a fake `fm9g` that writes down its arguments and variables."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import ROOT

from fm9g.config.model import load_model_config
from fm9g.config.run import load_run
from fm9g.io.json_file import read_object

APPS = ROOT / "apps"
SIZES = ("2b", "4b", "7b", "8b", "70b")
NAMES = ("GPUS_PER_NODE", "NNODES", "RANK", "MASTER_ENDPOINT", "MASTER_PORT")
FAKE = f"""#!{sys.executable}
import json, os, sys
json.dump({{"argv": sys.argv[1:], "cwd": os.getcwd(), "env": {{n: os.environ[n] for n in {NAMES} if n in os.environ}}}},
          sys.stdout)
sys.exit(3)
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def bash(tmp_path: Path) -> Callable[..., dict]:
    """bash(folder, "run_bmtrain.sh RANK=1", NNODES="2"): what the script started, and with what."""
    fake = tmp_path / "bin" / "fm9g"
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def start(folder: Path, words: str, **variables: str) -> dict:
        clean = {name: value for name, value in os.environ.items() if name not in NAMES}
        environment = {**clean, "PATH": f"{fake.parent}:{os.environ['PATH']}", "CDPATH": "/", **variables}
        done = subprocess.run(f"bash {words}", shell=True, cwd=folder, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (3, "")  # 3: of the fake one
        return json.loads(done.stdout)

    return start


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """apps/ in a folder with a space in its name."""
    ignored = shutil.ignore_patterns("data", "ckpt", "9g_models")
    return Path(shutil.copytree(APPS, tmp_path / "my apps", symlinks=True, ignore=ignored))


def pairs(launched: dict) -> dict[str, str]:
    """The keys that `fm9g train` was given, with their values."""
    words = launched["argv"][1:]
    return dict(zip(words[::2], words[1::2]))


def change(script: Path, old: str, new: str) -> None:
    text = script.read_text()
    assert text.count(old) == 1
    script.write_text(text.replace(old, new))


def test_bash_can_read_every_script() -> None:
    for script in APPS.glob("*.sh"):
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script


def test_folders_of_sizes_hold_links() -> None:
    for folder in (APPS / f"fm9g_{size}" for size in SIZES):
        for name in ("run_bmtrain.sh", "run_bmtrain_lora.sh", "launch.sh", "data_preprocess.sh"):
            assert os.readlink(folder / name) == f"../{name}"
        for name in ("train_configs", "model_configs", "dataset_configs"):
            assert os.readlink(folder / name) == f"../../{name}"
        not_linked = {"bmtrain_over_gloo.py", "checkout.py", "finetune.py", "gpu_wheels.py"}
        for name in {file.name for file in (ROOT / "tools").glob("*.py")} - not_linked:
            assert os.readlink(folder / name) == f"../../tools/{name}"
        assert all(link.exists() for link in folder.iterdir() if link.is_symlink())


@pytest.mark.parametrize("size", SIZES)
def test_the_guides_commands_train_the_size_of_the_folder(size: str, bash: Callable[..., dict]) -> None:
    folder = APPS / f"fm9g_{size}"
    result = bash(folder, "run_bmtrain.sh")
    assert (result["cwd"], result["env"]) == (str(folder), {})
    shared = {
        "--default.resume_ckpt": "",
        "--default.tokenizer_path": "./ckpt",
        "--default.dataset_config": "data_test",
    }
    assert pairs(result) == {"--config": size, "--default.pretrained_model": "", **shared}
    model = {"--default.pretrained_model": f"./9g_models/{size}.pt"}
    assert pairs(bash(folder, "run_bmtrain_lora.sh")) == {"--config": f"{size}_lora", **model, **shared}


def test_variables_and_arguments_reach_fm9g_and_arguments_win(bash: Callable[..., dict]) -> None:
    variables = {"GPUS_PER_NODE": "4", "NNODES": "2", "RANK": "0", "MASTER_ENDPOINT": "g3006", "MASTER_PORT": "12345"}
    folder = APPS / "fm9g_7b"
    assert bash(folder, "run_bmtrain.sh", **variables)["env"] == variables
    words = " ".join(f"{name}={value}" for name, value in variables.items())
    result = bash(folder, f"run_bmtrain.sh {words} --lr 1e-5 --save=False --model_unique 'a b'", RANK="7", NNODES="9")
    assert result["env"] == variables
    assert result["argv"][-5:] == ["--lr", "1e-5", "--save=False", "--model_unique", "a b"]


def test_an_empty_variable_is_none(bash: Callable[..., dict]) -> None:
    assert bash(APPS / "fm9g_7b", "run_bmtrain.sh", RANK="", NNODES="")["env"] == {}


@pytest.mark.parametrize("kind", ["", "_lora"])
def test_an_edited_copy_is_obeyed(kind: str, bash: Callable[..., dict], copy: Path) -> None:
    folder = copy / "fm9g_4b"
    script = Path(shutil.copy(folder / f"run_bmtrain{kind}.sh", folder / f"run_bmtrain{kind}_node_1.sh"))
    change(script, "\nNNODES=${NNODES:-} ", "\n  NNODES=2 ")  # as the guide indents it
    change(script, "\nRANK=${RANK:-} ", "\nRANK=1 ")
    change(script, "\nMASTER_ENDPOINT=${MASTER_ENDPOINT:-} ", "\nMASTER_ENDPOINT=g3006 ")
    result = bash(folder, f"{script.name} RANK=5 MASTER_PORT=12345", NNODES="8")
    assert result["env"] == {"NNODES": "2", "RANK": "1", "MASTER_ENDPOINT": "g3006", "MASTER_PORT": "12345"}
    assert result["argv"][:3] == ["train", "--config", f"4b{kind}"]
    assert result["cwd"] == str(folder)


def test_a_renamed_link_works(bash: Callable[..., dict], copy: Path) -> None:
    (copy / "fm9g_8b" / "run_bmtrain.sh").rename(copy / "fm9g_8b" / "run_bmtrain_node_0.sh")
    assert bash(copy / "fm9g_8b", "run_bmtrain_node_0.sh")["argv"][:3] == ["train", "--config", "8b"]


def test_keys_written_as_in_the_guide(bash: Callable[..., dict], copy: Path) -> None:
    script = Path(shutil.copy(copy / "fm9g_7b" / "run_bmtrain.sh", copy / "fm9g_7b" / "mine.sh"))
    lines = 'args["pretrained_model"]="./9g models/7b.pt"\nargs["lr"]="1e-5"\nargs["n_gpus"]=2\nargs["config"]="7b"\n'
    change(script, "\n# All sizes share", f"{lines}\n# All sizes share")
    change(script, "GPUS_PER_NODE=${GPUS_PER_NODE:-} ", 'GPUS_PER_NODE=${args["n_gpus"]} ')
    result = bash(copy / "fm9g_7b", "mine.sh --lr 2e-5")
    given = {key: pairs(result)[key] for key in ("--config", "--default.pretrained_model", "--default.lr", "--lr")}
    assert list(given.values()) == ["7b", "./9g models/7b.pt", "1e-5", "2e-5"]
    # The number of processes is a default as well: train_configs/ wins over it.
    assert (result["env"], pairs(result)["--default.n_gpus"]) == ({}, "2")
    assert bash(copy / "fm9g_7b", "run_bmtrain.sh GPUS_PER_NODE=2")["env"] == {"GPUS_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('args["lr"]= 1e-5', "1e-5"),
        ('args["lr"] = "1e-5"', "1e-5"),
        ("args['lr']= '1e-5'", "1e-5"),
        ("args[lr]=1e-5", "1e-5"),
        ('args["x-y"]= "x"', None),
        ('args["lr"]= "$size"', None),
        ('args["lr"] ="1"', None),
    ],
)
def test_a_setting_with_blanks_counts_or_ends_the_script(
    line: str, expected: str | None, bash: Callable[..., dict], copy: Path
) -> None:
    script = Path(shutil.copy(copy / "fm9g_7b" / "run_bmtrain.sh", copy / "fm9g_7b" / "mine.sh"))
    change(script, "\n# All sizes share", f"\n{line}\n# All sizes share")
    if expected:
        assert pairs(bash(copy / "fm9g_7b", "mine.sh"))["--default.lr"] == expected
        return
    done = subprocess.run(["bash", "mine.sh"], cwd=copy / "fm9g_7b", capture_output=True, text=True)
    assert done.returncode == 2
    assert line in done.stderr


def test_what_follows_a_key_is_its_value(bash: Callable[..., dict]) -> None:
    result = bash(APPS / "fm9g_7b", "run_bmtrain.sh --model_unique NNODES=4")
    assert (pairs(result)["--model_unique"], result["env"]) == ("NNODES=4", {})


def test_a_copy_of_a_script_works_elsewhere(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tools" / "convert_txt2jsonl.py", tmp_path)
    command = [sys.executable, "convert_txt2jsonl.py"]
    done = subprocess.run(command, cwd=tmp_path, input="a\n", capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"input": "", "output": "a"})


def test_the_guide_also_calls_pretrained_model_load(bash: Callable[..., dict], copy: Path) -> None:
    script = Path(shutil.copy(copy / "fm9g_7b" / "run_bmtrain.sh", copy / "fm9g_7b" / "mine.sh"))
    change(script, "\n# All sizes share", '\nargs["load"]="7b.pt"\n# All sizes share')
    result = pairs(bash(copy / "fm9g_7b", "mine.sh"))
    assert result["--default.pretrained_model"] == "7b.pt"
    assert "--default.load" not in result


def test_another_configuration_may_be_named(bash: Callable[..., dict], copy: Path) -> None:
    for kind in ("", "_lora"):
        script = Path(shutil.copy(copy / "fm9g_2b" / f"run_bmtrain{kind}.sh", copy / "fm9g_2b" / f"mine{kind}.sh"))
        for name in ("2.4b", f"2.4b{kind}"):
            change(script, "\n# All sizes share", f'\nargs["config"]="{name}"\n# All sizes share')
            assert bash(copy / "fm9g_2b", script.name)["argv"][:3] == ["train", "--config", f"2.4b{kind}"]
            change(script, f'args["config"]="{name}"\n', "")


def test_any_folder_may_be_the_current_one(bash: Callable[..., dict], copy: Path, tmp_path: Path) -> None:
    result = bash(tmp_path, f"'{copy}/fm9g_70b/run_bmtrain.sh' NNODES=2")
    assert (result["argv"][2], result["cwd"], result["env"]) == ("70b", str(copy / "fm9g_70b"), {"NNODES": "2"})
    assert bash(copy / "fm9g_2b", "../run_bmtrain_lora.sh")["argv"][:3] == ["train", "--config", "2b_lora"]
    (tmp_path / "fm9g_mine").symlink_to(copy / "fm9g_7b")  # the name that the user sees counts
    assert bash(tmp_path, "fm9g_mine/run_bmtrain.sh")["argv"][:3] == ["train", "--config", "mine"]


def test_tools_find_fm9g_where_it_is_not_installed_and_name_a_package_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    command = [sys.executable, "-S", "convert_json2index.py", "--path", str(tmp_path / "a.txt")]  # -S: no packages
    command += ["--language", "en", "--output", str(tmp_path / "a")]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=APPS / "fm9g_7b", capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert re.fullmatch(r"fm9g: the package \w+ is missing from .*\n", done.stderr)


def test_without_a_size_or_fm9g_the_script_says_so(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(APPS / "run_bmtrain.sh")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "which size?" in done.stderr
    for tool in ("bash", "dirname", "readlink"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    python = tmp_path / "python3"  # has nothing
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    script = str(APPS / "fm9g_7b" / "run_bmtrain.sh")
    done = subprocess.run([tmp_path / "bash", script], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "fm9g is not on PATH" in done.stderr
    python.write_text('#!/bin/sh\nif [ "$1" = -m ]; then echo "$PYTHONPATH: $@"; fi\n')  # has torch
    done = subprocess.run([tmp_path / "bash", script], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.stdout.startswith(f"{ROOT}: -m fm9g train --config 7b --default.")


@pytest.mark.parametrize("size", SIZES)
def test_the_settings_of_a_size_are_of_its_model(size: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fm9g")
    run = load_run(size, {"dataset_config": "data_test", "tokenizer_path": "./ckpt"})
    assert caplog.messages == []
    assert (run.train.config, run.train.model_unique) == (size, size)
    assert run.model == load_model_config(ROOT / "model_configs" / f"{size}.json")
    assert [item.task_name for item in run.mixture] == ["medical_o1_reasoning", "ralpaca_zh"]
    for dp_size in (run.train.n_gpus, 8):
        assert run.train.packs_per_step(dp_size) == run.train.global_batch_size > 0
    lora = load_run(f"{size}_lora", {"pretrained_model": "m.pt"}, complete=False)
    assert (lora.train.model_unique, lora.model) == (f"{size}_lora", run.model)
    sections = read_object(ROOT / "train_configs" / f"{size}_lora.json")
    assert sections["finetune"].keys() == {"lora_layer", "lora_r", "lora_alpha", "lora_dropout"}


def test_the_guides_lora_block_works_as_typed(bash: Callable[..., dict], copy: Path, shared: Path) -> None:
    """With the blank that it has after one "=", where an assignment of bash ends."""
    guide = next((shared / "spec").glob("002*")).read_text(encoding="utf-8")
    chapter = guide[guide.index("### lora 新增参数详细介绍") :]
    typed = chapter[chapter.index("``` python\n") + 11 : chapter.index("\n```\n")]
    assert 'args["lora_layer"]= "[' in typed
    script = copy / "fm9g_7b" / "run_bmtrain_lora.sh"
    text = script.read_text()
    script.unlink()  # a link to what all sizes share
    script.write_text(text.replace("\n# All sizes share", f"\n{typed}\n# All sizes share"))
    given = pairs(bash(copy / "fm9g_7b", "run_bmtrain_lora.sh"))
    layers = json.loads(given["--default.lora_layer"])
    assert layers == ["project_q", "project_k", "project_v", "w_0", "w_1", "w_out"]
    values = [given[f"--default.{key}"] for key in ("lora_r", "lora_alpha", "lora_dropout", "resume_ckpt")]
    assert values == ["16", "32", "0.0", ""]
