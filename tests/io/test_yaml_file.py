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


def test_plain_numbers_are_decimal_and_other_words_are_text(tmp_path: Path) -> None:
    text = "a: 1e-4\nb: 010\nc: 1:30\nd: 2024-01-01\ne: .5\nf: -7\ng: 0x10\nh: 1_000\ni: .inf\n"
    values = [1e-4, "010", "1:30", "2024-01-01", 0.5, -7, "0x10", "1_000", float("inf")]
    assert [*read(tmp_path, text).values()] == values


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: 1\n# é\n".encode("latin-1"), "run.yaml, line 2: is not UTF-8 text; save it as UTF-8"),
        (b"a: 1\nb: \x07\n", r"run.yaml, line 2: contains the character U\+0007; remove it"),
        (b"a: " + b"[" * 500 + b"]" * 500, "its values are nested too deeply"),
        (b"a: !!bool maybe\n", "a tag such as !!int does not fit its value"),
        (b"a: !!timestamp x\n", "a tag such as !!int does not fit its value"),
        (b"a: " + b"9" * 5000, "a number is too long"),
    ],
)
def test_what_is_no_text_of_yaml_says_so(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_config_object(tmp_path / "run.yaml")


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
    with pytest.raises(UserError, match=f"^{tmp_path}/.*{expected}") as error:
        read(tmp_path, text)
    assert str(error.value).count("run.yaml") == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        read_config_object(tmp_path / "nowhere.yaml")
