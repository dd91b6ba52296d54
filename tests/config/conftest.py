from pathlib import Path

import pytest

from fm9g.config.load import require_config


@pytest.fixture
def model_file() -> Path:
    """The smallest shipped model configuration."""
    return require_config("model_configs", "tiny")
