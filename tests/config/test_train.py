"""Keys of training: every one is known, and wrong values are refused."""

import pytest
from helpers.train_config import load_train

from fm9g.config.fields import keys_of
from fm9g.config.train import DEPRECATED_KEYS, TrainConfig
from fm9g.errors import UserError

GUIDE = """
pretrained_model resume_ckpt tokenizer_path dataset_config model_unique config n_gpus flash max_length local
dataloader save load_grad grad_ckpt_num exp_group ignore_cuda_oom tensorboard_all_tasks stop_when_end
only_run_dataloader eps inspect_iters strict_state_dict resume_no_optimze tp_size async_save batch_size save_iters
train_iters dataloader_num_threads dataloader_prefetch dataloader_prefetch_factor dataloader_num_workers
parallel_load_datastate lr warmup_iters drop_iters only_load_model lr_scheduler load_dataloader_ckpt drop_begin
drop_rate use_checkpoint
""".split()  # noqa: SIM905


@pytest.mark.parametrize("key", GUIDE)
def test_every_parameter_of_the_guide_is_known_in_exactly_one_way(key: str) -> None:
    assert (key in keys_of(TrainConfig)) + (key in DEPRECATED_KEYS) == 1


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("tp_size", "0", "tp_size: found 0, allowed: integer >= 1"),
        ("zero_level", "1", "zero_level: found 1, allowed: one of 0, 2, 3"),
        ("learning_rate", "1", "learning_rate: unknown key; it is called lr here"),
        ("cutoff_len", "1", "it is called max_length here"),
        ("per_device_train_batch_size", "1", "it is called batch_size here: rows of max_length tokens"),
        ("gradient_checkpointing", "1", "it is called activation_checkpoint here"),
        ("zzz", "1", "zzz: unknown key; `fm9g config keys` lists"),
        ("lora_layer", "qproj", "'qproj' is not the name of a linear layer; these are: project_q, project_k"),
        ("lora_layer", "foo,all", "'foo' is not the name of a linear layer; these are: project_q"),
        ("output_dir", "a\0b", "output_dir: found 'a\\x00b', which contains characters that are not text"),
        ("output_dir", "\ud800", "which contains characters that are not text"),
        ("n_gpus", "100000", "n_gpus: found 100000, allowed: integer >= 1 and <= 1024"),
        ("train_iter", "5", "did you mean 'train_iters'?"),
        ("batch_size", "two", "batch_size: found 'two', allowed: integer >= 1"),
        ("lr_scheduler", "cosin", "did you mean 'cosine'?"),
        ("lr", "-1", "lr: found -1"),
        ("resume_ckpt", "newest", "expected the number of a step"),
    ],
)
def test_wrong_values_on_the_command_line_are_refused(key: str, value: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_train("tiny", {key: value})
    assert "command line" in str(error.value)
    assert expected in str(error.value)


def test_intervals_stay_whole_numbers_or_are_fractions() -> None:
    train = load_train("tiny", {"save_iters": "300", "eval_iters": "1e3", "log_iters": "0.25"})[0].value
    assert repr((train.save_iters, train.eval_iters, train.log_iters)) == "(300, 1000, 0.25)"
    config = TrainConfig(config="x", train_iters=30)
    assert [config.interval_steps(value) for value in (7, 1, 0.1, 0.101, 1 / 3, 1e-9)] == [7, 1, 3, 4, 10, 1]
    with pytest.raises(UserError, match="save_iters: found 0, allowed: integer or number > 0"):
        load_train("tiny", {"save_iters": "0"})
