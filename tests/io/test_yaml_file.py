"""Configuration files in YAML: the same values as in JSON, and mistakes by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config_object


def read(tmp_path: Path, text: str, name: str = "run.yaml") -> dict:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_config_object(tmp_path / name)


def test_values_have_their_types_and_json_reads_as_before(tmp_path: Path) -> None:
    text = "model: 九格\nlr: 2.0e-5\nepochs: 3\nsave: false\nlora_layer: [q_proj, v_proj]\n# a comment\nadapter:\n"
    values = {"model": "九格", "lr": 2e-5, "epochs": 3, "save": False, "lora_layer": ["q_proj", "v_proj"]}
    assert read(tmp_path, text) == {**values, "adapter": None}
    assert read(tmp_path, '{"lr": 1}', "run.json") == {"lr": 1}
    assert read(tmp_path, "# nothing\n") == {}
    assert read(tmp_path, "off: 1\n") == {"False": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr: 1\nepochs: 2\nlr: 3\n", "run.yaml, line 3: key 'lr' is given twice"),
        ("lr: 1\n  epochs: 2\n", "run.yaml, line 2, column 9: not YAML"),
        ("a:\n\tb: 1\n", "run.yaml, line 2, column 1: not YAML: .*not tabs"),
        ("a: &x {b: 1}\nc: *x\n", "line 1: anchors and aliases of YAML are not supported"),
        ("- a\n- b\n", "run.yaml: found list, expected keys and values"),
        (
            "a: !!python/object:os.system {}\n",
            "run.yaml, line 1, column 4: not YAML: could not determine",
        ),
    ],
)
def test_a_mistake_names_the_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        read_config_object(tmp_path / "nowhere.yaml")
