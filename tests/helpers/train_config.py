"""Training configurations as the command line gives them."""

from pathlib import Path

from fm9g.config.load import COMMAND_LINE, ConfigSource, Resolved, require_config
from fm9g.config.train import TrainConfig
from fm9g.config.train_file import LAUNCH_SCRIPT, load_train_config


def load_train(
    name: str, overrides: dict[str, str], defaults: dict[str, str] | None = None
) -> tuple[Resolved[TrainConfig], Path]:
    """The configuration NAME with `--key value` and `--default.key value`, and the path of its model."""
    given = ConfigSource(COMMAND_LINE, overrides, text=True)
    train = load_train_config(name, [given], ConfigSource(LAUNCH_SCRIPT, defaults or {}, text=True))
    return train, require_config("model_configs", train.value.config)
