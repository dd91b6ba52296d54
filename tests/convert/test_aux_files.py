"""Files beside the weights of an exported folder: tokenizer, chat template, model card, a reference's code."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import small_model

from fm9g.checkpoint.save import Snapshot, save_checkpoint
from fm9g.cli import main
from fm9g.config.model import ModelConfig
from fm9g.convert.aux_files import copy_aux_files, write_tokenizer
from fm9g.convert.hf_export import ExportOptions, export_folder
from fm9g.convert.hf_import import import_folder
from fm9g.data.encode.tokenizer_files import CHAT_TEMPLATE
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError
from fm9g.io.pt_file import write_weights
from fm9g.model.transformer import weight_shapes

TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
CONFIG = small_model(tie_word_embeddings=True)


class Weights:
    """Those of a small model, as a checkpoint is given them."""

    def __init__(self, config: ModelConfig) -> None:
        torch.manual_seed(0)
        self.meta = {name: torch.randn(shape) * 0.1 for name, shape in weight_shapes(config).items()}

    def __iter__(self):
        return iter(self.meta.items())


def item(value: object) -> dict[str, Any]:
    return {"value": value, "from": "command line"}


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_path: Path) -> Path:
    return make_checkpoint(tmp_path / "run", tokenizer_path, TEMPLATE)


def make_checkpoint(run_folder: Path, tokenizer_path: Path, template: str, config: ModelConfig = CONFIG) -> Path:
    files: dict[str, Path | str] = {file.name: file for file in tokenizer_path.iterdir()}
    run = {
        "train": {
            "pretrained_model": item(""),
            "lr": item(0.01),
            "optimizer": item("muon"),
            "chat_template": item("chatml"),
        },
        "data.poems": {"chat_template": item("chatml")},
    }
    counts = {
        "iteration": 7,
        "global_token_pass": 1000,
        "global_total_task_token": {"poems": 750, "a|b": 250},
        "loss": 2.5,
    }
    snapshot = Snapshot(
        step=7,
        weights=Weights(config),
        optimizer=None,
        ema=None,
        loader_state={},
        trainer_state=counts,
        json_files={"config.json": config.to_json(), "run_config.json": run},
        tokenizer_files={**files, CHAT_TEMPLATE: template},
    )
    return save_checkpoint(run_folder, snapshot)


def test_the_chat_template_is_where_old_and_new_programs_look(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_folder(checkpoint, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (tmp_path / "hf" / CHAT_TEMPLATE).read_text() == TEMPLATE
    (tmp_path / "hf" / CHAT_TEMPLATE).unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the</s>"


def test_a_template_that_is_only_in_the_configuration_gets_its_file(tmp_path: Path, tokenizer_path: Path) -> None:
    shutil.copytree(tokenizer_path, tmp_path / "t")
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "t", None, tmp_path / "out")
    assert (tmp_path / "out" / CHAT_TEMPLATE).read_text() == TEMPLATE


def test_the_card_tells_what_the_checkpoint_knows(checkpoint: Path, tmp_path: Path) -> None:
    export_folder(checkpoint, tmp_path / "my model")
    card = (tmp_path / "my model" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert head == ("library_name: transformers\npipeline_tag: text-generation\ntags:\n- fm9g\n- causal-lm\n")
    assert "# my model\n" in body
    total = sum(shape.numel() for shape in weight_shapes(CONFIG).values())
    for row in (
        f"| parameters | {total:,} |",
        "| step | 7 |",
        "| tokens | 1,000 |",
        "| loss | 2.5000 |",
        "| lr | 0.01 |",
        "| optimizer | muon |",
        "| poems | 750 | 75.00% | chatml |",
        "| a\\|b | 250 | 25.00% |  |",
    ):
        assert row in body
    assert "trust_remote_code" not in body


def test_a_bare_file_has_a_card_of_what_is_known(tmp_path: Path) -> None:
    weights = Weights(CONFIG)
    write_weights(tmp_path / "m.pt", weights.meta, weights)
    (tmp_path / "m.json").write_text(json.dumps(CONFIG.to_json()))
    export_folder(tmp_path / "m.pt", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "## Configuration" in card
    assert "## Training" not in card


@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": True}, {"qk_norm": True}, {"scale": True, "base_hidden_size": 16}, {"attention_scale": 0.1}],
)
def test_peft_and_generation_work_on_what_is_exported(changes: dict, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = small_model(**changes)
    weights = Weights(config)
    write_weights(tmp_path / "m.pt", weights.meta, weights)
    (tmp_path / "m.json").write_text(json.dumps(config.to_json()))
    name = export_folder(tmp_path / "m.pt", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == name
    ids = torch.tensor([[5, 6, 7]])
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert alone.shape == (1, 7)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(weight.grad is not None for name, weight in adapted.named_parameters() if "lora_B" in name)


def test_a_reference_may_be_another_one_only_where_it_is_the_same_model(checkpoint: Path, tmp_path: Path) -> None:
    export_folder(checkpoint, tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    export_folder(checkpoint, tmp_path / "again", tmp_path / "hf")
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 5e5}))
    with pytest.raises(UserError, match=r"describes another model than .*base is 10000.0 there, 500000.0 here"):
        export_folder(checkpoint, tmp_path / "no", tmp_path / "hf")


def test_all_but_weights_travels_with_a_kept_configuration(checkpoint: Path, tmp_path: Path) -> None:
    export_folder(checkpoint, tmp_path / "hf")
    for name, text in {
        "qwen.tiktoken": "x",
        "tokenization_qwen.py": "y",
        "LICENSE": "z",
        "pytorch_model.bin.index.json": "{}",
        ".hidden": "h",
    }.items():
        (tmp_path / "hf" / name).write_text(text)
    export_folder(
        checkpoint, tmp_path / "kept", tmp_path / "hf", options=ExportOptions(dtype="bf16", keep_reference=True)
    )
    names = {file.name for file in (tmp_path / "kept").iterdir()}
    assert {"qwen.tiktoken", "tokenization_qwen.py", "LICENSE", "tokenizer.json", "model.safetensors"} <= names
    assert not {"pytorch_model.bin.index.json", ".hidden"} & names
    config = json.loads((tmp_path / "kept" / "config.json").read_text())
    assert config == {**json.loads((tmp_path / "hf" / "config.json").read_text()), "torch_dtype": "bfloat16"}


def test_a_tokenizer_that_only_its_own_code_reads_gets_a_warning(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export_folder(checkpoint, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").rename(tmp_path / "hf" / "qwen.tiktoken")
    export_folder(checkpoint, tmp_path / "out", tmp_path / "hf")
    assert "--keep-reference-config takes both" in caplog.text


def test_verification_uses_texts_where_a_tokenizer_is_there(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(checkpoint), str(tmp_path / "hf"), "--verify"]) == 0
    assert "3 texts of" in capsys.readouterr().out
    shutil.copyfile(tmp_path / "hf" / "config.json", tmp_path / "hf" / "config.json.old")
    import_folder(tmp_path / "hf", tmp_path / "m.pt")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    from fm9g.convert.source import open_9g_source
    from fm9g.convert.verify import verify

    source = open_9g_source(tmp_path / "m.pt")
    diff = verify(tmp_path / "hf", source.config, source.weights)
    assert not diff.passed


def test_generation_ends_where_the_template_ends_a_turn(checkpoint: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    """The checkpoint's chat template takes precedence over a reference's generation settings."""
    from tokenizers import Tokenizer

    shutil.copytree(tokenizer_path, tmp_path / "chat")
    model = Tokenizer.from_file(str(tmp_path / "chat" / "tokenizer.json"))
    model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    model.save(str(tmp_path / "chat" / "tokenizer.json"))
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    trained = make_checkpoint(tmp_path / "chat-run", tmp_path / "chat", chatml)
    end = model.token_to_id("<|im_end|>")
    export_folder(trained, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [end, 1]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 1
    reference = json.loads((tmp_path / "hf" / "generation_config.json").read_text()) | {"eos_token_id": 1, "top_k": 7}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(reference))
    export_folder(trained, tmp_path / "again", tmp_path / "hf")
    settings = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["top_k"]) == ([end, 1], 7)
    # A template whose turns end with the tokenizer's own token needs no other.
    export_folder(checkpoint, tmp_path / "own")
    assert json.loads((tmp_path / "own" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_chat_template_that_is_not_jinja_is_named(checkpoint: Path, tmp_path: Path) -> None:
    export_folder(checkpoint, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{")
    shutil.copy(next(checkpoint.glob("*.pt")), tmp_path / "m.pt")
    shutil.copy(checkpoint / "config.json", tmp_path / "m.json")
    with pytest.raises(UserError, match=rf"chat template of {tmp_path / 'hf'}, line 1"):
        export_folder(tmp_path / "m.pt", tmp_path / "again", tmp_path / "hf")


def test_what_is_exported_needs_no_code_of_a_tokenizer(tmp_path: Path, tokenizer_path: Path, shared: Path) -> None:
    from transformers import AutoTokenizer

    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    shutil.copytree(tokenizer_path, fast)
    slow.mkdir()
    shutil.copyfile(shared / "tokenizers" / "9g-2b" / "tokenizer.model", slow / "tokenizer.model")
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": False}
    (fast / "tokenizer_config.json").write_text(json.dumps(own | {"bos_token": "<s>", "eos_token": "</s>"}))
    (slow / "tokenizer_config.json").write_text(json.dumps(own | settings | {"legacy": False}))
    text = "九格大模型 is  a model.\n 你好\t x=1"
    for source, reading in ((fast, tokenizer_path), (slow, shared / "tokenizers" / "9g-2b")):
        out = tmp_path / f"out-{source.name}"
        out.mkdir()
        assert write_tokenizer(source, None, out).opener == "AutoTokenizer"
        assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
        reference = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
        assert reference(text, add_special_tokens=False)["input_ids"] == list(load_tokenizer(reading).encode(text))


def test_named_templates_travel_unless_the_checkpoint_was_trained_with_one(
    checkpoint: Path, tmp_path: Path, tokenizer_path: Path
) -> None:
    from transformers import AutoTokenizer

    named = tmp_path / "named"
    shutil.copytree(tokenizer_path, named)
    (named / "additional_chat_templates").mkdir()
    (named / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (named / CHAT_TEMPLATE).write_text("plain")
    for trained, expected in ((None, {"default": "plain", "tool_use": "tools"}), (checkpoint, TEMPLATE)):
        out = tmp_path / f"out-{trained is None}"
        out.mkdir()
        write_tokenizer(named, trained, out)
        assert AutoTokenizer.from_pretrained(out).chat_template == expected


def test_every_file_of_a_tokenizer_travels(tmp_path: Path, tokenizer_path: Path) -> None:
    shutil.copytree(tokenizer_path, tmp_path / "t")
    out = tmp_path / "out"
    out.mkdir()
    names = {"special_tokens_map.json", "vocab.json", "merges.txt", "x.tiktoken", "tokenizer.model.v3", "tekken.json"}
    for name in names:
        (tmp_path / "t" / name).write_text("{}")
    (tmp_path / "t" / "added_tokens.json").write_text('{"</s>": 1}')
    (tmp_path / "t" / "model.safetensors").write_text("no part of it")
    assert write_tokenizer(tmp_path / "t", None, out).opener == "AutoTokenizer"
    expected = {*names, "added_tokens.json", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == expected


@pytest.mark.slow
def test_a_tokenizer_that_transformers_would_read_otherwise_is_left_out(
    tmp_path: Path, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As InternLM2's, whose code gives pieces of the SentencePiece model other names."""
    source, out = tmp_path / "t", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    shutil.copyfile(shared / "tokenizers" / "9g-2b" / "tokenizer.model", source / "tokenizer.model")
    named = {"90000": {"content": "<|im_start|>", "special": True}}
    settings = {"auto_map": {"AutoTokenizer": ["own.T", None]}, "tokenizer_class": "T", "added_tokens_decoder": named}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert write_tokenizer(source, None, out).opener == ""
    assert not list(out.iterdir())
    error = caplog.text
    assert "so the folder gets none (transformers opens it as LlamaTokenizer, where <|im_start|> is" in error
    assert "and not 90000); --keep-reference-config takes both" in error


def test_a_class_that_transformers_takes_for_a_kind_of_models_gets_a_warning(
    tmp_path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For Qwen2 models AutoTokenizer takes Qwen2's class, whatever the settings name; the ids then differ."""
    import transformers

    trained = make_checkpoint(tmp_path / "run", tokenizer_path, TEMPLATE, small_model(qkv_bias=True))
    export_folder(trained, tmp_path / "hf")
    assert "to other ids; PreTrainedTokenizerFast.from_pretrained opens it" in caplog.text
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast" in card
    text = "in 1863"
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert reference.encode(text, add_special_tokens=False) == load_tokenizer(tokenizer_path).encode(text)


def test_named_templates_in_the_configuration_stay_unless_the_checkpoint_was_trained_with_one(
    checkpoint: Path, tmp_path: Path, tokenizer_path: Path
) -> None:
    from transformers import AutoTokenizer

    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    shutil.copytree(tokenizer_path, tmp_path / "named")
    file = tmp_path / "named" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    for trained, inside, found in (
        (None, named, {"default": "plain", "tool_use": "tools"}),
        (checkpoint, TEMPLATE, TEMPLATE),
    ):
        out = tmp_path / f"out-{trained is None}"
        out.mkdir()
        write_tokenizer(tmp_path / "named", trained, out)
        assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == inside
        assert AutoTokenizer.from_pretrained(out).chat_template == found


def test_the_template_inside_the_tokenizer_of_a_checkpoint_goes_before_the_one_of_a_reference(
    checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    export_folder(checkpoint, tmp_path / "hf")
    (tmp_path / "hf" / CHAT_TEMPLATE).write_text("of the reference")
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    (tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja").write_text("of the reference, too")
    own = checkpoint / "tokenizer"
    (own / CHAT_TEMPLATE).unlink()
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "of the checkpoint"}))
    for out in (tmp_path / "native", tmp_path / "kept"):
        out.mkdir()
    write_tokenizer(tmp_path / "hf", checkpoint, tmp_path / "native")
    copy_aux_files(tmp_path / "hf", checkpoint, tmp_path / "kept")
    for out in (tmp_path / "native", tmp_path / "kept"):
        assert AutoTokenizer.from_pretrained(out).chat_template == "of the checkpoint"
    copy_aux_files(tmp_path / "hf", None, tmp_path / "kept")
    assert (tmp_path / "kept" / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_a_sentencepiece_model_is_exported_with_equal_ids(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from fm9g.data.encode.tokenizer_loading import load_tokenizer

    source = shared / "tokenizers" / "9g-2b"
    written = write_tokenizer(source, None, tmp_path).tokenizer
    text = "九格大模型 is  a model.\n 你好\t🚀 x=1"
    assert written is not None
    assert (written.bos_id, written.eos_id) == (1, 2)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == [1, *load_tokenizer(source).encode(text)]
