"""Building token caches."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.common import assert_same_packs, load_steps, make_records
from helpers.mixtures import open_mixture

from fm9g.data.load.mixture import Mixture
from fm9g.data.load.token_cache_builder import build_token_cache
from fm9g.errors import UserError

Make = Callable[..., Path]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_gives_the_same_packs_and_is_used_again(
    path: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    plain = open_mixture(path, tokenizer_path)
    cached = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "cache")), workers)
    assert all(cached.caches)
    assert not caplog.messages
    assert_same_packs(load_steps(plain, 12)[0], load_steps(cached, 12)[0])
    assert sorted(folder.name[0] for folder in (tmp_path / "cache").iterdir()) == ["a", "b", "c"]
    again = open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(Mixture, "render", None)  # nothing is encoded any more
    assert_same_packs(load_steps(build_token_cache(again, 0), 12)[0], load_steps(cached, 12)[0])


def test_a_stale_cache_is_noticed_and_made_anew(
    path: Path, tokenizer_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cache = str(tmp_path / "cache")
    build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=cache), 0)
    changed = open_mixture(path, tokenizer_path, token_cache_dir=cache, a={"chat_template": "chatml"})
    assert [bool(one) for one in changed.caches] == [False, True, True]
    created = build_token_cache(changed, 0)
    (message,) = caplog.messages
    assert "is stale and built again: template: was , is" in message
    assert_same_packs(
        load_steps(open_mixture(path, tokenizer_path, a={"chat_template": "chatml"}), 5)[0], load_steps(created, 5)[0]
    )
    data = tmp_path / "indexed" / "b" / "data.jsonl"
    full = data.read_bytes()
    data.write_bytes(full.replace(b"fox", b"cat"))  # as long as before
    stale = open_mixture(path, tokenizer_path, token_cache_dir=cache)
    assert not stale.caches[1]
    (created.cache_folder(2) / "tokens").write_bytes(b"1234")
    with pytest.raises(UserError, match="the token cache is incomplete; delete it"):
        open_mixture(path, tokenizer_path, token_cache_dir=cache)
    for content in ("[]", "5", "junk"):
        (created.cache_folder(2) / "cache.json").write_text(content)
        assert not open_mixture(path, tokenizer_path, token_cache_dir=cache).caches[2]


def test_a_cache_replaces_nothing_but_a_cache(path: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """Whatever the datasets are called, and wherever the caches are to go."""
    entries = json.loads(path.read_text())
    entries[0]["task_name"], entries[1]["task_name"] = "../indexed/a", ".."
    path.write_text(json.dumps(entries))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    mixture = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "indexed")), 0)
    assert all(mixture.caches)
    assert {mixture.cache_folder(number).parent for number in range(3)} == {tmp_path / "indexed"}
    assert all(file.read_bytes() == content for file, content in before.items() if file.name != "changed.json")
    folder = mixture.cache_folder(2)
    (folder / "mine.txt").write_text("precious")
    (folder / "cache.json").unlink()
    with pytest.raises(UserError, match="holds something other than a token cache"):
        build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "indexed")), 0)
    assert (folder / "mine.txt").exists()


def test_a_dataset_without_any_output_has_an_empty_cache(
    make_mixture: Make, tokenizer_path: Path, tmp_path: Path
) -> None:
    path = make_mixture({"a": make_records(5), "b": [{"input": "x", "output": ""}] * 3})
    cached = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=str(tmp_path / "cache")), 0)
    assert [encoded.skipped for encoded in cached.encode(1, range(3))] == ["no output"] * 3


def test_a_transform_that_draws_random_numbers_has_no_cache(
    path: Path, tokenizer_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (path.parent / "pure.py").write_text("def transform(data, num_sample, r):\n    return {**data, 'input': 'say'}\n")
    (path.parent / "draws.py").write_text(
        "def transform(data, num_sample, r):\n    return {**data, 'output': r.choice('abc')}\n"
    )
    extra = {"a": {"transforms": "pure.py"}, "b": {"transforms": "draws.py"}}
    cache = str(tmp_path / "cache")
    cached = build_token_cache(open_mixture(path, tokenizer_path, token_cache_dir=cache, **extra), 0)
    assert [bool(one) for one in cached.caches] == [True, False, True]
    assert "draws random numbers" in caplog.messages[0]
    assert not cached.cache_folder(1).exists()
    assert_same_packs(load_steps(cached, 8)[0], load_steps(open_mixture(path, tokenizer_path, **extra), 8)[0])
