"""`fm9g data check` and `fm9g data show`: figures that are computed by hand, and marks on exactly what is learnt."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from helpers.common import make_records, random_text

from fm9g.cli import main
from fm9g.data.encode.encoder import LONG_INPUT, OVERSIZE
from fm9g.data.encode.tokenizer import load_tokenizer
from fm9g.data.inspect import check as check_module
from fm9g.data.inspect.check import check_mixture, open_named_mixture
from fm9g.data.inspect.show import show_samples, wants_color
from fm9g.data.load.loader import Loader
from fm9g.errors import UserError

Make = Callable[..., Path]
CHAT = {
    "messages": [
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "Z\nX"},
        {"role": "user", "content": "W 深度"},
        {"role": "assistant", "content": "Y 学习"},
    ]
}


def z(read: int, trained: int) -> dict:
    """A record of read + learnt + 1 tokens: no two Z are merged by the tests' tokenizer, and eos comes behind."""
    return {"input": "Z" * read, "output": "Z" * trained}


@pytest.fixture
def run_check(tokenizer_path: Path, tmp_path: Path) -> Callable[..., dict]:
    def run(path: Path, **keys: object) -> dict:
        output = tmp_path / "data_check"
        report = check_mixture(
            str(path), output, **{"tokenizer_path": str(tokenizer_path), "max_length": 16, "steps": 20, **keys}
        )
        assert json.loads((output / "check.json").read_text(encoding="utf-8")) == report
        assert (output / "lengths.png").read_bytes().startswith(b"\x89PNG")
        assert {file.name for file in output.iterdir()} == {"check.json", "lengths.png"}
        return report

    return run


@pytest.fixture
def run_show(tokenizer_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    def run(path: Path, *arguments: str, max_length: int = 64, tokenizer: Path = tokenizer_path) -> list[str]:
        """What is printed below the legend: borders and texts in turn."""
        capsys.readouterr()
        common = ["--tokenizer", str(tokenizer), "--max_length", str(max_length), *arguments]
        assert main(["data", "show", str(path), *common]) == 0
        printed = capsys.readouterr().out.partition("\n")[2]
        return [part.rstrip("─═· \n") for part in re.split(r"^(?:──|══|··) (.*)\n", printed, flags=re.M)[1:]]

    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_every_rule_is_counted(make_mixture: Make, run_check: Callable[..., dict], workers: int) -> None:
    cut = [z(0, 9), z(0, 39), z(4, 30), z(20, 1), z(3, 0), z(0, 9)]
    whole = [z(0, 29), z(0, 39), z(15, 2)]
    path = make_mixture(
        {"cut": cut, "drop": [z(0, 9), z(2, 37)], "whole": whole},
        drop={"oversize_rule": "drop"},
        whole={"oversize_rule": "whole", "nlines": 4, "ave_tokens": 29.0, "total_tokens": 0.5},
    )
    report = run_check(path, batch_size=2, workers=workers)  # a row has 32 tokens
    one, two, three = report["datasets"].values()
    assert report["buckets"] == [1, 2, 4, 8, 16, 32, 64]
    expected = {
        "records": 6,
        "read": 6,
        "tokens": 10 + 40 + 35 + 22 + 0 + 10,
        "mean": 117 / 5,
        "min": 10,
        "median": 22,
        "p95": 40,
        "max": 40,
        "kept_tokens": 10 + 40 + 16 + 10,
        "learnt_tokens": 10 + 40 + 12 + 10,
        "truncated": 1,
        "segmented": 1,
        "segments": 3,
        "dropped": {LONG_INPUT: 1, OVERSIZE: 0},
        "empty": 1,
        "duplicates": 1,
        "histogram": [0, 0, 0, 0, 2, 1, 2],
    }
    assert {key: one[key] for key in expected} == expected
    assert (two["kept_tokens"], two["dropped"][OVERSIZE], two["truncated"]) == (10, 1, 0)
    assert (three["kept_tokens"], three["learnt_tokens"], three["dropped"]) == (48, 33, {LONG_INPUT: 0, OVERSIZE: 1})
    notes = "\n".join(report["notes"])
    for note in (
        f"cut: 1 of 6 records (16.7%) give nothing to train on: {LONG_INPUT}",
        "cut: 1 of 6 records (16.7%) give nothing to train on: no output",
        "cut: 1 of 6 records (16.7%) lose their end at 16 tokens",
        "cut: 1 of 6 records (16.7%) repeat another one exactly",
        f"drop: 1 of 2 records (50.0%) give nothing to train on: {OVERSIZE}",
        "whole: nlines: 4 in the configuration, 3 found",
        "whole: total_tokens: 0.5 in the configuration, 8.8e-08 found",
    ):
        assert note in notes
    assert "average tokens" not in notes  # 29 and 29.33 are near enough


def test_padding_and_epochs_of_a_case_that_is_plain(
    make_mixture: Make, run_check: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_mixture({"ten": [{"input": "", "output": f"{'Z' * 8}{i}"} for i in range(5)]})
    report = run_check(path, steps=10, packs=2)  # a row has room for one sample of 10
    expected = {"rows": 20, "samples": 20, "padding": 6 / 16, "samples_per_row": 1.0, "steps": 10}
    assert report["packing"] == pytest.approx(expected)
    ten = report["datasets"]["ten"]
    assert (ten["run_tokens"], ten["run_records"], ten["run_epochs"]) == (200, 20, 4.0)
    assert (ten["share_wanted"], ten["share_realised"]) == (1.0, 1.0)
    assert report["notes"] == ["37.5% of the positions are padding; a larger batch_size has less"]
    monkeypatch.setattr(check_module, "_MAX_SIMULATED_SAMPLES", 10)
    report = run_check(path, steps=100, packs=2)  # most of it is extrapolated
    assert report["packing"]["rows"] == 10
    assert report["datasets"]["ten"]["run_tokens"] == 2000
    assert "ten: makes 40.0 epochs in 100 steps" in report["notes"]


def test_the_forecast_is_what_the_loader_does(
    make_mixture: Make, run_check: Callable[..., dict], tokenizer_path: Path
) -> None:
    path = make_mixture(
        {"a": make_records(60), "b": make_records(40, seed=1, longest=200), "c": make_records(30, seed=2)},
        a={"abs_weight": 3.0},
        c={"allow_repeat": False, "oversize_rule": "head"},
    )
    report = run_check(path, max_length=64, batch_size=2, steps=30, packs=4, seed=5)
    mixture, _ = open_named_mixture(str(path), tokenizer_path=str(tokenizer_path), max_length=64, batch_size=2, seed=5)
    with Loader(mixture, global_batch_size=4) as loader:
        packs = [pack for _ in range(30) for pack in loader.next_batch()]
    tokens = np.sum([np.bincount(pack.task_ids[pack.task_ids >= 0], minlength=3) for pack in packs], axis=0)
    figures = list(report["datasets"].values())
    assert [item["run_tokens"] for item in figures] == tokens.tolist()
    assert report["packing"]["padding"] == pytest.approx(1 - tokens.sum() / (120 * 128))
    assert figures[0]["share_realised"] / figures[1]["share_realised"] == pytest.approx(3.0, rel=0.05)


def test_a_dataset_that_is_used_up_leaves_its_tokens_to_the_others(
    make_mixture: Make, run_check: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_module, "_MAX_SIMULATED_SAMPLES", 8)
    sixes = [{"input": "", "output": f"ZZZ{i:02}"} for i in range(50)]
    data = {"once": sixes[:20], "again": sixes}
    path = make_mixture(data, once={"allow_repeat": False}, again={"abs_weight": 2.0})
    report = run_check(path, max_length=12, steps=100, packs=1)
    assert (report["datasets"]["once"]["run_epochs"], report["datasets"]["once"]["run_tokens"]) == (1.0, 120)
    assert report["datasets"]["again"]["run_tokens"] == 100 * 12 - 120
    assert report["notes"][0].startswith("once: is used up within the 100 steps")
    path = make_mixture(data, once={"allow_repeat": False}, again={"allow_repeat": False})
    report = run_check(path, max_length=12, steps=100, packs=1)
    assert report["packing"]["steps"] == 35
    assert "the data is used up after about 35 of 100 steps" in report["notes"]


def test_notes_on_shares(make_mixture: Make, run_check: Callable[..., dict]) -> None:
    data = {"small": make_records(2), "big": make_records(200), "never": make_records(3), "mute": [z(20, 1), z(30, 1)]}
    path = make_mixture(data, never={"abs_weight": 0.0})
    report = run_check(path, max_length=20, steps=1, packs=1, chat_template="")
    notes = "\n".join(report["notes"])
    assert re.search(r"small: has 1\.\d\d% of the mixture's tokens and is to be 33\.33% of the run", notes)
    assert "never: its share is 0: nothing is drawn from it" in notes
    assert "mute: nothing in it is learnt; a run that draws from it ends with an error" in notes
    assert report["datasets"]["mute"]["run_tokens"] == 0


def test_a_sample_is_spread_over_the_dataset(make_mixture: Make, run_check: Callable[..., dict]) -> None:
    path = make_mixture({"a": [z(0, 3 + i) for i in range(6)], "b": [z(0, 4)]})
    report = run_check(path, sample=3)
    one = report["datasets"]["a"]
    assert (one["records"], one["read"], one["tokens"]) == (6, 3, 4 + 6 + 8)
    assert one["run_epochs"] == pytest.approx(one["run_tokens"] / 36)
    assert report["datasets"]["b"]["read"] == 1
    assert report["notes"][0].startswith("only 3 records of each dataset were read")


def test_only_its_own_output_is_replaced_unasked(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, output = make_mixture({"a": make_records(20)}), tmp_path / "out"
    command = ["data", "check", str(path), "--tokenizer", str(tokenizer_path), "--steps", "5", "--output", str(output)]
    assert main(command) == main(command) == 0
    (output / "mine").touch()
    capsys.readouterr()
    assert main(command) == 2
    assert "holds something" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert not (output / "mine").exists()
    assert main([*command[:-1], str(tmp_path / "indexed"), "--overwrite"]) == 2
    assert "which is read" in capsys.readouterr().err


def test_the_table_names_every_dataset(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = [f"dataset_with_a_long_name_{i}" for i in range(5)] + ["中文"]
    path = make_mixture({name: make_records(20) for name in names})
    command = ["data", "check", str(path), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    assert main([*command, "--max_length", "40", "--steps", "5", "--packs", "2"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for name in names:
        assert len([line for line in lines if name in line.split()]) == 1, name
    assert max(map(len, lines)) < 120
    assert lines[1].split() == ["records", *["20"] * (len(lines[1].split()) - 1)]
    above, _, below = printed.partition("max_length  ─")
    assert "33 - 40  █" in above
    assert "41 - 64  █" in below
    assert "packing: " in printed
    assert "epochs in 5 steps" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "--steps: found 0, expected 1 to 1000000000"),
        ({"workers": 10**40}, "workers: found 1000.*, expected 0 to 1024"),
        ({"sample": 0}, "--sample: found 0"),
        ({"max_length": 2}, "max_length"),
        ({"train_on": "some"}, "train_on"),
        ({"chat_template": "chatmk"}, "chatml"),
    ],
)
def test_mistakes_of_a_check(make_mixture: Make, run_check: Callable, arguments: dict, message: str) -> None:
    path = make_mixture({"a": make_records(5)})
    with pytest.raises(UserError, match=message):
        run_check(path, **arguments)


def test_a_bad_record_is_named(make_mixture: Make, run_check: Callable, tmp_path: Path) -> None:
    path = make_mixture({"a": [z(0, 3), CHAT]})
    with pytest.raises(UserError, match=r"a, line 2 of .*: a conversation needs a template"):
        run_check(path)
    assert not (tmp_path / "data_check").exists()
    assert run_check(path, chat_template="chatml", max_length=400)["datasets"]["a"]["records"] == 2


def test_marks_are_on_exactly_what_is_learnt(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    path = make_mixture({"a": [{"input": "Who? ", "output": "me, 深\nyes"}, z(3, 0)], "chat": [CHAT]})
    border, text = run_show(path, "--task", "a", "--record", "1")
    assert text == "<s>Who? «me, 深⏎\nyes</s>»"
    assert re.match(r"a, line 1: \d+ tokens, \d+ learnt$", border)
    assert run_show(path, "--task", "a", "--record", "1", "--train_on", "all")[1] == "<s>«Who? me, 深⏎\nyes</s>»"
    assert run_show(path, "--task", "a", "--record", "2") == [
        "a, line 2: 0 tokens, 0 learnt, skipped: no output",
        "ZZZ",
    ]
    chat = (
        "<s><|im_start|>user⏎\nQ?<|im_end|>⏎\n<|im_start|>assistant⏎\n«Z⏎\nX<|im_end|>»⏎\n"
        "<|im_start|>user⏎\nW 深度<|im_end|>⏎\n<|im_start|>assistant⏎\n«Y 学习<|im_end|></s>»"
    )
    arguments = "--task", "chat", "--record", "1", "--chat_template", "chatml"
    assert run_show(path, *arguments, max_length=400)[1] == chat
    last = run_show(path, *arguments, "--train_on", "last", max_length=400)[1]
    assert last == chat.replace("«", "", 1).replace("»", "", 1)
    assert run_show(path, *arguments)[0].endswith(" cut: the first of 130 tokens (oversize_rule segment)")


def test_colours_tell_what_a_token_is(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    path = make_mixture({"chat": [CHAT]})
    arguments = "--record", "1", "--chat_template", "chatml", "--color", "always"
    text = run_show(path, *arguments, max_length=400)[1]
    parts = re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b\[0m", text)
    of = {code: "".join(part for found, part in parts if found == code) for code, _ in parts}
    assert of["32"] == "Z⏎XY 学习"
    assert of["2"] == "Q?W 深度"
    assert (of["33"], of["1;33"], of["4;32"]) == ("<s>", "</s>", "<|im_end|>" * 2)
    prompt = "<|im_end|>⏎<|im_start|>assistant⏎"
    assert of["4;36"] == f"<|im_start|>user⏎{prompt}⏎<|im_start|>user⏎{prompt}"
    assert re.sub(r"\x1b\[[\d;]+m", "", text).count("\n") == 8  # one for each ⏎
    assert all("\n" not in part for _, part in parts)


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert wants_color("auto")
    assert not wants_color("never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color("auto")
    assert wants_color("always")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    monkeypatch.delenv("NO_COLOR")
    assert not wants_color("auto")


def test_pieces_and_what_is_cut_or_dropped(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    digits = "".join(str(i % 10) for i in range(39))
    data = [{"input": "", "output": digits}, {"input": "ab", "output": digits}]
    path = make_mixture({"a": data, "b": data}, b={"oversize_rule": "drop"})
    found = run_show(path, "--task", "a", "--record", "1", "--count", "2", max_length=16)
    piece = "a, line 1: 16 tokens, 16 learnt, piece {} of 3 (oversize_rule segment)"
    assert found[0::2] == [piece.format(1), piece.format(2), "1 more pieces of this record; --count 3 shows all"]
    # What ends a piece is learnt there, and only read where the next one begins.
    assert found[1::2] == [f"<s>«{digits[:16]}»", f"{digits[15]}«{digits[16:32]}»", ""]
    found = run_show(path, "--task", "a", "--record", "1", max_length=16)
    assert found[-1] == f"{digits[31]}«{digits[32:]}</s>»"
    border, text = run_show(path, "--task", "a", "--record", "2", max_length=16)
    assert border == "a, line 2: 16 tokens, 14 learnt, cut: the first of 42 tokens (oversize_rule segment)"
    assert text == f"<s>ab«{digits[:14]}»"
    border, text = run_show(path, "--task", "b", "--record", "2", max_length=16)
    assert border == "b, line 2: 42 tokens, 40 learnt, skipped: longer than max_length"
    assert text == f"<s>ab«{digits}</s>»"


def test_samples_come_in_the_order_of_training(
    make_mixture: Make, run_show: Callable[..., list[str]], tokenizer_path: Path
) -> None:
    path = make_mixture({"a": make_records(50), "b": make_records(50, seed=1)})
    mixture, _ = open_named_mixture(str(path), tokenizer_path=str(tokenizer_path), max_length=128, seed=9)
    with Loader(mixture, global_batch_size=1) as loader:
        packs = [loader.next_batch()[0] for _ in range(2)]
    tokenizer = load_tokenizer(tokenizer_path)
    expected = []
    for pack in packs:
        for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:]):
            if pack.task_ids[start] >= 0:
                expected.append(tokenizer.decode(pack.input_ids[start + 1 : end].tolist()))
    found = run_show(path, "--count", str(len(expected)), "--seed", "9", max_length=128)
    assert [re.sub("<s>|</s>|[«»]", "", text) for text in found[1::2]] == expected
    rows = run_show(path, "--packs", "--count", "2", "--seed", "9", max_length=128)
    assert [part for part in rows[0::2] if re.match("[ab], ", part)] == found[0::2]
    assert rows[0].endswith(f"{packs[0].tokens} tokens")
    paddings = [part for part in rows[0::2] if part.startswith("padding")]
    assert paddings == [f"padding: {128 - pack.tokens} of 128 positions" for pack in packs]
    assert {part[0] for part in run_show(path, "--task", "b", "--count", "5")[0::2]} == {"b"}


def test_a_row_shows_its_padding(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    path = make_mixture({"ten": [z(0, 9)]})
    sample = "ten, line 1: 10 tokens, 10 learnt"
    assert run_show(path, "--packs", "--count", "1", max_length=16) == [
        *("row 1: 1 sample, 10 tokens", "", sample, f"<s>«{'Z' * 9}</s>»", "padding: 6 of 16 positions", "")
    ]


def test_long_texts_are_shortened(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    path = make_mixture({"a": [{"input": "", "output": "Z" * 2000 + "Y" * 700 + "X" * 500}]})
    _, text = run_show(path, "--record", "1", max_length=4000)
    assert text == f"<s>«{'Z' * 1997}»\n… 707 tokens …\n«{'X' * 496}</s>»"
    assert run_show(path, "--record", "1", "--full", max_length=4000)[1].count("Y") == 700


def test_nothing_acts_on_the_terminal(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    path = make_mixture({"a": [{"input": "", "output": "Z\x1b[2JZ\r\tZ\x9b"}]})
    assert run_show(path, "--record", "1")[1] == "<s>«Z␛[2JZ␍\tZ\\u009b</s>»"


def test_spaces_of_a_sentencepiece_model(make_mixture: Make, run_show: Callable, tmp_path: Path) -> None:
    """Such a model puts a space before a text and takes it away in decoding: elsewhere a space is the text's own."""
    source, tokenizer = random.Random(0), tmp_path / "tokenizer.model"
    with tokenizer.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([random_text(source, 30) for _ in range(200)]),
            model_writer=file,
            vocab_size=90,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    data = [{"input": "the quick", "output": "brown fox"}, {"input": "", "output": "the quick brown fox jumps over"}]
    path = make_mixture({"a": data})
    assert run_show(path, "--record", "1", tokenizer=tokenizer)[1] == "<s>the quick«brown fox</s>»"
    pieces = run_show(path, "--record", "2", max_length=4, tokenizer=tokenizer)[1::2]
    assert pieces == ["<s>«the quick brown fox»", " fox« jumps over</s>»"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "aa"], "--task: the mixture has no 'aa'; did you mean 'a'? It has: a, b"),
        (["--record", "1"], "--record: say of which dataset: --task, one of a, b"),
        (["--record", "6", "--task", "b"], "--record: found 6, expected 1 to 5, the records of b"),
        (["--record", "0", "--task", "b"], "--record: found 0"),
        (["--record", "1", "--task", "b", "--packs"], "--record and --packs are both given"),
        (["--count", "0"], "--count: found 0"),
    ],
)
def test_mistakes_of_a_look(
    make_mixture: Make, tokenizer_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    path = make_mixture({"a": make_records(5), "b": make_records(5)})
    assert main(["data", "show", str(path), "--tokenizer", str(tokenizer_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_show_is_a_library_too(make_mixture: Make, tokenizer_path: Path) -> None:
    mixture, file = open_named_mixture(
        str(make_mixture({"a": [z(0, 3)]})), tokenizer_path=str(tokenizer_path), max_length=8
    )
    settings = {"count": 1, "task": "", "record": None, "packs": False, "color": True, "full": False}
    legend, _, text = show_samples(mixture, **settings)
    assert "\x1b[32mlearnt\x1b[0m" in legend
    assert text == "\x1b[33m<s>\x1b[0m\x1b[32mZZZ\x1b[0m\x1b[1;33m</s>\x1b[0m"
    assert file.name == "mixture.json"
