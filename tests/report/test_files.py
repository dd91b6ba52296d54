"""Opening runs for reports: finding them, and what is wrong with their files."""

import os
from pathlib import Path

import pytest

from fm9g.cli import main
from fm9g.errors import UserError
from fm9g.report.files import find_run, open_runs, read_run_info


def test_a_run_file_may_be_missing_or_malformed(tmp_path: Path) -> None:
    nothing = {"config": {}, "data": [], "validation": [], "summary": "", "versions": {}}
    assert read_run_info(tmp_path / "run.json") == nothing
    (tmp_path / "run.json").write_text('{"config": {"train": {"lr": {"value": 1}, "bad": 3}, "x": 4}, "data": [5, {}]}')
    read = read_run_info(tmp_path / "run.json")
    assert (read["config"], read["data"]) == ({"train": {"lr": {"value": 1}}}, [{}])
    (tmp_path / "run.json").write_text('{"config"')
    with pytest.raises(UserError, match=r"run\.json, line 1"):
        read_run_info(tmp_path / "run.json")


def test_a_run_is_found_by_name_folder_and_file(make_run) -> None:
    folder = make_run("tiny")
    Path("tiny").mkdir()  # something else of the same name
    for name in ("tiny", str(folder), str(folder / "metrics.jsonl"), str(folder / "events.jsonl"), str(folder) + "/"):
        assert find_run(name).resolve() == folder.resolve()
    assert find_run(str(folder.resolve())) == folder.resolve()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "report tny",
            "tny: is neither a folder with a metrics.jsonl nor the name of a run in data/logs/; did you mean ",
        ),
        ("report tny", "did you mean 'tiny'? Runs in data/logs/: empty, junk, other, tiny"),
        (
            "plot data/logs",
            "data/logs: the folder holds no metrics.jsonl. Runs in data/logs/: empty, junk, other, tiny",
        ),
        ("plot data/logs/oter", "did you mean 'other'?"),
        ("report setup.txt", "setup.txt: is not the metrics.jsonl of a run"),
        ("report tiny data/logs/tiny", "data/logs/tiny: is given twice, also as tiny"),
        ("report tiny empty", "data/logs/empty/metrics.jsonl: holds no metrics yet"),
        ("plot junk", "data/logs/junk/metrics.jsonl: none of its lines is of a run, such as"),
        ("plot tiny --output x.jpg", "--output: found 'x.jpg', expected a name that ends in .png or .svg or .pdf"),
        ("report tiny --output x.png", "--output: found 'x.png', expected a name that ends in .html or .htm"),
        ("report tiny --output old.html", "old.html: already exists; choose another --output, or replace it with"),
        ("report tiny --output dir.html --overwrite", "dir.html: a folder is in the way"),
        ("plot tiny --output link.svg --overwrite", "link.svg: is an input; choose another"),
    ],
)
def test_mistakes_are_one_line(make_run, capsys: pytest.CaptureFixture, command: str, expected: str) -> None:
    folder = make_run("tiny")
    make_run("other")
    make_run("empty", metrics=[])
    make_run("junk", metrics=[{"step": "one"}, [], "text"])
    Path("setup.txt").touch()
    Path("old.html").write_text("old")
    Path("dir.html").mkdir()
    Path("link.svg").symlink_to(folder / "metrics.jsonl")
    before = (folder / "metrics.jsonl").read_bytes()
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert printed.err.startswith("fm9g: ")
    assert printed.out == ""
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert Path("old.html").read_text() == "old"


def test_without_any_run_the_message_says_where_they_are_looked_for(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "tiny"]) == 2
    assert "No run is in data/logs/ here; go to where training was started" in capsys.readouterr().err


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(make_run, tmp_path: Path) -> None:
    first, third = make_run("tiny"), make_run("big")
    second = tmp_path / "elsewhere" / "tiny"
    second.parent.mkdir()
    os.rename(make_run("tiny2"), second)
    assert [run.name for run in open_runs([str(first), str(third)])] == ["tiny", "big"]
    assert [run.name for run in open_runs([str(first), str(second)])] == ["logs/tiny", "elsewhere/tiny"]


BIG = "9" * 400


@pytest.mark.parametrize(
    ("bad", "is_left_out"),
    [
        ('{"step": -1, "Loss/train": 1}', True),
        (f'{{"step": {BIG}, "Loss/train": 1}}', True),
        (f'{{"step": {"9" * 5000}}}', True),
        ('{"step": "3"}', True),
        ('{"step": 3.0}', True),
        ('{"step": NaN}', True),
        ("{" * 100_000, True),
        ('{"step": 3, "note": "' + "x" * (5 << 20) + '"}', True),
        ("x" * (4 << 20) + '{"step": 99, "kind": "save", "Loss/train": 1}', True),
        (f'{{"step": 3, "Loss/train": {BIG}, "Time/compute": -{BIG}, "Run/tokens": "x"}}', False),
        ('{"step": 3, "Loss/train": "2", "Loss/val": Infinity, "Optimizer/lr": 1e999, "Run/tokens": []}', False),
    ],
    ids=lambda value: str(value)[:30],
)
def test_malformed_lines_are_left_out_with_a_warning_and_malformed_values_are_gaps(
    make_run, bad: str, is_left_out: bool, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    from fm9g.report.tables import events, results

    folder = make_run("tiny")
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (folder / name).read_text().splitlines()
        event = bad.replace("{", '{"kind": "save", "time": 1e300, ', 1) if name == "events.jsonl" else bad
        (folder / name).write_text("\n".join([*lines[:2], event, *lines[2:], '{"step": 11, "Lo']))
    (run,) = open_runs(["tiny"])
    assert [row["step"] for row in run.metrics] == list(range(1, 11))
    expected = "line 3 is left out: not a JSON object with a step from 0 on, as training writes them"
    files = ("metrics.jsonl", "events.jsonl") if is_left_out else ()
    assert sorted(caplog.messages) == sorted(f"{folder / name}: {expected}" for name in files)
    assert results([run])
    assert len(events([run], routine=False) + events([run], routine=True)) == (6 if is_left_out else 7)
    assert not [str(warning.message) for warning in recwarn]


def test_warnings_are_printed_and_count_lines(make_run, capsys: pytest.CaptureFixture) -> None:
    folder = make_run("a\x1b[31mb")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('\n\n[1]\n{"step": -5}\nx\n')
    assert main(["plot", "a\x1b[31mb"]) == 0
    assert capsys.readouterr().err == (
        "warning: data/logs/a␛[31mb/metrics.jsonl: lines 13 and 2 more are left out: not a JSON object with a step "
        "from 0 on, as training writes them\n"
    )


@pytest.mark.parametrize("content", ['{"config": ' + "9" * 5000 + "}", "[1]", '{"summary": 1e', "[" * 100_000])
def test_a_bad_run_file_is_one_message(make_run, content: str, capsys: pytest.CaptureFixture) -> None:
    folder = make_run("tiny")
    (folder / "run.json").write_text(content)
    assert main(["report", "tiny"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"fm9g: {folder / 'run.json'}")
    assert len(printed.splitlines()) == 1
