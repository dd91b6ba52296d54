"""The plan of tensor parallelism fits the model that it splits."""

from __future__ import annotations

import inspect

import torch
from helpers.common import small_model

from fm9g.model.sharding import TENSOR_PARALLEL_PLAN, Split
from fm9g.model.transformer import FM9G


def test_every_name_of_the_plan_is_a_module_and_every_matrix_is_split() -> None:
    with torch.device("meta"):
        model = FM9G(small_model())
    modules = dict(model.named_modules())
    assert [name for name in TENSOR_PARALLEL_PLAN if name.replace("*", "0") not in modules] == []
    splits = {name.replace("*", "0"): module_split.split for name, module_split in TENSOR_PARALLEL_PLAN.items()}
    matrices = {name for name, module in modules.items() if hasattr(module, "weight") and module.weight.dim() == 2}
    by_weight = (Split.COLWISE, Split.ROWWISE, Split.EMBEDDING)
    split_matrices = {name for name, split in splits.items() if split in by_weight}
    assert split_matrices == {name for name in matrices if ".layers.1." not in name}


def test_the_plan_knows_the_arguments_of_each_module() -> None:
    with torch.device("meta"):
        modules = dict(FM9G(small_model()).named_modules())
    for name, module_split in TENSOR_PARALLEL_PLAN.items():
        parameters = inspect.signature(modules[name.replace("*", "0")].forward).parameters
        assert len(parameters) == module_split.num_inputs, name
