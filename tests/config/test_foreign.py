"""Other tools' names of keys."""

import re

import pytest

from fm9g.config.fields import aliases_of, keys_of
from fm9g.config.mixture import DatasetConfig
from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig


@pytest.mark.parametrize("cls", [TrainConfig, ModelConfig, DatasetConfig])
def test_what_other_tools_call_a_key_leads_to_a_key(cls: type) -> None:
    known = {f"model.{key}" for key in keys_of(ModelConfig)} | keys_of(cls).keys() | {"nothing"}
    hints = cls.FOREIGN_KEYS
    for reference, actual in (hints() if callable(hints) else hints).items():
        if reference in {*keys_of(cls), *aliases_of(cls)}:
            continue  # a name that is used here, too
        assert re.split(r"[ :,]", actual)[0] in known, reference
