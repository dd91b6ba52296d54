from pathlib import Path
from typing import Any

import pytest
from helpers.common import write_json

from fm9g.config.dialects.deepspeed import DEEPSPEED, flatten
from fm9g.config.dialects.transformers import TRANSFORMERS
from fm9g.config.dialects.translate import translate
from fm9g.errors import UserError

# With the values that transformers' documentation shows for ZeRO 3.
ZERO3: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
             "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR",
                  "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True},
                          "offload_param": {"device": "none"}, "overlap_comm": True, "contiguous_gradients": True,
                          "sub_group_size": 1e9, "reduce_bucket_size": "auto",
                          "stage3_gather_16bit_weights_on_model_save": True},
    "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
}  # fmt: skip
ALONE: dict[str, Any] = {
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 12, "loss_scale_window": 500},
    "optimizer": {"type": "Adam", "params": {"lr": 3e-5, "betas": [0.8, 0.99], "eps": 1e-7, "weight_decay": 3e-7}},
    "scheduler": {"type": "WarmupDecayLR",
                  "params": {"warmup_num_steps": 10, "total_num_steps": 90, "warmup_type": "linear"}},
    "zero_optimization": {"stage": 1}, "gradient_clipping": 0.5, "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4, "wall_clock_breakdowm": False,
}  # fmt: skip


def alone(content: dict[str, Any]) -> dict[str, Any]:
    return translate(DEEPSPEED, flatten(content), "ds.json").keys


def beside(tmp_path: Path, content: object, **arguments: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keys and notes of arguments of the Trainer with a file of DeepSpeed."""
    file = write_json(tmp_path / "ds.json", content)
    found = translate(TRANSFORMERS, {"deepspeed": str(file), **arguments}, "command line")
    return found.keys, found.notes


def test_a_configuration_without_auto() -> None:
    assert alone(ALONE) == {
        "model.half_type": "fp16", "loss_scale": 4096.0, "loss_scale_steps": 500, "optimizer": "adamw", "lr": 3e-5,
        "beta1": 0.8, "beta2": 0.99, "eps": 1e-7, "weight_decay": 3e-7, "lr_scheduler": "linear", "min_lr_ratio": 0.0,
        "warmup_iters": 10, "warmup_ratio": 0.0, "train_iters": 90, "zero_level": 2, "clip_grad": 0.5,
        "batch_size": 4, "global_batch_size": 16,
    }  # fmt: skip


def test_auto_leaves_the_value_to_the_arguments(tmp_path: Path) -> None:
    arguments = {"lr_scheduler_type": "cosine", "bf16": True, "learning_rate": 1e-5, "warmup_steps": 3}
    keys, notes = beside(tmp_path, ZERO3, **arguments)
    expected = {
        "zero_level": 3, "offload_optimizer": True, "lr_scheduler": "constant", "warmup_iters": 3, "lr": 1e-5,
        "model.half_type": "bf16", "batch_size": 8, "clip_grad": 1.0, "beta2": 0.999,
    }  # fmt: skip
    assert {key: keys.get(key) for key in expected} == expected
    assert "lr_scheduler_type: the scheduler block of DeepSpeed applies in its place, as there" in notes
    assert any("logarithmic" in note for note in notes)


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        (0, {"zero_level": 0, "engine": "torch"}),
        (1, {"zero_level": 2}),
        (2, {"zero_level": 2}),
        (3, {"zero_level": 3}),
    ],
)
def test_stages_and_their_names(stage: int, keys: dict[str, Any]) -> None:
    assert alone({"zero_optimization": {"stage": stage}}) == keys
    named = translate(TRANSFORMERS, {"deepspeed": f"zero{stage}"}, "command line").keys
    assert {key: named.get(key) for key in ("zero_level", "engine")} == {"engine": None, **keys}


def test_a_batch_size_that_follows_from_the_others_says_for_how_many_processes() -> None:
    content = {"train_batch_size": "16", "train_micro_batch_size_per_gpu": "4", "gradient_accumulation_steps": 2}
    found = translate(DEEPSPEED, content, "ds.json")
    assert (found.keys["batch_size"], found.keys["gradient_accumulation_steps"]) == (4, 2)
    assert "train_batch_size 16: holds for 2 processes" in " ".join(found.all_notes)


def test_offloading() -> None:
    for name in ("offload_optimizer", "offload_param"):
        assert alone({"zero_optimization": {"stage": 3, name: {"device": "cpu"}}})["offload_optimizer"] is True
        with pytest.raises(UserError, match="NVMe"):
            alone({"zero_optimization": {"stage": 3, name: {"device": "nvme"}}})
    assert "offload_optimizer" not in alone(
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}
    )


def test_an_object_in_place_of_a_file() -> None:
    keys = translate(TRANSFORMERS, {"deepspeed": {"zero_optimization": {"stage": 2}}}, "run.json").keys
    assert keys["zero_level"] == 2


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"gradient_clipping": 2.0}, {"max_grad_norm": 1.0}, "clip"),
        ({"train_micro_batch_size_per_gpu": 4}, {"per_device_train_batch_size": 2}, "per_device_train_batch_size is 2"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.9]}}}, {"adam_beta2": 0.95}, "adam_beta2 is 0.95"),
        ({"fp16": {"enabled": True}}, {"bf16": True, "fp16": False}, "contradicts fp16.enabled"),
        ({"bf16": {"enabled": False}}, {"bf16": True}, "contradicts bf16.enabled"),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}}, {}, "needs max_steps"),
        ({"scheduler": {"type": "OneCycle"}}, {}, "found 'OneCycle', expected one of WarmupLR"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-6}}}, {}, "warmup starts at 0"),
        ({"optimizer": {"type": "Lamb"}}, {}, "found 'lamb', expected one of adam"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, {}, "the loss scale is dynamic here"),
        ({"zero_optimization": {"stge": 3}}, {}, "did you mean 'zero_optimization.stage'"),
        ({"zero_optimization": {"stage": 4}}, {}, "expected 0, 1, 2 or 3"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, {}, "no multiple"),
        ({"train_batch_size": "x", "train_micro_batch_size_per_gpu": 4}, {}, "train_batch_size: found 'x'"),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2}, {}, "give train_micro_batch_size_per_gpu"),
        (
            {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            {},
            "no multiple of train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 2",
        ),
    ],
)
def test_contradictions_and_unsupported_values_are_refused(
    tmp_path: Path, content: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        beside(tmp_path, content, **arguments)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ds_config_zero2.json", {"zero_level": 2}),
        ("examples/deepspeed/ds_z3_offload_config.json", {"zero_level": 3, "offload_optimizer": True}),
    ],
)
def test_a_published_file_that_is_missing_is_known_by_its_name(name: str, expected: dict) -> None:
    translation = translate(TRANSFORMERS, {"deepspeed": name}, "run.yaml")
    assert {key: translation.keys[key] for key in expected} == expected
    assert any("is not here; stage" in note for note in translation.notes)
