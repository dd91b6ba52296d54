"""`fm9g data show`: marks are on exactly the tokens that are trained on."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from helpers.common import make_records, random_text
from helpers.inspection import CHAT, Make, z

from fm9g.cli import main
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.inspect.check import open_named_mixture
from fm9g.data.inspect.show import show_samples, wants_color
from fm9g.data.load.loader import Loader


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


def test_marks_are_on_exactly_what_is_learnt(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    path = make_mixture({"a": [{"input": "Who? ", "output": "me, 深\nyes"}, z(3, 0)], "chat": [CHAT]})
    border, text = run_show(path, "--task", "a", "--record", "1")
    assert text == "<s>Who? «me, 深⏎\nyes</s>»"
    assert re.match(r"a, line 1: \d+ tokens, \d+ trained on$", border)
    assert run_show(path, "--task", "a", "--record", "1", "--train_on", "all")[1] == "<s>«Who? me, 深⏎\nyes</s>»"
    assert run_show(path, "--task", "a", "--record", "2") == [
        "a, line 2: 0 tokens, 0 trained on, skipped: no output",
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
    assert run_show(path, *arguments)[0].endswith(" truncated: the first of 130 tokens (oversize_rule segment)")


def test_rows_without_packing(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    path = make_mixture({"a": [z(0, length) for length in (3, 4, 5, 90)]})  # the last one is dropped
    arguments = "--packs", "--packing", "false", "--oversize_rule", "drop", "--count", "6"
    borders = run_show(path, *arguments)[::2]
    used = [int(border.split(", ")[1].split()[0]) for border in borders if border.startswith("row")]
    padding = [border for border in borders if border.startswith("padding")]
    assert sorted(used[:3]) == sorted(used[3:]) == [4, 5, 6]  # an epoch has three rows, of one sample each
    assert padding == [f"padding: {64 - tokens} of 64 positions" for tokens in used]


def test_a_system_message_is_shown(make_mixture: Make, run_show: Callable[..., list[str]]) -> None:
    path = make_mixture({"chat": [CHAT]})
    text = run_show(path, "--chat_template", "chatml", "--system", "Be kind.", max_length=400)[1]
    assert text.startswith("<s><|im_start|>system⏎\nBe kind.<|im_end|>⏎\n")


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
    piece = "a, line 1: 16 tokens, 16 trained on, segment {} of 3 (oversize_rule segment)"
    assert found[0::2] == [piece.format(1), piece.format(2), "1 more samples of this record; --count 3 shows all"]
    # The last token of a segment is trained on there, and is masked at the beginning of the next one.
    assert found[1::2] == [f"<s>«{digits[:16]}»", f"{digits[15]}«{digits[16:32]}»", ""]
    found = run_show(path, "--task", "a", "--record", "1", max_length=16)
    assert found[-1] == f"{digits[31]}«{digits[32:]}</s>»"
    border, text = run_show(path, "--task", "a", "--record", "2", max_length=16)
    assert border == "a, line 2: 16 tokens, 14 trained on, truncated: the first of 42 tokens (oversize_rule segment)"
    assert text == f"<s>ab«{digits[:14]}»"
    border, text = run_show(path, "--task", "b", "--record", "2", max_length=16)
    assert border == "b, line 2: 42 tokens, 40 trained on, skipped: longer than max_length"
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
    sample = "ten, line 1: 10 tokens, 10 trained on"
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
        (["--record", "1"], "--record: name its dataset with --task, one of a, b"),
        (["--record", "6", "--task", "b"], "--record: found 6, expected 1 to 5, the records of b"),
        (["--record", "0", "--task", "b"], "--record: found 0"),
        (["--record", "1", "--task", "b", "--packs"], "--record does not go with --packs"),
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
    assert "\x1b[32mtrained on\x1b[0m" in legend
    assert text == "\x1b[33m<s>\x1b[0m\x1b[32mZZZ\x1b[0m\x1b[1;33m</s>\x1b[0m"
    assert file.name == "mixture.json"
