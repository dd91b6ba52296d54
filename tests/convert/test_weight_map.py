"""The table of names of weights."""

from fm9g.convert.weight_map import LLAMA_MAP, WeightMap


def test_the_table_has_both_directions() -> None:
    names = WeightMap(LLAMA_MAP)
    for actual, reference in LLAMA_MAP.items():
        for part in ("weight", "bias"):
            one, other = actual.format(n=12, p=part), reference.format(n=12, p=part)
            assert (names.to_hf(one), names.from_hf(other)) == (other, [one])
    assert names.from_hf("model.layers.1.mlp.experts.0.weight") == []
    assert names.to_hf("encoder.layers.x.ffn.ffn.w_out.weight") is None
