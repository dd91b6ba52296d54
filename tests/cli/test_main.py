"""The command line and the guide's data tools, as a user types them."""

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.common import ROOT, write_jsonl

from fm9g.cli import main
from fm9g.data.load.indexed_dataset import IndexedDataset


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, shell=True, cwd=cwd, capture_output=True, text=True, env=environment)


def test_help_and_configuration_need_no_torch() -> None:
    code = "import sys; from fm9g.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = "print([name for name in ('torch', 'numpy', 'transformers', 'jsonschema') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "quickstart" in done.stdout


def test_the_guides_data_commands_work_as_typed_on_text(tmp_path: Path, shared: Path) -> None:
    tools = tmp_path / "tools"
    tools.symlink_to(ROOT / "tools")
    lines = (shared / "data" / "wiki_demo.txt").read_text(encoding="utf-8").split("\n")
    (tools.parent / "pretrain.txt").write_text("\n".join(lines), encoding="utf-8")
    done = shell("cat pretrain.txt | python tools/convert_txt2jsonl.py > pretrain.jsonl", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").open(encoding="utf-8")]
    # The guide's own script, line by line: the same records.
    with (tmp_path / "pretrain.txt").open(encoding="utf-8") as file:
        expected = [{"input": "", "output": line.strip()} for line in file if line.strip() != ""]
    assert records == expected


def test_the_guides_index_command_works_as_typed_on_alpaca(tmp_path: Path, shared: Path) -> None:
    work, data = tmp_path / "apps" / "fm9g_7b", tmp_path / "data_test" / "converted_data" / "alpaca"
    work.mkdir(parents=True)
    data.mkdir(parents=True)
    (work / "convert_json2index.py").symlink_to(ROOT / "tools" / "convert_json2index.py")
    alpaca = json.loads((shared / "data" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    records = [{"input": f"<用户>{r['instruction']}{r['input']}<AI>", "output": r["output"]} for r in alpaca]
    write_jsonl(data / "alpaca_zh.jsonl", records)
    command = """python convert_json2index.py \
      --path ../../data_test/converted_data/alpaca/alpaca_zh.jsonl \
      --language zh \
      --output ../../data_test/indexed_data/data_ralpaca_zh"""
    done = shell(command, work)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data_test" / "indexed_data" / "data_ralpaca_zh"
    assert {file.name for file in folder.iterdir()} == {"data.jsonl", "index", "index.h5", "meta.json"}
    raw = (data / "alpaca_zh.jsonl").read_bytes()
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["nlines"] == len(records) == sum(meta["length_distribute"].values())
    assert meta["nbytes"] == len(raw)
    estimate = sum(0.7 * len(line) for line in raw.decode().splitlines()) / len(records)
    assert meta["avg_token_per_line"] == pytest.approx(estimate)
    assert meta["data_sample"]["input"] == records[0]["input"][:50] + ("..." if len(records[0]["input"]) > 50 else "")
    opened = IndexedDataset(folder)
    assert (opened[0], opened[len(opened) - 1]) == (records[0], records[-1])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("data index --path none.jsonl --language zh --output o", "none.jsonl: no such file"),
        ("train --config none", "'none' is neither a file nor a name in model_configs/"),
        ("train --config tiny", "dataset_config: missing; give --dataset_config"),
        ("train --config tiny", "tokenizer_path: missing; give --tokenizer_path"),
        ("train --config tiny --lr", "--lr: its value is missing"),
        ("train --config tiny lr 3", "found 'lr', expected --key value"),
        ("train --config tiny --learning_rat=3", "learning_rat: unknown key"),
        ("convert none out", "none: no such file"),
        ("convert . out.pt", "config.json: no such file"),
        ("generate . --prompt x", "not a Hugging Face folder"),
        ("data tokenizer none.txt --vocab_size 300 --output t", "none.txt: no such file"),
        ("quickstart --steps 1", "--steps: found 1"),
    ],
)
def test_mistakes_get_one_message_and_status_2(
    command: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 2
    assert expected in capsys.readouterr().err


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    done = shell(f"printf 'a\\n\\377' | python -m fm9g data txt2jsonl > {tmp_path}/o", ROOT)
    assert done.returncode == 2
    assert "stdin, line 2: not UTF-8" in done.stderr


def test_every_way_to_end_a_line_is_known(tmp_path: Path) -> None:
    done = shell("printf '\\357\\273\\277a\\r\\n b\\rc\\n\\nd' | python -m fm9g data txt2jsonl", ROOT)
    assert [json.loads(line)["output"] for line in done.stdout.splitlines()] == ["a", "b", "c", "d"]


def test_an_option_given_twice_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config", "tiny", "--lr", "1", "--lr", "2"]) == 2
    assert "--lr is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("data index --path a --path b --language en --output o", "argument --path: is given twice"),
        ("generate f --prompt=a --prompt b", "argument --prompt: is given twice"),
        ("data index --path a --language en --output '' --overwrite", "argument --output: the path is empty"),
        ("convert '' out.pt", "argument source: the path is empty; is a variable of the shell not set?"),
        ("lora combine a '' --out o", "argument adapters: the path is empty"),
    ],
)
def test_words_that_are_slips_are_refused(command: str, expected: str, capsys: pytest.CaptureFixture) -> None:
    """An empty --output is the current folder to Python, which --overwrite would replace."""
    with pytest.raises(SystemExit, match="2"):
        main(shlex.split(command))
    assert expected in capsys.readouterr().err


def test_what_the_system_says_of_a_name_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENAMETOOLONG, "File name too long", "a" * 100_000)

    monkeypatch.setattr("fm9g.data.prepare.index_builder.build_index", fail)
    source = write_jsonl(tmp_path / "s.jsonl", [{"input": "", "output": "a"}])
    assert main(["data", "index", "--path", str(source), "--language", "en", "--output", str(tmp_path / "o")]) == 2
    message = capsys.readouterr().err
    assert message.endswith("a: File name too long\n")
    assert len(message) < 1100


@pytest.mark.slow
def test_names_in_chinese_work_whatever_the_locale(tmp_path: Path, tokenizer_path: Path) -> None:
    folder = tmp_path / "数据"
    folder.mkdir()
    (folder / "词表").symlink_to(tokenizer_path)
    write_jsonl(folder / "原文.jsonl", [{"input": "问", "output": "答"}])
    (folder / "混合.json").write_text('[{"task_name": "任务", "path": "索引"}]', encoding="utf-8")
    plain = "PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=C PYTHONIOENCODING="
    for command, expected in (
        ("fm9g data index --path 数据/原文.jsonl --language zh --output 数据/索引", "数据/索引: 1 records"),
        (f"python {ROOT}/tools/convert_json2index.py --path 数据/原文.jsonl --language zh --output s", "s: 1 records"),
        ("fm9g config show --config tiny --dataset_config 数据/混合.json", "[data.任务]"),
        ("fm9g data show 数据/混合.json --tokenizer 数据/词表 --chat_template none", "── 任务, line 1"),
        ("fm9g ckpt ls 数据/没有; echo", ""),
    ):
        done = shell(f"env {plain} {command}", tmp_path)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert "数据/没有: no such file or folder" in done.stderr


def test_a_memory_that_does_not_suffice_is_one_message_for_every_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory\nframe #0")

    for target in (
        "fm9g.convert.hf_export.export_folder",
        "fm9g.infer.open_model.open_model",
        "fm9g.data.prepare.index_builder.build_index",
    ):
        monkeypatch.setattr(target, fail)
    source = write_jsonl(tmp_path / "s.jsonl", [{"input": "", "output": "a"}])
    for words, advice in (
        (["convert", str(tmp_path / "m.bin"), str(tmp_path / "hf")], "end other programs"),
        (["generate", str(tmp_path), "--prompt", "a"], "lower max_new_tokens"),
        (["data", "index", "--path", str(source), "--language", "en", "--output", str(tmp_path / "o")], "--workers"),
    ):
        assert main(words) == 2
        message = capsys.readouterr().err
        assert message.startswith("fm9g: out of memory ([enforce fail")
        assert advice in message
        assert len(message.splitlines()) == 1
