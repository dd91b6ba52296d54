"""The hash of a base model."""

from __future__ import annotations

from helpers.random_adapters import make_model

from fm9g.lora.base_fingerprint import base_fingerprint


def test_the_hash_of_a_base_is_of_its_values() -> None:
    weights = {name: weight.bfloat16() for name, weight in make_model().named_parameters()}
    fingerprint = base_fingerprint(weights, weights.__getitem__)
    assert fingerprint == base_fingerprint(reversed(list(weights)), lambda name: weights[name].float())
    changed = {**weights, "encoder.output_layernorm.weight": weights["encoder.output_layernorm.weight"] * 1.01}
    assert fingerprint != base_fingerprint(changed, changed.__getitem__)
    renamed = {name.replace("project_k", "project_x"): weight for name, weight in weights.items()}
    assert fingerprint != base_fingerprint(renamed, renamed.__getitem__)
