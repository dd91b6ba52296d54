"""Mixtures on disk: the shares of datasets, and what transforms make of records."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.common import ROOT, index_dataset, make_records, write_jsonl
from helpers.mixtures import answer_dataset, open_mixture

from fm9g.config.mixture import DatasetConfig
from fm9g.data.encode import template
from fm9g.data.encode.tokenizer_training import train_tokenizer
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError

Make = Callable[..., Path]


BY_SIZE = {"abs_weight": None}


def test_without_abs_weight_the_share_is_weight_times_size(make_mixture: Make, tokenizer_path: Path) -> None:
    path = make_mixture({"a": make_records(10), "b": make_records(30)}, a={**BY_SIZE, "weight": 2.0}, b=BY_SIZE)
    mixture = open_mixture(path, tokenizer_path)
    a, b = (dataset.nbytes for dataset in mixture.datasets)
    assert mixture.proportions() == pytest.approx([2 * a / (2 * a + b), b / (2 * a + b)])


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
            r"line 1 of .*bad.py: E: \(its text cannot be created: ValueError\)",
        ),
        (
            "class D(dict):\n    def __repr__(self): raise ValueError\n"
            "def transform(data, num_sample, r):\n    return D({1: 2})\n",
            r"line 1 of .*bad.py: returned \(its text cannot be created: ValueError\)",
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


MESSAGES = [{"role": "user", "content": "a"}]


def test_a_template_that_came_with_a_model_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer(["a b"], 300, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(template, "MAX_SECONDS", 0.1)
    mixture = Mixture([answer_dataset(tmp_path, "b")], str(tmp_path / "t"), 64, 1)
    with pytest.raises(UserError, match=r"^chat template tokenizer, line 1: takes more than"):
        mixture.encode(0, [0])


ALPACA = [{"instruction": "q", "input": "x", "output": "a"}, {"messages": [{"role": "user", "content": "q"}]}]


@pytest.mark.parametrize("with_transform", [False, True])
def test_records_that_were_indexed_as_they_are_have_their_format_recognised(
    tmp_path: Path, tokenizer_path: Path, with_transform: bool
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ALPACA)
    index_dataset(source, tmp_path / "as_is", "en", as_is=True)
    index_dataset(write_jsonl(tmp_path / "b.jsonl", ALPACA[:1]), tmp_path / "converted", "en")
    (tmp_path / "same.py").write_text("def transform(data, num_sample, r):\n    return data\n")
    script = str(tmp_path / "same.py") if with_transform else ""
    configs = [
        DatasetConfig(task_name=name, path=str(tmp_path / name), transforms=script) for name in ("as_is", "converted")
    ]
    mixture = Mixture(configs, str(tokenizer_path), 64, 3)
    assert [dataset.is_canonical for dataset in mixture.datasets] == [False, True]
    as_is, converted = (mixture.tokenize_records(number, [0], [0])[0] for number in range(2))
    np.testing.assert_array_equal(as_is, converted)
    with pytest.raises(UserError, match=r"as_is, line 2 of .*: messages: no turn of the assistant"):
        mixture.tokenize_records(0, [1], [1])


def test_records_that_indexing_converted_are_not_recognised_again(
    mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fm9g.data.load.mixture.canonicalize", None)
    assert len(mixture.encode(1, range(20))) == 20


def test_a_record_that_was_edited_after_indexing_is_named(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path
) -> None:
    path = make_mixture({"edited": make_records(3)})
    data = tmp_path / "indexed" / "edited" / "data.jsonl"
    data.write_bytes(data.read_bytes().replace(b'"output"', b'"answer"'))  # of equal size
    with pytest.raises(UserError, match=r"edited, line \d of .*: was changed after indexing; index the dataset again"):
        open_mixture(path, tokenizer_path).encode(0, range(3))
