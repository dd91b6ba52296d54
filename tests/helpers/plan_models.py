"""Models whose memory and work are computed: a small one, and those that are shipped."""

from fm9g.config.load import require_config
from fm9g.config.model import ModelConfig, load_model_config

SMALL = ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=352, num_layers=4, num_heads=4, use_flash_attn=False
)


def shipped(name: str) -> ModelConfig:
    return load_model_config(require_config("model_configs", name))
