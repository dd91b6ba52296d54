"""Rules on values of training keys."""

import pytest

from fm9g.config.train_file import load_train_config
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
        load_train_config("tiny", {key: value})
