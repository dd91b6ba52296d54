"""docs/dialects.md, and that every argument in it does what it says."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest
from helpers.common import ROOT

from fm9g.config.dialects.table import Dialect, Row
from fm9g.config.dialects.translate import dialects, translate
from fm9g.errors import UserError

SPEC = ROOT.parent / "shared" / "spec"
# What an argument may be given; one of these shows its effect.
VALUES: tuple[Any, ...] = (
    True, False, 3, -1, 0.25, "0.25", "lora", "full", "freeze", "no", "steps", "epoch", "cosine", "constant", "bf16",
    "fp16", "tensorboard", "wandb", "pt", "sft", "somewhere", "q_proj", "qwen", "nf4", "fp4", "int8", [1, 2],
    {"num_cycles": 2}, {"x": 1}, "auto", "adamw_torch", "AdamW", "sgd", "WarmupLR", "zero3", "token:1",
    "interleave_under", "cpu", "last_round", "right", "pissa", "linear",
)  # fmt: skip
# What else must be given for the effect of an argument: the name of the argument -> the others.
CONTEXTS: tuple[dict[str, Any], ...] = (
    {},
    {"use_lora": True},
    {"qlora": True},
    {"train_mode": "lora"},
    {"finetuning_type": "freeze"},
    {"finetuning_type": "lora", "pissa_init": True},
    {"finetuning_type": "lora", "quantization_bit": 4},
    {"tuner_type": "lora", "quant_bits": 4},
    {"sft_type": "lora", "quantization_bit": 4},
    {"lr_scheduler_type": "cosine_with_restarts"},
    {"dataset": "d"},
    {"eval_file": "v.json", "eval_strategy": "steps"},
    {"eval_file": "v.json"},
    {"val_size": 0.1, "eval_strategy": "steps"},
    {"val_size": 0.1},
    {"split_dataset_ratio": 0.1, "eval_strategy": "steps"},
    {"eval_data_path": "v.json", "eval_strategy": "steps"},
    {"eval_data_path": "v.json"},
    {"optimizer.type": "AdamW"},
    {"scheduler.type": "WarmupCosineLR"},
    {"fp16.enabled": True},
    {"zero_optimization.stage": 2},
)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "dialects.py"))


def test_the_committed_page_is_what_the_script_makes(script: dict[str, Any]) -> None:
    page = script["table"]()
    assert (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8") == page, "run `make docs`"


@pytest.mark.parametrize("dialect", dialects().values(), ids=lambda dialect: dialect.name)
def test_no_argument_is_silent(dialect: Dialect) -> None:
    """Every argument sets a key, says why it has no effect, or is refused."""
    contexts = [context for context in CONTEXTS if context.keys() <= dialect.by_name.keys()]
    silent = [
        row.name
        for row in dialect.rows
        if row.name != dialect.file_argument
        and not any(shows(dialect, row, value, context) for context in contexts for value in VALUES)
    ]
    assert silent == []


SPECIFIED = {
    # the first three digits of the document, the dialect: its arguments
    ("000", "transformers"): r"^    --(?!n|master_)(\w+)|^    --(num_train_epochs) ",
    ("000", "job"): r"^- `(\w+)` - ",
    ("001", "console"): r"^    - ([^:\uff1a ]+?)(?:解释)?\s*[:\uff1a]",
    ("003", "swift-sft"): r"^- `--(\w+)`",
    ("004", "finetune-json"): r"^\d+、([a-z_]+)(?:是|表示|分别|在)",
}


@pytest.mark.parametrize(("number", "name"), SPECIFIED)
def test_the_arguments_of_the_documents_are_covered(number: str, name: str) -> None:
    documents = list(SPEC.glob(f"{number}_*.txt"))
    if not documents:
        pytest.skip(f"{SPEC} is missing")
    found = re.findall(SPECIFIED[number, name], documents[0].read_text(encoding="utf-8"), re.MULTILINE)
    names = {"".join(groups) for groups in found}
    assert len(names) > 10
    known = dialects()[name].by_name.keys() | {
        part for row in dialects()["deepspeed"].by_name for part in row.split(".")
    }
    assert names - known == set()


def shows(dialect: Dialect, row: Row, value: Any, context: dict[str, Any]) -> bool:
    """Whether the translation says or shows that an argument is given."""
    try:
        without = translate(dialect, context, "x")
        found = translate(dialect, {**context, row.name: value}, "x")
    except UserError as error:
        refusals = [line for line in str(error).splitlines() if line.startswith(f"x: {row.name}: ")]
        if row.rule:  # which refuses some values; that it wants a number shows nothing
            return any(", expected " not in line for line in refusals)
        return bool(row.refused) and f"x: {row.name}: {row.refused}" in refusals
    if row.ignored:
        return any(row.name in note and row.ignored in note for note in found.all_notes)
    changed = {key for key, other in found.keys.items() if without.keys.get(key) != other}
    if row.ours:
        return changed == {row.ours}
    return changed != set() or found.keys.keys() != without.keys.keys() or found.all_notes != without.all_notes
