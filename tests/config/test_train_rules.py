"""Rules on values of training keys."""

import pytest
from helpers.train_config import load_train

from fm9g.config.load import ConfigSource, build
from fm9g.config.train import TrainConfig
from fm9g.errors import UserError


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lr", "nan", "expected a finite number"),
        ("clip_grad", "inf", "expected a finite number"),
        ("model_unique", "", "expected a plain name"),
        ("model_unique", "..", "expected a plain name"),
        ("exp_group", "a/b", "expected a plain name"),
        ("chat_template", "chatm", "'chatm': no such chat template; did you mean 'chatml'"),
        ("chat_template", "mine", r"give a file such as ./mine.jinja, or one of .*, tokenizer, none"),
        ("resume_ckpt", "²", "expected the number of a step"),
        ("resume_ckpt", "9" * 5000, "expected the number of a step"),
        ("train_iters", "9" * 40, r"train_iters: found \d+, expected a finite number up to 2\^53"),
        ("batch_size", "100000000000", "too many for a row"),
        ("seed", "99999999999", "seed: found"),
    ],
)
def test_values_that_would_do_harm_are_refused(key: str, value: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_train("tiny", {key: value})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"data": "a", "dataset_config": "b"}, "data and dataset_config are both given"),
        ({"data": "a", "val_data": "b", "val_dataset": "c"}, "val_data and val_dataset are both given"),
        ({"data": "a", "val_split": 0.1, "val_data": "b"}, "val_split and val_data are both given"),
        ({"data": "a", "val_split": 0.1, "val_dataset": "b"}, "val_split and val_dataset are both given"),
        ({"val_split": 0.1}, "val_split is given and data is not"),
        ({"dataset_config": "a", "train_sample": 5}, "train_sample is given and data is not"),
        ({"data": "a", "val_sample": 5}, "val_sample is given, and neither val_split nor val_data"),
        ({"data": "a", "val_split": 1}, "val_split: found 1"),
    ],
)
def test_keys_of_data_that_do_not_go_together_are_refused(values: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        build(TrainConfig, [ConfigSource("f", values)])


def test_data_may_be_evaluated_on_a_mixture_and_a_mixture_on_data() -> None:
    build(TrainConfig, [ConfigSource("f", {"data": "a", "val_dataset": "b"})])
    build(TrainConfig, [ConfigSource("f", {"dataset_config": "a", "val_data": "b", "val_sample": 5})])
