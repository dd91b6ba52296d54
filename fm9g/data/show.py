"""Samples of a mixture as training sees them: decoded, with what is learnt marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby, islice, pairwise
from typing import NamedTuple

import numpy as np

from fm9g.config.fields import nearest
from fm9g.data.encode import Chat, Encoded, Pair, Texts
from fm9g.data.loader import make_plan
from fm9g.data.mixture import Mixture
from fm9g.data.pack import Sample
from fm9g.data.stream import Stream
from fm9g.data.tokens import is_weighted, loss_weights, split_samples, token_ids
from fm9g.errors import UserError
from fm9g.printable import as_is, printable, printable_lines

HEAD, TAIL = 2000, 500  # characters of a long sample that are shown

_WIDTH = 100  # characters of a border
_LEARNT, _OWN, _SPECIAL = 1, 2, 4  # what a token is; own: of the template
_CODES = {0: "2", _LEARNT: "32", _OWN: "4;36", _OWN | _LEARNT: "4;32", _SPECIAL: "33", _SPECIAL | _LEARNT: "1;33"}

Run = tuple[str, int]  # a text, and what its tokens are


def wants_color(choice: str) -> bool:
    """choice: auto, always or never; auto is a terminal, unless NO_COLOR is set."""
    return choice == "always" or (choice == "auto" and as_is(sys.stdout).isatty() and not os.environ.get("NO_COLOR"))


def show(
    mixture: Mixture, *, count: int, task: str, record: int | None, packs: bool, color: bool, full: bool
) -> Iterator[str]:
    """Texts to print: a legend, then samples in the order of a run with one pack a step.

    count: of samples, or with `packs` of rows. task: of this dataset only. record: this one, from 1, of the task.
    full: long samples whole. Raises UserError for a dataset or record that is not there.
    """
    tasks = [config.task_name for config in mixture.configs]
    if count < 1:
        raise UserError(f"--count: found {count}, expected at least 1")
    if task and task not in tasks:
        raise UserError(f"--task: the mixture has no {task!r}{nearest(task, tasks)} It has: {', '.join(tasks)}")
    dataset = tasks.index(task) if task else None
    if record is not None:
        if packs:
            raise UserError("--record and --packs are both given; a record is shown by itself")
        if dataset is None and len(tasks) > 1:
            raise UserError(f"--record: say of which dataset: --task, one of {', '.join(tasks)}")
        dataset = dataset or 0
        size = len(mixture.datasets[dataset])
        if not 1 <= record <= size:
            raise UserError(f"--record: found {record}, expected 1 to {size}, the records of {tasks[dataset]}")
    view = _View(mixture, color, full)
    yield view.legend()
    if record is not None and dataset is not None:
        yield from view.record(dataset, record - 1, count)
        return
    rows = islice(_rows(mixture, dataset), count)
    if not packs:
        for sample in islice(chain.from_iterable(rows), count):
            yield from view.sample(*sample[1:])
        return
    for number, row in enumerate(rows, 1):
        used = sum(len(sample.tokens) - 1 for sample in row)
        yield _border(f"row {number}: {len(row)} sample{'s' * (len(row) > 1)}, {used} tokens", "═")
        for sample in row:
            yield from view.sample(*sample[1:])
        yield _border(f"padding: {mixture.capacity - used} of {mixture.capacity} positions", "·")


def _rows(mixture: Mixture, dataset: int | None) -> Iterator[list[Sample]]:
    """The samples of each row. dataset: the only one."""
    plan = make_plan(mixture, 1)
    if dataset is not None:
        plan = replace(plan, shares=[float(number == dataset) for number in range(len(plan.names))])

    def read_ahead(dataset: int, places: Iterator[int]) -> Iterator[tuple[int, Encoded]]:
        return ((place, mixture.encode(dataset, [place])[0]) for place in places)

    stream = Stream(0, plan, mixture.capacity, lambda d, place: mixture.encode(d, [place])[0], read_ahead)
    return iter(stream.next_samples, [])


class _Sample(NamedTuple):
    """One of the samples that a record gives, before it is cut."""

    number: int
    tokens: np.ndarray


class _Piece(NamedTuple):
    """A piece of a sample: its tokens, where they begin in it, and how many pieces that has."""

    sample: _Sample
    tokens: np.ndarray
    start: int
    of: int
    skipped: str


class _View:
    """Texts of samples."""

    def __init__(self, mixture: Mixture, color: bool, full: bool) -> None:
        self._mixture, self._tokenizer, self._color, self._full = mixture, mixture.tokenizer, color, full
        self._anchor = list(self._tokenizer.encode("a"))[-1:]
        self._width = len(self._tokenizer.decode(self._anchor))

    def legend(self) -> str:
        if not self._color:
            return "«learnt», the rest is only read  ⏎ a line end"
        names = ("only read", "learnt", "the template's own", "its own, learnt", "special token", "special, learnt")
        return "  ".join(_painted([run], True) for run in zip(names, _CODES)) + "  ⏎ a line end"

    def record(self, dataset: int, number: int, count: int) -> Iterator[str]:
        """The first samples of a record, or why it has none."""
        texts = self._mixture.texts(dataset, number, number, with_contents=True)
        pieces = len(self._pieces(dataset, number, texts))
        for piece in range(max(1, min(count, pieces))):
            yield from self.sample(dataset, number, piece, number)
        if pieces > count:
            yield _border(f"{pieces - count} more pieces of this record; --count {pieces} shows all")
        record = self._mixture.datasets[dataset][number]
        if not self._mixture.transforms[dataset]:
            found = self._mixture.encoders[dataset].findings(record, texts)
            yield from (f"note: it has {printable(what)}" for what in found)

    def sample(self, dataset: int, place: int, piece: int, number: int | None = None) -> Iterator[str]:
        """A border, and the text of a sample. number: of the record; default: the one at the place."""
        mixture, config = self._mixture, self._mixture.configs[dataset]
        number = int(mixture.numbers(dataset, [place])[0]) if number is None else number
        texts = mixture.texts(dataset, number, place, with_contents=True)
        pieces = self._pieces(dataset, number, texts)
        of_sample, tokens, start, count, skipped = pieces[piece]
        whole, rule = len(of_sample.tokens), f"(oversize_rule {config.oversize_rule})"
        fate = f", skipped: {skipped}" if skipped else ""
        if len({id(item.sample) for item in pieces}) > 1:
            fate += f", text {of_sample.number + 1} of {pieces[-1].sample.number + 1} of this record"
        if count > 1:
            fate += f", piece {start // mixture.max_length + 1} of {count} {rule}"
        elif not skipped and len(tokens) < whole:
            fate += f", cut: the first of {whole - 1} tokens {rule}"
        states, begins = self._states(dataset, texts, of_sample)
        states = states[start : start + len(tokens)]
        states[:1] &= ~_LEARNT  # nothing comes before it to learn it from
        learnt, length = int((states & _LEARNT).sum()), max(0, len(tokens) - 1)
        if is_weighted(tokens):
            named = ", ".join(f"{weight:g}" for weight in sorted(set(loss_weights(tokens[1:]).tolist()) - {0.0}))
            fate += f", weights {named}"
        yield _border(f"{config.task_name}, line {number + 1}: {length} tokens, {learnt} learnt{fate}")
        if len(tokens):
            yield self._text(token_ids(tokens).tolist(), states, {at - start for at in begins})
        else:
            text = texts.samples[0].text if isinstance(texts, Chat) and texts.samples else ""
            yield _painted([(texts.input if isinstance(texts, Pair) else text, 0)], self._color)

    def _pieces(self, dataset: int, number: int, texts: Texts) -> list[_Piece]:
        """The pieces of a record; one that is skipped where there are none."""
        mixture = self._mixture
        pieces = []
        for at, tokens in enumerate(split_samples(mixture.tokens_of([texts], dataset, [number])[0])):
            sample, encoded = _Sample(at, tokens), mixture.cut(dataset, tokens)
            if encoded.skipped:
                pieces.append(_Piece(sample, tokens, 0, 1, encoded.skipped))
            pieces += [
                _Piece(sample, piece, start * mixture.max_length, len(encoded.pieces), "")
                for start, piece in enumerate(encoded.pieces)
            ]
        kept = [piece for piece in pieces if not piece.skipped]
        return kept or pieces[:1]

    def _states(self, dataset: int, texts: Texts, sample: _Sample) -> tuple[np.ndarray, set[int]]:
        """(tokens,) what each token of a sample is; and where texts begin that are encoded apart."""
        tokens = sample.tokens
        states, begins = np.where(tokens >= 0, _LEARNT, 0), {0}
        if isinstance(texts, Chat) and len(tokens):
            trained = [pair for pair in zip(texts.samples, texts.literal) if pair[0].targets]
            chat, literal = trained[sample.number]
            starts = self._tokenizer.encode_chat(chat.text, chat.starts, literal)[1]
            starts = starts[: len(states)]
            inside = np.searchsorted(np.array(chat.contents).ravel(), starts, side="right") % 2 == 1
            states[: len(starts)] |= np.where(inside, 0, _OWN)
        elif len(tokens) and self._mixture.encoders[dataset].loss != "all":
            begins.add(int((tokens >= 0).argmax()))
        special = [bool(self._tokenizer.special(token)) for token in token_ids(tokens).tolist()]
        return np.where(special, states & _LEARNT | _SPECIAL, states), begins

    def _text(self, ids: list[int], states: np.ndarray, begins: set[int]) -> str:
        first = last = len(ids)
        if not self._full:
            ends = np.cumsum([len(self._tokenizer.special(token) or self._decoded([token])) for token in ids])
            if ends[-1] > HEAD + TAIL:
                first, last = (int(np.searchsorted(ends, end, "right")) for end in (HEAD, ends[-1] - TAIL))
        text = _painted(self._runs(ids, states, begins, 0, first), self._color)
        if first < last:
            text += f"\n… {last - first} tokens …\n"
        return text + _painted(self._runs(ids, states, begins, last, len(ids)), self._color)

    def _runs(self, ids: list[int], states: np.ndarray, begins: set[int], start: int, end: int) -> list[Run]:
        """Tokens that are alike are decoded together, for a character may be several tokens."""
        changes = (np.flatnonzero(np.diff(states)) + 1).tolist()
        borders = sorted({start, end, *(place for place in (*changes, *begins) if start < place < end)})
        runs = []
        for one, other in pairwise(borders):
            state, some = int(states[one]), ids[one:other]
            begun = one in begins or (one > 0 and bool(states[one - 1] & _SPECIAL))
            special = map(self._tokenizer.special, some)
            runs.append(("".join(special) if state & _SPECIAL else self._decoded(some, begun), state))
        return runs

    def _decoded(self, ids: list[int], begun: bool = False) -> str:
        """The text of tokens. begun: a text begins with them; there decoders take away a space that encoders add."""
        return self._tokenizer.decode(ids) if begun else self._tokenizer.decode(self._anchor + ids)[self._width :]


def _painted(runs: list[Run], color: bool) -> str:
    """Runs as one text: in colours, or with marks around what is learnt."""
    if color:
        parts = [(_visible(text).split("\n"), f"\x1b[{_CODES[state]}m") for text, state in runs]
        # Each line by itself: pagers forget the colour at its end.
        return "".join("\n".join(f"{code}{line}\x1b[0m" if line else "" for line in lines) for lines, code in parts)
    text = ""
    for learnt, some in groupby(runs, key=lambda run: run[1] & _LEARNT):
        together = _visible("".join(text for text, _ in some))
        text += f"«{together}»" if learnt else together
    return text


def _visible(text: str) -> str:
    return printable_lines(text).replace("\n", "⏎\n")


def _border(text: str, line: str = "─") -> str:
    return f"{line * 2} {printable(text)} ".ljust(_WIDTH, line)
