"""Many requests at once: each is answered as alone, leaves nothing behind, and frees its place when its client goes."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from fm9g.errors import UserError
from fm9g.infer.completion import Piece
from fm9g.infer.continuation import Continuation
from fm9g.infer.continuous import ContinuousEngine
from fm9g.infer.generate import generate_batches
from fm9g.infer.open_model import LoadedModel, open_model
from fm9g.infer.options import GenerationOptions

from .conftest import PROMPTS, Trained

OPTIONS = (
    GenerationOptions(max_new_tokens=20),
    GenerationOptions(max_new_tokens=9, temperature=1.5, top_k=99, min_p=0.001, repetition_penalty=1.2, logprobs=1),
    GenerationOptions(max_new_tokens=15, temperature=0.8, top_p=0.9, num_return_sequences=2, stop=("x", "an")),
)


@pytest.fixture(scope="module")
def model(trained: Trained) -> LoadedModel:
    return open_model(trained.base, adapters={name: str(path) for name, path in trained.peft.items()})


async def collect(engine: ContinuousEngine, name: str, prompt: str, options: GenerationOptions) -> list[list[Piece]]:
    pieces: dict[int, list[Piece]] = {}
    async for piece in engine.stream(name, engine.encode_text(name, prompt), options):
        pieces.setdefault(piece.index, []).append(piece)
    return [pieces[index] for index in sorted(pieces)]


async def leave(engine: ContinuousEngine, name: str, prompt: str, count: int) -> None:
    pieces = engine.stream(name, engine.encode_text(name, prompt), GenerationOptions(max_new_tokens=60))
    for _ in range(count):
        await anext(pieces)
    await pieces.aclose()


def test_requests_for_all_adapters_are_answered_as_alone_while_clients_leave(model: LoadedModel) -> None:
    names = {"own": "", "first": "first", "second": "second"}
    jobs = list(itertools.product(names, PROMPTS, OPTIONS))
    expected = []
    for name, prompt, options in jobs:
        model.use_adapter(names[name])
        (completions,) = generate_batches(model, [model.prompts.encode_text(prompt)], options, chat=True)
        expected.append([(each.text, each.token_ids, each.finish_reason, each.logprobs) for each in completions])

    async def run() -> None:
        engine = ContinuousEngine(model, "own", max_num_seqs=6)
        assert engine.model_names == ("own", "first", "second")
        answers = asyncio.gather(*(collect(engine, *job) for job in jobs))
        leavers = [leave(engine, name, prompt, count) for name in names for prompt in PROMPTS[:2] for count in (0, 3)]
        await asyncio.gather(*leavers)
        for job, answer, wanted in zip(jobs, await answers, expected):
            for pieces, (text, tokens, reason, logprobs) in zip(answer, wanted, strict=True):
                assert "".join(piece.text for piece in pieces) == text, job
                assert tuple(token for piece in pieces for token in piece.token_ids) == tokens
                assert pieces[-1].finish_reason == reason
                found = [entry for piece in pieces for entry in piece.logprobs]
                assert [entry.logprob for entry in found] == pytest.approx(
                    [each.logprob for each in logprobs], abs=1e-4
                )
        await engine._until_idle()
        assert (engine.num_running, engine.num_waiting) == (0, 0)
        assert not engine._manager.output_router.result_handlers
        assert not engine._manager.batch_processor.scheduler.active_requests
        await engine.close()

    asyncio.run(run())


def test_a_failed_choice_ends_its_own_request_alone(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Continuation.step

    def step(self: Continuation, logits: object) -> Piece:
        if self.max_new_tokens == 7:
            raise ValueError("no number")
        return own(self, logits)  # type: ignore[arg-type]

    monkeypatch.setattr(Continuation, "step", step)

    async def run() -> None:
        engine = ContinuousEngine(model, "own", max_num_seqs=4)
        good = asyncio.create_task(collect(engine, "own", "the", GenerationOptions(max_new_tokens=20)))
        with pytest.raises(RuntimeError, match="choosing a token failed: no number"):
            await collect(engine, "own", "over", GenerationOptions(max_new_tokens=7))
        assert (await good)[0][-1].finish_reason
        assert engine.failure == ""
        await engine.close()
        assert engine.failure
        with pytest.raises(RuntimeError, match="stopping"):
            await collect(engine, "own", "over", GenerationOptions())

    asyncio.run(run())


def test_limits_are_checked_when_the_engine_starts_and_per_prompt(model: LoadedModel) -> None:
    with pytest.raises(UserError, match="max_model_len: 999 is more than the model's context, 128 tokens"):
        ContinuousEngine(model, max_model_len=999)
    with pytest.raises(UserError, match="first: the model and an adapter have the same name"):
        ContinuousEngine(model, "first")

    async def run() -> None:
        engine = ContinuousEngine(model, "own", max_model_len=10)
        with pytest.raises(UserError, match="prompt: is 10 tokens, and the limit is 10"):
            async for _ in engine.stream("own", [5] * 10, GenerationOptions()):
                pass
        pieces = [piece async for piece in engine.stream("own", [5] * 8, GenerationOptions())]
        assert len(pieces) == 2
        await engine.close()

    asyncio.run(run())
