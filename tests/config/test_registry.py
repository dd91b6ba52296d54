import os
from pathlib import Path

import jinja2
import pytest

from fm9g.config import registry
from fm9g.config.registry import find_dataset, find_model, find_template, registered_names
from fm9g.errors import UserError
from fm9g.io.yaml_file import read_config_object

USER = """
models:
  my-7b: {model_id: weights, template: my-chat, lora_TM: [q_proj, v_proj]}
  qwen-7b: {model_id: org/name}
datasets:
  my-qa: {dataset_path: qa.jsonl, columns: {prompt: question, response: answer}}
  on-hub: {dataset_id: ms://org/name, subset: zh}
templates:
  my-chat:
    prefix: [[bos_token_id], "{{SYSTEM}}\\n"]
    prompt: "[Round {{ROUND}}] {{QUERY}} = "
    chat_sep: "\\n"
    suffix: [[eos_token_id]]
"""
MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "{{ROUND}}"},
    {"role": "assistant", "content": "3"},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    (tmp_path / "registry.yaml").write_text(USER, encoding="utf-8")
    return tmp_path


def render(name: str, messages: list[dict[str, str]]) -> str:
    environment = jinja2.Environment()
    environment.globals["raise_exception"] = pytest.fail
    source = find_template(name)
    assert source is not None
    return environment.from_string(source).render(messages=messages, bos_token="<s>", eos_token="</s>")


def test_names_of_the_users_file_win_over_the_built_in_ones(folder: Path) -> None:
    assert find_model("qwen-7b") == registry.RegisteredModel("org/name")
    model = find_model("qwen-14b")
    assert model == registry.RegisteredModel("ms://qwen/Qwen-14B", "swift-default", ("qkv",))
    assert find_model("no-such-name") is None
    assert find_dataset("no-such-name") is None
    assert find_template("no-such-name") is None
    assert {"my-7b", "qwen-14b"} <= {*registered_names("models")}


def test_paths_are_beside_the_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "weights").mkdir()
    (folder / "qa.jsonl").touch()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv(registry.VARIABLE, str(folder / "registry.yaml"))
    assert find_model("my-7b") == registry.RegisteredModel(str(folder / "weights"), "my-chat", ("q_proj", "v_proj"))
    assert find_dataset("my-qa") == registry.RegisteredDataset(
        str(folder / "qa.jsonl"), {"prompt": "question", "response": "answer"}
    )
    assert find_dataset("on-hub") == registry.RegisteredDataset("ms://org/name:zh")


def test_a_template_is_its_parts_in_order(folder: Path) -> None:
    assert render("my-chat", MESSAGES) == "<s>S\n[Round 1] 1+1 = 2\n[Round 2] {{ROUND}} = 3</s>"
    assert render("my-chat", MESSAGES[1:3]) == "<s>\n[Round 1] 1+1 = 2</s>"
    assert render("my-chat", MESSAGES[:2]) == "<s>S\n[Round 1] 1+1 = "  # an answer follows: a prompt for generation


def test_a_changed_file_is_read_again(folder: Path) -> None:
    assert find_model("new") is None
    file = folder / "registry.yaml"
    file.write_text("models: {new: {model_id: M}}\n", encoding="utf-8")
    os.utime(file, ns=(1, 1))
    assert find_model("new") == registry.RegisteredModel("M")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {}", "model: unknown section; did you mean 'models'"),
        ("models: {a: b}", "models: expected names with keys and values"),
        ("models: {a: {model_id: M, revision: v2}}", "models: a: revision: fm9g downloads nothing"),
        (
            "models: {a: {model_id: M, ignore_file_pattern: x}}",
            "models: a: ignore_file_pattern: fm9g downloads nothing",
        ),
        ("models: {a: {model_di: M}}", "models: a: model_di: unknown key; did you mean 'model_id'"),
        ("models: {a: {get_function: f}}", "fm9g runs no code of a registry"),
        ("models: {a: {template: t}}", "models: a: model_id: missing"),
        ("datasets: {a: {columns: {}}}", "datasets: a: dataset_path: missing"),
        ("templates: {a: {prompt: Q}}", "templates: a: prompt: has no {{QUERY}}"),
        ("templates: {a: {prompt: '{{QUERY}}', suffix: [[pad_token_id]]}}", "suffix: found .*, expected a list of bos"),
        ("templates: {a: {prompt: '{{QUERY}}', prefix: [1]}}", "prefix: found 1, expected a text"),
    ],
)
def test_mistakes_name_the_file_and_the_key(folder: Path, text: str, message: str) -> None:
    (folder / "registry.yaml").write_text(text, encoding="utf-8")
    os.utime(folder / "registry.yaml", ns=(2, len(text)))
    with pytest.raises(UserError, match=message) as error:
        find_model("a"), find_dataset("a"), find_template("a")
    assert "registry.yaml: " in str(error.value)


@pytest.mark.parametrize("section", ["models", "datasets", "templates"])
def test_every_built_in_entry_can_be_used_or_says_why_not(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    find = {"models": find_model, "datasets": find_dataset, "templates": find_template}[section]
    entries = read_config_object(registry.BUILTIN_REGISTRY)[section]
    assert [*entries] == registered_names(section)
    for name, entry in entries.items():
        if "refused" in entry:
            with pytest.raises(UserError, match=f"^{section}: {name}: "):
                find(name)
        else:
            assert find(name)
            assert section != "templates" or "1+1" in render(name, MESSAGES)
