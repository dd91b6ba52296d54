"""A bare SentencePiece model, such as that of the 2b model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fm9g.data.encode.tokenizer import Tokenizer
from fm9g.errors import UserError


class SentencePieceTokenizer(Tokenizer):
    """A bare SentencePiece .model file."""

    _has_exact_starts = True

    def __init__(self, file: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{file}: has no eos token; samples must end with a token")
        has_bos = self._model.bos_id() >= 0
        self.bos_id = self._model.bos_id() if has_bos else self.eos_id
        self.prefix_ids, self.suffix_ids = [self.bos_id] if has_bos else [], [self.eos_id]
        self.special_tokens = {"eos_token": self._model.id_to_piece(self.eos_id)}
        if has_bos:
            self.special_tokens["bos_token"] = self._model.id_to_piece(self.bos_id)
        self.special_ids = {text: self._model.piece_to_id(text) for text in self.special_tokens.values()}
        self.vocab_size, self.files = self._model.get_piece_size(), [file]
        self.adds_prefix_space: bool = self._model.encode("a", out_type=str)[0].startswith("\u2581")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_batch(self, texts: list[str]) -> Sequence[Sequence[int]]:
        ids: Sequence[Sequence[int]] = self._model.encode(texts, return_type="numpy")
        return ids

    def _encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self._model.encode(text, return_type="offset_mapping")
        return encoding["ids"], [start for start, _ in encoding["offsets"]]

    def token_id(self, text: str) -> int | None:
        token = self._model.piece_to_id(text)
        return None if token == self._model.unk_id() else token

    def decode(self, ids: list[int]) -> str:
        return str(self._model.decode([int(i) for i in ids]))

    def special_token(self, token: int) -> str:
        token = int(token)
        return self._model.id_to_piece(token) if self._model.is_control(token) or self._model.is_unknown(token) else ""
