"""Tokenizer folders of every layout give the ids that transformers gives, and text stays text."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fm9g.data.encode.template import load_template
from fm9g.data.encode.tokenizer import Tokenizer, load_tokenizer
from fm9g.errors import UserError

TEXTS = [
    "plain text",
    " leading and  double spaces \n\n",
    "深度学习 模型🚀 é 123456",
    "def f(x):\n\treturn x  # code",
    "Yes",
    "",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "深度 q?"},
    {"role": "assistant", "content": "a\n\nb"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "plain text, double spaces",
    "深度学习 模型",
    "def f(x): return x  # code Yes",
    "assistant\nuser\nsystem",
] * 20


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def bpe(trim: bool = True, merges: int = 100) -> Any:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    model = Model(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    model.post_processor = processors.ByteLevel(trim_offsets=trim)
    return model


def fast(folder: Path, **config: Any) -> Path:
    from tokenizers import AddedToken

    model = bpe()
    model.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    model.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    return write(folder, tokenizer_config__json=settings | config)


def qwen2(folder: Path) -> Path:
    """vocab.json and merges.txt, as Qwen2's and GPT-2's folders have, with added tokens in the configuration."""
    folder.mkdir()
    bpe().model.save(str(folder))
    first = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    added = {
        str(first + i): {"content": text, "special": True} for i, text in enumerate(["<|endoftext|>", *SPECIAL[2:]])
    }
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return write(folder, tokenizer_config__json={**settings, "added_tokens_decoder": added, "chat_template": CHATML})


def sentencepiece_model(folder: Path, kind: str, **options: Any) -> Path:
    import sentencepiece

    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=400 if kind == "bpe" else 340,
            model_type=kind, byte_fallback=True, minloglevel=2, hard_vocab_limit=False, **options,
        )  # fmt: skip
    return folder


def llama(folder: Path, kind: str = "bpe") -> Path:
    """A SentencePiece model with tokens beside it (InternLM2, Yi, Llama with ChatML)."""
    import sentencepiece

    sentencepiece_model(folder, kind)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = {text: size + i for i, text in enumerate(SPECIAL[2:])}
    settings = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
        "add_bos_token": True, "additional_special_tokens": SPECIAL[2:], "chat_template": CHATML,
    }  # fmt: skip
    return write(folder, tokenizer_config__json=settings, added_tokens__json=added)


def byt5(folder: Path) -> Path:
    """A class of transformers that is written in Python, and has no file for its vocabulary."""
    settings = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "extra_ids": 0, "chat_template": CHATML}
    return write(folder, tokenizer_config__json=settings)


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json": fast,
    "tokenizer.json, bos in front": lambda folder: with_post_processor(fast(folder, bos_token="<s>")),
    "tokenizer.json, bos that is not put in front": lambda folder: fast(folder, bos_token="<s>", add_bos_token=False),
    "vocab.json and merges.txt": qwen2,
    "tokenizer.model (BPE) and added_tokens.json": llama,
    "tokenizer.model (unigram) and added_tokens.json": lambda folder: llama(folder, "unigram"),
    "a class in Python": byt5,
}


def with_post_processor(folder: Path) -> Path:
    from tokenizers import Tokenizer as Model
    from tokenizers import processors

    model = Model.from_file(str(folder / "tokenizer.json"))
    pairs = [("<s>", model.token_to_id("<s>"))]
    model.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=pairs)
    model.save(str(folder / "tokenizer.json"))
    return folder


def open_both(folder: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_transformers(tmp_path: Path, layout: str) -> None:
    folder = LAYOUTS[layout](tmp_path / "tokenizer")
    ours, theirs = open_both(folder)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert list(ours.encode(text)) == ids
        assert [list(found) for found in ours.encode_batch([text, text])] == [ids, ids]
        whole = theirs(text)["input_ids"]
        assert [*ours.prefix_ids, *ids, *ours.suffix_ids] in (whole, [*whole, ours.eos_id])
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    template = load_template("tokenizer", ours)
    text = theirs.apply_chat_template(CHAT, tokenize=False)
    assert template.render(CHAT) == text
    assert ours.encode_chat(text)[0] == theirs.apply_chat_template(CHAT, return_dict=False)
    copied = pickle.loads(pickle.dumps(ours))
    assert copied.encode_chat(text) == ours.encode_chat(text)
    # A copy of the files that it names is the same tokenizer.
    (tmp_path / "copy").mkdir()
    for file in ours.files:
        shutil.copyfile(file, tmp_path / "copy" / file.name)
    assert load_tokenizer(tmp_path / "copy").encode_chat(text) == ours.encode_chat(text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_spelling_of_a_special_token_in_a_text_stays_text(tmp_path: Path, layout: str) -> None:
    ours, theirs = open_both(LAYOUTS[layout](tmp_path / "tokenizer"))
    special = [text for text in SPECIAL if text in ours.special_ids]
    assert len(special) >= 1
    for text in special:
        plain = f"Price: {text}12 EUR{text}"
        ids = list(ours.encode(plain))
        if text in ours.unescapable_tokens:  # a unigram model has it as a word, whatever is done
            assert "unigram" in layout
            continue
        assert ours.special_ids[text] not in ids
        assert ids == theirs(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        # In a chat, where the others are tokens: the same letters in the same place.
        chat = f"{special[0]}user\na {text} b{special[0]}"
        start = chat.index(text, len(special[0]))
        ids, starts, _ = ours.encode_chat(chat, literal=[(start, start + len(text))])
        kept = [i for i, token in enumerate(ids) if token in ours.special_ids.values()]
        assert [ids[i] for i in kept] == [ours.special_ids[special[0]]] * 2
        assert [starts[i] for i in kept] == [0, len(chat) - len(special[0])]
        assert text in theirs.decode(ids[1:-1]).replace(" ", "")


def test_chat_templates_are_found_where_transformers_looks(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b{{ tools | length }}"}]
    in_config = fast(tmp_path / "in-config", chat_template=named)
    in_file = fast(tmp_path / "in-file", chat_template="not this one")
    write(in_file, chat_template__jinja="a")
    in_folder = fast(tmp_path / "in-folder")
    write(in_folder, chat_template__jinja="a")
    write(in_folder / "additional_chat_templates", tool_use__jinja="b{{ tools | length }}")
    for folder in (in_config, in_file, in_folder):
        ours, theirs = open_both(folder)
        template = load_template("tokenizer", ours)
        for tools in (None, [{"name": "x"}]):
            assert template.render(CHAT, tools) == theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
    assert {file.name for file in ours.files} >= {"chat_template.jinja", "tool_use.jinja"}


def test_a_pad_token_that_a_class_adds_by_itself_is_no_part_of_the_vocabulary(tmp_path: Path) -> None:
    folder = qwen2(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    first, *others = sorted(config["added_tokens_decoder"], key=int)
    names = [config["added_tokens_decoder"][key] for key in others]
    del config["pad_token"]
    config["added_tokens_decoder"] = {str(int(first) + i): name for i, name in enumerate(names)}
    write(folder, tokenizer_config__json=config)
    ours, theirs = open_both(folder)
    assert theirs.pad_token == "<|endoftext|>"  # Qwen2Tokenizer's default, behind all others
    assert ours.vocab_size == theirs.pad_token_id == len(theirs) - 1
    assert max(ours.encode("a<|endoftext|>b")) < ours.vocab_size  # where a text spells it
    chat = "<|im_start|>a<|endoftext|>b"
    literal = [match.span() for match in ours.special_pattern.finditer(chat)][1:]
    assert max(ours.encode_chat(chat, literal=literal)[0]) < ours.vocab_size


def test_code_that_lies_in_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "own",
        tokenizer_config__json={
            "tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["code.OwnTokenizer", None]},
            "eos_token": "x",
        },
        code__py=f"open({str(tmp_path / 'was-run')!r}, 'w')",
        own__tiktoken="YQ== 0",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"its tokenizer is code of its own \(OwnTokenizer\), which is not run"):
        load_tokenizer(folder)
    assert not (tmp_path / "was-run").exists()


def test_a_tiktoken_file_opens_as_transformers_opens_it(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    import base64

    ranks = [bytes([byte]) for byte in range(256)] + [b"pl", b"ai", b"plai"]
    lines = "\n".join(f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    added = {"259": {"content": "<|im_end|>", "special": True}}
    folder = write(tmp_path / "t", tokenizer_config__json={**settings, "added_tokens_decoder": added})
    (folder / "tokenizer.model").write_text(lines)
    ours, theirs = open_both(folder)
    assert list(ours.encode("plain text")) == theirs("plain text", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("trim", [False, True])
def test_the_ids_before_a_border_are_those_of_the_text_before_it(tmp_path: Path, trim: bool) -> None:
    """A token across the border of prompt and answer would be one that the prompt does not end with."""
    from tokenizers import Tokenizer as Model

    folder = fast(tmp_path / "tokenizer")
    model = bpe(trim)
    model.add_special_tokens(SPECIAL)
    model.save(str(folder / "tokenizer.json"))
    assert Model.from_file(str(folder / "tokenizer.json")).encode("Yes Yes").tokens[-1].endswith("Yes")
    ours = load_tokenizer(folder)
    text = "x  # code Yes<|im_end|># code Yes there"
    borders = [text.index("Yes"), text.rindex("Yes")]
    in_one_go = ours.encode_chat(text)[0]
    ids, starts, indices = ours.encode_chat(text, borders)
    assert ids != in_one_go
    for border, index in zip(borders, indices):
        assert starts[index] == border
    assert ids[: indices[0]] == ours.encode_chat(text[: borders[0]])[0]
    assert ids[ids.index(ours.special_ids["<|im_end|>"]) : indices[1]] == ours.encode_chat("<|im_end|># code ")[0]
    assert ours.decode(ids) == ours.decode(in_one_go)
    # Where no token lies across it, nothing changes.
    text = "<|im_start|>assistant\nYes<|im_end|>"
    border = text.index("Yes")
    ids, _, (index,) = ours.encode_chat(text, [border])
    assert ids == ours.encode_chat(text)[0]
    assert index == 1 + len(ours.encode("assistant\n"))


@pytest.mark.parametrize("kind", ["2b", "llama"])
def test_an_answer_after_a_space_begins_without_another(shared: Path, tmp_path: Path, kind: str) -> None:
    """SentencePiece puts a space in front of a text; an answer goes on in a text, and has none."""
    folder = shared / "tokenizers" / "9g-2b" if kind == "2b" else llama(tmp_path / "tokenizer")
    ours = load_tokenizer(folder)
    text = "User: hi\nAssistant: Yes"
    ids, _, (index,) = ours.encode_chat(text, [text.index("Yes")])
    assert ids[:index] == ours.encode_chat("User: hi\nAssistant: ")[0]
    assert ours.decode(ids) == ours.decode(ours.encode_chat(text)[0])
    assert ours.decode(ids[index:]).strip() == "Yes"
    assert not ours.decode([*ids[:1], *ids[index:]]).endswith(" Yes")
