"""Going on with other data, and encoded datasets that are kept on disk."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.common import assert_same_packs, load_steps, make_records, write_jsonl

from fm9g.config.mixture import load_mixture
from fm9g.data.load.encoding_pool import build_token_cache
from fm9g.data.load.loader import Loader
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError

Make = Callable[..., Path]
DATASETS = {"a": make_records(40, 1), "b": make_records(60, 2, longest=120), "c": make_records(30, 3)}


def open_mixture(path: Path, tokenizer: Path, names: str = "", token_cache_dir: str = "", **extra) -> Mixture:
    """names: of the datasets that are taken, in this order; extra: `a={"abs_weight": 2.0}`."""
    entries = {entry["task_name"]: entry for entry in json.loads(path.read_text())}
    chosen = [{**entries[name], **extra.get(name, {})} for name in names or entries]
    changed = path.with_name("changed.json")
    changed.write_text(json.dumps(chosen))
    configs = [item.value for item in load_mixture(changed)]
    return Mixture(configs, str(tokenizer), 64, 3, 128, token_cache_dir)


def loader(mixture: Mixture, state: dict, allow_changes: bool = False, streams: int = 4) -> Loader:
    return Loader(mixture, global_batch_size=streams, state=state, allow_changes=allow_changes)


def num_started(state: dict, dataset: int) -> int:
    return sum(stream_state["begun"][dataset] for stream_state in state["streams"].values())


@pytest.fixture
def path(make_mixture: Make) -> Path:
    return make_mixture(DATASETS)


def test_a_dataset_that_is_taken_out_leaves_the_others_where_they_were(path: Path, tokenizer_path: Path) -> None:
    _, state = load_steps(open_mixture(path, tokenizer_path, "abc"), 6)
    gone = loader(open_mixture(path, tokenizer_path, "ca"), state)
    assert "data: b is no longer in the mixture" in gone.notes
    assert any("share of the tokens was 0.3333, is 0.5" in note for note in gone.notes)
    now = gone.state_dict()
    assert (num_started(now, 0), num_started(now, 1)) == (num_started(state, 2), num_started(state, 0))
    packs = [pack for _ in range(20) for pack in gone.next_batch()]
    tasks = np.concatenate([pack.task_ids for pack in packs])
    assert (tasks == 0).sum() / (tasks >= 0).sum() == pytest.approx(0.5, abs=0.02)


def test_a_new_dataset_gets_its_share_from_now_on_and_no_more(path: Path, tokenizer_path: Path) -> None:
    _, state = load_steps(open_mixture(path, tokenizer_path, "ab"), 30)
    more = loader(open_mixture(path, tokenizer_path, "abc", c={"abs_weight": 2.0}), state)
    assert "data: c is new in the mixture" in more.notes
    packs = [pack for _ in range(120) for pack in more.next_batch()]
    tasks = np.concatenate([pack.task_ids for pack in packs[-240:]])  # when what waited before is used up
    shares = np.bincount(tasks[tasks >= 0], minlength=3) / (tasks >= 0).sum()
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.02)


def test_an_epoch_goes_on_when_shares_change(make_mixture: Make, tokenizer_path: Path) -> None:
    """Every record is used once, although the share changed half-way."""
    path = make_mixture({"a": make_records(200, 1, longest=10), "b": make_records(50, 2)}, a={"allow_repeat": False})
    made, state = load_steps(open_mixture(path, tokenizer_path), 3)
    more = loader(open_mixture(path, tokenizer_path, a={"abs_weight": 5.0, "allow_repeat": False}), state)
    assert sum("share" in note for note in more.notes) == 2
    packs = [pack for step in made for pack in step]
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


def test_the_order_in_the_file_does_not_matter(path: Path, tokenizer_path: Path) -> None:
    whole, _ = load_steps(open_mixture(path, tokenizer_path, "abc"), 12)
    _, state = load_steps(open_mixture(path, tokenizer_path, "abc"), 6)
    turned = loader(open_mixture(path, tokenizer_path, "cab"), state)
    assert turned.notes == []
    for step in whole[6:]:
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
    path: Path, tokenizer_path: Path, change: dict, expected: str
) -> None:
    (path.parent / "t.py").write_text("def transform(data, num_sample, r):\n    return data\n")
    _, state = load_steps(open_mixture(path, tokenizer_path), 5)
    changed = open_mixture(path, tokenizer_path, **change)
    with pytest.raises(UserError, match=expected) as error:
        loader(changed, state)
    assert "--on_data_change allow" in str(error.value)
    migrated = loader(changed, state, allow_changes=True)
    assert any(expected in note for note in migrated.notes)
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
def test_another_number_of_packs_a_step_goes_on_when_asked(path: Path, tokenizer_path: Path, streams: int) -> None:
    mixture = open_mixture(path, tokenizer_path)
    _, state = load_steps(mixture, 6)
    with pytest.raises(UserError, match=f"packs a step: was 4, is {streams}"):
        loader(mixture, state, streams=streams)
    migrated = loader(mixture, state, allow_changes=True, streams=streams)
    assert any("some may come twice or not" in note for note in migrated.notes)
    now = migrated.state_dict()
    for dataset in range(3):
        assert num_started(now, dataset) == num_started(state, dataset)
    buffer = Counter(tuple(w) for stream_state in now["streams"].values() for w in stream_state["waiting"])
    assert buffer == Counter(tuple(w) for stream_state in state["streams"].values() for w in stream_state["waiting"])
    migrated.next_batch()


def test_an_earlier_versions_position_is_refused(path: Path, tokenizer_path: Path) -> None:
    mixture = open_mixture(path, tokenizer_path)
    for state in ({}, {"fingerprint": {"global_batch": 1, "datasets": []}, "streams": {"0": {}}}):
        with pytest.raises(UserError, match="not whole, or an earlier version's"):
            loader(mixture, state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_gives_the_same_packs_and_is_used_again(
    path: Path, tokenizer_path: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = open_mixture(path, tokenizer_path)
    cached, notes = build_token_cache(
        open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "cache")), workers
    )
    assert all(cached.caches)
    assert not notes
    assert_same_packs(load_steps(plain, 12)[0], load_steps(cached, 12)[0])
    assert sorted(folder.name[0] for folder in (tmp_path / "cache").iterdir()) == ["a", "b", "c"]
    again = open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(Mixture, "render", None)  # nothing is encoded any more
    assert_same_packs(load_steps(build_token_cache(again, 0)[0], 12)[0], load_steps(cached, 12)[0])


def test_a_stale_cache_is_noticed_and_made_anew(path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=cache), 0)
    changed = open_mixture(path, tokenizer_path, token_cache_dir=cache, a={"chat_template": "chatml"})
    assert [bool(one) for one in changed.caches] == [False, True, True]
    made, notes = build_token_cache(changed, 0)
    assert len(notes) == 1
    assert "is stale and made anew: template: was , is" in notes[0]
    assert_same_packs(
        load_steps(open_mixture(path, tokenizer_path, a={"chat_template": "chatml"}), 5)[0], load_steps(made, 5)[0]
    )
    data = tmp_path / "indexed" / "b" / "data.jsonl"
    whole = data.read_bytes()
    data.write_bytes(whole.replace(b"fox", b"cat"))  # as long as before
    stale = open_mixture(path, tokenizer_path, token_cache_dir=cache)
    assert not stale.caches[1]
    (made.cache_folder(2) / "tokens").write_bytes(b"1234")
    with pytest.raises(UserError, match="the token cache is not whole; delete it"):
        open_mixture(path, tokenizer_path, token_cache_dir=cache)
    for content in ("[]", "5", "junk"):
        (made.cache_folder(2) / "cache.json").write_text(content)
        assert not open_mixture(path, tokenizer_path, token_cache_dir=cache).caches[2]


def test_a_cache_and_a_dataset_that_change_meanwhile_are_noticed(
    path: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    mixture, _ = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "cache")), 0)
    for file in ("tokens", "bounds"):
        os.truncate(mixture.cache_folder(0) / file, 4)
        with pytest.raises(UserError, match="cache was changed while it was read"):
            mixture.encode(0, range(4))
    shutil.rmtree(mixture.cache_folder(1))
    with pytest.raises(UserError, match="No such file or directory; the run was reading it"):
        mixture.encode(1, range(4))
    data = mixture.datasets[2].folder / "data.jsonl"
    mixture.datasets[2].line(0)
    data.write_bytes(data.read_bytes()[::-1])  # of the same length
    with pytest.raises(UserError, match=r"data.jsonl: was changed or replaced while it was read"):
        mixture.datasets[2].line(0)


def test_a_cache_replaces_nothing_but_a_cache(path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """Whatever the datasets are called, and wherever the caches are to go."""
    entries = json.loads(path.read_text())
    entries[0]["task_name"], entries[1]["task_name"] = "../indexed/a", ".."
    path.write_text(json.dumps(entries))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    mixture, _ = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "indexed")), 0)
    assert all(mixture.caches)
    assert {mixture.cache_folder(number).parent for number in range(3)} == {tmp_path / "indexed"}
    assert all(file.read_bytes() == content for file, content in before.items() if file.name != "changed.json")
    folder = mixture.cache_folder(2)
    (folder / "mine.txt").write_text("precious")
    (folder / "cache.json").unlink()
    with pytest.raises(UserError, match="holds something else than a token cache"):
        build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "indexed")), 0)
    assert (folder / "mine.txt").exists()


def test_a_dataset_without_any_output_has_an_empty_cache(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path
) -> None:
    path = make_mixture({"a": make_records(5), "b": [{"input": "x", "output": ""}] * 3})
    cached, _ = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "cache")), 0)
    assert [encoded.skipped for encoded in cached.encode(1, range(3))] == ["no output"] * 3


def test_a_transform_that_draws_random_numbers_has_no_cache(path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (path.parent / "pure.py").write_text("def transform(data, num_sample, r):\n    return {**data, 'input': 'say'}\n")
    (path.parent / "draws.py").write_text(
        "def transform(data, num_sample, r):\n    return {**data, 'output': r.choice('abc')}\n"
    )
    extra = {"a": {"transforms": "pure.py"}, "b": {"transforms": "draws.py"}}
    cache = str(tmp_path / "cache")
    cached, notes = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=cache, **extra), 0)
    assert [bool(one) for one in cached.caches] == [True, False, True]
    assert "draws random numbers" in notes[0]
    assert not cached.cache_folder(1).exists()
    assert_same_packs(load_steps(cached, 8)[0], load_steps(open_mixture(path, tokenizer_path, **extra), 8)[0])


def test_data_is_the_same_if_it_is_copied_but_not_if_it_is_written_anew(path: Path, tokenizer_path: Path) -> None:
    """The fingerprint of a run is the content, not the time or place of a file."""
    mixture = open_mixture(path, tokenizer_path)
    _, state = load_steps(mixture, 2)
    data = path.parent / "indexed" / "a" / "data.jsonl"
    data.write_bytes(data.read_bytes())
    assert loader(open_mixture(path, tokenizer_path), state).notes == []
    write_jsonl(data, [{**record, "output": record["output"][::-1]} for record in DATASETS["a"]])
    with pytest.raises(UserError, match="a: checksum"):
        loader(open_mixture(path, tokenizer_path), state)
