"""Generates for many requests at once: transformers' continuous batching runs the model, each request has its options.

    stream() ──> queue ──> place in the batch ──> ContinuousBatchingManager (a thread of its own)
       ^      (in order)                             │ logits of each step
       └──────────── pieces ──── Continuation <──────┘ _ChooseTokens

Which token comes next, and when a continuation ends, a Continuation says, as in `generate`. So answers are the same
alone and beside others. Requests for another adapter than the active one wait until the batch is empty.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fm9g.errors import UserError, error_text
from fm9g.infer.completion import Piece
from fm9g.infer.continuation import Continuation
from fm9g.infer.open_model import LoadedModel
from fm9g.infer.options import GenerationOptions
from fm9g.process_memory import available_bytes

logger = logging.getLogger(__name__)

MAX_NUM_SEQS = 64
_PAGE_SIZE = 32  # tokens
_MAX_BATCH_TOKENS = 512  # of a step on a CPU: longer prompts take several steps
_CACHE_SHARE = 0.4  # of the free memory, on a CPU
_POLL_SECONDS = 0.005


@dataclass
class _Request:
    """A continuation on its way. pieces: those that `stream` has not passed on yet, or the error that ended it."""

    name: str
    adapter: str
    continuation: Continuation
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    is_running: bool = False


class ContinuousEngine:
    """An Engine of fm9g.serve on a model of transformers. All methods belong to one event loop.

    Args:
        name: what requests call the model without an adapter; its adapters have their own names.
        max_num_seqs: continuations at a time.
        max_model_len: maximum of prompt and continuation together; 0: the model's, as far as memory allows.

    Raises:
        UserError: the cache of a continuation of max_model_len tokens does not fit into memory.
    """

    def __init__(
        self, model: LoadedModel, name: str = "", max_num_seqs: int = MAX_NUM_SEQS, max_model_len: int = 0
    ) -> None:
        self._model, self._max_num_seqs = model, max_num_seqs
        self.model_names = (name or model.name, *model.adapters)
        if len(set(self.model_names)) < len(self.model_names):
            raise UserError(f"{self.model_names[0]}: the model and an adapter have the same name; give another one")
        cache_tokens = _cache_tokens(model.model, max_num_seqs, max_model_len or model.max_model_len)
        self.max_model_len = min(max_model_len or model.max_model_len, model.max_model_len, cache_tokens)
        if max_model_len > self.max_model_len:
            limit = "the model's context" if model.max_model_len < max_model_len else "what fits into memory"
            raise UserError(f"max_model_len: {max_model_len} is more than {limit}, {self.max_model_len} tokens")
        self.vocab_size = int(model.model.config.get_text_config().vocab_size)
        self._numbers = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._running: dict[str, _Request] = {}
        self._starter: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure = ""
        self._manager = _start_manager(model, max_num_seqs, cache_tokens, self._on_logits)

    def encode_chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """See Engine."""
        return self._model.prompts_of(self._adapter(model)).encode_chat(messages, tools)

    def encode_text(self, model: str, text: str) -> list[int]:
        """See Engine."""
        return self._model.prompts_of(self._adapter(model)).encode_text(text)

    def token_text(self, model: str, token_id: int) -> str:
        """See Engine."""
        return str(self._model.prompts_of(self._adapter(model)).tokenizer.decode([token_id]))

    async def stream(
        self, model: str, prompt: Sequence[int], options: GenerationOptions
    ) -> AsyncGenerator[Piece, None]:
        """See Engine."""
        adapter = self._adapter(model)
        prompts = self._model.prompts_of(adapter)
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise UserError(f"prompt: is {len(prompt)} tokens, and the limit is {self.max_model_len}; shorten it")
        options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        requests = [
            _Request(
                f"request-{next(self._numbers)}",
                adapter,
                Continuation(prompt, options, prompts.stop_ids(chat=prompts.can_chat), prompts.tokenizer, index),
                pieces,
            )
            for index in range(options.num_return_sequences)
        ]
        self._waiting.extend(requests)
        self._start_waiting()
        try:
            num_left = len(requests)
            while num_left:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                num_left -= bool(piece.finish_reason)
                yield piece
        finally:
            for request in requests:
                self._drop(request)
            self._start_waiting()

    @property
    def num_running(self) -> int:
        """Continuations that are generated now."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Continuations that wait for a place."""
        return len(self._waiting)

    @property
    def failure(self) -> str:
        """Why nothing can be generated any more; empty while all is well."""
        if not self._failure and not self._manager.is_running():
            self._failure = f"generation has ended: {self._manager.background_thread_status.fatal_error}"
        return self._failure

    async def close(self) -> None:
        """Ends what runs and frees the memory."""
        self._failure = self._failure or "the server is stopping"
        for request in [*self._waiting, *self._running.values()]:
            request.pieces.put_nowait(RuntimeError(self._failure))
        self._waiting.clear()
        await asyncio.to_thread(self._manager.stop, True, None, False, True)

    def _adapter(self, model: str) -> str:
        return "" if model == self.model_names[0] else model

    def _start_waiting(self) -> None:
        """Gives free places to waiting requests, in their order."""
        if self._waiting and (self._starter is None or self._starter.done()):
            self._loop = asyncio.get_running_loop()
            self._starter = self._loop.create_task(self._start_in_order())

    async def _start_in_order(self) -> None:
        while self._waiting and len(self._running) < self._max_num_seqs:
            request = self._waiting[0]
            if request.adapter != self._model.adapter:
                if self._running:
                    return  # the end of the last of them starts this again
                await self._until_idle()
                if self._waiting and self._waiting[0].adapter == request.adapter and not self._running:
                    self._model.use_adapter(request.adapter)
                continue
            self._waiting.popleft()
            self._start(request)

    async def _until_idle(self) -> None:
        """Waits until no step of the model runs, also none for requests that were dropped."""
        while not self.failure and _is_busy(self._manager):
            await asyncio.sleep(_POLL_SECONDS)

    def _start(self, request: _Request) -> None:
        if self.failure:
            request.pieces.put_nowait(RuntimeError(self.failure))
            return
        request.is_running = True
        self._running[request.name] = request
        self._manager.register_result_handler(request.name, lambda output: self._on_end(request, output.error))
        accepted = self._manager.add_request(
            list(request.continuation.prompt),
            request_id=request.name,
            max_new_tokens=request.continuation.max_new_tokens,
            eos_token_id=list(request.continuation.stop_ids),
        )
        if accepted is None:
            self._on_end(request, "the engine takes no more requests")

    def _on_end(self, request: _Request, error: str | None) -> None:
        """transformers is done with a request. It is an error unless the continuation has ended, too."""
        self._running.pop(request.name, None)
        if not request.continuation.finish_reason and request.is_running:
            request.pieces.put_nowait(RuntimeError(error or "generation ended too early"))
        request.is_running = False
        self._start_waiting()

    def _drop(self, request: _Request) -> None:
        """Forgets a request, whether it waits, runs or has ended."""
        if request in self._waiting:
            self._waiting.remove(request)
        if request.is_running:
            request.is_running = False
            self._running.pop(request.name, None)
            self._manager.cancel_request(request.name)
            router = self._manager.output_router
            router.result_handlers.pop(request.name, None)
            while not router.output_queue.empty():  # of requests that ended while they were dropped
                router.output_queue.get_nowait()

    def _on_logits(self, name: str, logits: torch.Tensor) -> int:
        """The next token of a request. Called in the thread of the manager."""
        request = self._running.get(name)
        if request is None or request.continuation.finish_reason:  # dropped, or a stop text has ended it
            return 0
        assert self._loop
        try:
            item: Piece | Exception = request.continuation.step(logits)
        except Exception as error:  # it must not end the other requests of the step
            item = RuntimeError(f"choosing a token failed: {error_text(error)}")
        self._loop.call_soon_threadsafe(request.pieces.put_nowait, item)
        return item.token_ids[0] if isinstance(item, Piece) else 0


def _start_manager(model: LoadedModel, max_num_seqs: int, cache_tokens: int, choose: Any) -> Any:
    """transformers' manager of continuous batching, with our choice of tokens in place of its own."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    on_cpu = model.model.device.type == "cpu"
    manager = model.model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=-(-cache_tokens // _PAGE_SIZE) if on_cpu else None,
            max_batch_tokens=max(_MAX_BATCH_TOKENS, max_num_seqs) if on_cpu else None,
            max_requests_per_batch=max_num_seqs,
            use_async_batching=False,  # the next step needs the tokens that are chosen here
            use_cuda_graph=False,  # a graph would not call Python
            allow_block_sharing=not model.adapters,  # the cache of one adapter must not serve another
        ),
    )
    manager.logit_processor.clear()
    manager.logit_processor.logits_processor.append(_choose_tokens(choose))
    manager.logit_processor.tensors_required = 1
    manager.logit_processor.do_processing = True
    manager.start()
    return manager


def _choose_tokens(choose: Any) -> Any:
    """A processor for continuous batching that leaves each request one token, the one that `choose` says.

    Args:
        choose: takes the name of a request and its logits (V,), and returns a token id.
    """
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

    class ChooseTokens(ContinuousBatchingLogitsProcessor):
        def __init__(self) -> None:
            self.supported_kwargs, self.ignored_kwargs = {}, ()
            self._names: list[str] = []

        def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
            self._names = [request.state.request_id for request in requests_with_new_token]
            return torch.zeros(len(self._names), dtype=torch.int32)

        def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
            chosen = [choose(name, row) for name, row in zip(self._names, scores)]
            only = torch.full_like(scores, -torch.inf)
            only[torch.arange(len(chosen)), torch.tensor(chosen, dtype=torch.long)] = 0
            return only

    return ChooseTokens()


def _is_busy(manager: Any) -> bool:
    processor = manager.batch_processor
    pending = processor is not None and (
        processor.has_pending_requests() or bool(processor.scheduler._requests_to_cancel)
    )
    return bool(pending or not manager.input_queue.empty() or not manager.cancel_queue.empty())


def _cache_tokens(model: Any, max_num_seqs: int, max_model_len: int) -> int:
    """Tokens for which the cache of keys and values has room: all continuations at full length, if memory allows."""
    wanted = max_num_seqs * max_model_len
    if model.device.type != "cpu":
        return wanted  # transformers takes what the GPU has
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    mask = max(_MAX_BATCH_TOKENS, max_num_seqs) * model.dtype.itemsize  # bytes per token of the cache
    room = int(_CACHE_SHARE * min(available_bytes(), 2.0**45)) // (per_token + mask)
    return min(wanted, int(room))
