"""`import fm9g`: what it loads, and docs/library.md from its first example to its last."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.common import ROOT

import fm9g


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The logger of the library, which is afterwards as it was."""
    logger = logging.getLogger("fm9g")
    level, handlers = logger.level, list(logger.handlers)
    yield logger
    logger.setLevel(level)
    for handler in set(logger.handlers) - set(handlers):
        logger.removeHandler(handler)
        handler.close()


def test_the_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logger: logging.Logger
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in code_blocks("library.md"):
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert "missing.pt: no such folder or file" in printed
    assert (tmp_path / "sums-hf" / "model.safetensors").is_file()


def test_both_languages_have_the_same_examples() -> None:
    assert code_blocks("library.zh.md") == code_blocks("library.md") != []


def test_the_page_shows_every_function() -> None:
    functions = [name for name in fm9g.__all__ if name.islower()]
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert [name for name in functions if f"fm9g.{name}(" not in page] == []


def test_the_import_loads_nothing_and_every_name_is_there() -> None:
    code = (
        "import sys, fm9g\n"
        "assert not [name for name in sys.modules if name.startswith('fm9g.') or name == 'torch']\n"
        "assert set(fm9g.__all__) <= set(dir(fm9g))\n"
        "fm9g.UserError, fm9g.load_run_config, fm9g.build_index\n"
        "assert 'torch' not in sys.modules\n"
        "for name in fm9g.__all__: assert getattr(fm9g, name).__name__ == name\n"
        "import fm9g.train, fm9g.convert\n"
        "assert fm9g.train_model.__doc__\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'fm9g' has no attribute 'load_modle'"):
        fm9g.load_modle  # type: ignore[attr-defined] # noqa: B018


def test_a_complete_configuration_takes_no_further_keys(tmp_path: Path, make_mixture, tokenizer_path: Path) -> None:
    mixture = make_mixture({"a": [{"input": "", "output": "text"}]})
    config = fm9g.load_run_config("tiny", dataset_config=mixture, tokenizer_path=tokenizer_path, save=False)
    assert config.train.save is False
    with pytest.raises(TypeError, match="lr: give keys to load_run_config instead"):
        fm9g.train_model(config, lr=0.1)


def test_values_are_given_as_python_has_them(make_mixture, tokenizer_path: Path) -> None:
    mixture = make_mixture({"a": [{"input": "", "output": "text"}]})
    keys = {"pretrained_model": Path("m.pt"), "lora_layer": ["project_q", "w_0"], "lr": 1e-5, "val_dataset": None}
    config = fm9g.load_run_config("tiny", keys, dataset_config=mixture, tokenizer_path=tokenizer_path).train
    assert (config.pretrained_model, config.lora_layer, config.lr) == ("m.pt", ["project_q", "w_0"], 1e-5)
    assert config.val_dataset == ""
