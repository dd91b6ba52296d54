"""Options of the commands that use a model: one that would have no effect is refused."""

from __future__ import annotations

import pytest

from fm9g.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate m --prompt x --sample 3", "--sample: needs --data"),
        ("generate m --prompt x --val_split 0.1", "--val_split: needs --data"),
        ("generate m", "give one of --prompt TEXT, --prompts FILE and --data DATA"),
        ("generate m --prompt x --logprobs 2", "logprobs: needs --output FILE.jsonl"),
        ("chat --url http://localhost:1/v1 --dtype bf16", "--dtype: needs a model, not --url"),
        ("chat m --api_key k", "--api_key: needs --url"),
        ("serve m --system x", "--system: needs --page"),
        ("serve m --tensor_parallel_size 2", "--tensor_parallel_size: needs --backend vllm"),
        ("serve m --backend vllm --device cpu", "--device: vLLM takes the GPUs"),
        ("serve m --new_api_key a", "--new_api_key: needs --api_keys FILE"),
        ("serve m --max_queue 0", "max_queue: found 0, expected more than 0"),
        ("serve m --temperature -1", "temperature: found -1.0, which is out of range"),
    ],
)
def test_an_option_without_effect_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words.split(), *(["--port", "0"] if words.startswith("serve") else [])]) == 2
    assert message in capsys.readouterr().err


def test_options_of_which_there_may_be_several_are_all_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "nowhere", "--stop", "a", "--stop", "b", "--adapter", "x=p", "--adapter", "y=q"]) == 2
    assert "nowhere: no such folder or file" in capsys.readouterr().err
