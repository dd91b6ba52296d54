"""Files of dataset_configs/."""

from pathlib import Path

import pytest
from helpers.common import write_json

from fm9g.config.mixture import load_mixture
from fm9g.errors import UserError


def test_paths_of_a_mixture_may_be_relative_to_where_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = tmp_path / "apps" / "fm9g_7b"
    entry = {"task_name": "a", "path": "../../data_test/a", "transforms": "./t.py"}
    mixture = write_json(app / "dataset_configs" / "m.json", [entry])
    (tmp_path / "data_test" / "a").mkdir(parents=True)
    (mixture.parent / "t.py").touch()
    monkeypatch.chdir(app)
    (item,) = load_mixture(mixture)
    assert (item.path, item.transforms) == (str(tmp_path / "data_test" / "a"), str(mixture.parent / "t.py"))
    (tmp_path / "apps" / "data_test" / "a").mkdir(parents=True)  # relative to the file, which comes first
    assert load_mixture(mixture)[0].path == str(tmp_path / "apps" / "data_test" / "a")


def test_a_dataset_has_one_share(tmp_path: Path) -> None:
    file = write_json(tmp_path / "mix.json", [{"task_name": "a", "path": "x", "abs_weight": 1, "weight": 2}])
    with pytest.raises(UserError, match="a: abs_weight and weight are both given"):
        load_mixture(file)


def test_mixture_keys_are_checked_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    entry = {"task_name": "a", "path": "sets/a", "transforms": "t.py"}
    (item,) = load_mixture(write_json(tmp_path / "m.json", [entry]))
    assert item.path == str(tmp_path / "sets/a")
    assert item.transforms == str(tmp_path / "t.py")
    for wrong, expected in [
        ([{**entry, "abs_wieght": 1}], r"\[0\].abs_wieght: unknown key; did you mean 'abs_weight'"),
        ([{"path": "x"}], r"\[0\].task_name: missing"),
        ([{**entry, "oversize_rule": "cut"}], "oversize_rule: found 'cut'"),
        ([entry, entry], "task_name 'a' is used 2 times"),
        ([{**entry, "abs_weight": 0}], "every weight is 0"),
        ([{**entry, "abs_weight": 1}, {**entry, "task_name": "b"}], "abs_weight is missing for b"),
        ({}, "expected a list"),
        ([3], r"\[0\]: found 3"),
    ]:
        with pytest.raises(UserError, match=expected):
            load_mixture(write_json(tmp_path / "m.json", wrong))


@pytest.mark.parametrize("key", ["path", "transforms", "chat_template"])
def test_a_loop_of_links_in_a_mixture_is_a_file_that_is_not_there(key: str, tmp_path: Path) -> None:
    (tmp_path / "loop.jinja").symlink_to("loop.jinja")
    entry = {"task_name": "t", "path": "data", key: "./loop.jinja"}
    loaded = load_mixture(write_json(tmp_path / "mixture.json", [entry]))
    assert getattr(loaded[0], key) == str(tmp_path.resolve() / "loop.jinja")
