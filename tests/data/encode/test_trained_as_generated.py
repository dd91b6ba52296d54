"""What is trained on is what generation would have to make, by transformers' own word for it.

For each turn of the assistant, transformers gives the prompt (add_generation_prompt) and the conversation up to the
turn. Their difference is what a model has to make. It is compared with what training sees: for the built-in templates,
for the published ones that trl carries, and for templates of the shapes that are hard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fm9g.config.mixture import BUILTIN_TEMPLATES, TEMPLATE_FOLDER
from fm9g.data.encode.conversation import TURNS
from fm9g.data.encode.encoder import Encoder
from fm9g.data.encode.template import Template, load_template
from fm9g.data.encode.token_array import split_samples, token_ids
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.data.prepare.record_formats import BadRecord

FUNCTION = {"name": "weather", "arguments": {"city": "北京", "days": 2}}
CALL = {"id": "abcDEF123", "type": "function", "function": FUNCTION}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "where"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": PARAMETERS}}]


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


RESULT = turn("tool", "sunny", name="weather", tool_call_id="abcDEF123")
RECORDS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [turn("user", "hi"), turn("assistant", "hello")]},
    "two turns": {
        "messages": [turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2"), turn("assistant", "a2")]
    },
    "system": {
        "messages": [turn("system", "Be brief."), turn("user", "深度 学习?"), turn("assistant", "模型🚀\nline")]
    },
    "a question at the end": {"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r")]},
    "thoughts": {
        "messages": [
            turn("user", "2+2?"),
            turn("assistant", "4", reasoning_content="two and two"),
            turn("user", "3+3?"),
            turn("assistant", "6", reasoning_content="three and three"),
        ]
    },
    "thoughts in contents": {
        "messages": [
            turn("user", "2+2?"),
            turn("assistant", "<think>\nhm\n</think>\n\n4"),
            turn("user", "3+3?"),
            turn("assistant", "<think>\nhm, too\n</think>\n\n6"),
        ]
    },
    "a call and its result": {
        "messages": [
            turn("user", "Weather?"),
            turn("assistant", "", tool_calls=[CALL]),
            RESULT,
            turn("assistant", "Sunny."),
        ],
        "tools": TOOLS,
    },
    "calls of two questions": {
        "messages": [
            turn("system", "Help."),
            turn("user", "Weather?"),
            turn("assistant", "", tool_calls=[CALL], reasoning_content="I ask"),
            RESULT,
            turn("assistant", "Sunny."),
            turn("user", "And now?"),
            turn("assistant", "", tool_calls=[CALL]),
            RESULT,
            turn("assistant", "Still sunny.", reasoning_content="it did not change"),
        ],
        "tools": TOOLS,
    },
    "spaces at the borders": {"messages": [turn("user", " q "), turn("assistant", "\n\n a \n")]},
}

# Shapes of templates, each with what is hard about it.
SHAPES = {
    "the prompt ends with a space": (
        "{% for m in messages %}{{ ('User: ' if m.role == 'user' else 'Assistant: ') + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
    "no prompt of its own": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "an empty thought in the last turn alone": (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "another end for the last turn": (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "tools in the last question": (
        "{% set ns = namespace(last=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if tools and loop.index0 == ns.last %}{{ tools | tojson }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "no end marker": (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}

SPECIAL = """<s> </s> <|im_start|> <|im_end|> <|endoftext|> <|start|> <|end|> <|return|> <|message|> <|channel|>
<|call|> <|user|> <|assistant|> <|system|> <|observation|> <|tool|> [gMASK] <sop> <|turn> <turn|> [INST] [/INST]
[TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]""".split()  # noqa: SIM905
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # as in Qwen3


def published() -> dict[str, str]:
    """The chat templates that trl carries, but those for pictures and those made for training."""
    try:
        from importlib.resources import files

        folder = files("trl") / "chat_templates"
        names = [file.name for file in folder.iterdir() if file.name.endswith(".jinja")]
    except (ImportError, OSError):
        return {}
    left_out = re.compile(r"_training|idefics|llava|smolvlm|_vl|_vl_|diffusion")
    return {
        name.removesuffix(".jinja"): (folder / name).read_text(encoding="utf-8")
        for name in sorted(names)
        if not left_out.search(name.removesuffix(".jinja"))
    }


PUBLISHED = published()
# Each template has its markers as tokens.
TEXTS = [*PUBLISHED.values(), *(Path(file).read_text(encoding="utf-8") for file in TEMPLATE_FOLDER.glob("*.jinja"))]
SPECIAL = list(dict.fromkeys([*SPECIAL, *(marker for text in TEXTS for marker in Template("x", text).markers)]))


@pytest.fixture(scope="module", params=[False, True], ids=["offsets", "trimmed offsets"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A byte-level BPE with merges and many special tokens: ours, and transformers'."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    texts = [
        "User: hi\nAssistant: hello there, Assistant: Yes there\n\n",
        "assistant\nThe weather is sunny.\n",
        "模型 学习",
    ]
    model.train_from_iterator(texts * 20, trainer)
    model.add_tokens([AddedToken(text, special=False, normalized=False) for text in NOT_SPECIAL])
    model.post_processor = processors.ByteLevel(trim_offsets=request.param)
    folder = tmp_path_factory.mktemp("tokenizer")
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    function = FUNCTION | {"arguments": json.dumps(FUNCTION["arguments"], ensure_ascii=False)}
    return message | {"tool_calls": [CALL | {"function": function}]} if "tool_calls" in message else message


def trained_runs(tokens: np.ndarray) -> Iterator[tuple[list[int], list[int]]]:
    """Of each sample's trained runs: all ids before it, and its own."""
    for sample in split_samples(tokens):
        ids, trained = token_ids(sample), (sample >= 0).astype(int)
        borders = np.flatnonzero(np.diff(trained, prepend=0, append=0))
        for start, end in zip(borders[::2], borders[1::2]):
            yield ids[:start].tolist(), ids[start:end].tolist()


def generated(reference: Any, template: str, record: dict[str, Any]) -> list[tuple[list[int], list[int]]] | None:
    """For each turn of the assistant, by transformers: the ids of its prompt, and those that generation has to make.

    None where the prompt is no beginning of the turn: then there is no such generation.
    """
    turns = []
    options = {"chat_template": template, "tools": record.get("tools"), "tokenize": False}
    messages = record["messages"]
    try:
        reference.apply_chat_template(messages, **options)
    except TypeError:  # DeepSeek-V3's takes the arguments of calls as text alone
        messages = [with_json_arguments(message) for message in messages]
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = messages[:number], messages[: number + 1]
        prompt = reference.apply_chat_template(before, add_generation_prompt=True, **options)
        full = reference.apply_chat_template(after, **options)
        if not (message["content"] and full.endswith(message["content"])):
            full = full.rstrip()  # the space after an end marker
        if not full.startswith(prompt):
            return None
        # A model makes its answer from the ids of the prompt; the ids of the answer continue them.
        head, ids = (reference(text, add_special_tokens=False)["input_ids"] for text in (prompt, full))
        answer = ids[len(head) :]
        if ids[: len(head)] != head:
            answer = reference(full[len(prompt) :], add_special_tokens=False)["input_ids"]
        if reference.convert_ids_to_tokens(answer[-1:])[0] not in SPECIAL:
            answer = [*answer, reference.eos_token_id]
        turns.append((head, answer))
    return turns


def compare(actual: Any, reference: Any, template: Template, record: dict[str, Any], turns: str) -> str:
    """Compares a record's trained runs with what generation has to make; what came of it."""
    text = template.sources["default"]
    encoder = Encoder(actual, template, turns=turns)
    try:
        texts = encoder.render(record)
    except BadRecord as error:
        return f"refused: {error}"
    expected = generated(reference, text, record)
    if expected is None:
        return "no generation"
    found = list(trained_runs(encoder.tokenize([texts])[0]))
    assert len(found) == len(expected)
    for (before, run), (head, answer) in zip(found, expected):
        *most, last = answer
        if template.has_generation_blocks(record.get("tools")):
            # LFM2.5's own blocks enclose the line end, too, and leave out calls: what they say is what counts.
            run = run if reference.decode(run[-1:]).strip() else run[:-1]
            assert run == answer[-len(run) :]
            continue
        if turns == "split" or len(split_samples(encoder.tokenize([texts])[0])) == len(expected):
            assert before == head
        # The end of a turn that others follow may be the token that begins the next one (GLM-4).
        assert run[:-1] == most
        assert run[-1] == last or actual.special_token(run[-1])
    return "compared"


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_built_in_templates_train_what_generation_has_to_make(tokenizer: tuple, name: str, turns: str) -> None:
    actual, reference = tokenizer
    template = load_template(name, actual)
    results = {title: compare(actual, reference, template, record, turns) for title, record in RECORDS.items()}
    refused = {title for title, result in results.items() if result != "compared"}
    no_place = {"system", "thoughts", *(title for title, record in RECORDS.items() if "tools" in record)}
    assert refused <= no_place, results


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", SHAPES)
def test_templates_of_every_shape_train_what_generation_has_to_make(tokenizer: tuple, name: str, turns: str) -> None:
    actual, reference = tokenizer
    template = Template(name, SHAPES[name], actual.special_tokens)
    results = {title: compare(actual, reference, template, record, turns) for title, record in RECORDS.items()}
    refused = {title for title, result in results.items() if result != "compared"}
    assert refused <= {"a call and its result", "calls of two questions"}, results


@pytest.mark.parametrize("name", PUBLISHED or ["none"])
def test_published_templates_train_what_generation_has_to_make(tokenizer: tuple, name: str) -> None:
    if not PUBLISHED:
        pytest.skip("trl is not installed")
    actual, reference = tokenizer
    template = Template(name, PUBLISHED[name], actual.special_tokens)
    results = {title: compare(actual, reference, template, record, "auto") for title, record in RECORDS.items()}
    print(name, {t: r for t, r in results.items() if r != "compared"})
    assert results["one question"] in ("compared", "no generation"), results
    assert results["two turns"] == results["one question"], results
