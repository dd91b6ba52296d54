"""A chat: one or two models, a conversation with each, and how a question is answered."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from fm9g.chat.conversation import Conversation
from fm9g.chat.model import ChatModel
from fm9g.chat.screen import Screen
from fm9g.errors import UserError
from fm9g.infer.completion import LENGTH
from fm9g.infer.options import GenerationOptions
from fm9g.out_of_memory import oom_as_user_error


class Chat:
    """A chat with one or two models.

    Args:
        stream: show an answer while it is generated; else when it is complete.

    Attributes:
        failed: whether a question had no answer.
        done: whether the user wants to leave.
    """

    def __init__(
        self,
        models: Sequence[ChatModel],
        options: GenerationOptions,
        screen: Screen,
        system: str = "",
        stream: bool = True,
    ) -> None:
        self.models, self.screen, self.is_comparing = models, screen, len(models) > 1
        self.options = replace(options, num_return_sequences=1, logprobs=None)
        self.failed = self.done = False
        self._stream, self._retries = stream, 0
        self._conversations = [Conversation(system) for _ in models]

    @property
    def active(self) -> list[ChatModel]:
        """The models that answer."""
        return list(self.models) if self.is_comparing else list(self.models[:1])

    @property
    def conversations(self) -> list[Conversation]:
        """Those with the models that answer."""
        return self._conversations[: len(self.active)]

    def replace_conversations(self, conversations: Sequence[Conversation]) -> None:
        """Goes on with others, one for each model that answers."""
        self._conversations[: len(self.active)] = conversations

    def ask(self, question: str) -> None:
        """Shows the answers to a question, and remembers both."""
        self._retries = 0
        self._answer([(conversation, question, False) for conversation in self.conversations], self.options)

    def retry(self) -> None:
        """Asks the last question again. Raises UserError if there is none."""
        asked = []
        for conversation in self.conversations:
            if conversation.unanswered:
                asked.append((conversation, conversation.unanswered, False))
            elif conversation.turns:
                asked.append((conversation, conversation.turns[-1][0], True))
            else:
                raise UserError("there is no question to ask again")
        # With the same seed, a sampled answer would be the same again.
        self._retries += 1
        self._answer(asked, replace(self.options, seed=(self.options.seed + self._retries) % 2**63))

    def _answer(self, asked: Sequence[tuple[Conversation, str, bool]], options: GenerationOptions) -> None:
        """asked: conversation, question, and whether the question replaces the last turn; one for each model."""
        beside = len(asked) > 1 and self.screen.has_columns
        if beside:
            self.screen.note("both models are answering ...")
        answers = []
        for model, (conversation, question, replaces) in zip(self.active, asked):
            if len(asked) > 1 and not beside:
                self.screen.heading(f"{label(model)}:")
            before = Conversation(conversation.system, conversation.turns[: -1 if replaces else None])
            try:
                with oom_as_user_error("shorten the conversation (/undo, /reset), or /set max_new_tokens lower"):
                    answer = self._generate(model, before, question, options, show=not beside)
            except UserError as error:
                self.failed, answer = True, ""
                conversation.unanswered = "" if replaces else question
                self.screen.error(f"{error}; /retry asks again" if self.screen.interactive else str(error))
            else:
                conversation.turns, conversation.unanswered = [*before.turns, (question, answer)], ""
            answers.append(answer)
        if beside:
            self.screen.columns([label(model) for model in self.active], answers)

    def _generate(
        self, model: ChatModel, conversation: Conversation, question: str, options: GenerationOptions, show: bool
    ) -> str:
        """The answer of a model; what there is of it if the user interrupts."""
        limit = model.max_model_len - options.max_new_tokens
        first = conversation.first_turn_that_fits(question, lambda messages: model.count_tokens(messages) <= limit)
        messages = conversation.messages(question, first)
        length = model.count_tokens(messages)
        if length >= model.max_model_len:
            raise UserError(
                f"the question is too long: with the system prompt it is {length} tokens, and the context of "
                f"{model.name} is {model.max_model_len}; shorten it"
            )
        if first:
            self.screen.note(
                f"the oldest {first} of {len(conversation.turns)} questions and their answers are left out: "
                f"the context of {model.name} is {model.max_model_len} tokens"
            )
        options = replace(options, max_new_tokens=min(options.max_new_tokens, model.max_model_len - length))
        parts: list[str] = []
        shown = show and self._stream
        reason = ""
        try:
            with closing(model.stream(messages, options)) as pieces:
                for piece in pieces:
                    parts.append(piece.text)
                    reason = piece.finish_reason or reason
                    if shown and piece.text:
                        self.screen.write(piece.text)
        except KeyboardInterrupt:
            if not self.screen.interactive:
                raise
            if not any(parts):
                raise UserError("stopped before the answer began") from None
            reason = "interrupted"
        except BaseException:
            if shown and any(parts):
                self.screen.line()
            raise
        answer = "".join(parts)
        if show:
            self.screen.line("" if shown else answer)
        if reason == "interrupted":
            self.screen.note("stopped; what there is of the answer is kept")
        elif reason == LENGTH:
            self.screen.note(f"the answer ends at max_new_tokens, {options.max_new_tokens}")
        return answer


def label(model: ChatModel) -> str:
    """A model and its adapter."""
    return f"{model.name} + {model.adapter}" if model.adapter else model.name
