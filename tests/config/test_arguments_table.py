"""docs/arguments.md says what the configuration and the source say."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from typing import Any

import pytest
from helpers.common import ROOT

from fm9g.config.fields import keys_of
from fm9g.config.train import DEPRECATED_KEYS, TrainConfig


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "arguments.py"))


def test_the_committed_table_is_what_the_script_makes(script: dict[str, Any]) -> None:
    table = script["table"]()
    assert (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8") == table, "run `make docs`"
    for name in [*keys_of(TrainConfig), *DEPRECATED_KEYS]:
        assert table.count(f"\n| `{name}` |") == 1


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("lr", "train/lr_schedule.py"),
        ("early_stopping_patience", "train/runner.py"),  # of an attribute
        ("use_checkpoint", "train/model_setup.py"),  # through a property
        ("chat_template", "config/run.py"),  # out of a list of names
        ("zero_level", "plan/job.py"),  # out of one that has a name
        ("seed", "data/inspect/check.py"),  # of one that is built
    ],
)
def test_places_are_found(script: dict[str, Any], key: str, file: str) -> None:
    find_places: Callable[[], dict[str, list[str]]] = script["find_places"]
    assert file in find_places()[key]


def test_keys_of_models_and_datasets_are_not_taken_for_those_of_training(script: dict[str, Any]) -> None:
    places = script["find_places"]()
    assert "model/transformer.py" not in {file for files in places.values() for file in files}
    assert places["train_on"] == places["max_samples"] == ["config/run.py"]  # elsewhere it is the dataset's
