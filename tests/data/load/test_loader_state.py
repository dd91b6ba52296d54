"""Resuming with other data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.common import load_steps, make_records, write_jsonl
from helpers.mixtures import DATASETS, open_mixture

from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError

Make = Callable[..., Path]


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


def loader(mixture: Mixture, state: dict, allow_changes: bool = False, streams: int = 4) -> Loader:
    return Loader(mixture, global_batch_size=streams, state=state, allow_changes=allow_changes)


def num_started(state: dict, dataset: int) -> int:
    return sum(stream_state["begun"][dataset] for stream_state in state["streams"].values())


def test_a_dataset_that_is_taken_out_leaves_the_others_where_they_were(
    path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, state = load_steps(open_mixture(path, tokenizer_path, "abc"), 6)
    gone = loader(open_mixture(path, tokenizer_path, "ca"), state)
    assert "data: b is no longer in the mixture" in caplog.messages
    assert any("share of the tokens was 0.3333, is 0.5" in note for note in caplog.messages)
    now = gone.state_dict()
    assert (num_started(now, 0), num_started(now, 1)) == (num_started(state, 2), num_started(state, 0))
    packs = [pack for _ in range(20) for pack in gone.next_batch()]
    tasks = np.concatenate([pack.task_ids for pack in packs])
    assert (tasks == 0).sum() / (tasks >= 0).sum() == pytest.approx(0.5, abs=0.02)


def test_a_new_dataset_gets_its_share_from_now_on_and_no_more(
    path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, state = load_steps(open_mixture(path, tokenizer_path, "ab"), 30)
    more = loader(open_mixture(path, tokenizer_path, "abc", c={"abs_weight": 2.0}), state)
    assert "data: c is new in the mixture" in caplog.messages
    packs = [pack for _ in range(120) for pack in more.next_batch()]
    tasks = np.concatenate([pack.task_ids for pack in packs[-240:]])  # when what waited before is used up
    shares = np.bincount(tasks[tasks >= 0], minlength=3) / (tasks >= 0).sum()
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.02)


def test_an_epoch_goes_on_when_shares_change(
    make_mixture: Make, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every record is used once, although the share changed half-way."""
    caplog.set_level(logging.INFO)
    path = make_mixture({"a": make_records(200, 1, longest=10), "b": make_records(50, 2)}, a={"allow_repeat": False})
    created, state = load_steps(open_mixture(path, tokenizer_path), 3)
    more = loader(open_mixture(path, tokenizer_path, a={"abs_weight": 5.0, "allow_repeat": False}), state)
    assert sum("share" in note for note in caplog.messages) == 2
    packs = [pack for step in created for pack in step]
    for _ in range(60):
        packs += more.next_batch()
    tokenizer = open_mixture(path, tokenizer_path).tokenizer
    seen = Counter(
        tokenizer.decode(pack.input_ids[start + 1 : end].tolist())
        for pack in packs
        for start, end in zip(pack.cu_seqlens, pack.cu_seqlens[1:])
        if pack.task_ids[start] == 0
    )
    assert seen == Counter(record["input"] + record["output"] for record in make_records(200, 1, longest=10))


def test_the_order_in_the_file_does_not_matter(
    path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    full, _ = load_steps(open_mixture(path, tokenizer_path, "abc"), 12)
    _, state = load_steps(open_mixture(path, tokenizer_path, "abc"), 6)
    turned = loader(open_mixture(path, tokenizer_path, "cab"), state)
    assert caplog.messages == []
    for step in full[6:]:
        for one, other in zip(step, turned.next_batch()):
            np.testing.assert_array_equal(one.input_ids, other.input_ids)


def test_a_new_dataset_does_not_make_up_for_the_time_since_another_was_used_up(
    make_mixture: Make, tokenizer_path: Path
) -> None:
    once = {"allow_repeat": False}
    path = make_mixture({"a": make_records(8, 1), "b": make_records(60, 2), "c": make_records(30, 3)}, a=once)
    _, state = load_steps(open_mixture(path, tokenizer_path, "ab"), 60)
    for names, extra in (("abc", {}), ("abc", {"a": {"allow_repeat": True}})):
        more = loader(open_mixture(path, tokenizer_path, names, **extra), state)
        packs = [pack for _ in range(60) for pack in more.next_batch()]
        tasks = np.concatenate([pack.task_ids for pack in packs[-120:]])
        shares = np.bincount(tasks[tasks >= 0], minlength=3) / (tasks >= 0).sum()
        expected = [1 / 3, 1 / 3, 1 / 3] if extra else [0, 0.5, 0.5]
        assert shares == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a": {"oversize_rule": "drop"}}, "a: oversize_rule: was segment, is drop"),
        ({"a": {"chat_template": "chatml"}}, "a: chat_template: was , is"),
        ({"b": {"train_on": "all"}}, "b: train_on: was assistant, is all"),
        ({"a": {"transforms": "t.py"}}, "a: transforms: was 00000000, is"),
    ],
)
def test_what_makes_other_samples_is_refused_unless_it_is_asked_for(
    path: Path, tokenizer_path: Path, change: dict, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (path.parent / "t.py").write_text("def transform(data, num_sample, r):\n    return data\n")
    _, state = load_steps(open_mixture(path, tokenizer_path), 5)
    changed = open_mixture(path, tokenizer_path, **change)
    with pytest.raises(UserError, match=expected) as error:
        loader(changed, state)
    assert "--on_data_change allow" in str(error.value)
    migrated = loader(changed, state, allow_changes=True)
    assert any(expected in note for note in caplog.messages)
    name = next(iter(change))
    dataset = "abc".index(name)
    stream_state = migrated.state_dict()["streams"]["0"]
    assert [d for d, _, _ in stream_state["waiting"]].count(dataset) == 0
    assert num_started(migrated.state_dict(), dataset) == num_started(state, dataset)
    migrated.next_batch()


def test_other_data_under_the_same_name_starts_anew(path: Path, tokenizer_path: Path, make_mixture: Make) -> None:
    _, state = load_steps(open_mixture(path, tokenizer_path), 5)
    other = open_mixture(make_mixture({**DATASETS, "b": make_records(60, 9)}), tokenizer_path)
    with pytest.raises(UserError, match="b: checksum: was"):
        loader(other, state)
    now = loader(other, state, allow_changes=True).state_dict()
    assert num_started(now, 1) == 0
    assert num_started(now, 0) == num_started(state, 0)


@pytest.mark.parametrize("streams", [2, 3, 8])
def test_another_number_of_packs_a_step_goes_on_when_asked(
    path: Path, tokenizer_path: Path, streams: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mixture = open_mixture(path, tokenizer_path)
    _, state = load_steps(mixture, 6)
    with pytest.raises(UserError, match=f"packs per step: was 4, is {streams}"):
        loader(mixture, state, streams=streams)
    migrated = loader(mixture, state, allow_changes=True, streams=streams)
    assert any("some records may come twice or not" in note for note in caplog.messages)
    now = migrated.state_dict()
    for dataset in range(3):
        assert num_started(now, dataset) == num_started(state, dataset)
    buffer = Counter(tuple(w) for stream_state in now["streams"].values() for w in stream_state["waiting"])
    assert buffer == Counter(tuple(w) for stream_state in state["streams"].values() for w in stream_state["waiting"])
    migrated.next_batch()


def test_an_earlier_versions_position_is_refused(path: Path, tokenizer_path: Path) -> None:
    mixture = open_mixture(path, tokenizer_path)
    for state in ({}, {"fingerprint": {"global_batch": 1, "datasets": []}, "streams": {"0": {}}}):
        with pytest.raises(UserError, match="is incomplete, or from an earlier version"):
            loader(mixture, state)


def test_data_is_the_same_if_it_is_copied_but_not_if_it_is_written_anew(
    path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The fingerprint of a run is the content, not the time or place of a file."""
    caplog.set_level(logging.INFO)
    mixture = open_mixture(path, tokenizer_path)
    _, state = load_steps(mixture, 2)
    data = path.parent / "indexed" / "a" / "data.jsonl"
    data.write_bytes(data.read_bytes())
    loader(open_mixture(path, tokenizer_path), state)
    assert caplog.messages == []
    write_jsonl(data, [{**record, "output": record["output"][::-1]} for record in DATASETS["a"]])
    with pytest.raises(UserError, match="a: checksum"):
        loader(open_mixture(path, tokenizer_path), state)
