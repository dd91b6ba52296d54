"""Models that a chat talks to: one in memory, or one behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from fm9g.errors import UserError
from fm9g.infer.completion import Piece
from fm9g.infer.options import GenerationOptions

if TYPE_CHECKING:
    from fm9g.infer.open_model import LoadedModel

Messages = Sequence[Mapping[str, Any]]
UNLIMITED = 2**31  # max_model_len of a server that does not tell it


class ChatModel(Protocol):
    """A model that answers conversations.

    Attributes:
        name: what the chat calls it.
        max_model_len: maximum of conversation and answer together, in tokens.
    """

    name: str
    max_model_len: int

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""

    @property
    def adapter(self) -> str:
        """The active adapter; empty: none."""

    def use_adapter(self, name: str) -> None:
        """Switches to an adapter; empty: to the model without any. Raises UserError if there is no such adapter."""

    def count_tokens(self, messages: Messages) -> int:
        """Tokens of a conversation, with the beginning of the answer."""

    def stream(self, messages: Messages, options: GenerationOptions) -> Generator[Piece, None, None]:
        """The pieces of an answer. Closing the generator stops the generation. Raises UserError."""


class LocalChatModel:
    """A model in memory."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self.name, self.max_model_len = model.name, model.max_model_len

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._model.adapters

    @property
    def adapter(self) -> str:
        return self._model.adapter

    def use_adapter(self, name: str) -> None:
        self._model.use_adapter(name)

    def count_tokens(self, messages: Messages) -> int:
        return len(self._model.prompts.encode_chat(messages))

    def stream(self, messages: Messages, options: GenerationOptions) -> Generator[Piece, None, None]:
        from fm9g.infer.generate import stream

        yield from stream(self._model, self._model.prompts.encode_chat(messages), options, chat=True)


class OpenAIChatModel:
    """A model behind an OpenAI-compatible server.

    Args:
        base_url: of the API, as http://HOST:PORT/v1.
        api_key: empty: the server wants none.
        model: one that the server lists; empty: its first one. The others can be chosen like adapters.

    Raises:
        UserError: the package openai is missing, the server cannot be reached, refuses the key, or lacks the model.
    """

    def __init__(self, base_url: str, api_key: str = "", model: str = "") -> None:
        try:
            import openai
        except ImportError:
            raise UserError("a chat with a server needs the package openai; install it: pip install openai") from None

        self._url, self._adapter = base_url, ""
        with self._errors_as_user_error():
            self._client = openai.OpenAI(base_url=base_url, api_key=api_key or "none")
            served = {item.id: item for item in self._client.models.list()}
        if not served:
            raise UserError(f"{base_url}: the server lists no models")
        self.name = model or next(iter(served))
        if self.name not in served:
            raise UserError(f"{base_url}: the server has no model {self.name}; it has: {', '.join(served)}")
        self.adapters = tuple(name for name in served if name != self.name)
        # An addition of vLLM and of `fm9g serve` to the OpenAI API.
        self.max_model_len = int(getattr(served[self.name], "max_model_len", None) or UNLIMITED)

    @property
    def adapter(self) -> str:
        return self._adapter

    def use_adapter(self, name: str) -> None:
        if name and name not in self.adapters:
            raise UserError(f"adapter {name}: unknown; the server has: {', '.join(self.adapters) or 'none'}")
        self._adapter = name

    def count_tokens(self, messages: Messages) -> int:
        """An estimate, because the OpenAI API does not count tokens: one for each 4 bytes."""
        return sum(8 + len(str(message["content"]).encode(errors="replace")) // 4 for message in messages)

    def stream(self, messages: Messages, options: GenerationOptions) -> Generator[Piece, None, None]:
        default = GenerationOptions()
        request: dict[str, Any] = {
            "model": self._adapter or self.name,
            "messages": [dict(message) for message in messages],
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
            "stream": True,
        }
        if options.stop:
            request["stop"] = list(options.stop)
        # Not every server knows these, so only what differs from the default is sent.
        request["extra_body"] = {
            name: getattr(options, name)
            for name in ("top_k", "min_p", "repetition_penalty")
            if getattr(options, name) != getattr(default, name)
        }
        with self._errors_as_user_error(), closing(self._client.chat.completions.create(**request)) as chunks:
            for chunk in chunks:
                for choice in chunk.choices[:1]:
                    yield Piece(choice.delta.content or "", finish_reason=choice.finish_reason or "")

    @contextmanager
    def _errors_as_user_error(self) -> Iterator[None]:
        import httpx  # of openai, which lets its errors through while an answer comes
        import openai

        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise UserError(f"{self._url}: the server refuses the key; give one with --api_key") from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise UserError(f"{self._url}: the server cannot be reached ({reason}); is it running?") from None
        except openai.NotFoundError as error:
            raise UserError(f"{self._url}: not found ({error.message}); does the address end in /v1?") from None
        except openai.APIError as error:
            raise UserError(f"{self._url}: {error.message}") from None
        except (openai.OpenAIError, httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{self._url}: {error}") from None
