"""Every family of models: logits against transformers, packed layouts in and out, and the refused configurations."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.common import make_batch, small_model
from helpers.hf_models import HF_CONFIG
from safetensors.torch import load_file, save_file

from fm9g.cli import main
from fm9g.config.load import ConfigSource, build
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.convert.hf_config import from_hf_config
from fm9g.convert.hf_export import ExportOptions, export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.convert.hf_reader import open_hf_folder
from fm9g.errors import UserError
from fm9g.io.pt_file import read_weights, write_weights
from fm9g.model.transformer import FM9G, weight_shapes

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
NATIVE: dict[str, dict] = {
    "llama": {},
    "llama-llama3": {"rope_scaling": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "llama-llama3-odd": {"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 3.0}},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-wide-heads": {"head_dim": 16},
    "mistral": {"sliding_window": None, "head_dim": 8},
    "mistral-window": {"sliding_window": 128, "head_dim": 8},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "qwen3-tied": {"head_dim": 8, "tie_word_embeddings": True},
    "granite": {**GRANITE, "attention_multiplier": 8**-0.5},
    "granite-real": {**GRANITE, "attention_multiplier": 1 / 8, "tie_word_embeddings": True},
}


def native_folder(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A small model of transformers' class, whose norms and biases do something, and its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(kind.split("-")[0], **{**HF_CONFIG, **NATIVE[kind]})
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += torch.randn_like(weight) * 0.1
    model.to(dtype).save_pretrained(folder)
    return model


def our_logits(config: ModelConfig, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = FM9G(config)
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.logits(make_batch())


def their_logits(model: torch.nn.Module) -> torch.Tensor:
    batch = make_batch()
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits[0] for ids in batch.input_ids.split(batch.seqlens)])


def assert_equal_files(one: Path, other: Path) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", NATIVE)
def test_imported_models_have_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    model = native_folder(kind, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "m.pt")
    config = load_model_config(tmp_path / "m.json")
    actual = our_logits(config, read_weights(tmp_path / "m.pt"))
    torch.testing.assert_close(actual, their_logits(model), rtol=0, atol=1e-5)

    export_folder(tmp_path / "m.pt", tmp_path / "out", tmp_path / "hf")
    assert_equal_files(tmp_path / "hf", tmp_path / "out")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out["model_type"] == kind.split("-")[0]
    assert from_hf_config(out, "out") == config
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(their_logits(again), their_logits(model), rtol=0, atol=1e-5)


# ---- families whose folders bring their own code: laid out here from a model of transformers with the same arithmetic


def qkv(source: dict[str, torch.Tensor], n: int, part: str) -> list[torch.Tensor]:
    return [source[f"model.layers.{n}.self_attn.{each}_proj.{part}"] for each in "qkv"]


def qwen(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    created = {
        "transformer.wte.weight": source["model.embed_tokens.weight"],
        "transformer.ln_f.weight": source["model.norm.weight"],
        "lm_head.weight": source["lm_head.weight"],
    }
    for n in range(2):
        reference, actual = f"model.layers.{n}.", f"transformer.h.{n}."
        created[actual + "ln_1.weight"] = source[reference + "input_layernorm.weight"]
        created[actual + "ln_2.weight"] = source[reference + "post_attention_layernorm.weight"]
        for part in ("weight", "bias"):
            created[f"{actual}attn.c_attn.{part}"] = torch.cat(qkv(source, n, part))
        created[actual + "attn.c_proj.weight"] = source[reference + "self_attn.o_proj.weight"]
        created[actual + "mlp.w2.weight"] = source[reference + "mlp.gate_proj.weight"]
        created[actual + "mlp.w1.weight"] = source[reference + "mlp.up_proj.weight"]
        created[actual + "mlp.c_proj.weight"] = source[reference + "mlp.down_proj.weight"]
    return created


def baichuan(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    created = {
        name: tensor for name, tensor in source.items() if "_proj" not in name or "mlp" in name or "o_proj" in name
    }
    return created | {
        f"model.layers.{n}.self_attn.W_pack.weight": torch.cat(qkv(source, n, "weight")) for n in range(2)
    }


def internlm2(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    created = {
        "model.tok_embeddings.weight": source["model.embed_tokens.weight"],
        "model.norm.weight": source["model.norm.weight"],
        "output.weight": source["lm_head.weight"],
    }
    for n in range(2):
        reference = f"model.layers.{n}."
        q, k, v = qkv(source, n, "weight")
        # 4 query heads and 2 key heads of width 8: a key head's two query heads, itself, its values.
        created[reference + "attention.wqkv.weight"] = torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
        created[reference + "attention.wo.weight"] = source[reference + "self_attn.o_proj.weight"]
        created[reference + "attention_norm.weight"] = source[reference + "input_layernorm.weight"]
        created[reference + "ffn_norm.weight"] = source[reference + "post_attention_layernorm.weight"]
        for actual, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            created[f"{reference}feed_forward.{actual}.weight"] = source[f"{reference}mlp.{name}_proj.weight"]
    return created


def yi(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2"): tensor
        for name, tensor in source.items()
    }


QWEN_CONFIG = {
    "model_type": "qwen",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "layer_norm_epsilon": 1e-5,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 64,
    "max_position_embeddings": 128,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}
HEADS = {"num_key_value_heads": 4}  # as many as query heads
Make = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
REMOTE: dict[str, tuple[str, dict, dict, Make]] = {  # the class, its configuration, the folder's, the layout
    "qwen": ("qwen2", HEADS, QWEN_CONFIG, qwen),
    "baichuan": ("llama", HEADS, {**HF_CONFIG, **HEADS, "model_type": "baichuan"}, baichuan),
    "internlm2": ("llama", {}, {**HF_CONFIG, "model_type": "internlm2", "bias": False}, internlm2),
    "Yi": ("llama", {}, {**HF_CONFIG, "model_type": "Yi"}, yi),
    "xverse": ("llama", HEADS, {**HF_CONFIG, **HEADS, "model_type": "xverse"}, dict),
    "minicpm": (
        "granite",
        {
            **GRANITE,
            "logits_scaling": 2.0,
            "attention_multiplier": 8**-0.5,
            "residual_multiplier": 1.4 / 2**0.5,
            "tie_word_embeddings": True,
        },
        {
            **{key: value for key, value in HF_CONFIG.items() if key != "tie_word_embeddings"},
            "model_type": "minicpm",
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 16,
        },
        dict,
    ),
}


def remote_folder(kind: str, folder: Path, **changes: object) -> torch.nn.Module:
    """A folder in the layout of a family, with code beside it; and a model of transformers with its arithmetic."""
    from transformers import AutoConfig, AutoModelForCausalLM

    cls, own, config, make = REMOTE[kind]
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(cls, **{**HF_CONFIG, **own})).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += torch.randn_like(weight) * 0.1
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    folder.mkdir()
    save_file(make(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = {**config, **changes, "torch_dtype": "float32", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_x.py").write_text("raise SystemExit('this code is never run')")
    return model


@pytest.mark.parametrize("kind", REMOTE)
def test_families_with_their_own_code_go_in_and_out_bit_for_bit(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    model = remote_folder(kind, source)
    import_folder(source, tmp_path / "m.pt")
    config = load_model_config(tmp_path / "m.json")
    weights = read_weights(tmp_path / "m.pt")
    torch.testing.assert_close(our_logits(config, weights), their_logits(model), rtol=0, atol=1e-5)

    loads_as = export_folder(tmp_path / "m.pt", tmp_path / "same", source, ExportOptions(keep_reference=True))
    assert loads_as == kind
    assert_equal_files(source, tmp_path / "same")
    for name in ("config.json", "modeling_x.py"):
        assert (tmp_path / "same" / name).read_bytes() == (source / name).read_bytes()
    assert "trust_remote_code=True" in (tmp_path / "same" / "README.md").read_text()

    export_folder(tmp_path / "m.pt", tmp_path / "native", source)
    assert not (tmp_path / "native" / "modeling_x.py").exists()
    from transformers import AutoModelForCausalLM

    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    torch.testing.assert_close(their_logits(native), their_logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"z_loss_weight": 0}, {"vocab_size": 125696}])
def test_the_output_weights_of_baichuan2_are_normalized_as_its_code_does(changes: dict, tmp_path: Path) -> None:
    if "vocab_size" in changes:
        config = {**HF_CONFIG, "model_type": "baichuan", **changes}
        tensors = {"lm_head.weight": torch.randn(125696, 32), "model.embed_tokens.weight": torch.zeros(125696, 32)}
        remote_folder("baichuan", tmp_path / "hf")
        tensors = load_file(tmp_path / "hf" / "model.safetensors") | tensors
        save_file(tensors, tmp_path / "hf" / "model.safetensors")
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **HEADS}))
    else:
        remote_folder("baichuan", tmp_path / "hf", **changes)
    before = load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"]
    weights = open_hf_folder(tmp_path / "hf")[1]
    expected = torch.nn.functional.normalize(before)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(weights["lm_head.weight"].read(), expected)


@pytest.mark.parametrize("size", ["2b", "4b", "7b", "8b", "70b"])
def test_every_size_goes_there_and_back_bit_for_bit(size: str, tmp_path: Path) -> None:
    """The shipped configuration with its ratios of heads, at a fraction of the width."""
    from fm9g.config.load import require_config

    shipped = load_model_config(require_config("model_configs", size))
    group = shipped.num_heads // shipped.num_kv_heads
    small = {"vocab_size": 500, "num_layers": 3, "dim_head": 8, "num_heads": 2 * group, "num_kv_heads": 2}
    small |= {"dim_model": 64, "dim_ff": 96, "dim_model_base": 16}
    values = {key: value for key, value in shipped.to_json().items() if key != "architectures"}
    config = build(ModelConfig, [ConfigSource(size, {**values, **small})])
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in weight_shapes(config).items()
    }
    write_weights(tmp_path / "m.pt", weights, weights.items())
    (tmp_path / "m.json").write_text(json.dumps(config.to_json()))
    export_folder(tmp_path / "m.pt", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "back.pt")
    again = read_weights(tmp_path / "back.pt")
    assert list(again) == list(weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    back = load_model_config(tmp_path / "back.json")
    assert (back.mup_width, back.embedding_multiplier) == (config.mup_width, config.embedding_multiplier)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "granite"])
def test_keys_that_are_not_given_are_as_in_the_class_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    for given in ({}, {"hidden_size": 2048, "num_attention_heads": 64}):
        reference = AutoConfig.for_model(kind, **given)
        actual = from_hf_config({"model_type": kind, **given}, "config.json")
        heads = reference.num_attention_heads
        expected = {
            "vocab_size": reference.vocab_size,
            "hidden_size": reference.hidden_size,
            "intermediate_size": reference.intermediate_size,
            "num_layers": reference.num_hidden_layers,
            "num_heads": heads,
            "num_kv_heads": reference.num_key_value_heads,
            "head_dim": getattr(reference, "head_dim", reference.hidden_size // heads),
            "activation": reference.hidden_act,
            "norm_eps": reference.rms_norm_eps,
            "init_std": reference.initializer_range,
            "max_length": reference.max_position_embeddings,
            "rope_theta": reference.rope_parameters["rope_theta"],
            "tie_word_embeddings": reference.tie_word_embeddings,
            "sliding_window": reference.sliding_window if kind == "mistral" else 0,
            "qkv_bias": kind == "qwen2",
            "qk_norm": kind == "qwen3",
        }
        assert {key: getattr(actual, key) for key in expected} == expected
        if kind == "granite":
            scales = (reference.embedding_multiplier, reference.attention_multiplier, reference.logits_scaling)
            assert (actual.embedding_multiplier, actual.attention_multiplier, actual.mup_width) == scales
            assert actual.residual_multiplier == pytest.approx(reference.residual_multiplier)


def test_keys_that_are_not_given_are_as_in_the_published_classes() -> None:
    def read(kind: str, **given: object) -> ModelConfig:
        return from_hf_config({"model_type": kind, **given}, "config.json")

    yi, minicpm, xverse = read("Yi"), read("minicpm"), read("xverse")
    assert (yi.rope_theta, yi.norm_eps, yi.num_kv_heads, yi.max_length) == (5e6, 1e-5, 4, 4096)
    assert (minicpm.tie_word_embeddings, minicpm.scale, minicpm.scale_depth, minicpm.max_length) == (
        True,
        True,
        1,
        2048,
    )
    assert (xverse.hidden_size, xverse.num_layers, xverse.vocab_size, xverse.norm_eps) == (5120, 40, 100278, 1e-6)
    qwen, internlm2 = read("qwen"), read("internlm2", bias=False)
    assert (qwen.intermediate_size, qwen.head_dim, qwen.qkv_bias, qwen.max_length) == (11008, 128, True, 8192)
    assert (internlm2.vocab_size, internlm2.num_kv_heads, internlm2.max_length) == (103168, 32, 2048)
    assert read("baichuan", max_position_embeddings=4096).intermediate_size == 11008
    with pytest.raises(UserError, match="num_attention_heads: missing"):
        read("fm9g")


@pytest.mark.parametrize("kind", ["granite", "minicpm", "fm9g"])
def test_only_scaled_models_of_9g_have_the_learning_rates_of_mup(kind: str) -> None:
    scaled = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "logits_scaling": 2.0}
    config = from_hf_config({**HF_CONFIG, **scaled, "model_type": kind}, "config.json")
    assert config.mup_width == 2.0
    assert config.mup_lr == (kind == "fm9g")


# ---- what wrappers and other ways of saving leave in a folder


@pytest.mark.parametrize(
    ("front", "inside"),
    [("_orig_mod.", ""), ("module.", ""), ("model.", ""), ("module._orig_mod.", ""), ("", "_orig_mod.")],
)
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_names_with_a_wrapper_in_them_are_recognised(kind: str, front: str, inside: str, tmp_path: Path) -> None:
    (native_folder if kind == "llama" else remote_folder)(kind, tmp_path / "hf")
    expected = open_hf_folder(tmp_path / "hf")[1]
    expected = {name: weight.read() for name, weight in expected.items()}
    file = tmp_path / "hf" / "model.safetensors"
    wrapped = {front + name.replace("0.", f"0.{inside}", 1): tensor for name, tensor in load_file(file).items()}
    save_file(wrapped, file)
    found = open_hf_folder(tmp_path / "hf")[1]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), expected[name]) for name in expected)
    # transformers knows none of these names, and would make new weights.
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "m.pt"), "--verify"]) == 0


def test_a_weight_that_is_there_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    native_folder("llama", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "module.model.norm.weight": torch.zeros(32)}, file)
    with pytest.raises(UserError, match=r"is there twice, as encoder.output_layernorm.weight"):
        open_hf_folder(tmp_path / "hf")
    save_file({**weights, "module.model.extra": torch.zeros(32)}, file)
    with pytest.raises(UserError, match=r"module.model.extra and 0 more have no place"):
        open_hf_folder(tmp_path / "hf")


@pytest.mark.parametrize("front", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_9g_files_with_a_wrapper_in_their_names_are_recognised(front: str, tmp_path: Path) -> None:
    native_folder("llama", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "m.pt")
    weights = {front + name: tensor.clone() for name, tensor in read_weights(tmp_path / "m.pt").items()}
    write_weights(tmp_path / "m.pt", weights, weights.items())
    export_folder(tmp_path / "m.pt", tmp_path / "out")
    assert_equal_files(tmp_path / "hf", tmp_path / "out")
    doubled = {**weights, "lm_head.weight": weights[front + "lm_head.weight"].clone()}
    write_weights(tmp_path / "m.pt", doubled, doubled.items())
    with pytest.raises(UserError, match=r"m.pt: .*lm_head.weight: is there twice"):
        export_folder(tmp_path / "m.pt", tmp_path / "again")


@pytest.mark.parametrize("case", ["head alone", "both differ", "both equal", "base model alone"])
def test_tied_weights_are_read_as_transformers_reads_them(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    native_folder("llama-tied", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    if case == "head alone":
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    elif case == "base model alone":
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    else:
        weights["lm_head.weight"] = embedding.clone() if case == "both equal" else torch.randn_like(embedding)
    save_file(weights, file, metadata={"format": "pt"})
    import_folder(tmp_path / "hf", tmp_path / "m.pt")
    config = load_model_config(tmp_path / "m.json")
    assert config.tie_word_embeddings == (case != "both differ")
    reference = their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval())
    torch.testing.assert_close(our_logits(config, read_weights(tmp_path / "m.pt")), reference, rtol=1e-5, atol=1e-5)
    if case == "both differ":
        return
    for name in list(weights):
        if "embed" in name or "lm_head" in name:
            del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"input_embedding.weight is missing"):
        open_hf_folder(tmp_path / "hf")


def test_an_untied_model_needs_its_output_weights(tmp_path: Path) -> None:
    native_folder("llama", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        open_hf_folder(tmp_path / "hf")


REFUSED = {
    "experts": ("llama", {"num_experts": 8}, "num_experts is above 1"),
    "local experts": ("minicpm", {"num_local_experts": 8}, "num_local_experts is above 1"),
    "routed experts": ("xverse", {"n_routed_experts": 64}, "n_routed_experts is above 1"),
    "part of a head": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
    "part of a head of qwen": ("qwen", {**QWEN_CONFIG, "rotary_pct": 0.25}, "rotary_pct is not 1"),
    "biases of qwen": ("qwen", {**QWEN_CONFIG, "no_bias": False}, "no_bias is false"),
    "biases": ("llama", {"attention_bias": True}, "attention_bias is true"),
    "biases of qwen3": ("qwen3", {"attention_bias": True}, "attention_bias is true"),
    "biases in the feed-forward layers": ("llama", {"mlp_bias": True}, "mlp_bias is true"),
    "biases of internlm2": ("internlm2", {}, "bias is not false"),
    "alibi": ("llama", {"alibi": True}, "ALiBi"),
    "quantized": ("qwen2", {"quantization_config": {"quant_method": "gptq"}}, "take the folder that was quantized"),
    "logits": ("granite", {**GRANITE, "logits_scaling": 5.0}, "logits_scaling does not divide"),
    "rope": ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling is"),
    "unknown": ("gpt2", {}, "model_type 'gpt2' is not supported; supported are llama, mistral"),
    "none": (None, {}, "model_type None is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_9g_lacks_is_refused_with_its_key(case: str) -> None:
    kind, changes, expected = REFUSED[case]
    with pytest.raises(UserError, match=expected):
        from_hf_config({**HF_CONFIG, "model_type": kind, **changes}, "config.json")


def test_a_13b_of_baichuan_is_refused() -> None:
    config = {key: value for key, value in HF_CONFIG.items() if key != "max_position_embeddings"}
    with pytest.raises(UserError, match="ALiBi"):
        from_hf_config({**config, "model_type": "baichuan", "model_max_length": 4096}, "config.json")


def test_a_packed_weight_of_another_height_is_refused(tmp_path: Path) -> None:
    remote_folder("internlm2", tmp_path / "hf", num_key_value_heads=4)
    with pytest.raises(UserError, match=r"wqkv.weight: shape \[64, 32\], expected 96 rows"):
        import_folder(tmp_path / "hf", tmp_path / "no.pt")


def test_only_the_first_model_of_qwen_is_as_long_as_seq_length() -> None:
    assert from_hf_config(QWEN_CONFIG, "config.json").max_length == 64


def test_the_reference_must_describe_the_checkpoint(tmp_path: Path) -> None:
    native_folder("llama", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "m.pt")
    with pytest.raises(UserError, match="needs --reference"):
        export_folder(tmp_path / "m.pt", tmp_path / "out", options=ExportOptions(keep_reference=True))
    remote_folder("qwen", tmp_path / "other")
    with pytest.raises(UserError, match="belongs to another model configuration"):
        export_folder(
            tmp_path / "m.pt", tmp_path / "out", tmp_path / "other", options=ExportOptions(keep_reference=True)
        )


def test_norms_of_queries_are_only_in_layouts_that_have_them(tmp_path: Path) -> None:
    config = small_model(qk_norm=True)
    assert "encoder.layers.1.self_att.self_attention.q_norm.weight" in weight_shapes(config)
    with pytest.raises(UserError, match="qkv_bias with qk_norm: no transformers class has both"):
        from fm9g.convert.hf_config import native_model_type

        native_model_type(small_model(qk_norm=True, qkv_bias=True))
