"""Prompts as token ids: plain texts, and conversations in the chat template that the model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fm9g.config.mixture import NO_TEMPLATE
from fm9g.data.encode.encoding_limits import panics_as_user_error
from fm9g.data.encode.stop_tokens import stop_token_ids
from fm9g.data.encode.template import Template, load_template
from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.data.encode.tokenizer_loading import load_tokenizer
from fm9g.errors import UserError
from fm9g.infer.hf_folder import open_hf_tokenizer

Messages = Sequence[Mapping[str, Any]]


class Prompts:
    """Turns prompts into token ids.

    Args:
        folder: of the tokenizer.
        config: the model's, as transformers' object.
        stop_ids: the token ids that end any generation of the model.
        chat_template: a built-in name, a Jinja file, or none (contents of messages are joined); empty: the folder's.
        name: of the model, for messages.
    """

    def __init__(
        self, folder: Path, config: Any, stop_ids: Sequence[int], chat_template: str = "", name: str = ""
    ) -> None:
        self.tokenizer, self._name = open_hf_tokenizer(folder, config), name or str(folder)
        self._stop_ids, self._chat_template = list(dict.fromkeys(stop_ids)), chat_template
        self._native: Tokenizer | UserError  # some tokenizers only transformers opens; they have no chats here
        try:
            self._native = load_tokenizer(folder)
        except UserError as error:
            self._native = error

    @cached_property
    def _template(self) -> tuple[Template | None, list[int]]:
        """The chat template, None for joined contents, and the token ids that end its turns."""
        tokenizer = self._native
        if isinstance(tokenizer, UserError):
            raise tokenizer
        if self._chat_template == NO_TEMPLATE:
            return None, [tokenizer.eos_id]
        own = tokenizer.chat_template
        if self._chat_template:
            template = load_template(self._chat_template, tokenizer)
        elif own:
            template = Template(f"of {self._name}", own, tokenizer.special_tokens)
        else:
            raise UserError(
                f"{self._name}: has no chat template; leave out --chat, take a model that has one, or give one with "
                "--chat_template (chatml, for example; none joins question and answer as training without one does)"
            )
        return template, stop_token_ids(tokenizer, template)

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        try:
            return bool(self._template)
        except UserError:
            return False

    def stop_ids(self, chat: bool) -> list[int]:
        """The token ids that end a continuation."""
        return list(dict.fromkeys([*self._stop_ids, *(self._template[1] if chat else [])]))

    def render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """A conversation as text, with the beginning of the answer.

        Raises UserError if there is no chat template, or it refuses the conversation.
        """
        template = self._template[0]
        if template is None:
            return "".join(str(message.get("content") or "") for message in messages)
        return template.render(
            [dict(message) for message in messages],
            [dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=True,
        )

    def encode_chat(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation, with the beginning of the answer."""
        text = self.render(messages, tools)
        return self._encode(text, add_special_tokens=self._template[0] is None)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued: begun as the tokenizer begins a text, but not ended."""
        return self._encode(text, add_special_tokens=True)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError("prompt: not UTF-8")
        tokenizer = self.tokenizer
        with panics_as_user_error("the tokenizer"):
            ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        if add_special_tokens and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # a tokenizer that ends each text (add_eos_token)
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
        if not ids:
            raise UserError(
                "prompt: it is empty, and the tokenizer has no token that starts a text; give at least a word"
            )
        return ids
