"""What the HTTP application needs from whoever generates."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from fm9g.infer.completion import Piece
from fm9g.infer.options import GenerationOptions


class Engine(Protocol):
    """Generates for many requests at once, in the process of the HTTP application.

    Attributes:
        model_names: what requests call the model: its own name first, then one per adapter.
        max_model_len: maximum of prompt and continuation together, in tokens.
        vocab_size: number of token ids.
    """

    model_names: tuple[str, ...]
    max_model_len: int
    vocab_size: int

    def encode_chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, with the beginning of the answer.

        Messages have role, content (a text), and where they apply tool_calls and tool_call_id, as in the OpenAI API.
        Raises UserError if there is no chat template, or it refuses the conversation.
        """

    def encode_text(self, model: str, text: str) -> list[int]:
        """Token ids of a plain prompt."""

    def token_text(self, model: str, token_id: int) -> str:
        """The text of one token, special tokens included; for log-probabilities."""

    def stream(self, model: str, prompt: Sequence[int], options: GenerationOptions) -> AsyncGenerator[Piece, None]:
        """The pieces of the continuations of a prompt, as they come, those of several continuations interleaved.

        The last piece of each continuation has its finish_reason. Closing the iterator (aclose) frees its place.

        Args:
            model: one of model_names.
        Raises UserError for a request that cannot be run, RuntimeError if generation failed.
        """

    @property
    def num_running(self) -> int:
        """Continuations that are generated now."""

    @property
    def num_waiting(self) -> int:
        """Continuations that wait for a place."""

    @property
    def failure(self) -> str:
        """Why nothing can be generated any more; empty while all is well."""

    async def close(self) -> None:
        """Ends what runs and frees the memory."""
