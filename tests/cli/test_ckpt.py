"""fm9g ckpt ls, verify, show, diff: their output is right, and they change nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import (
    MODEL,
    POSITION,
    RUN_CONFIG,
    file_of,
    no_progress,
    put_weights,
    save,
    seal,
    tensors,
)

from fm9g.checkpoint.find import CHECKPOINTS_DIR
from fm9g.checkpoint.inspect import compare, describe
from fm9g.checkpoint.layout import MANIFEST
from fm9g.checkpoint.listing import inspect_run
from fm9g.cli import main
from fm9g.model.transformer import weight_shapes


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    status = main(["ckpt", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_ls_shows_what_each_checkpoint_holds_and_which_are_next_and_best(capsys: pytest.CaptureFixture) -> None:
    save("m", 100, val_loss=2.5, loss=2.4)
    save("m", 20, val_loss=2.25)
    last = save("m", 1000, val_loss=math.nan)
    put_weights(last, ".ema.pt")
    file_of(last, ".rank-0.opt").unlink()
    seal(last)
    save("other", 3)
    status, out = run(capsys, "ls")
    header, *lines = out.splitlines()
    assert status == 0
    assert header.split() == ["run", "step", "written", "size", "tokens", "loss", "val_loss", "contents", "state"]
    assert [line.split()[:2] for line in lines] == [["m", "20"], ["m", "100"], ["m", "1000"], ["other", "3"]]
    assert [" ".join(line.split()).partition("KiB ")[2] for line in lines] == [
        "20,000 2.2500 weights +optimizer complete <- best val_loss",
        "100,000 2.4000 2.5000 weights +optimizer complete",
        "1,000,000 nan weights +ema complete <- resume auto",
        "3,000 weights +optimizer complete <- resume auto",
    ]
    _, of_m = run(capsys, "ls", "m")
    assert of_m == run(capsys, "ls", CHECKPOINTS_DIR / "m")[1]
    assert [line.split() for line in of_m.splitlines()[1:]] == [line.split() for line in lines[:3]]


def test_ls_never_offers_a_damaged_checkpoint(capsys: pytest.CaptureFixture) -> None:
    full, truncated, bare, mismatched = (save("m", step, val_loss=1 / step) for step in (1, 2, 3, 4))
    with file_of(truncated).open("r+b") as file:
        file.truncate(100)
    (bare / MANIFEST).unlink()
    (mismatched / MANIFEST).write_text("[]")
    found = inspect_run(full.parent)
    assert (found.newest, found.best) == (full, full)
    reasons = [item.problem.partition(":")[0] for item in found.checkpoints]
    assert reasons == ["", file_of(truncated).name, MANIFEST, MANIFEST]
    out = run(capsys, "ls", "m")[1].splitlines()
    assert "damaged: fm9g_live_checkpoint-2.pt: has 100 of" in out[2]
    assert out[3].endswith("damaged: manifest.json: is missing")
    assert "damaged: manifest.json: " in out[4]


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_run_without_a_whole_checkpoint_has_neither_a_best_nor_a_last(name: str, capsys) -> None:
    for step in (1, 2):
        file_of(save("m", step, val_loss=1.0)).write_bytes(b"cut")
    assert main(["ckpt", "show", f"m/{name}"]) == 2
    assert capsys.readouterr().err == (
        f"fm9g: {CHECKPOINTS_DIR / 'm'}: every checkpoint is damaged (`fm9g ckpt ls` says how); its steps: 1, 2\n"
    )


def test_ls_mentions_what_an_interrupted_save_left_and_leaves_it(capsys: pytest.CaptureFixture) -> None:
    save("m", 1)
    left = [
        CHECKPOINTS_DIR / "m" / ".7.4242.tmp",
        CHECKPOINTS_DIR / "m" / ".5.4242.old",
        CHECKPOINTS_DIR / "new" / ".1.4242.tmp",
    ]
    for folder in left:
        folder.mkdir(parents=True)
    (CHECKPOINTS_DIR / "m" / ".cache").mkdir()
    out = run(capsys, "ls")[1]
    assert "m/.7.4242.tmp: incomplete: a process is saving 7, or ended before it had" in out
    assert "m/.5.4242.old: the former 5, moved aside" in out
    assert "new/.1.4242.tmp: incomplete" in out
    assert ".cache" not in out
    assert all(folder.is_dir() for folder in left)


def test_verify_says_that_a_checkpoint_is_whole(capsys: pytest.CaptureFixture) -> None:
    folder = save("m", 5)
    status, out = run(capsys, "verify", folder)
    parameters = sum(math.prod(shape) for shape in weight_shapes(MODEL).values())
    assert status == 0
    assert out.startswith(f"{folder}: complete: 7 files, ")
    assert out.endswith(f"{parameters:,} parameters, all values finite\n")


def test_verify_names_every_damage_of_every_checkpoint_of_a_run(capsys: pytest.CaptureFixture) -> None:
    full, broken, last = (save("m", step) for step in (1, 2, 3))
    with file_of(broken).open("r+b") as file:
        file.seek(file_of(broken).stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    (broken / "tokenizer" / "tokenizer.json").write_text("{} ")
    (broken / "config.json").unlink()
    file_of(last, ".rank-0.opt").write_bytes(b"no state")
    seal(last)
    status, out = run(capsys, "verify", "m")
    assert status == 2
    assert out.splitlines()[0].startswith(f"{CHECKPOINTS_DIR / 'm' / '1'}: complete: ")
    assert f"{CHECKPOINTS_DIR / 'm' / '2'}: damaged\n" in out
    assert "  fm9g_live_checkpoint-2.pt: its content has changed\n" in out
    assert "  tokenizer/tokenizer.json: has 3 of 2 bytes\n" in out
    assert "  config.json: is missing\n" in out
    assert (
        f"{CHECKPOINTS_DIR / 'm' / '3'}: damaged\n  fm9g_live_checkpoint-3.rank-0.opt: not a complete weight file"
        in out
    )
    assert len(out.splitlines()) == 7
    assert run(capsys, "verify", full)[0] == 0


def test_show_tells_what_a_checkpoint_is(capsys: pytest.CaptureFixture) -> None:
    folder = save("m", 7, loss=2.5, val_loss=None, skipped={"nan": 1})
    status, out = run(capsys, "show", "m/7")
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == str(CHECKPOINTS_DIR / "m" / "7")
    assert "tokens 7,000: few 2,800, many 4,200" in lines
    assert "loss 2.5" in lines
    assert not any(line.startswith("val_loss") for line in lines)
    assert 'skipped {"nan": 1}' in lines
    assert "data few: 100 records of 50 started, 2.000 epochs" in lines
    assert "data many: 30 records of 150 started, 0.200 epochs" in lines
    assert "data 2 of these records or samples wait for the next steps" in lines
    assert "data 3 records were skipped: too long" in lines
    assert any(
        line.startswith("model num_layers 2, dim_model 8, dim_ff 12, num_heads 4, num_kv_heads 2") for line in lines
    )
    assert "lr 0.03 command line" in lines
    assert "abs_weight 0.5 mixture.json" in lines
    assert not any(line.startswith(("beta1", "train_iters")) for line in lines)
    assert "tokenizer/tokenizer.json 2 B" in lines
    assert "weights" not in lines
    assert folder.is_dir()


def test_show_as_json_holds_the_same_and_is_json(capsys: pytest.CaptureFixture) -> None:
    folder = save("m", 7, loss=math.nan)
    status, out = run(capsys, "show", folder, "--json", "--weights")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    shown = json.loads(out, parse_constant=refuse)
    shapes = weight_shapes(MODEL)
    assert status == 0
    assert shown["counts"] == {
        "iteration": 7,
        "global_token_pass": 7000,
        "global_total_task_token": {"few": 2800, "many": 4200},
        "loss": None,
    }
    assert shown["model"] == MODEL.to_json()
    assert shown["parameters"] == sum(math.prod(shape) for shape in shapes.values())
    assert shown["dtypes"] == {"float32": len(shapes)}
    assert {row["name"]: row["shape"] for row in shown["weights"]} == {name: list(s) for name, s in shapes.items()}
    assert shown["files"]["config.json"] == (folder / "config.json").stat().st_size
    assert MANIFEST in shown["files"]


def test_show_tells_of_a_bare_file_what_its_shapes_and_its_neighbour_tell(capsys: pytest.CaptureFixture) -> None:
    torch.save({name: value.bfloat16() for name, value in tensors().items()}, "bare.pt")
    shown = describe(Path("bare.pt"))
    assert (shown["step"], shown["counts"], shown["data"]) == (None, {}, None)
    assert shown["model"] == {
        "vocab_size": 16,
        "dim_model": 8,
        "dim_ff": 12,
        "num_layers": 2,
        "qkv_bias": False,
        "tie_lm_head": False,
    }
    assert (shown["model_from"], list(shown["dtypes"])) == ("the shapes of the weights", ["bfloat16"])
    Path("bare.json").write_text(json.dumps(MODEL.to_json()))
    assert describe(Path("bare.pt"))["model"] == MODEL.to_json()
    assert run(capsys, "show", "bare.pt")[0] == 0
    torch.save({"a": torch.ones(3)}, "other.pt")
    assert "not a 9G model, by the names of the weights" in run(capsys, "show", "other.pt")[1]
    # The weight file of a checkpoint, named by itself, has that checkpoint's configuration.
    assert describe(file_of(save("m", 1)))["model"] == MODEL.to_json()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(1).expand(1 << 20), "repeats its values"),
        (torch.eye(3).to_sparse(), "found a sparse tensor"),
        (torch.ones(2, dtype=torch.complex64), "expected a plain tensor"),
    ],
)
def test_odd_tensors_are_refused_by_name(capsys: pytest.CaptureFixture, tensor: torch.Tensor, message: str) -> None:
    torch.save({"some.weight": tensor}, "odd.pt")
    status, out = run(capsys, "show", "odd.pt", "--weights")
    assert status == 2
    assert out.startswith("fm9g: odd.pt: some.weight: ")
    assert message in out


def test_diff_of_equal_checkpoints_is_0_and_says_bit_for_bit(capsys: pytest.CaptureFixture) -> None:
    save("m", 1)
    save("n", 1)
    status, out = run(capsys, "diff", "m/1", "n/1")
    count = len(weight_shapes(MODEL))
    assert status == 0
    assert out.splitlines()[2:] == [
        "configuration: equal",
        "counts: equal",
        "data position: equal",
        f"weights: {count} tensors, all bits equal",
        f"optimizer: {count} tensors, all bits equal",
    ]


def test_diff_tells_configuration_counts_position_and_the_largest_differences(capsys: pytest.CaptureFixture) -> None:
    weights = tensors()
    save("m", 1)
    for number, name in enumerate(weights):
        weights[name].flatten()[0] += 0.001 * (number + 1)
    other = save("m", 2, weights, loss=1.5)
    (other / "data_position.json").write_text(json.dumps({**POSITION, "streams": {}}))
    changed = {**RUN_CONFIG, "train": {**RUN_CONFIG["train"], "lr": {"value": 0.01, "from": "command line"}}}
    (other / "run_config.json").write_text(json.dumps(changed))
    file_of(other, ".rank-0.opt").unlink()
    seal(other)
    status, out = run(capsys, "diff", "m/1", "m/2")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert status == 1
    assert "configuration: 1 differs" in lines
    assert "train.lr 0.03 0.01" in lines
    assert "global_total_task_token.few 400 800" in lines
    assert "global_token_pass 1000 2000" in lines
    assert "loss null 1.5" in lines
    assert "data position: different" in lines
    assert not any(line.startswith("optimizer") for line in lines)
    names = list(weights)
    table = lines[lines.index("largest |A - B| |A - B| / |A| cosine") + 1 :]
    assert [line.split()[0] for line in table[:-1]] == names[::-1][:10]
    assert table[0].split()[1] == f"{0.001 * len(names):.3e}"
    assert table[-1] == f"and {len(names) - 10} more; --all shows them"
    everything = run(capsys, "diff", "m/1", "m/2", "--all")[1]
    assert all(f"  {name} " in everything for name in names)


def test_diff_of_files_finds_names_shapes_types_signs_and_what_is_not_a_number(capsys: pytest.CaptureFixture) -> None:
    nan, same = torch.tensor([1.0, math.nan]), torch.tensor([math.nan, 0.0, 2.0])[::2]  # which stays every second one
    a = {"same": same, "left": nan, "shape": torch.ones(3, 2), "type": torch.zeros(4).half(), "zero": torch.zeros(2)}
    b = {"same": same, "right": nan, "shape": torch.ones(2, 3), "type": torch.zeros(4).short(), "zero": -torch.zeros(2)}
    torch.save({**a, "nan": nan, "most": torch.zeros(2)}, "a.pt")
    torch.save({**b, "nan": torch.ones(2), "most": torch.tensor([0.0, 5.0])}, "b.pt")
    found = compare(Path("a.pt"), Path("b.pt"), no_progress)
    weights = found.tensors["weights"]
    assert (weights.only_a, weights.only_b, weights.count) == (["left"], ["right"], 8)
    assert weights.shapes == [("shape", [3, 2], [2, 3])]
    assert [d.name for d in weights.deltas] == ["nan", "most", "type", "zero"]
    assert [d.max_abs for d in weights.deltas[1:]] == [5.0, 0.0, 0.0]
    assert weights.deltas[2].dtypes == "float16, int16"
    status, out = run(capsys, "diff", "a.pt", "b.pt")
    assert status == 1
    assert "shape  shape [3, 2] in A, [2, 3] in B" in out
    assert "configuration: not in both" in out
    assert "data position: not in both" in out


def test_a_checkpoint_and_a_file_can_be_compared(capsys: pytest.CaptureFixture) -> None:
    save("m", 1)
    torch.save(tensors(), "a.pt")
    Path("a.json").write_text(json.dumps({**MODEL.to_json(), "eps": 1e-6}))
    status, out = run(capsys, "diff", "m/1", "a.pt")
    assert status == 0
    assert "model.eps  1e-05  1e-06" in out
    assert "train.lr" not in out  # of which a .pt file tells nothing
    assert run(capsys, "diff", "a.pt", "m/1")[0] == 0


def test_nothing_is_ever_written(here: Path, capsys: pytest.CaptureFixture) -> None:
    save("m", 1)
    truncated = save("m", 2)
    file_of(truncated).write_bytes(b"")
    (CHECKPOINTS_DIR / "m" / ".3.4242.tmp").mkdir()
    (CHECKPOINTS_DIR / "m" / ".4.4242.old").mkdir()

    def state() -> dict:
        return {file: file.stat().st_mtime_ns for file in [here, *here.rglob("*")]}

    before = state()
    for words in (["ls"], ["verify", "m"], ["show", "m/1", "--weights"], ["diff", "m/1", "m/1"], ["show", "m/2"]):
        run(capsys, *words)
    assert state() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ls", "nm"], "nm: there is no run 'nm' in data/checkpoints; its runs: m, other; did you mean 'm'?"),
        (["verify", "othr/1"], "there is no run 'othr' in data/checkpoints; its runs: m, other; did you mean 'other'?"),
        (
            ["show", "m/101"],
            "m/101: data/checkpoints/m has no checkpoint '101'; its steps: 100, 200; did you mean '100'?",
        ),
        (["show", "data/checkpoints/m/9"], "data/checkpoints/m has no checkpoint '9'; its steps: 100, 200\n"),
        (["show", "m"], "m: is a run with the steps 100, 200; give one of them: m/200"),
        (["diff", "m/100", "none.pt"], "none.pt: there is no run 'none.pt' in data/checkpoints; its runs: m, other"),
        (["ls", "empty"], "has neither checkpoints (folders named by their step)"),
        (["verify", "empty"], "not a checkpoint: no manifest.json, nor folders with one"),
        (["verify", "data/checkpoints"], "not a checkpoint; it contains the runs m, other: give one of them"),
        (["verify", "text.pt"], "text.pt: is a file; only checkpoint folders have checksums"),
        (["show", "text.pt"], "text.pt: not a complete weight file"),
    ],
)
def test_mistakes_name_what_is_there(capsys: pytest.CaptureFixture, words: list[str], expected: str) -> None:
    save("m", 100)
    save("m", 200)
    save("other", 1)
    Path("empty").mkdir()
    Path("text.pt").write_text("text")
    status, out = run(capsys, *words)
    assert status == 2
    assert expected in out


def test_without_any_run_the_user_is_told_where_to_look(capsys: pytest.CaptureFixture) -> None:
    status, out = run(capsys, "ls")
    assert (status, out) == (
        2,
        "fm9g: data/checkpoints: no such folder; run this beside data/, or give the folder of a run's checkpoints\n",
    )
    assert run(capsys, "show", "m/1")[0] == 2


def test_what_is_compared_has_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save("m", 1)
    Path("t.txt").write_text("text")
    Path("t.json").write_text("{}")  # and has nothing to do with it
    status, out = run(capsys, "diff", "m/1", "t.txt")
    assert (status, "fm9g: t.txt: not a complete weight file" in out) == (2, True)
