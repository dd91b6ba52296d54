"""Shows samples of a mixture as training sees them: decoded, with the trained tokens marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, groupby, islice, pairwise
from typing import NamedTuple

import numpy as np

from fm9g.config.fields import did_you_mean
from fm9g.data.encode.encoder import RenderedChat, RenderedPair, RenderedRecord
from fm9g.data.encode.token_array import is_weighted, loss_weights, split_samples, token_ids
from fm9g.data.load.loader import trimmed_length
from fm9g.data.load.mixture import Mixture
from fm9g.data.load.pack_stream import PackStream
from fm9g.data.load.packing import Sample
from fm9g.data.load.record_source import MixtureSource
from fm9g.data.load.sampling_plan import make_sampling_plan
from fm9g.errors import UserError
from fm9g.printable import printable, printable_lines, raw_stream

MAX_HEAD_CHARACTERS, MAX_TAIL_CHARACTERS = 2000, 500  # of a long sample

_WIDTH = 100  # columns of a border
_TRAINED, _TEMPLATE, _SPECIAL = 1, 2, 4  # flags of a token's style
_CODES = {  # style -> codes of terminal colours
    0: "2",
    _TRAINED: "32",
    _TEMPLATE: "4;36",
    _TEMPLATE | _TRAINED: "4;32",
    _SPECIAL: "33",
    _SPECIAL | _TRAINED: "1;33",
}

StyledText = tuple[str, int]  # text and style


def wants_color(choice: str) -> bool:
    """choice: auto, always or never. auto: on a terminal, unless NO_COLOR is set."""
    return choice == "always" or (
        choice == "auto" and raw_stream(sys.stdout).isatty() and not os.environ.get("NO_COLOR")
    )


def show_samples(
    mixture: Mixture, *, count: int, task: str, record: int | None, packs: bool, color: bool, full: bool
) -> Iterator[str]:
    """Yields texts to print: a legend, then samples in the order of a run with one pack per step.

    Args:
        count: number of samples, or of rows with `packs`.
        task: show this dataset only; empty: all.
        record: show the record with this number, from 1, of the task.
        packs: show complete rows with their padding.
        color: for a terminal; otherwise mark trained text with «».
        full: do not shorten long samples.

    Raises UserError for an unknown dataset or record.
    """
    tasks = [config.task_name for config in mixture.configs]
    if count < 1:
        raise UserError(f"--count: found {count}, expected at least 1")
    if task and task not in tasks:
        raise UserError(f"--task: the mixture has no {task!r}{did_you_mean(task, tasks)} It has: {', '.join(tasks)}")
    dataset = tasks.index(task) if task else None
    if record is not None:
        if packs:
            raise UserError("--record does not go with --packs: a record is shown by itself")
        if dataset is None and len(tasks) > 1:
            raise UserError(f"--record: name its dataset with --task, one of {', '.join(tasks)}")
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
        positions = trimmed_length(used) if mixture.samples_per_pack else mixture.row_length
        yield _border(f"padding: {positions - used} of {positions} positions", "·")


def _rows(mixture: Mixture, dataset: int | None) -> Iterator[list[Sample]]:
    """The samples of each row. dataset: draw from this one only."""
    plan = make_sampling_plan(mixture, 1)
    if dataset is not None:
        proportions = [float(number == dataset) for number in range(len(plan.names))]
        plan = replace(plan, proportions=proportions, concat_order=None)
    # Encode one record at a time, so that those before a bad one are shown.
    stream = PackStream(0, plan, mixture.row_length, MixtureSource(mixture, max_chunk=1))
    while (row := stream.next_samples()) or plan.has_empty_packs:
        if row:
            yield row


class _RecordSample(NamedTuple):
    """A sample of a record, before oversize_rule is applied."""

    number: int
    tokens: np.ndarray


class _Segment(NamedTuple):
    """A segment of a sample.

    Args:
        start: offset of its tokens in the sample.
        num_segments: number of segments of the sample.
        skipped: why the sample is not used; empty if it is.
    """

    sample: _RecordSample
    tokens: np.ndarray
    start: int
    num_segments: int
    skipped: str


class _SampleView:
    """Formats samples of a mixture."""

    def __init__(self, mixture: Mixture, color: bool, full: bool) -> None:
        self._mixture, self._tokenizer, self._color, self._full = mixture, mixture.tokenizer, color, full
        self._anchor = list(self._tokenizer.encode("a"))[-1:]
        self._width = len(self._tokenizer.decode(self._anchor))

    def legend(self) -> str:
        if not self._color:
            return "«trained on», the rest is masked  ⏎ line break"
        names = ("masked", "trained on", "template", "template, trained on", "special token", "special, trained on")
        return "  ".join(_paint([styled_text], True) for styled_text in zip(names, _CODES)) + "  ⏎ line break"

    def record(self, dataset: int, number: int, count: int) -> Iterator[str]:
        """The first `count` samples of a record, or why it has none."""
        rendered = self._mixture.render(dataset, number, number, with_content_spans=True)
        segments = len(self._segments(dataset, number, rendered))
        for segment in range(max(1, min(count, segments))):
            yield from self.sample(dataset, number, segment, number)
        if segments > count:
            yield _border(f"{segments - count} more samples of this record; --count {segments} shows all")
        if not self._mixture.transforms[dataset]:
            issues = self._mixture.find_issues(dataset, number, number)
            yield from (f"note: it has {printable(issue)}" for issue in issues)

    def sample(self, dataset: int, sample_index: int, segment: int, number: int | None = None) -> Iterator[str]:
        """A border and the text of a segment. number: of the record; default: the one at the sample index."""
        mixture, config = self._mixture, self._mixture.configs[dataset]
        number = int(mixture.record_indices(dataset, [sample_index])[0]) if number is None else number
        rendered = mixture.render(dataset, number, sample_index, with_content_spans=True)
        segments = self._segments(dataset, number, rendered)
        sample, tokens, start, _, _ = shown = segments[segment]
        styles, text_starts = self._token_styles(dataset, rendered, sample)
        styles = styles[start : start + len(tokens)]
        styles[:1] &= ~_TRAINED  # no token comes before the first one, so nothing predicts it
        trained, length = int((styles & _TRAINED).sum()), max(0, len(tokens) - 1)
        details = self._describe(shown, segments[-1].sample.number + 1, config.rule_for_long_records)
        yield _border(f"{config.task_name}, line {number + 1}: {length} tokens, {trained} trained on{details}")
        if len(tokens):
            yield self._format_tokens(token_ids(tokens).tolist(), styles, {at - start for at in text_starts})
        else:
            text = rendered.samples[0].text if isinstance(rendered, RenderedChat) and rendered.samples else ""
            yield _paint([(rendered.input if isinstance(rendered, RenderedPair) else text, 0)], self._color)

    def _describe(self, segment: _Segment, num_samples: int, oversize_rule: str) -> str:
        """What is unusual about a segment. num_samples: of its record."""
        tokens, sample_length = segment.tokens, len(segment.sample.tokens)
        details = f", skipped: {segment.skipped}" if segment.skipped else ""
        if num_samples > 1:
            details += f", sample {segment.sample.number + 1} of {num_samples} of this record"
        rule = f"(oversize_rule {oversize_rule})"
        if segment.num_segments > 1:
            details += f", segment {segment.start // self._mixture.max_length + 1} of {segment.num_segments} {rule}"
        elif not segment.skipped and len(tokens) < sample_length:
            end = "last" if oversize_rule == "tail" else "first"
            details += f", truncated: the {end} of {sample_length - 1} tokens {rule}"
        if is_weighted(tokens):
            weights = sorted(set(loss_weights(tokens[1:]).tolist()) - {0.0})
            details += f", weights {', '.join(f'{weight:g}' for weight in weights)}"
        return details

    def _segments(self, dataset: int, number: int, rendered: RenderedRecord) -> list[_Segment]:
        """The segments of a record's samples; if all samples are skipped, the first one."""
        mixture = self._mixture
        keeps_tail = mixture.configs[dataset].rule_for_long_records == "tail"
        segments = []
        for at, tokens in enumerate(split_samples(mixture.tokenize([rendered], dataset, [number])[0])):
            sample, encoded = _RecordSample(at, tokens), mixture.split_or_truncate(dataset, tokens)
            if encoded.skipped:
                segments.append(_Segment(sample, tokens, 0, 1, encoded.skipped))
            segments += [
                _Segment(
                    sample,
                    segment,
                    len(tokens) - len(segment) if keeps_tail else position * mixture.max_length,
                    len(encoded.segments),
                    "",
                )
                for position, segment in enumerate(encoded.segments)
            ]
        used = [segment for segment in segments if not segment.skipped]
        return used or segments[:1]

    def _token_styles(
        self, dataset: int, rendered: RenderedRecord, sample: _RecordSample
    ) -> tuple[np.ndarray, set[int]]:
        """(tokens,) the style of each token of a sample, and the offsets of texts that were encoded separately."""
        tokens = sample.tokens
        styles, text_starts = np.where(tokens >= 0, _TRAINED, 0), {0}
        if isinstance(rendered, RenderedChat) and len(tokens):
            trained_samples = [pair for pair in zip(rendered.samples, rendered.escaped) if pair[0].targets]
            chat, escaped = trained_samples[sample.number]
            starts = self._tokenizer.encode_chat(chat.text, chat.starts, escaped)[1]
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
        """Decodes tokens of the same style together, since a character may be several tokens."""
        changes = (np.flatnonzero(np.diff(styles)) + 1).tolist()
        borders = sorted({start, end, *(index for index in (*changes, *text_starts) if start < index < end)})
        styled_texts = []
        for first, last in pairwise(borders):
            style, same = int(styles[first]), ids[first:last]
            starts_text = first in text_starts or (first > 0 and bool(styles[first - 1] & _SPECIAL))
            special = map(self._tokenizer.special_token, same)
            styled_texts.append(("".join(special) if style & _SPECIAL else self._decode(same, starts_text), style))
        return styled_texts

    def _decode(self, ids: list[int], starts_text: bool = False) -> str:
        """The text of tokens. starts_text: they start a text, where decoders remove the space that encoders add."""
        return self._tokenizer.decode(ids) if starts_text else self._tokenizer.decode(self._anchor + ids)[self._width :]


def _paint(styled_texts: list[StyledText], color: bool) -> str:
    """One text: in colours, or with «» around what is trained on."""
    if color:
        parts = [(_mark_line_ends(text).split("\n"), f"\x1b[{_CODES[style]}m") for text, style in styled_texts]
        # Each line has its own codes: pagers reset the colour at line ends.
        return "".join("\n".join(f"{code}{line}\x1b[0m" if line else "" for line in lines) for lines, code in parts)
    text = ""
    for is_trained, same in groupby(styled_texts, key=lambda styled_text: styled_text[1] & _TRAINED):
        part = _mark_line_ends("".join(text for text, _ in same))
        text += f"«{part}»" if is_trained else part
    return text


def _mark_line_ends(text: str) -> str:
    return printable_lines(text).replace("\n", "⏎\n")


def _border(text: str, line: str = "─") -> str:
    return f"{line * 2} {printable(text)} ".ljust(_WIDTH, line)
