"""Configurations of 9G models and of transformers classes."""

import pytest
from helpers.common import small_model

from fm9g.convert.hf_config import from_hf_config, native_model_type, to_hf_config
from fm9g.errors import UserError


def test_scaled_models_with_biases_have_no_class() -> None:
    with pytest.raises(UserError, match="no transformers class has both"):
        native_model_type(small_model(qkv_bias=True, scale=True, base_hidden_size=16))


def test_a_minicpm_configuration_is_read() -> None:
    config = small_model(scale=True, scale_emb=12.0, scale_depth=1.4, base_hidden_size=16)
    values = to_hf_config(config, "bfloat16", 1, 2)
    values |= {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
    again = from_hf_config(values, "config.json")
    assert (again.scale, again.scale_emb, again.scale_depth, again.base_hidden_size) == (True, 12.0, 1.4, 16)
