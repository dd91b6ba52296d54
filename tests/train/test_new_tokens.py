"""Runs with new tokens: what their rows start with, and that checkpoints, exports, merges and later runs know them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import make_records, small_model

from fm9g.api import generate
from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.config.model import ModelConfig, load_model_config
from fm9g.convert.adapters import import_peft, read_adapter
from fm9g.convert.hf_export import export_folder
from fm9g.convert.merge import merge
from fm9g.convert.peft import write_peft
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError
from fm9g.infer.options import GenerationOptions
from fm9g.io.pt_file import read_weights, write_weights
from fm9g.lora.adapter_file import open_adapter
from fm9g.lora.inject import load_adapter_into
from fm9g.model.prompt_batch import prompt_batch
from fm9g.model.transformer import FM9G
from fm9g.run_files import read_metrics
from fm9g.train.runner import TrainResult

Train = Callable[..., TrainResult]
TOKENS = ["<new>", "⟨9g⟩"]
SIZE = 320  # tokens of the tokenizer
LORA = {"lora_layer": '["project_q", "w_out"]', "lora_r": 3, "lora_alpha": 6}
EMBEDDING, HEAD = "input_embedding.weight", "lm_head.weight"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    (tmp_path / "tokens.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return tmp_path / "tokens.txt"


@pytest.fixture
def run(train: Train, make_mixture: Callable[..., Path], tokens: Path, tmp_path: Path) -> Train:
    """run(out, tied=False, rows=320, key=value, ...): a run on records with new tokens, from a base of its own."""
    records = [
        {"input": "", "output": f"{TOKENS[i % 2]} {record['output']}"} for i, record in enumerate(make_records(60))
    ]
    mixture = make_mixture({"new": records})

    def start(out: str, tied: bool = False, rows: int = SIZE, **changes: object) -> TrainResult:
        config = small_model(vocab_size=rows, tie_word_embeddings=tied, scale=True, base_hidden_size=16)
        (tmp_path / "base.json").write_text(json.dumps(config.to_json()))
        if not (tmp_path / "base.pt").exists():
            write(tmp_path / "base.pt", random_model(config))
        settings = {"dataset_config": mixture, "pretrained_model": tmp_path / "base.pt", "new_tokens": tokens}
        settings |= {"train_iters": 4, "save_iters": 4, "batch_size": 1, "lr": 0.02, "report_to": "none"}
        return train(out, **{**settings, "config": tmp_path / "base.json", **changes})

    return start


def random_model(config: ModelConfig) -> FM9G:
    model = FM9G(config).eval()
    for name, weight in model.named_parameters():
        model.init_weight(name, weight.data, seed=5)
    return model


def write(file: Path, model: FM9G) -> None:
    write_weights(file, weights := dict(model.named_parameters()), weights.items())


def folder_of(result: TrainResult) -> Path:
    assert result.checkpoint is not None
    return result.checkpoint


def content(result: TrainResult) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder_of(result))
    return {**checkpoint.weights(), **{f"optimizer {name}": value for name, value in checkpoint.optimizer().items()}}


def assert_equal(one: TrainResult, other: TrainResult) -> None:
    left, right = content(one), content(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def losses(result: TrainResult) -> list[float]:
    return [line["Loss/train"] for line in read_metrics(result.metrics_file) if "Loss/train" in line]


def our_logits(config: ModelConfig, weights: Any, ids: list[int], adapter: Any = None) -> torch.Tensor:
    model = FM9G(config).eval()
    model.load_state_dict(dict(weights))
    if adapter:
        load_adapter_into(model, "", adapter.config, adapter.weights)
    with torch.no_grad():
        return model.logits(prompt_batch([ids]))


def hf_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [SIZE, SIZE + 1, SIZE + 9])
def test_new_rows_are_the_mean_and_spare_rows_come_first(run: Train, tmp_path: Path, tied: bool, rows: int) -> None:
    result = run("out", tied, rows, train_iters=1, lr=0.0)
    base, weights = read_weights(tmp_path / "base.pt"), content(result)
    assert (EMBEDDING in base, HEAD in base) == (True, not tied)
    for name in {EMBEDDING, HEAD} & base.keys():
        assert weights[name].shape == (max(rows, SIZE + 2), 32)
        assert torch.equal(weights[name][:SIZE], base[name][:SIZE])
        mean = base[name][:SIZE].mean(0).expand(2, -1)
        torch.testing.assert_close(weights[name][SIZE : SIZE + 2], mean, rtol=0, atol=1e-6)
        assert torch.equal(weights[name][SIZE + 2 :], base[name][SIZE + 2 :])
    assert load_model_config(folder_of(result) / "config.json").vocab_size == max(rows, SIZE + 2)


def test_random_weights_grow(run: Train) -> None:
    weights = content(run("out", pretrained_model="", train_iters=1))
    assert weights[EMBEDDING].shape == weights[HEAD].shape == (SIZE + 2, 32)
    assert 0.05 < weights[EMBEDDING][SIZE:].std() < 0.2


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_a_run_resumes_exactly_with_or_without_the_file_and_refuses_another(
    run: Train, tokens: Path, changes: dict
) -> None:
    whole = run("whole", **changes)
    run("parts", **changes, stop_iters=2)
    shutil.copytree(folder_of(whole).parents[2], folder_of(whole).parents[2].with_name("spare"))
    for text in ("\n".join(reversed(TOKENS)), TOKENS[0], "\n".join([*TOKENS, "third"])):
        tokens.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="these are not the tokens of"):
            run("parts", **changes, resume_ckpt="auto")
    tokens.unlink()
    assert_equal(run("parts", **changes, resume_ckpt="auto"), whole)
    again = run("spare", **changes, resume_ckpt="auto", new_tokens="", train_iters=5)
    assert again.step == 5
    assert (folder_of(again) / "tokenizer" / "new_tokens.txt").read_text(encoding="utf-8").split() == TOKENS


def test_a_run_without_new_tokens_gets_none_later(run: Train, tokens: Path) -> None:
    run("out", new_tokens="", train_iters=1)
    with pytest.raises(UserError, match="has none, and a run cannot change its tokens"):
        run("out", resume_ckpt="auto")


def test_an_exported_run_reads_them_and_says_the_same(run: Train, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = folder_of(run("out"))
    export_folder(checkpoint, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert [tokenizer.encode(token, add_special_tokens=False) for token in TOKENS] == [[SIZE], [SIZE + 1]]
    text = f"abc {TOKENS[1]}def"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(SIZE + 1) == 1
    assert tokenizer.decode(ids) == text
    config = load_model_config(checkpoint / "config.json")
    ours = our_logits(config, Checkpoint(checkpoint).weights(), ids)
    torch.testing.assert_close(hf_logits(tmp_path / "hf", ids), ours, rtol=1e-5, atol=1e-5)
    assert isinstance(generate(tmp_path / "hf", TOKENS[0], GenerationOptions(max_new_tokens=2)), str)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_with_new_tokens_goes_everywhere_with_the_original_base(
    run: Train, tmp_path: Path, tokenizer_path: Path, tied: bool, capfd: pytest.CaptureFixture
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base.pt"
    result = run("out", tied, **LORA)
    modules = ["input_embedding"] if tied else ["input_embedding", "lm_head"]
    assert f"modules_to_save: {', '.join(modules)}, in which the new tokens have rows" in capfd.readouterr().err
    adapter = read_adapter(folder_of(result))
    assert adapter.config.modules_to_save == modules
    assert adapter.config.ensure_weight_tying == tied
    assert adapter.weights[EMBEDDING].shape == (SIZE + 2, 32)
    ids = load_tokenizer(folder_of(result) / "tokenizer").encode(f"{TOKENS[0]} ab{TOKENS[1]}c")
    assert {SIZE, SIZE + 1} < set(ids)
    grown = load_model_config(folder_of(result) / "config.json")
    expected = our_logits(grown, {**read_weights(base), **adapter.saved_modules}, ids, adapter)

    export_folder(base, tmp_path / "hf")
    shutil.copytree(tokenizer_path, tmp_path / "hf", dirs_exist_ok=True)
    report = merge(tmp_path / "hf", adapter, tmp_path / "merged")
    assert report.merge_error < 1e-4
    torch.testing.assert_close(hf_logits(tmp_path / "merged", ids), expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(TOKENS[1]) == SIZE + 1
    merge(base, adapter, tmp_path / "merged.pt")
    assert load_model_config(tmp_path / "merged.json") == grown

    write_peft(adapter, tmp_path / "peft", base=str(tmp_path / "hf"))
    card = (tmp_path / "peft" / "README.md").read_text(encoding="utf-8")
    assert f"model.resize_token_embeddings({SIZE + 2}, mean_resizing=False)" in card
    assert 'AutoTokenizer.from_pretrained("peft")' in card
    assert AutoTokenizer.from_pretrained(tmp_path / "peft").convert_tokens_to_ids(TOKENS[1]) == SIZE + 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    model.resize_token_embeddings(SIZE + 2, mean_resizing=False)
    loaded = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(torch.tensor([ids])).logits[0], expected, rtol=1e-5, atol=1e-5)

    import_peft(tmp_path / "peft", tmp_path / "imported", base, overwrite=False)
    again = open_adapter(tmp_path / "imported")
    assert (again.config.modules_to_save, again.config.ensure_weight_tying) == (modules, tied)
    assert again.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(weight, again.weights[name]) for name, weight in adapter.weights.items())

    def go_on(out: str, where: Path) -> TrainResult:
        return run(out, tied, adapter=where, new_tokens="", train_iters=2, seed=9)

    runs = [go_on(where.name, where) for where in (folder_of(result), tmp_path / "peft", tmp_path / "imported")]
    assert losses(runs[0])[0] < losses(result)[0]
    for other in runs[1:]:
        assert_equal(other, runs[0])
    follower = read_adapter(folder_of(runs[0]))
    assert follower.config.base_sha256 == adapter.config.base_sha256
    assert follower.weights[EMBEDDING].shape == (SIZE + 2, 32)
    assert not torch.equal(follower.weights[EMBEDDING], adapter.weights[EMBEDDING])
    with pytest.raises(UserError, match="these are not the tokens of"):
        (tmp_path / "other.txt").write_text("other")
        run("no", tied, adapter=folder_of(result), new_tokens=tmp_path / "other.txt")


def test_rows_that_were_trained_stay(run: Train) -> None:
    first = run("first")
    config = folder_of(first) / "config.json"
    second = run("second", config=config, pretrained_model=folder_of(first), train_iters=1, lr=0.0)
    assert torch.equal(content(second)[EMBEDDING], content(first)[EMBEDDING])
    own = run("own", config=config, pretrained_model=folder_of(first), train_iters=1, lr=0.0, new_tokens="",
              tokenizer_path=folder_of(first) / "tokenizer")  # fmt: skip
    assert torch.equal(content(own)[EMBEDDING], content(first)[EMBEDDING])


def test_what_cannot_be_meant_is_refused(run: Train, tokens: Path, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"new_tokens: .*nowhere.txt: no such file"):
        run("no", new_tokens=tokens.with_name("nowhere.txt"))
    with pytest.raises(UserError, match="new_tokens and only_load_model false are both given"):
        run("no", only_load_model=False)
    with pytest.raises(UserError, match="has 322 tokens, the model's vocab_size is 300; they do not belong together"):
        run("no", rows=300)
    run("frozen", freeze="input_embedding*", train_iters=1, rows=320)
    assert "input_embedding.weight is frozen, so the new tokens keep their first values" in capfd.readouterr().err


@pytest.mark.slow  # two processes that import torch
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_two_processes_train_what_one_does(run: Train, tmp_path: Path, tokenizer_path: Path, changes: dict) -> None:
    alone = run("alone", **changes, gradient_accumulation_steps=2)
    words = f"""--config {tmp_path}/base.json --dataset_config {tmp_path}/mixture.json --tokenizer_path {tokenizer_path}
        --output_dir {tmp_path}/two --model_unique m --device cpu --batch_size 1 --max_length 64 --global_batch_size 2
        --warmup_iters 2 --dataloader_num_workers 1 --peak_tflops 1 --lr 0.02 --train_iters 4 --report_to none --nproc 2
        --pretrained_model {tmp_path}/base.pt --new_tokens {tmp_path}/tokens.txt""".split()
    words += [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "fm9g", "train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two, one = Checkpoint(tmp_path / "two" / "checkpoints" / "m" / "4").weights(), content(alone)
    for name in two:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5)
