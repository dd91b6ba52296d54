import pytest

from fm9g.config.dialects.table import Dialect, Given, Keys, Row
from fm9g.config.dialects.translate import detect, dialects, find_dialect, translate
from fm9g.config.fields import keys_of
from fm9g.config.model import ModelConfig
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError


def square(given: Given) -> Keys:
    side = given.number("side") or 0
    return {"max_length": side * side}


TOOL = Dialect(
    "tool",
    "The Tool",
    (
        Row("rate", "lr", default=0.5, aliases=("speed",)),
        Row("decay", "weight_decay", note="on matrices alone"),
        Row("side", rule=square),
        Row("colour", ignored="nothing is shown"),
        Row("shade", ignored="nothing is shown"),
        Row("upload", refused="write convert", harmless=(False, "no")),
        Row("whole", "batch_size", convert=int),
    ),
)


def test_every_row_does_one_thing_and_names_keys_that_exist() -> None:
    known = {*keys_of(TrainConfig), *(f"model.{key}" for key in keys_of(ModelConfig))}
    for dialect in dialects().values():
        names = [name for row in dialect.rows for name in (row.name, *row.aliases)]
        assert len(names) == len(set(names)), dialect.name
        assert {name for name in dialect.distinctive if dialect.row_of(name)} == {*dialect.distinctive}, dialect.name
        for row in dialect.rows:
            kinds = [bool(each) for each in (row.ours, row.rule, row.ignored, row.refused)]
            assert kinds.count(True) == 1, f"{dialect.name} {row.name}"
            assert not row.ours or row.ours in known, f"{dialect.name} {row.name}"


def test_given_arguments_win_over_defaults_and_say_where_they_are_from() -> None:
    found = translate(TOOL, {"decay": "0.1", "side": "3", "colour": "red", "shade": 1, "upload": "no"}, "run.yaml")
    assert found.keys == {"lr": 0.5, "weight_decay": "0.1", "max_length": 9}
    assert found.origins == {
        "lr": "default of The Tool",
        "weight_decay": "run.yaml: decay",
        "max_length": "run.yaml: side",
    }
    assert found.notes == ("decay: on matrices alone",)
    assert found.all_notes[1:] == ("colour, shade: no effect here: nothing is shown",)
    assert translate(TOOL, {"speed": 2}, "command line").origins["lr"] == "command line: --speed"
    assert translate(TOOL, {"rate": "null"}, "run.yaml").keys == translate(TOOL, {"side": None}, "run.yaml").keys


def test_all_mistakes_are_in_one_message() -> None:
    given = {"rat": 1, "upload": True, "whole": "half", "side": "wide", "rate": 1, "speed": 2}
    with pytest.raises(UserError) as error:
        translate(TOOL, given, "run.yaml")
    assert str(error.value).splitlines() == [
        "run.yaml: rat: The Tool has no such argument; did you mean 'rate'?",
        "run.yaml: upload: write convert",
        "run.yaml: speed: is the same as rate; keep one of them",
        "run.yaml: whole: found 'half', invalid literal for int() with base 10: 'half'",
        "run.yaml: side: found 'wide', expected a number",
    ]


def test_a_mistake_that_several_rules_find_is_told_once() -> None:
    with pytest.raises(UserError) as error:
        translate(find_dialect("transformers"), {"q_lora": "maybe"}, "command line")
    assert str(error.value) == "command line: --q_lora: found 'maybe', expected true or false"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("model_name_or_path", "data_path", "use_lora", "q_lora"), "transformers"),
        (("learning_rate", "per_device_train_batch_size"), "transformers"),
        (("model-name-or-path", "data-path"), "transformers"),
        (("model_name_or_path", "train_file", "max_seq_length", "lora_rank"), "finetune-json"),
        (("train_args_file",), "finetune-json"),
        (("train_data_config_path", "qlora", "lora_modules"), "9g-hf"),
        (("JobId", "BaseModelPath", "DataPath"), "job"),
        (("zero_optimization.stage", "fp16.enabled"), "deepspeed"),
        (("no_tool_has_this",), None),
    ],
)
def test_a_tool_is_recognized_by_its_names(names: tuple[str, ...], expected: str | None) -> None:
    found = detect(names)
    assert (found and found.name) == expected


def test_an_unknown_tool_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'swift'"):
        find_dialect("swfit")
