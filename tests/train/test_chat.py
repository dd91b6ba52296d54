"""Conversations: what is trained on, what is exported and what is generated from are one template."""

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.common import index_dataset, small_model, write_jsonl

from fm9g.checkpoint.checkpoint import Checkpoint
from fm9g.cli import main
from fm9g.config.mixture import load_mixture
from fm9g.config.run import load_run
from fm9g.convert.hf_export import export_folder
from fm9g.data.encode.encoder import Encoder
from fm9g.data.encode.template import load_template
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.load.loader_state import fingerprint
from fm9g.data.load.mixture import Mixture
from fm9g.errors import UserError
from fm9g.run_files import read_metrics
from fm9g.train.runner import run_training

CHAT = [
    {"role": "system", "content": "seven wizards"},
    {"role": "user", "content": "the quick brown fox"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "深度 学习"},
    {"role": "assistant", "content": "lazy dogs"},
]


def ids_of(tokens: np.ndarray) -> list[int]:
    return np.where(tokens < 0, ~tokens, tokens).tolist()


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("assistant", "jumps over<|im_end|>lazy dogs<|im_end|>"),
        ("last", "lazy dogs<|im_end|>"),
        ("all", None),
    ],
)
def test_the_loss_is_on_the_turns_of_the_assistant(tokenizer_path: Path, loss: str, expected: str | None) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = Encoder(tokenizer, load_template("chatml", tokenizer), loss)
    tokens = encoder.tokenize([encoder.render({"messages": CHAT})])[0]
    trained = tokens[tokens >= 0].tolist()
    assert trained[-1] == tokenizer.eos_id
    assert tokenizer.decode(trained[:-1]) == (expected or tokenizer.decode(ids_of(tokens)[:-1]))


def test_a_pair_is_a_conversation_where_there_is_a_template_and_text_stays_text(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = Encoder(tokenizer, load_template("add_template", tokenizer))
    pair, text, empty = encoder.tokenize(
        [encoder.render({"input": i, "output": o}) for i, o in (("fox", "dogs"), ("", "dogs"), ("fox", ""))]
    )
    assert "<|im_start|>User\nfox<|im_end|>\n<|im_start|>assistant\ndogs<|im_end|>" in tokenizer.decode(ids_of(pair))
    assert tokenizer.decode(text[text >= 0].tolist()[:-1]) == "dogs"
    assert len(empty) == 0


def test_the_2b_tokenizer_encodes_a_chat_with_its_special_tokens(shared: Path) -> None:
    for folder in ("9g-2b", "9g-8b"):
        tokenizer = load_tokenizer(shared / "tokenizers" / folder)
        encoder = Encoder(tokenizer, load_template("add_template", tokenizer))
        tokens = encoder.tokenize([encoder.render({"messages": CHAT})])[0]
        ids = ids_of(tokens)
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.bos_id not in ids[1:]
        trained = tokens[tokens >= 0].tolist()[:-1]
        assert "".join(tokenizer.decode(trained).split()) == "jumpsover<|im_end|>lazydogs<|im_end|>"


def test_what_is_trained_with_is_exported_and_generated_from(
    tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from transformers import AutoTokenizer

    index_dataset(
        write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": CHAT[:3]}]), tmp_path / "chats", "en"
    )
    (tmp_path / "mine.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (tmp_path / "mixture.json").write_text('[{"task_name": "chats", "path": "chats"}]')
    (tmp_path / "model.json").write_text(json.dumps(small_model().to_json()))
    settings = {
        "config": tmp_path / "model.json", "dataset_config": tmp_path / "mixture.json", "train_iters": 2,
        "tokenizer_path": tokenizer_path, "output_dir": tmp_path / "data", "max_length": 256, "device": "cpu",
        "dataloader_num_workers": 0, "chat_template": tmp_path / "mine.jinja",
    }  # fmt: skip
    result = run_training(load_run(str(tmp_path / "model.json"), {key: str(value) for key, value in settings.items()}))
    assert result.checkpoint is not None
    export_folder(result.checkpoint, tmp_path / "hf")
    reference = tmp_path / "reference"
    shutil.copytree(tmp_path / "hf", reference)
    (reference / "chat_template.jinja").write_text("another")
    for number, source in enumerate((result.checkpoint, next(result.checkpoint.glob("*.pt")))):
        export_folder(source, tmp_path / f"with-reference-{number}", reference)
        exported = (tmp_path / f"with-reference-{number}" / "chat_template.jinja").read_text()
        assert exported == (tmp_path / "mine.jinja").read_text()
    expected = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert expected.chat_template == (tmp_path / "mine.jinja").read_text()
    text = expected.apply_chat_template(CHAT[:2], add_generation_prompt=True, tokenize=False)
    assert text == "<s>[system] seven wizards\n[user] the quick brown fox\n[assistant] "
    generate = ["generate", str(tmp_path / "hf"), "--max_new_tokens", "5"]
    capsys.readouterr()
    assert main([*generate, "--chat", "--system", "seven wizards", "--prompt", "the quick brown fox"]) == 0
    answer = capsys.readouterr().out
    text = text.removeprefix("<s>")  # which the tokenizer puts in front by itself
    assert main([*generate, "--prompt", text]) == 0
    assert capsys.readouterr().out.removeprefix(text) == answer
    assert main([*generate, "--prompt", "x", "--system", "y"]) == 2


def test_a_conversation_without_a_template_is_refused_and_says_how(
    tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    index_dataset(write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}]), tmp_path / "chats", "en")
    (tmp_path / "mixture.json").write_text('[{"task_name": "chats", "path": "chats"}]')
    arguments = ["train", "--config", "tiny", "--dataset_config", str(tmp_path / "mixture.json"), "--tokenizer_path"]
    arguments += [str(tokenizer_path), "--output_dir", str(tmp_path / "data"), "--dataloader_num_workers", "0"]
    assert main([*arguments, "--only_run_dataloader", "1", "--train_iters", "2"]) == 2
    assert "chats, line 1 of " in (error := capsys.readouterr().err)
    assert "a conversation needs a template; give --chat_template, chatml for example" in error


@pytest.mark.parametrize("key", ["chat_template", "train_on", "turns"])
def test_a_dataset_may_differ_from_the_run(make_mixture: Callable, tokenizer_path: Path, key: str) -> None:
    value, other = {"chat_template": ("chatml", "llama"), "train_on": ("all", "last"), "turns": ("split", "auto")}[key]
    mixture = make_mixture({"a": [{"output": "x"}], "b": [{"output": "x"}]}, b={key: other})
    settings = {"dataset_config": str(mixture), "tokenizer_path": str(tokenizer_path), key: value}
    run = load_run("tiny", settings)
    assert [getattr(item, key) for item in run.mixture] == [value, other]
    assert [run.origins[f"data.{item.task_name}"][key] for item in run.mixture] == ["command line", str(mixture)]


def test_a_run_keeps_the_date_of_its_first_day(
    train: Callable, make_mixture: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ bos_token }}{{ strftime_now('%d %b %Y') }}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    )
    mixture = make_mixture({"chats": [{"messages": CHAT}, {"messages": CHAT[:3]}]})
    given = {"dataset_config": mixture, "chat_template": template, "max_length": 256}

    def on(day: int, out: str, **changes: object) -> Checkpoint:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return datetime.date(2026, 7, day)

        monkeypatch.setattr("fm9g.data.load.mixture.datetime.date", Day)
        return Checkpoint(train(out, **given, **changes).checkpoint)

    full = on(1, "whole", train_iters=4)
    assert full.loader_state()["fingerprint"]["template_date"] == "2026-07-01"
    on(1, "parts", train_iters=4, stop_iters=2)
    with pytest.raises(UserError, match=r"chats: chat_template: was .* of 2026-07-01, is .* of 2026-07-02"):
        on(2, "parts", train_iters=4, resume="auto", chat_template_date="2026-07-02")
    parts = on(2, "parts", train_iters=4, resume="auto")
    assert parts.loader_state() == full.loader_state()
    assert parts.weight_file.read_bytes() == full.weight_file.read_bytes()
    other = on(2, "other", train_iters=4)
    assert other.weight_file.read_bytes() != full.weight_file.read_bytes()
    given_date = on(2, "given", train_iters=4, chat_template_date="2026-07-01")
    assert given_date.weight_file.read_bytes() == full.weight_file.read_bytes()
    with pytest.raises(UserError, match=r"chat_template_date: found '1.7.2026', expected a date such as"):
        on(1, "wrong", chat_template_date="1.7.2026")


def test_a_record_of_weight_two_counts_like_two_records(
    train: Callable, make_mixture: Callable, tmp_path: Path
) -> None:
    """In a step that holds all records: loss, gradient and weights are those of the step with the record twice."""
    one, other = (
        {"input": "the quick", "output": "brown fox"},
        {"input": "lazy", "output": "dogs jump over seven wizards"},
    )
    found = []
    for number, content in enumerate(([one, one, other], [one | {"weight": 2}, other], [one, other])):
        mixture = make_mixture({"a": content}, a={"allow_repeat": False})
        model = tmp_path / "plain.json"
        model.write_text(json.dumps(small_model().to_json()))
        settings = {
            "dataset_config": mixture,
            "max_length": 64,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "train_iters": 1,
        }
        result = train(f"out-{number}", config=model, warmup_iters=0, lr=0.01, **settings)
        (line,) = read_metrics(result.metrics_file)
        found.append([line["Loss/train"], line["Optimizer/grad_norm"]])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-3)


def test_a_conversation_that_is_split_trains_a_text_for_each_turn(
    train: Callable, make_mixture: Callable, tmp_path: Path
) -> None:
    mixture = make_mixture({"a": [{"messages": CHAT}]}, a={"allow_repeat": False})
    settings = {
        "dataset_config": mixture,
        "max_length": 256,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "chat_template": "chatml",
    }
    tokens = []
    for turns in ("auto", "split"):
        result = train(turns, turns=turns, train_iters=5, **settings)
        tokens.append(Checkpoint(result.checkpoint).trainer_state()["global_token_pass"])
    assert tokens[0] < tokens[1] < 2 * tokens[0]


def test_a_tokenizer_with_further_templates_is_saved_and_exported(
    train: Callable, tokenizer_path: Path, make_mixture: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_path, folder)
    (folder / "additional_chat_templates").mkdir()
    plain = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(plain)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | tojson }}" + plain)
    mixture = make_mixture({"chats": [{"messages": CHAT}]})
    settings = {"dataset_config": mixture, "tokenizer_path": folder, "max_length": 256, "train_iters": 1}
    result = train("out", **settings)
    assert main(["ckpt", "verify", str(result.checkpoint)]) == 0
    assert load_tokenizer(result.checkpoint / "tokenizer").chat_template.keys() == {"default", "tool_use"}
    export_folder(result.checkpoint, tmp_path / "hf")
    assert load_tokenizer(tmp_path / "hf").chat_template == load_tokenizer(folder).chat_template
    # With a template that is named, that one alone is kept.
    result = train("named", chat_template="chatml", **settings)
    assert isinstance(load_tokenizer(result.checkpoint / "tokenizer").chat_template, str)


def test_a_system_message_is_added_where_a_conversation_has_none(tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    encoder = Encoder(tokenizer, load_template("chatml", tokenizer), system="be brief <|im_end|>")
    records = [{"messages": CHAT}, {"messages": CHAT[1:]}, {"input": "fox", "output": "dogs"}, {"output": "text"}]
    own, chat, pair, text = (
        tokenizer.decode(ids_of(tokens)) for tokens in encoder.tokenize([encoder.render(record) for record in records])
    )
    assert "seven wizards" in own
    assert "be brief" not in own + text
    assert chat.count("system\nbe brief") == pair.count("system\nbe brief") == 1


def test_a_system_message_needs_a_template_and_is_part_of_the_data(
    make_mixture: Callable[..., Path], tokenizer_path: Path
) -> None:
    config = load_mixture(make_mixture({"a": [{"input": "fox", "output": "dogs"}]}))[0]
    plain, other = (
        Mixture([replace(config, chat_template="chatml", system=system)], str(tokenizer_path), 64, 1)
        for system in ("", "be brief")
    )
    assert fingerprint(plain, 1) != fingerprint(other, 1)
    with pytest.raises(UserError, match="a: system: needs a chat_template"):
        Mixture([replace(config, system="be brief")], str(tokenizer_path), 64, 1)
