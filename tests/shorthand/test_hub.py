"""Names on hubs and addresses: which they are, where their downloads are, and how to download them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fm9g.errors import UserError
from fm9g.shorthand.hub import DATASET, HF, MODEL, MS, OM, WEB, Remote, find_download, parse_remote, require_download


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Remote("", "org/name")),
        ("hf://org/name", Remote(HF, "org/name")),
        ("hf://datasets/org/name", Remote(HF, "org/name")),
        ("HF::org/na.me-2", Remote(HF, "org/na.me-2")),
        ("ms://org/name", Remote(MS, "org/name")),
        ("MS::org/name", Remote(MS, "org/name")),
        ("https://host:80/a/b.jsonl?x=1", Remote(WEB, "https://host:80/a/b.jsonl?x=1")),
        ("s3://bucket/a.json", Remote(WEB, "s3://bucket/a.json")),
        ("name", None),
        ("a/b/c", None),
        ("./name", None),
        ("../name", None),
        ("/name", None),
        ("a b/c", None),
    ],
)
def test_names_and_addresses_are_recognized(text: str, expected: Remote | None) -> None:
    assert parse_remote(text) == expected


def test_a_prefix_before_no_name_is_a_mistake() -> None:
    with pytest.raises(UserError, match="hf://name: expected hf://ORG/NAME"):
        parse_remote("hf://name")


@pytest.mark.parametrize(
    ("remote", "kind", "message"),
    [
        (
            Remote(HF, "org/name"),
            MODEL,
            "hf://org/name: this model of a hub is not on this machine, and fm9g does not download. Run `hf download "
            "org/name --local-dir name` where there is a network, then give --model name",
        ),
        (
            Remote("", "org/name"),
            DATASET,
            "`hf download org/name --repo-type dataset --local-dir name` or `modelscope download --dataset org/name "
            "--local_dir name`",
        ),
        (Remote(MS, "org/name"), MODEL, "Run `modelscope download --model org/name --local_dir name` where"),
        (Remote(OM, "org/name"), DATASET, "Download it from openMind to the folder name where"),
        (Remote(WEB, "https://h/a b.jsonl?x"), DATASET, "Run `curl -L -o 'a b.jsonl' 'https://h/a b.jsonl?x'` where"),
        (Remote(WEB, "s3://b/a.json"), DATASET, "Run `aws s3 cp s3://b/a.json .` where"),
    ],
)
def test_what_is_not_here_is_refused_with_the_command(
    remote: Remote, kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        require_download(remote, kind, "give --model {}")
    assert message in str(error.value)


def hugging_face_snapshot(cache: Path, name: str, kind: str) -> Path:
    """The folder of a download in the layout of the cache of huggingface_hub."""
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_downloads_are_found_in_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    snapshot = hugging_face_snapshot(tmp_path / "hf", "org/name", DATASET)
    (tmp_path / "ms" / "hub" / "datasets" / "org" / "other").mkdir(parents=True)
    assert find_download(Remote(HF, "org/name"), DATASET) == find_download(Remote("", "org/name"), DATASET) == snapshot
    assert find_download(Remote(HF, "org/name"), MODEL) is find_download(Remote(MS, "org/name"), DATASET) is None
    assert find_download(Remote("", "org/other"), DATASET) == tmp_path / "ms" / "hub" / "datasets" / "org" / "other"
    assert require_download(Remote(HF, "org/name"), DATASET, "") == snapshot
