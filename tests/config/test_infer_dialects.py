"""Inference arguments of other tools: infer.sh, LLaMA-Factory, ms-swift, and the scripts of Firefly."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.common import ROOT

from fm9g.config.dialects.infer import OPTIONS, InferRequest, Verb, inference_dialects, translate_inference
from fm9g.config.dialects.table import Dialect, Row
from fm9g.config.dialects.translate import dialects, translate
from fm9g.errors import UserError
from fm9g.infer.hf_folder import OpenOptions
from fm9g.infer.options import GenerationOptions

GUIDES = sorted((ROOT.parent / "shared" / "spec").glob("003_*.txt"))
LISTS = sorted((Path(__file__).parent / "infer_arguments").glob("*.txt"))
DEFAULTS_OF_INFER_SH = {
    "dtype": "bf16", "max_new_tokens": 1024, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.0,
    "seed": 42, "system": "you are a helpful assistant!", "stream": True, "save_generation_config": True,
}  # fmt: skip
DATA_OF_INFER_SH = {
    "data": "blossom-math-zh", "val_split": 0.01, "split_seed": 42, "sample": 20, "references": True,
}  # fmt: skip


def infer_sh(asked: Verb | None = None, **given: Any) -> InferRequest:
    return translate_inference("swift-sft", {"ckpt_dir": "out/best", **given}, asked=asked)


# infer.sh


def test_infer_sh_answers_the_validation_records_unless_a_person_asks() -> None:
    found = infer_sh()
    assert (found.verb, found.model, found.adapters, found.then) == ("generate", "out/best", (), None)
    assert found.options == DEFAULTS_OF_INFER_SH | DATA_OF_INFER_SH
    found = infer_sh(eval_human="true")
    assert (found.verb, found.options, found.notes) == ("chat", DEFAULTS_OF_INFER_SH, ())


@pytest.mark.parametrize("given", [{}, {"dataset": ["a", "b"], "dataset_split_seed": 7, "dataset_test_ratio": 0.2}])
def test_the_validation_records_are_those_of_the_training(given: dict[str, Any]) -> None:
    training = translate(dialects()["swift-sft"], given, "x").keys
    options = infer_sh(**given).options
    for key in ("data", "val_split", "split_seed", "system"):
        assert options[key] == training[key]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"do_sample": "false"}, {"temperature": 0.0, "top_k": None, "top_p": None}),
        ({"temperature": "0.3", "top_k": "-1", "top_p": "0.5"}, {"temperature": 0.3, "top_k": 0, "top_p": 0.5}),
        ({"repetition_penalty": "1.1"}, {"repetition_penalty": 1.1}),
        ({"max_new_tokens": "7"}, {"max_new_tokens": 7, "max_model_len": None}),
        ({"max_length": "100", "max_new_tokens": "7"}, {"max_new_tokens": 7, "max_model_len": 107}),
        ({"quantization_bit": "4"}, {"quantization": "nf4"}),
        ({"quantization_bit": "8", "bnb_4bit_quant_type": "fp4"}, {"quantization": "int8"}),
        ({"quantization_bit": "0"}, {"quantization": None}),
        ({"dtype": "fp16"}, {"dtype": "fp16"}),
        ({"seed": "1"}, {"seed": 1}),
        ({"use_streamer": "false"}, {"stream": False}),
        ({"save_generation_config": "false"}, {"save_generation_config": False}),
        ({"show_dataset_sample": "3"}, {"sample": 3}),
        ({"show_dataset_sample": "-1"}, {"sample": 0}),
        ({"dataset": "a b"}, {"data": "a,b"}),
        ({"system": "be brief"}, {"system": "be brief"}),
        ({"template_type": "chatml"}, {"chat_template": "chatml"}),
        ({"template_type": "default-generation"}, {"chat_template": "none"}),
    ],
)
def test_an_argument_of_infer_sh(given: dict[str, Any], expected: dict[str, Any]) -> None:
    options = infer_sh(**given).options
    assert {key: options.get(key) for key in expected} == expected


def test_another_base_is_named_for_an_adapter() -> None:
    found = infer_sh(model_id_or_path="base")
    assert (found.model, found.adapters) == ("base", ("out/best",))
    found = infer_sh(model_id_or_path="base", sft_type="full")
    assert (found.model, found.adapters) == ("out/best", ())


def test_the_adapter_is_merged_first_and_the_merged_model_is_used() -> None:
    found = infer_sh(merge_lora_and_save="true", model_id_or_path="base", eval_human="true")
    assert (found.verb, found.model, found.adapters) == ("merge", "base", ("out/best",))
    assert found.options == {"dtype": "bf16", "output": "out/best-merged"}
    assert found.then == InferRequest("chat", "out/best-merged", (), DEFAULTS_OF_INFER_SH, ())
    found = infer_sh("serve", merge_lora_and_save="true", use_streamer="false", ckpt_dir="runs/lr=1/")
    assert (found.adapters, found.options["output"]) == (("runs/lr=1",), "runs/lr=1-merged")
    assert found.then
    assert found.then.notes == ("command line: --use_streamer: no effect on `fm9g serve`",)
    found = infer_sh(merge_lora_and_save="true")
    assert (found.model, found.adapters) == ("", ("out/best",))  # the adapter names its base


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ckpt_dir": ""}, "--ckpt_dir: is missing; give the checkpoint that the training saved"),
        ({"ckpt_dri": "x"}, "--ckpt_dri: ms-swift of 2023 (infer.sh) has no such argument; did you mean 'ckpt_dir'?"),
        ({"merge_lora_and_save": "true", "sft_type": "full"}, "sft_type full has no adapter to merge"),
        ({"merge_lora_and_save": "true", "quantization_bit": "4"}, "leave out quantization_bit"),
        ({"quantization_bit": "3"}, "--quantization_bit: found 3, expected 4 or 8"),
        ({"quantization_bit": "4", "bnb_4bit_quant_type": "fp4"}, "a model is opened in nf4, not in fp4"),
        ({"eval_human": "perhaps"}, "--eval_human: found 'perhaps', expected true or false"),
        ({"show_dataset_sample": "0"}, "expected a number from 1, or -1 for all records"),
        ({"temperature": "hot"}, "--temperature: found 'hot', expected a number"),
        ({"seed": "1.5"}, "--seed: found 1.5, expected a whole number"),
        ({"ignore_args_error": "true"}, "a wrong argument would have no effect, unseen"),
        ({"template_type": "chatglm2"}, "fm9g has no ChatGLM2 model"),
    ],
)
def test_a_mistake_in_infer_sh(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        infer_sh(**given)


def test_every_argument_of_the_guide_has_a_row() -> None:
    if not GUIDES:
        pytest.skip("../shared is missing")
    section = GUIDES[0].read_text(encoding="utf-8").split("### infer.sh")[1].split("\n#")[0]
    names = re.findall(r"^- `--(\w+)`", section, re.MULTILINE)
    rows = inference_dialects()["swift-sft"].by_name
    assert len(names) == 28
    assert [name for name in names if name not in rows or "training" in rows[name].ignored] == []


def test_the_defaults_of_the_guide() -> None:
    if not GUIDES:
        pytest.skip("../shared is missing")
    section = GUIDES[0].read_text(encoding="utf-8").split("### infer.sh")[1].split("\n#")[0]
    found = dict(re.findall(r"^- `--(\w+)`:.*?默认(?:值)?为`?([^`,. ]+(?:\.\d+)?)", section, re.MULTILINE))
    assert len(found) > 20
    plain = infer_sh().options
    for name, text in found.items():
        value = {"None": None, "'you": "you are a helpful assistant!", "1.": 1.0}.get(text, text.strip("'"))
        assert name == "max_length" or infer_sh(**{name: value}).options == plain, name


# The command that was asked for


@pytest.mark.parametrize(
    ("asked", "given", "verb", "note"),
    [
        ("chat", {}, "chat", ""),  # a default of the tool is no wish of the user
        ("chat", {"eval_human": False}, "generate", "--eval_human: `fm9g generate` is run, not `fm9g chat`"),
        ("generate", {"eval_human": True}, "chat", "--eval_human: `fm9g chat` is run, not `fm9g generate`"),
        ("generate", {}, "generate", ""),
        ("serve", {"dataset": "d"}, "serve", "--dataset: no effect on `fm9g serve`"),
        ("serve", {}, "serve", ""),
        ("chat", {"show_dataset_sample": 3}, "chat", "--show_dataset_sample: no effect on `fm9g chat`"),
        ("merge", {}, "merge", ""),
    ],
)
def test_the_command_is_the_one_asked_for_unless_the_arguments_name_another(
    asked: Verb, given: dict[str, Any], verb: Verb, note: str
) -> None:
    found = infer_sh(asked, **given)
    assert found.verb == verb
    assert found.then is None
    assert found.notes == ((f"command line: {note}",) if note else ())
    assert found.options.keys() <= {*OPTIONS[verb], "output"}


def test_only_tools_with_inference_arguments_are_known() -> None:
    with pytest.raises(UserError, match=r"--from: found 'swfit', expected one of [^;]+; did you mean 'swift'"):
        translate_inference("swfit", {})
    with pytest.raises(UserError, match="--from: found 'deepspeed', expected one of llamafactory"):
        translate_inference("deepspeed", {})


def test_the_options_are_those_of_a_generation() -> None:
    sampling, opening = ({field.name for field in fields(kind)} for kind in (GenerationOptions, OpenOptions))
    for verb in ("generate", "chat", "serve"):
        assert sampling | opening <= set(OPTIONS[verb])


# LLaMA-Factory


def factory(asked: Verb | None = None, **given: Any) -> InferRequest:
    return translate_inference("llamafactory", {"model_name_or_path": "M", **given}, "api.yaml", asked)


def test_llamafactory_chats_with_an_adapter() -> None:
    found = factory(adapter_name_or_path="A", template="llama3", infer_backend="huggingface", trust_remote_code=True)
    assert (found.verb, found.model, found.adapters) == ("chat", "M", ("A",))
    assert found.options == {
        "chat_template": "llama", "dtype": "auto", "temperature": 0.95, "top_p": 0.7, "top_k": 50,
        "max_new_tokens": 1024,
    }  # fmt: skip
    assert found.notes == ("trust_remote_code: no effect here: no code of a model is run",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"do_sample": False}, {"temperature": 0.0, "top_p": None}),
        ({"temperature": 0}, {"temperature": 0.0, "top_k": None}),
        ({"max_length": 50}, {"max_new_tokens": 1024, "max_model_len": None}),
        ({"max_length": 50, "max_new_tokens": -1}, {"max_new_tokens": 50, "max_model_len": 50}),
        ({"infer_dtype": "bfloat16"}, {"dtype": "bf16"}),
        ({"quantization_bit": 4}, {"quantization": "nf4"}),
        ({"default_system": "s"}, {"system": "s"}),
        ({"repetition_penalty": 1.2, "num_beams": 1}, {"repetition_penalty": 1.2}),
        ({"template": "gemma"}, {"chat_template": None}),
    ],
)
def test_an_argument_of_llamafactory(given: dict[str, Any], expected: dict[str, Any]) -> None:
    options = factory(**given).options
    assert {key: options.get(key) for key in expected} == expected


def test_llamafactory_serves_with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_PORT", "9")
    found = factory("serve", infer_backend="vllm", vllm_maxlen=100, default_system="s")
    assert found.options["backend"] == "vllm"
    assert found.options["max_model_len"] == 100
    assert found.options["gpu_memory_utilization"] == 0.7
    assert found.notes == (
        "API_PORT: is not read; write --port",
        "host: --host 0.0.0.0 --api_keys FILE serves all addresses, as there, but with keys",
        "api.yaml: default_system: no effect on `fm9g serve`",
    )
    assert "backend" not in factory("serve", vllm_maxlen=100).options


def test_llamafactory_exports() -> None:
    found = factory("merge", adapter_name_or_path="A", export_dir="out", export_size=2, infer_dtype="float16")
    assert found == InferRequest(
        "merge", "M", ("A",), {"output": "out", "dtype": "fp16"},
        ("export_size: no effect here: a file of weights has up to 5 GB",),
    )  # fmt: skip
    assert factory(adapter_name_or_path="A", export_dir="out").verb == "merge"
    found = factory("chat", adapter_name_or_path="A", export_dir="out")
    assert (found.verb, found.notes) == ("chat", ("api.yaml: export_dir: no effect on `fm9g chat`",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "api.yaml: num_beams: texts are sampled"),
        ({"infer_backend": "sglang"}, "infer_backend: sglang is not supported; write huggingface or vllm"),
        ({"infer_backend": "vlm"}, "found 'vlm', expected one of huggingface, vllm, sglang, ktransformers; did you"),
        ({"adapter_name_or_path": "A,B"}, "`fm9g lora combine A B --out FOLDER` makes one of them"),
        ({"adapter_name_or_path": "A", "finetuning_type": "full"}, "finetuning_type full has no adapter"),
        ({"export_dir": "out"}, "`fm9g convert MODEL FOLDER` writes a model"),
        ({"export_quantization_bit": 4}, "weights are not calibrated"),
        ({"stage": "rm"}, "models continue texts"),
        ({"shift_attn": True}, "it changes the model"),
        ({"model_name_or_path": None}, "api.yaml: model_name_or_path is missing"),
    ],
)
def test_a_mistake_in_llamafactory(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        factory(**given)


def test_a_merge_of_quantized_weights_is_refused() -> None:
    with pytest.raises(UserError, match=r"api\.yaml: quantization_bit: an adapter is merged into weights that are not"):
        factory("merge", adapter_name_or_path="A", export_dir="out", quantization_bit=4)


# ms-swift


def swift(asked: Verb | None = None, **given: Any) -> InferRequest:
    return translate_inference("swift", given, asked=asked)


def test_swift_infer_answers_records_if_there_are_any() -> None:
    found = swift(adapters="out/A", val_dataset=["v.json"], val_dataset_sample="5", result_path="r.jsonl", stream=True)
    assert (found.verb, found.model, found.adapters) == ("generate", "out/A", ())
    assert found.options == {
        "data": "v.json", "references": True, "sample": 5, "output": "r.jsonl", "stream": True, "max_new_tokens": 2048,
        "seed": 42, "split_seed": 42,
    }  # fmt: skip
    found = swift(model="M", dataset="d", split_dataset_ratio=0.1, data_seed=3)
    assert (found.options["data"], found.options["val_split"], found.options["split_seed"]) == ("d", 0.1, 3)
    assert swift(model="M").verb == "chat"
    found = swift("chat", model="M", val_dataset="v.json")
    assert found.verb == "generate"
    assert "command line: --val_dataset: `fm9g generate` is run, not `fm9g chat`" in found.notes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": "0", "top_p": "0.5"}, {"temperature": 0.0, "top_p": None}),
        ({"temperature": "0.5", "top_k": "-1"}, {"temperature": 0.5, "top_k": 0}),
        ({"stop_words": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"logprobs": "true"}, {"logprobs": 0}),
        ({"logprobs": "true", "top_logprobs": "5"}, {"logprobs": 5}),
        ({"top_logprobs": "5"}, {"logprobs": None}),
        ({"torch_dtype": "float16"}, {"dtype": "fp16"}),
        ({"quant_method": "bnb", "quant_bits": "8"}, {"quantization": "int8"}),
        ({"max_new_tokens": "9"}, {"max_new_tokens": 9}),
        ({"max_batch_size": "16", "infer_backend": "pt"}, {"max_num_seqs": 16, "backend": None}),
        ({"max_batch_size": "-1"}, {"max_num_seqs": None}),
        ({"max_model_len": "300"}, {"max_model_len": 300}),
        (
            {"infer_backend": "vllm", "vllm_max_num_seqs": 8, "vllm_max_model_len": 99, "vllm_tensor_parallel_size": 2},
            {"backend": "vllm", "max_num_seqs": 8, "max_model_len": 99, "tensor_parallel_size": 2},
        ),
        (
            {"host": "h", "port": "81", "api_key": "123", "served_model_name": "n"},
            {"host": "h", "port": 81, "api_key": "123", "served_model_name": "n", "page": None},
        ),
        ({"server_name": "h", "server_port": 82}, {"host": "h", "port": 82, "page": True}),
        ({"template": "swift-llama"}, {"chat_template": "swift-llama"}),
        ({"use_chat_template": "false"}, {"chat_template": "none"}),
    ],
)
def test_an_argument_of_swift(given: dict[str, Any], expected: dict[str, Any]) -> None:
    options = swift("serve", model="M", **given).options
    assert {key: options.get(key) for key in expected} == expected


def test_swift_deploys_adapters_by_their_names() -> None:
    found = swift("serve", model="M", adapters=["a=out/A", "b=out/B"])
    assert (found.model, found.adapters) == ("M", ("a=out/A", "b=out/B"))


def test_swift_exports() -> None:
    found = swift("merge", adapters="out/A/", merge_lora=True, exist_ok=True)
    assert (found.verb, found.model, found.adapters) == ("merge", "", ("out/A/",))
    assert (found.options, found.then) == ({"overwrite": True, "output": "out/A-merged"}, None)
    found = swift("merge", model="M", adapters="out/A", merge_lora=True, output_dir="out/B")
    assert (found.model, found.options) == ("M", {"output": "out/B"})
    assert swift("merge", adapters="a=out/A", stream=True).notes[-1] == (
        "command line: --stream: no effect on `fm9g lora merge`"
    )
    then = swift("serve", model="M", adapters="out/A", merge_lora=True).then
    assert then
    assert (then.verb, then.model, then.adapters) == ("serve", "out/A-merged", ())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"infer_backend": "lmdeploy"}, "lmdeploy is not supported; write transformers or vllm"),
        ({"adapters": ["A", "B"]}, "several adapters need names"),
        ({"merge_lora": True}, "adapters has 0; give the one to merge"),
        ({"quant_method": "gptq", "quant_bits": 4}, "weights are quantized by bitsandbytes"),
        ({"quant_bits": 4}, "has no effect there without quant_method"),
        ({"metric": "acc"}, "not scored"),
        ({"base_url": "http://x"}, "`fm9g chat --url URL` talks to a server"),
        ({"ssl_keyfile": "k"}, "HTTPS is for a proxy before it"),
        ({"structured_outputs_regex": "a*"}, "texts are not constrained"),
        ({"load_data_args": True}, "give val_dataset"),
        ({"temprature": 1}, "did you mean 'temperature'?"),
    ],
)
def test_a_mistake_in_swift(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        swift(**{"model": "M", **given})


# The scripts of Firefly


@pytest.mark.parametrize("name", ["model_name_or_path", "LLM_MODULE_MODEL_PATH", "model_dir", "base_model_path"])
def test_the_constants_of_the_scripts(name: str) -> None:
    found = translate_inference("finetune-json", {name: "M", "adapter_name_or_path": "A", "load_in_4bit": "True"})
    assert (found.verb, found.model, found.adapters) == ("chat", "M", ("A",))
    assert found.options == {
        "quantization": "nf4", "temperature": 0.35, "top_p": 0.9, "max_new_tokens": 500, "repetition_penalty": 1.0,
    }  # fmt: skip


# All tables


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_every_field_has_a_row(file: Path) -> None:
    """infer_arguments/ lists the fields of the argument classes of a version."""
    name, _, version = file.stem.partition("-")
    dialect = inference_dialects()[name]
    fields = file.read_text(encoding="utf-8").split()
    assert dialect.version == version
    assert len(fields) > 150
    assert [field for field in fields if dialect.row_of(field) is None] == []


@pytest.mark.parametrize("dialect", inference_dialects().values(), ids=lambda dialect: dialect.name)
def test_names_are_unique(dialect: Dialect) -> None:
    names = [name for row in dialect.rows for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("dialect", inference_dialects().values(), ids=lambda dialect: dialect.name)
def test_the_page_lists_the_rows_of_inference(dialect: Dialect) -> None:
    page = (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8")
    section = page.split(f"## Inference: {dialect.title}")[1].split("\n## ")[0]
    shown = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in section.splitlines() if "|" in line)))
    assert {row.name for row in dialect.rows if row.ours or row.rule or row.refused} <= shown


VALUES: tuple[Any, ...] = (
    True, False, 3, 0, 1, 0.25, "somewhere", "lora", "full", "vllm", "bf16", "fp16", "nf4", "fp4", "qwen", "bnb",
    "swift-llama", [1, 2],
)  # fmt: skip
CONTEXTS: tuple[dict[str, Any], ...] = (
    {},
    {"infer_backend": "vllm"},
    {"quantization_bit": 4},
    {"quant_method": "bnb", "quant_bits": 4},
    {"adapter_name_or_path": "A"},
    {"adapters": "A"},
    {"logprobs": True},
    {"temperature": 0.5},
    {"dataset": "d"},
    {"max_new_tokens": -1},
    {"merge_lora_and_save": True},
)


@pytest.mark.parametrize("dialect", inference_dialects().values(), ids=lambda dialect: dialect.name)
def test_no_argument_is_silent(dialect: Dialect) -> None:
    """Every argument sets an option of a command, says why it has no effect, or is refused."""
    contexts = [context for context in CONTEXTS if context.keys() <= dialect.by_name.keys()]
    needed = {"ckpt_dir": "C"} if "ckpt_dir" in dialect.by_name else {}
    silent = [
        row.name
        for row in dialect.rows
        if row.name != dialect.file_argument
        and not any(shows(dialect, row, value, needed | context) for context in contexts for value in VALUES)
    ]
    assert silent == []


def shows(dialect: Dialect, row: Row, value: Any, context: dict[str, Any]) -> bool:
    """Whether the translation says or shows that an argument is given."""
    if row.ignored:
        return not row.ignored.startswith("it is for inference")
    without = translate(dialect, context, "x")
    try:
        found = translate(dialect, context | {row.name: value}, "x")
    except UserError as error:
        return ", expected " not in str(error) and (bool(row.refused) or bool(row.rule))
    known = {
        "verb",
        "model",
        "adapters",
        "merge_first",
        "merge_to",
        *(key for keys in OPTIONS.values() for key in keys),
    }
    assert found.keys.keys() <= known
    return found.keys != without.keys or found.notes != without.notes
