"""Continuations by transformers' generate(), several prompts at a time.

transformers runs the model and keeps its cache; which token comes next, and when a continuation ends, a Continuation
says. So each text is the same alone and in a batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fm9g.errors import UserError
from fm9g.infer.completion import Completion, Piece
from fm9g.infer.continuation import Continuation
from fm9g.infer.open_model import LoadedModel
from fm9g.infer.options import GenerationOptions
from fm9g.progress import Progress

BATCH_SIZE = 8


def generate_batches(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions = GenerationOptions(),
    *,
    chat: bool = False,
    batch_size: int = BATCH_SIZE,
    on_completions: Callable[[int, list[Completion]], None] | None = None,
) -> list[list[Completion]]:
    """The continuations of many prompts, by the active adapter.

    Prompts of about the same length share a batch. The continuations of a prompt do not depend on the others.

    Args:
        prompts: token ids of each.
        chat: whether an end of a turn ends a continuation.
        batch_size: continuations at a time.
        on_completions: receives the number of a prompt and its continuations as soon as they are complete.

    Returns:
        For each prompt its `num_return_sequences` continuations.
    """
    for prompt in prompts:
        check_length(model, prompt, options)
    results: dict[int, list[Completion]] = {number: [] for number in range(len(prompts))}
    order = sorted(results, key=lambda number: len(prompts[number]), reverse=True)  # a lack of memory shows at once
    rows = [(number, index) for number in order for index in range(options.num_return_sequences)]
    with Progress("generating", len(rows), "continuations") as progress:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            continuations = [_continuation(model, prompts[number], options, chat, index) for number, index in batch]
            _run(model, continuations)
            for (number, _), continuation in zip(batch, continuations):
                results[number].append(continuation.completion())
                if on_completions and len(results[number]) == options.num_return_sequences:
                    on_completions(number, results[number])
            progress.advance(len(batch))
    return [results[number] for number in range(len(prompts))]


def stream(
    model: LoadedModel, prompt: Sequence[int], options: GenerationOptions = GenerationOptions(), chat: bool = False
) -> Iterator[Piece]:
    """The pieces of the continuations of one prompt, as they come. Closing the iterator ends the generation."""
    check_length(model, prompt, options)
    continuations = [
        _continuation(model, prompt, options, chat, index) for index in range(options.num_return_sequences)
    ]
    pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def run() -> None:
        try:
            _run(model, continuations, pieces.put, cancelled)
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    thread = threading.Thread(target=run, name="fm9g generation", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        cancelled.set()
        thread.join()


def check_length(model: LoadedModel, prompt: Sequence[int], options: GenerationOptions) -> None:
    """Raises UserError if a prompt leaves no room for a token."""
    if len(prompt) >= model.max_model_len:
        raise UserError(
            f"prompt: is {len(prompt)} tokens, and the model's context is {model.max_model_len}; shorten it"
        )


def _continuation(
    model: LoadedModel, prompt: Sequence[int], options: GenerationOptions, chat: bool, index: int
) -> Continuation:
    room = model.max_model_len - len(prompt)
    options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
    return Continuation(prompt, options, model.prompts.stop_ids(chat), model.prompts.tokenizer, index)


@torch.inference_mode()
def _run(
    model: LoadedModel,
    continuations: Sequence[Continuation],
    on_piece: Callable[[Piece], None] | None = None,
    cancelled: threading.Event | None = None,
) -> None:
    """Generates several continuations in one batch, padded on the left."""
    width = max(len(continuation.prompt) for continuation in continuations)
    ids = torch.zeros(len(continuations), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, continuation in enumerate(continuations):
        ids[row, width - len(continuation.prompt) :] = torch.tensor(continuation.prompt)
        mask[row, width - len(continuation.prompt) :] = 1
    rows = _Rows(continuations, on_piece, cancelled)
    model.model.generate(
        ids.to(model.model.device),
        attention_mask=mask.to(model.model.device),
        generation_config=GenerationConfig(
            max_new_tokens=max(continuation.max_new_tokens for continuation in continuations),
            do_sample=False,
            pad_token_id=0,
        ),
        logits_processor=LogitsProcessorList([rows]),
        stopping_criteria=StoppingCriteriaList([_AllDone(rows)]),
    )


class _Rows(LogitsProcessor):
    """Lets each continuation choose its token, and leaves generate() no other."""

    def __init__(
        self,
        continuations: Sequence[Continuation],
        on_piece: Callable[[Piece], None] | None,
        cancelled: threading.Event | None,
    ) -> None:
        self._continuations, self._on_piece, self._cancelled = continuations, on_piece, cancelled

    @property
    def done(self) -> bool:
        """Whether nothing is left to generate."""
        return (self._cancelled is not None and self._cancelled.is_set()) or all(
            continuation.finish_reason for continuation in self._continuations
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        for row, continuation in enumerate(self._continuations):
            token = 0  # of a row that has ended
            if not continuation.finish_reason:
                piece = continuation.step(scores[row])
                token = continuation.token_ids[-1]
                if self._on_piece:
                    self._on_piece(piece)
            chosen[row, token] = 0
        return chosen


class _AllDone(StoppingCriteria):
    """Ends generate() when no row has anything left."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self._rows.done, device=input_ids.device)
