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
    for reference, actual in cls.FOREIGN_KEYS.items():
        assert reference not in {*keys_of(cls), *aliases_of(cls)}
        assert re.split(r"[ :,]", actual)[0] in known, reference
