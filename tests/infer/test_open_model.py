"""Every kind of model opens, and says what transformers says on the exported folder."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fm9g.errors import UserError
from fm9g.infer.generate import generate_batches, stream
from fm9g.infer.hf_folder import OpenOptions
from fm9g.infer.open_model import LoadedModel, open_model, short_name
from fm9g.infer.options import GenerationOptions

from .conftest import PROMPTS, Trained, transformers_answer

GREEDY = GenerationOptions(max_new_tokens=24)


def greedy(model: LoadedModel) -> list[list[int]]:
    prompts = [model.prompts.encode_text(prompt) for prompt in PROMPTS]
    return [list(completions[0].token_ids) for completions in generate_batches(model, prompts, GREEDY)]


@pytest.fixture(scope="module")
def base_answers(trained: Trained) -> list[list[int]]:
    return [transformers_answer(trained.folder, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["folder", "checkpoint", "last", "pt"])
def test_a_full_model_answers_as_the_exported_folder(
    kind: str, trained: Trained, base_answers: list[list[int]], tmp_path: Path
) -> None:
    path = {"folder": trained.folder, "checkpoint": trained.base, "last": trained.base.parent / "last"}.get(kind)
    if path is None:
        path = tmp_path / "own.pt"
        shutil.copy(next(trained.base.glob("*checkpoint*.pt")), path)
        shutil.copy(trained.base / "config.json", tmp_path / "own.json")
        shutil.copytree(trained.base / "tokenizer", tmp_path, dirs_exist_ok=True)
    model = open_model(path)
    assert greedy(model) == base_answers
    assert model.adapters == ()


def test_adapters_are_switched_unmerged_and_answer_as_with_peft(
    trained: Trained, base_answers: list[list[int]]
) -> None:
    expected = {
        name: [transformers_answer(trained.folder, prompt, peft) for prompt in PROMPTS]
        for name, peft in trained.peft.items()
    }
    assert expected["first"] != expected["second"] != base_answers != expected["first"]
    model = open_model(trained.adapters["first"], adapters={"second": trained.peft["second"]})
    own = short_name(str(trained.adapters["first"]))
    assert model.adapters == (own, "second")
    assert model.adapter == own
    for name, answers in ((own, expected["first"]), ("second", expected["second"]), ("", base_answers)) * 2:
        model.use_adapter(name)
        assert greedy(model) == answers, name
    with pytest.raises(UserError, match=f"adapter third: unknown; there are: {own}, second"):
        model.use_adapter("third")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_nf4_answers_as_transformers_with_nf4(trained: Trained) -> None:
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    expected = [transformers_answer(trained.folder, prompt, quantization_config=nf4) for prompt in PROMPTS]
    for path in (trained.folder, trained.base):
        assert greedy(open_model(path, OpenOptions(quantization="nf4"))) == expected


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_type_of_the_weights_is_chosen(trained: Trained, dtype: str, expected: torch.dtype) -> None:
    model = open_model(trained.base, OpenOptions(dtype=dtype))
    assert model.model.dtype == expected
    assert generate_batches(model, [model.prompts.encode_text("the")], GenerationOptions(max_new_tokens=2))


def test_a_chat_ends_at_the_end_of_a_turn_and_its_template_is_that_of_training(trained: Trained) -> None:
    for path in (trained.folder, trained.base, trained.adapters["first"]):
        prompts = open_model(path).prompts
        text = prompts.render([{"role": "user", "content": "hi"}])
        assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), path
    joined = open_model(trained.folder, OpenOptions(chat_template="none")).prompts
    assert joined.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "ab"


def test_samples_depend_on_seed_and_prompt_alone(trained: Trained) -> None:
    model = open_model(trained.folder)
    options = GenerationOptions(
        max_new_tokens=10, temperature=2.0, top_k=200, top_p=0.95, min_p=0.01, repetition_penalty=1.1,
        num_return_sequences=3, logprobs=2,
    )  # fmt: skip
    prompts = [model.prompts.encode_text(prompt) for prompt in PROMPTS]
    together = generate_batches(model, prompts, options, batch_size=7)
    alone = [generate_batches(model, [prompt], options, batch_size=1)[0] for prompt in prompts]
    assert [[c.token_ids for c in each] for each in together] == [[c.token_ids for c in each] for each in alone]
    assert len({completion.token_ids for completion in together[0]}) == 3
    other = generate_batches(model, prompts, GenerationOptions(max_new_tokens=10, temperature=1.0, seed=7))
    assert other[0][0].token_ids != together[0][0].token_ids
    # Log-probabilities are those of the model, before temperature and penalties.
    first = together[0][0]
    expected = model.logits(prompts[0])[-1].log_softmax(-1)
    assert first.logprobs[0].logprob == pytest.approx(float(expected[first.token_ids[0]]), abs=1e-5)
    assert [token for token, _ in first.logprobs[0].top] == expected.topk(2).indices.tolist()
    pieces = list(stream(model, prompts[0], options))
    for completion in together[0]:
        assert "".join(piece.text for piece in pieces if piece.index == completion.index) == completion.text


def test_a_stop_text_ends_the_continuation_and_is_not_part_of_it(trained: Trained) -> None:
    model = open_model(trained.folder)
    prompt = model.prompts.encode_text("the quick")
    (whole,) = generate_batches(model, [prompt], GREEDY)[0]
    stop = whole.text[3:6]
    (cut,) = generate_batches(model, [prompt], GenerationOptions(max_new_tokens=24, stop=("\0", stop)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert stop not in "".join(
        piece.text for piece in stream(model, prompt, GenerationOptions(max_new_tokens=24, stop=(stop,)))
    )


def test_a_prompt_that_fills_the_context_is_refused_and_a_long_answer_ends_there(trained: Trained) -> None:
    model = open_model(trained.folder)
    model.max_model_len = 8
    (answer,) = generate_batches(model, [[5, 6, 7]], GREEDY)[0]
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")
    with pytest.raises(UserError, match="prompt: is 8 tokens, and the model's context is 8"):
        generate_batches(model, [[5] * 8], GREEDY)


def test_what_cannot_be_opened_is_said_in_one_message(trained: Trained, tmp_path: Path) -> None:
    lonely = tmp_path / "lonely"
    shutil.copytree(trained.peft["first"], lonely)
    config = (lonely / "adapter_config.json").read_text().replace(str(trained.folder), "/nowhere")
    (lonely / "adapter_config.json").write_text(config)
    for path, adapters, message in (
        (lonely, {}, "its model /nowhere is not there"),
        (trained.folder, {"a": trained.base}, "is not an adapter"),
        (trained.folder, [str(trained.peft["first"])] * 2, "another one is called peft-first, too; give NAME=PATH"),
        ("tiny", {}, "is a configuration without weights"),
        ("nobody/nothing", {}, "is not on this machine"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(path, adapters=adapters)
    with pytest.raises(UserError, match="device: cuda:7: this machine has"):
        open_model(trained.folder, OpenOptions(device="cuda:7"))
