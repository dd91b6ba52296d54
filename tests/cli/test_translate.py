"""`fm9g config translate`."""

from fm9g.cli import main
from fm9g.shorthand.load import RunArguments, load_run


def test_run_file_means_the_same(tmp_path, capsys):
    words = [
        "--model_name_or_path",
        "tiny",
        "--bf16",
        "True",
        "--learning_rate",
        "3e-5",
        "--lr_scheduler_type",
        "cosine",
    ]
    assert main(["config", "translate", *words]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    direct, written = load_run(RunArguments(words=tuple(words)), False), load_run(RunArguments(file=str(file)), False)
    assert "# command line: --learning_rate\nlr: " in file.read_text(encoding="utf-8")
    assert written.train == direct.train and written.train.lr == 3e-5
