"""Samples of a mixture as training sees them: decoded, with what is learnt marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby, islice, pairwise
from typing import NamedTuple

import numpy as np

from fm9g.config.fields import did_you_mean
from fm9g.data.encode.encoder import EncodedRecord, RenderedChat, RenderedPair, RenderedRecord
from fm9g.data.encode.token_array import is_weighted, loss_weights, split_samples, token_ids
from fm9g.data.load.loader import make_sampling_plan
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.pack_stream import PackStream
from fm9g.data.load.packing import Sample
from fm9g.errors import UserError
from fm9g.printable import printable, printable_lines, raw_stream

MAX_HEAD_CHARACTERS, MAX_TAIL_CHARACTERS = 2000, 500  # characters of a long sample that are shown

_WIDTH = 100  # characters of a border
_TRAINED, _TEMPLATE, _SPECIAL = 1, 2, 4  # what a token is; own: of the template
_CODES = {
    0: "2",
    _TRAINED: "32",
    _TEMPLATE: "4;36",
    _TEMPLATE | _TRAINED: "4;32",
    _SPECIAL: "33",
    _SPECIAL | _TRAINED: "1;33",
}

StyledText = tuple[str, int]  # a text, and what its tokens are


def wants_color(choice: str) -> bool:
    """choice: auto, always or never; auto is a terminal, unless NO_COLOR is set."""
    return choice == "always" or (
        choice == "auto" and raw_stream(sys.stdout).isatty() and not os.environ.get("NO_COLOR")
    )


def show_samples(
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
        raise UserError(f"--task: the mixture has no {task!r}{did_you_mean(task, tasks)} It has: {', '.join(tasks)}")
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
    view = _SampleView(mixture, color, full)
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
        yield _border(f"padding: {mixture.row_length - used} of {mixture.row_length} positions", "·")


def _rows(mixture: Mixture, dataset: int | None) -> Iterator[list[Sample]]:
    """The samples of each row. dataset: the only one."""
    plan = make_sampling_plan(mixture, 1)
    if dataset is not None:
        plan = replace(plan, proportions=[float(number == dataset) for number in range(len(plan.names))])

    def read_ahead(dataset: int, sample_indices: Iterator[int]) -> Iterator[tuple[int, EncodedRecord]]:
        return ((sample_index, mixture.encode(dataset, [sample_index])[0]) for sample_index in sample_indices)

    stream = PackStream(
        0, plan, mixture.row_length, lambda d, sample_index: mixture.encode(d, [sample_index])[0], read_ahead
    )
    return iter(stream.next_samples, [])


class _RecordSample(NamedTuple):
    """One of the samples that a record gives, before it is cut."""

    number: int
    tokens: np.ndarray


class _Segment(NamedTuple):
    """A piece of a sample: its tokens, where they begin in it, and how many pieces that has."""

    sample: _RecordSample
    tokens: np.ndarray
    start: int
    of: int
    skipped: str


class _SampleView:
    """Texts of samples."""

    def __init__(self, mixture: Mixture, color: bool, full: bool) -> None:
        self._mixture, self._tokenizer, self._color, self._full = mixture, mixture.tokenizer, color, full
        self._anchor = list(self._tokenizer.encode("a"))[-1:]
        self._width = len(self._tokenizer.decode(self._anchor))

    def legend(self) -> str:
        if not self._color:
            return "«learnt», the rest is only read  ⏎ a line end"
        names = ("only read", "learnt", "the template's own", "its own, learnt", "special token", "special, learnt")
        return "  ".join(_paint([styled_text], True) for styled_text in zip(names, _CODES)) + "  ⏎ a line end"

    def record(self, dataset: int, number: int, count: int) -> Iterator[str]:
        """The first samples of a record, or why it has none."""
        rendered = self._mixture.render(dataset, number, number, with_content_spans=True)
        segments = len(self._segments(dataset, number, rendered))
        for segment in range(max(1, min(count, segments))):
            yield from self.sample(dataset, number, segment, number)
        if segments > count:
            yield _border(f"{segments - count} more pieces of this record; --count {segments} shows all")
        record = self._mixture.datasets[dataset][number]
        if not self._mixture.transforms[dataset]:
            found = self._mixture.encoders[dataset].find_issues(record, rendered)
            yield from (f"note: it has {printable(what)}" for what in found)

    def sample(self, dataset: int, sample_index: int, segment: int, number: int | None = None) -> Iterator[str]:
        """A border, and the text of a sample. number: of the record; default: the one at the place."""
        mixture, config = self._mixture, self._mixture.configs[dataset]
        number = int(mixture.record_indices(dataset, [sample_index])[0]) if number is None else number
        rendered = mixture.render(dataset, number, sample_index, with_content_spans=True)
        segments = self._segments(dataset, number, rendered)
        of_sample, tokens, start, count, skipped = segments[segment]
        whole, rule = len(of_sample.tokens), f"(oversize_rule {config.oversize_rule})"
        details = f", skipped: {skipped}" if skipped else ""
        if len({id(item.sample) for item in segments}) > 1:
            details += f", text {of_sample.number + 1} of {segments[-1].sample.number + 1} of this record"
        if count > 1:
            details += f", piece {start // mixture.max_length + 1} of {count} {rule}"
        elif not skipped and len(tokens) < whole:
            details += f", cut: the first of {whole - 1} tokens {rule}"
        styles, text_starts = self._token_styles(dataset, rendered, of_sample)
        styles = styles[start : start + len(tokens)]
        styles[:1] &= ~_TRAINED  # nothing comes before it to learn it from
        trained, length = int((styles & _TRAINED).sum()), max(0, len(tokens) - 1)
        if is_weighted(tokens):
            named = ", ".join(f"{weight:g}" for weight in sorted(set(loss_weights(tokens[1:]).tolist()) - {0.0}))
            details += f", weights {named}"
        yield _border(f"{config.task_name}, line {number + 1}: {length} tokens, {trained} learnt{details}")
        if len(tokens):
            yield self._format_tokens(token_ids(tokens).tolist(), styles, {at - start for at in text_starts})
        else:
            text = rendered.samples[0].text if isinstance(rendered, RenderedChat) and rendered.samples else ""
            yield _paint([(rendered.input if isinstance(rendered, RenderedPair) else text, 0)], self._color)

    def _segments(self, dataset: int, number: int, rendered: RenderedRecord) -> list[_Segment]:
        """The pieces of a record; one that is skipped where there are none."""
        mixture = self._mixture
        segments = []
        for at, tokens in enumerate(split_samples(mixture.tokenize([rendered], dataset, [number])[0])):
            sample, encoded = _RecordSample(at, tokens), mixture.split_or_truncate(dataset, tokens)
            if encoded.skipped:
                segments.append(_Segment(sample, tokens, 0, 1, encoded.skipped))
            segments += [
                _Segment(sample, segment, start * mixture.max_length, len(encoded.segments), "")
                for start, segment in enumerate(encoded.segments)
            ]
        kept = [segment for segment in segments if not segment.skipped]
        return kept or segments[:1]

    def _token_styles(
        self, dataset: int, rendered: RenderedRecord, sample: _RecordSample
    ) -> tuple[np.ndarray, set[int]]:
        """(tokens,) what each token of a sample is; and where texts begin that are encoded apart."""
        tokens = sample.tokens
        styles, text_starts = np.where(tokens >= 0, _TRAINED, 0), {0}
        if isinstance(rendered, RenderedChat) and len(tokens):
            trained_samples = [pair for pair in zip(rendered.samples, rendered.literal) if pair[0].targets]
            chat, literal = trained_samples[sample.number]
            starts = self._tokenizer.encode_chat(chat.text, chat.starts, literal)[1]
            starts = starts[: len(styles)]
            inside = np.searchsorted(np.array(chat.content_spans).ravel(), starts, side="right") % 2 == 1
            styles[: len(starts)] |= np.where(inside, 0, _TEMPLATE)
        elif len(tokens) and self._mixture.encoders[dataset].loss != "all":
            text_starts.add(int((tokens >= 0).argmax()))
        special = [bool(self._tokenizer.special_token(token)) for token in token_ids(tokens).tolist()]
        return np.where(special, styles & _TRAINED | _SPECIAL, styles), text_starts

    def _format_tokens(self, ids: list[int], styles: np.ndarray, text_starts: set[int]) -> str:
        first = last = len(ids)
        if not self._full:
            ends = np.cumsum([len(self._tokenizer.special_token(token) or self._decode([token])) for token in ids])
            if ends[-1] > MAX_HEAD_CHARACTERS + MAX_TAIL_CHARACTERS:
                first, last = (
                    int(np.searchsorted(ends, end, "right"))
                    for end in (MAX_HEAD_CHARACTERS, ends[-1] - MAX_TAIL_CHARACTERS)
                )
        text = _paint(self._styled_texts(ids, styles, text_starts, 0, first), self._color)
        if first < last:
            text += f"\n… {last - first} tokens …\n"
        return text + _paint(self._styled_texts(ids, styles, text_starts, last, len(ids)), self._color)

    def _styled_texts(
        self, ids: list[int], styles: np.ndarray, text_starts: set[int], start: int, end: int
    ) -> list[StyledText]:
        """Tokens that are alike are decoded together, for a character may be several tokens."""
        changes = (np.flatnonzero(np.diff(styles)) + 1).tolist()
        borders = sorted({start, end, *(index for index in (*changes, *text_starts) if start < index < end)})
        styled_texts = []
        for one, other in pairwise(borders):
            style, some = int(styles[one]), ids[one:other]
            starts_text = one in text_starts or (one > 0 and bool(styles[one - 1] & _SPECIAL))
            special = map(self._tokenizer.special_token, some)
            styled_texts.append(("".join(special) if style & _SPECIAL else self._decode(some, starts_text), style))
        return styled_texts

    def _decode(self, ids: list[int], starts_text: bool = False) -> str:
        """The text of tokens. starts_text: a text begins with them; there decoders take away a space that encoders
        add."""
        return self._tokenizer.decode(ids) if starts_text else self._tokenizer.decode(self._anchor + ids)[self._width :]


def _paint(styled_texts: list[StyledText], color: bool) -> str:
    """Runs as one text: in colours, or with marks around what is learnt."""
    if color:
        parts = [(_mark_line_ends(text).split("\n"), f"\x1b[{_CODES[style]}m") for text, style in styled_texts]
        # Each line by itself: pagers forget the colour at its end.
        return "".join("\n".join(f"{code}{line}\x1b[0m" if line else "" for line in lines) for lines, code in parts)
    text = ""
    for trained, some in groupby(styled_texts, key=lambda styled_text: styled_text[1] & _TRAINED):
        together = _mark_line_ends("".join(text for text, _ in some))
        text += f"«{together}»" if trained else together
    return text


def _mark_line_ends(text: str) -> str:
    return printable_lines(text).replace("\n", "⏎\n")


def _border(text: str, line: str = "─") -> str:
    return f"{line * 2} {printable(text)} ".ljust(_WIDTH, line)
