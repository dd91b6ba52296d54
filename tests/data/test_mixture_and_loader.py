"""Mixtures on disk and the loader: the packs of a step depend on no rank, worker or restart."""

import contextlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.common import ROOT, assert_same_packs, index_dataset, load_steps, make_records

from fm9g.config.mixture import load_mixture
from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError

Make = Callable[..., Path]
BY_SIZE = {"abs_weight": None}


def open_mixture(path: Path, tokenizer: Path, max_length: int = 64, seed: int = 3) -> Mixture:
    return Mixture([item.value for item in load_mixture(path)], str(tokenizer), max_length, seed, 2 * max_length)


@pytest.fixture
def mixture(make_mixture: Make, tokenizer_path: Path) -> Mixture:
    path = make_mixture(
        {"few": make_records(3, 1), "many": make_records(60, 2, longest=120)}, few={"allow_repeat": True}
    )
    return open_mixture(path, tokenizer_path)


@pytest.mark.parametrize("ranks", [2, 4])
def test_packs_do_not_depend_on_the_number_of_ranks(mixture: Mixture, ranks: int) -> None:
    assert_same_packs(load_steps(mixture, 12)[0], load_steps(mixture, 12, ranks=ranks)[0])


@pytest.mark.parametrize("workers", [1, 3])
def test_packs_do_not_depend_on_the_number_of_workers(mixture: Mixture, workers: int) -> None:
    assert_same_packs(load_steps(mixture, 12)[0], load_steps(mixture, 12, workers=workers)[0])


def test_another_number_of_ranks_and_workers_goes_on_with_the_same_packs(mixture: Mixture) -> None:
    whole, _ = load_steps(mixture, 14)
    first, position = load_steps(mixture, 5, ranks=2, workers=3)
    assert_same_packs(whole, first + load_steps(mixture, 9, ranks=4, state=position)[0])


def test_ranks_that_do_not_divide_the_packs_are_refused(mixture: Mixture) -> None:
    with pytest.raises(UserError, match=r"4 packs a step cannot be dealt to 3 processes; possible: \[1, 2, 4\]"):
        Loader(mixture, global_batch_size=4, world_size=3)


def test_a_position_of_other_data_is_refused_and_says_what_changed(
    mixture: Mixture, make_mixture: Make, tokenizer_path: Path
) -> None:
    _, position = load_steps(mixture, 2)
    other = open_mixture(make_mixture({"few": make_records(4, 1), "many": make_records(60, 2)}), tokenizer_path, seed=4)
    with pytest.raises(UserError) as error:
        load_steps(other, 1, state=position)
    assert "seed: was 3, is 4" in str(error.value)
    assert "few: records: was 3, is 4" in str(error.value)
    assert "--on_data_change allow" in str(error.value)


def test_the_first_record_of_a_dataset_is_trained_on(make_mixture: Make, tokenizer_path: Path) -> None:
    mixture = open_mixture(
        make_mixture({"a": make_records(20)}, a={"allow_repeat": False}), tokenizer_path, max_length=512
    )
    seen = []
    loader = Loader(mixture, global_batch_size=1)
    while (pack := loader.next_batch()[0]).tokens:
        for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:]):
            if pack.task_ids[start] >= 0:
                seen.append(mixture.tokenizer.decode(pack.input_ids[start + 1 : end].tolist()))
    assert Counter(seen) == Counter(record["input"] + record["output"] for record in make_records(20))


def test_shares_of_tokens_follow_abs_weight_whatever_the_lengths(make_mixture: Make, tokenizer_path: Path) -> None:
    datasets = {"short": make_records(50, 1, longest=3), "long": make_records(50, 2, longest=300)}
    path = make_mixture(datasets, short={"abs_weight": 0.3}, long={"abs_weight": 0.7})
    mixture = open_mixture(path, tokenizer_path, max_length=512)
    made, _ = load_steps(mixture, 60)
    tasks = np.concatenate([pack.task_ids for step in made for pack in step])
    assert (tasks == 0).sum() / (tasks >= 0).sum() == pytest.approx(0.3, abs=0.01)


def test_without_abs_weight_the_share_is_weight_times_size(make_mixture: Make, tokenizer_path: Path) -> None:
    path = make_mixture({"a": make_records(10), "b": make_records(30)}, a={**BY_SIZE, "weight": 2.0}, b=BY_SIZE)
    mixture = open_mixture(path, tokenizer_path)
    a, b = (dataset.nbytes for dataset in mixture.datasets)
    assert mixture.proportions() == pytest.approx([2 * a / (2 * a + b), b / (2 * a + b)])


def test_average_tokens_are_configured_or_measured(make_mixture: Make, tokenizer_path: Path) -> None:
    path = make_mixture({name: make_records(40) for name in "abc"}, a={"ave_tokens_per_line": 9}, b={"avg_tokens": 9e9})
    mixture = open_mixture(path, tokenizer_path)
    measured = np.mean([len(piece) - 1 for encoded in mixture.encode(2, range(40)) for piece in encoded.segments])
    assert mixture.mean_tokens() == [9, 64, pytest.approx(measured)]


def test_a_transform_shapes_the_record_and_draws_from_its_own_generator(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path
) -> None:
    script = tmp_path / "add_template.py"
    script.write_text(
        "def transform(data, num_sample, r):\n"
        "    return {'input': f'User: {data[\"input\"]}', 'output': f'{num_sample} {r.random()}'}\n"
    )
    extra = {"transforms": "add_template.py", "incontext_weight": [0, 1]}
    path = make_mixture({"a": [{"input": "x", "output": "y"}]}, a=extra)

    def texts(mixture: Mixture) -> list[str]:
        pieces = [encoded.segments[0] for encoded in mixture.encode(0, range(3))]
        return [mixture.tokenizer.decode(np.where(ids < 0, ~ids, ids)[1:-1].tolist()) for ids in pieces]

    some = texts(open_mixture(path, tokenizer_path))
    assert some == texts(open_mixture(path, tokenizer_path))
    assert len(set(some)) == 3
    assert all(text.startswith("User: x1 0.") for text in some)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "def transform(data, num_sample, r):\n    return data['nothing']\n",
            r"a, line 1 of .*bad.py: KeyError: 'nothing'",
        ),
        ("def transform(data, num_sample, r):\n    return 'text'\n", r"returned 'text', expected"),
        ("def transform(data, num_sample, r):\n    return {1: 'a'}\n", r"returned {1: 'a'}, expected"),
        ("class E(BaseException): pass\ndef transform(data, num_sample, r):\n    raise E()\n", r"bad.py: E"),
        (
            "def transform(data, num_sample, r):\n    return {'input': '', 'output': '\\ud800'}\n",
            r"a, one of the lines 1 of .*cannot be encoded",
        ),
        ("def other(): pass\n", r"defines no function transform"),
        ("def transform(:\n", r"bad.py: SyntaxError"),
        ("import os\nos._exit(0)\n", r"transforms: .*bad.py: calls os._exit\(0\)"),
        (
            "import os\ndef transform(data, num_sample, r):\n    os._exit(0)\n",
            r"line 1 of .*bad.py: calls os._exit\(0\)",
        ),
        ("import sys\ndef transform(data, num_sample, r):\n    sys.exit()\n", r"line 1 of .*bad.py: SystemExit"),
        (
            "def transform(data, num_sample, r):\n    raise KeyboardInterrupt\n",
            r"line 1 of .*bad.py: KeyboardInterrupt",
        ),
        (
            "class E(Exception):\n    def __str__(self): raise ValueError\n"
            "def transform(data, num_sample, r):\n    raise E\n",
            r"line 1 of .*bad.py: E: \(its text cannot be made: ValueError\)",
        ),
        (
            "class D(dict):\n    def __repr__(self): raise ValueError\n"
            "def transform(data, num_sample, r):\n    return D({1: 2})\n",
            r"line 1 of .*bad.py: returned \(its text cannot be made: ValueError\)",
        ),
        ("while True: pass\n", r"transforms: .*bad.py: takes more than 0.2 seconds \(transform_timeout\)"),
        (
            "def transform(data, num_sample, r):\n    while True: pass\n",
            r"line 1 of .*bad.py: takes more than 0.2 seconds",
        ),
    ],
)
def test_a_transform_that_fails_is_named_with_dataset_and_line(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path, script: str, expected: str
) -> None:
    (tmp_path / "bad.py").write_text(script)
    path = make_mixture({"a": make_records(1)}, a={"transforms": "bad.py", "transform_timeout": 0.2})
    with pytest.raises(UserError, match=expected):
        open_mixture(path, tokenizer_path).encode(0, [0])
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_ctrl_c_in_a_transform_is_no_mistake_of_its_own(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path
) -> None:
    script = "import os\ndef transform(data, num_sample, r):\n    os.kill(os.getpid(), 2)\n    while True: pass\n"
    (tmp_path / "t.py").write_text(script)
    path = make_mixture({"a": make_records(1)}, a={"transforms": "t.py"})
    with pytest.raises(KeyboardInterrupt):
        open_mixture(path, tokenizer_path).encode(0, [0])


def test_an_error_in_a_worker_reaches_the_user(make_mixture: Make, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def transform(data, num_sample, r):\n    raise RuntimeError('boom')\n")
    path = make_mixture({"a": make_records(5)}, a={"transforms": "bad.py", "ave_tokens_per_line": 10})
    with pytest.raises(UserError, match="boom"):
        load_steps(open_mixture(path, tokenizer_path), 1, workers=1)


def test_a_worker_that_is_killed_is_reported(make_mixture: Make, tokenizer_path: Path, tmp_path: Path) -> None:
    script = "import os\ndef transform(data, num_sample, r):\n    os.kill(os.getpid(), 9)\n"
    (tmp_path / "kill.py").write_text(script)
    path = make_mixture({"a": make_records(5)}, a={"transforms": "kill.py", "ave_tokens_per_line": 10})
    with pytest.raises(
        UserError, match=r"a worker that encodes records was killed while it was at a, line \d of .*/a\."
    ):
        load_steps(open_mixture(path, tokenizer_path), 1, workers=1)


def test_closing_does_not_wait_for_a_worker_that_never_ends(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "endless.py").write_text("def transform(data, num_sample, r):\n    while True: pass\n")
    path = make_mixture({"a": make_records(5)}, a={"transforms": "endless.py", "ave_tokens_per_line": 10})
    loader = Loader(open_mixture(path, tokenizer_path), global_batch_size=1, workers=1)
    taken = threading.Thread(target=_next, args=(loader,), daemon=True)
    taken.start()
    time.sleep(3)  # the worker has started, or is about to
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 10


def _next(loader: Loader) -> None:
    with contextlib.suppress(UserError, RuntimeError):
        loader.next_batch()


def test_a_wrong_number_of_lines_is_noted(make_mixture: Make, tokenizer_path: Path) -> None:
    path = make_mixture({"a": make_records(4)}, a={"nlines": 5})
    assert "nlines is 5 in the configuration, 4 in" in open_mixture(path, tokenizer_path).notes()[0]


def test_the_shipped_template_is_the_one_of_the_guide(make_mixture: Make, tokenizer_path: Path) -> None:
    script = ROOT / "dataset_configs" / "add_template.py"
    path = make_mixture({"a": [{"input": "问", "output": "答"}]}, a={"transforms": str(script)})
    mixture = open_mixture(path, tokenizer_path, max_length=512)
    tokens = mixture.encode(0, [0])[0].segments[0]
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    prompt = f"{system}<|im_start|>User\n问<|im_end|>\n<|im_start|>assistant\n"
    assert mixture.tokenizer.decode((~tokens[tokens < 0])[1:].tolist()) == prompt
    assert mixture.tokenizer.decode(tokens[tokens >= 0].tolist()) == "答<|im_end|>"
    assert tokens[-1] == mixture.tokenizer.eos_id


@pytest.mark.parametrize("names", [["alpaca_zh_demo.json", "wiki_demo.txt"], ["wiki_demo.txt"]])
def test_padding_is_below_one_percent_on_real_data(shared: Path, tmp_path: Path, names: list[str]) -> None:
    """Rows of 2048 tokens, once round each dataset."""
    entries = []
    for name in names:
        index_dataset(shared / "data" / name, tmp_path / name, "zh")
        entries.append({"task_name": name, "path": name})
    (tmp_path / "mixture.json").write_text(json.dumps(entries))
    configs = [item.value for item in load_mixture(tmp_path / "mixture.json")]
    mixture = Mixture(configs, str(shared / "tokenizers" / "9g-2b"), 2048, seed=1)
    loader = Loader(mixture, global_batch_size=1)
    packs = [loader.next_batch()[0] for _ in range(150)]
    assert 1 - sum(pack.tokens for pack in packs) / (2048 * len(packs)) < 0.01
    assert all(np.diff(pack.cu_seqlens).max() <= 2048 for pack in packs)
