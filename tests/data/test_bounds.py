"""What comes with data and models takes neither the memory nor the time of whoever opens it."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.common import ROOT, index_dataset, small_model, write_jsonl

from fm9g.config.mixture import DatasetConfig
from fm9g.config.model import load_model_config
from fm9g.convert.hf_config import from_hf_config, to_hf_config
from fm9g.convert.hf_reader import open_hf_tensors
from fm9g.data.encode import encoding_limits, template, transform
from fm9g.data.encode.template import Template, TemplateLimitError, load_template
from fm9g.data.encode.tokenizer import load_tokenizer, train_tokenizer
from fm9g.data.encode.transform import load_transform
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.load.mixture import Mixture
from fm9g.data.prepare import index_builder, readers, sources
from fm9g.data.prepare.columns import columns_from_file
from fm9g.data.prepare.index_worker import IndexConfig
from fm9g.data.prepare.sources import DataSource, find_sources
from fm9g.errors import UserError

MESSAGES = [{"role": "user", "content": "a"}]
NEST = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
LONG = "{% set x = 'a' * 1000000 %}"


class Endless(io.RawIOBase):
    """The same bytes again and again; more than 64 MB of them is a failure."""

    def __init__(self, piece: bytes) -> None:
        self._piece, self.taken = piece, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._piece * (len(buffer) // len(self._piece))
        buffer[: len(data)] = data
        self.taken += len(data)
        assert self.taken < 64 << 20, "it is read on and on"
        return len(data)


@pytest.mark.parametrize(
    ("format", "unit", "piece"),
    [
        ("csv", "", b"a"),
        ("csv", "", b"a,"),
        ("csv", "", b'"b\nb",'),
        ("tsv", "", b"a\t"),
        ("txt", "paragraph", b"a"),
        ("txt", "paragraph", b"a\n"),
        ("md", "file", b"a\n"),
        ("json", "", b"[[1, 2,"),
    ],
)
def test_a_record_that_never_ends_is_left_early(
    monkeypatch: pytest.MonkeyPatch, format: str, unit: str, piece: bytes
) -> None:
    @contextmanager
    def open_decompressed(source: DataSource) -> Iterator[Any]:
        yield io.BufferedReader(Endless(piece))

    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(readers, "open_decompressed", open_decompressed)
    with pytest.raises(UserError, match=r"a: a record is longer than 1 MB"):
        list(readers.read_records(DataSource("a", format, text_unit=unit)))


def test_records_of_parquet_are_read_few_at_a_time_where_they_are_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    # Of different letters: repeated texts would be stored once.
    texts = ["".join(random.Random(i).choices("abcdefgh", k=20_000)) for i in range(12)]
    pq.write_table(pyarrow.table({"input": [""] * 12, "output": texts}), file, use_dictionary=False, compression=None)
    monkeypatch.setattr(readers, "_BATCH_BYTES", 40_000)
    assert readers._rows_per_batch(pq.ParquetFile(file).metadata) == 1
    assert len(list(readers.read_records(DataSource(str(file), "parquet")))) == 12
    for module in (sources, readers):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 15_000)
    with pytest.raises(UserError, match=r"a\.parquet: a record is longer than 0 MB"):
        list(readers.read_records(DataSource(str(file), "parquet")))


def test_few_long_records_are_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    turns = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * 40}]
    file.write_text(json.dumps([{"messages": turns}] * 7))
    monkeypatch.setattr(index_builder, "_CHUNK_BYTES", 100)
    tasks = list(index_builder._make_tasks(DataSource(str(file), "json"), IndexConfig("en")))
    assert [len(arguments[0]) for _, arguments, _ in tasks] == [2, 2, 2, 1]


def test_xz_that_wants_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lzma

    file = tmp_path / "a.jsonl.xz"
    file.write_bytes(lzma.compress(b'{"input": "", "output": "a"}\n'))
    monkeypatch.setattr(sources, "_XZ_MEMORY_LIMIT", 1 << 20)
    with pytest.raises(UserError, match=r"a\.jsonl\.xz: cannot be decompressed.*[Mm]emory"):
        index_dataset(file, tmp_path / "out", "en")


def test_a_record_of_an_index_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"input": "", "output": "a"}, {"input": "", "output": "b" * 3000}])
    index_dataset(tmp_path / "a.jsonl", tmp_path / "out", "en")
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1000)
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset[0]["output"] == "a"
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: has 0 MB, and a record at most"):
        dataset[1]


@contextmanager
def pipe(path: Path) -> Iterator[Path]:
    """A FIFO nobody writes to. After a while it ends, so that the test fails and does not wait."""
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)

    def end() -> None:
        with suppress(OSError):  # nobody waits
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))

    timer = threading.Timer(10, end)
    timer.start()
    try:
        yield path
    finally:
        timer.cancel()


OPENERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "columns": ("a.json", columns_from_file),
    "model configuration": ("a.json", load_model_config),
    "parquet": ("a.parquet", lambda path: find_sources([str(path)])),
    "folder of data": ("data/a.jsonl", lambda path: find_sources([str(path.parent)])),
    "glob": ("a.jsonl", lambda path: find_sources([str(path.parent / "*.jsonl")])),
    "template": ("a.jinja", lambda path: load_template(str(path), None)),
    "transform": ("a.py", lambda path: load_transform(path, "where", 1.0)),
    "SentencePiece model": ("a.model", load_tokenizer),
    "vocabulary": ("vocab.txt", load_tokenizer),
    "file of a tokenizer": ("t/tokenizer.json", lambda path: load_tokenizer(path.parent)),
    "weights": ("h/model-1.safetensors", lambda path: open_hf_tensors(path.parent)),
}


@pytest.mark.parametrize("what", OPENERS)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, what: str) -> None:
    name, opener = OPENERS[what]
    with pipe(tmp_path / name) as path, pytest.raises(UserError, match=r"found a pipe \(FIFO\), expected a file"):
        opener(path)


def test_a_tokenizer_is_not_opened_beside_a_pipe(tmp_path: Path) -> None:
    train_tokenizer(["a b"], 300, tmp_path / "t")
    with pipe(tmp_path / "t" / "config.json"), pytest.raises(UserError, match=r"config\.json: found a pipe"):
        load_tokenizer(tmp_path / "t")


def test_a_pipe_that_is_named_as_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=[b'{"input": "", "output": "a"}\n'], daemon=True)
    writer.start()
    assert index_dataset(path, tmp_path / "out", "en")["nlines"] == 1
    writer.join()


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10**11 }}",
        "{% set n = 10**11 %}{{ [1] * n }}",
        "{{ 10**(10**9) }}",
        "{% set n = namespace(x=10) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ '%100000000000d' % 1 }}",
        "{{ '%*d' % (10**11, 1) }}",
        "{{ '%100000000000d' | format(1) }}",
        "{{ '{:100000000000d}'.format(1) }}",
        "{{ '{:{}d}'.format(1, 10**11) }}",
        "{{ ('{0:{1}}' * 1000).format(1, 10**7) }}",
        "{{ 'a' | center(10**11) }}",
        "{{ '' | center(10**11) }}",
        "{{ '' | indent(10**11) }}",
        "{{ ''.ljust(10**11) }}",
        "{{ 'a'.ljust(10**11) }}",
        "{{ 'a'.encode().ljust(10**11) }}",
        "{{ (1).to_bytes(10**11, 'big') }}",
        "{{ ['a'] | map('center', 10**11) | list }}",
        "{{ '\t'.expandtabs(10**11) }}",
        "{{ 'a\nb' | indent(10**11) }}",
        "{{ [1] | tojson(indent=10**11) }}",
        "{{ [1] | batch(10**11, 1) | list }}",
        "{% filter center(10**11) %}a{% endfilter %}",
        LONG + "{{ x.replace('a', x) }}",
        LONG + "{{ x | replace('a', x) }}",
        LONG + "{{ range(99999) | join(x) }}",
        LONG + "{{ x.join('a' * 99999) }}",
        LONG + "{% for i in range(99999) %}{{ x }}{% endfor %}",
    ],
)
def test_a_template_makes_no_text_without_bounds(text: str) -> None:
    with pytest.raises(
        TemplateLimitError, match=r"^chat template t(, line \d)?: makes a text, list or number that is too l"
    ):
        Template("t", text).render(MESSAGES)


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ lipsum(n=10**9) }}",
        NEST + "{{ n.x }}",
        NEST + "{{ n }}",
        NEST + "{{ n.x ~ '' }}",
        NEST + "{{ n.x | string }}",
        NEST + "{{ n.x | tojson }}",
        NEST + "{{ '%s' % n.x }}",
        NEST + "{{ '{}'.format(n.x) }}",
    ],
)
def test_a_template_does_not_go_on_and_on(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(template, "MAX_SECONDS", 0.1)
    with pytest.raises(
        TemplateLimitError, match=r"^chat template t, line 1: takes more than 0\.1 seconds \(has it a loop"
    ):
        Template("t", text).render(MESSAGES)


@pytest.mark.parametrize("sum", ["n.x + n.x", "n.x ~ n.x"])
def test_a_template_that_adds_and_adds_is_ended_by_its_memory(monkeypatch: pytest.MonkeyPatch, sum: str) -> None:
    monkeypatch.setattr(template, "MAX_MEMORY", 1 << 20)
    text = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = " + sum + " %}{% endfor %}"
    with pytest.raises(TemplateLimitError, match=r"^chat template t, line 1: takes more than 1 MB of memory"):
        Template("t", text).render(MESSAGES)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ (" + "(" * 3000 + "1" + ")" * 3000 + ") }}", ""),
    ],
)
def test_python_and_jinja_have_bounds_of_their_own(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"chat template t.*{problem}"):
        Template("t", text).render(MESSAGES)


def test_bounds_do_not_change_what_templates_write() -> None:
    text = (
        "{{ '-' * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ '%d of %5.1f%%' % (1700000000, 2.5) }}{{ 'a' ~ 1 ~ none ~ [1] }}"
        "{{ '{:>4}|{}'.format('a', 2) }}{{ 'a b'.replace(' ', '_') }}{{ messages | length }}{{ 'a\nb' | indent(2) }}"
        "{{ {'a': [1, true]} | tojson }}{{ ['a', 'b'] | join(', ') }}{{ nothing }}{{ 3 * 4 }}"
    )
    assert Template("t", text).render(MESSAGES) == (
        "---102431700000000 of   2.5%a1None[1]   a|2a_b1a\n  b" + '{"a": [1, true]}a, b12'
    )


@pytest.mark.parametrize(
    "text",
    [
        "{{ x.startswith(x) }}",
        "{{ x.split(x) | length }}",
        "{{ x.replace(x, '') }}",
        "{{ x | replace('<think>', '') }}",
        "{{ x | replace(x, '') }}",
        "{{ (guide ~ '{}').format(x) }}",
        "{{ (guide ~ '%s') % x }}",
        "{{ (guide ~ '%s') | format(x) }}",
        "{{ x | tojson }}",
        "{{ [x, x] | join('\\n\\n') }}",
    ],
)
def test_long_messages_are_within_bounds(text: str) -> None:
    """A reasoning of 500,000 characters, and 2,000 of a template's own."""
    begin = "{% set x, guide = 'a' * 500000, 'b' * 2000 %}"
    Template("t", begin + text).render(MESSAGES)


def dataset(folder: Path, text: str) -> DatasetConfig:
    write_jsonl(folder / "a.jsonl", [{"messages": [*MESSAGES, {"role": "assistant", "content": text}]}])
    index_dataset(folder / "a.jsonl", folder / "data", "en")
    return DatasetConfig(task_name="task", path=str(folder / "data"))


def test_a_template_that_came_with_a_model_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer(["a b"], 300, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(template, "MAX_SECONDS", 0.1)
    mixture = Mixture([dataset(tmp_path, "b")], str(tmp_path / "t"), 64, 1)
    with pytest.raises(UserError, match=r"^chat template tokenizer, line 1: takes more than"):
        mixture.encode(0, [0])


def with_regex(folder: Path, regex: str) -> Path:
    """A tokenizer whose file has a regular expression."""
    train_tokenizer(["a b"], 300, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_regular_expression_beyond_its_engine_is_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = with_regex(tmp_path / "t", "(a+)+$")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("aaa b")
    text = "a" * 60 + "c"
    calls: list[Callable[[], Any]] = [
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_batch([text] * 3),
        lambda: tokenizer.encode_chat(text),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"t: the tokenizer broke off: .*retry-limit.*tokenizer\.json is not made"):
            call()
    mixture = Mixture([dataset(tmp_path, text)], str(folder), 64, 1)
    mixture.encoders[0] = mixture.encoders[0].__class__(mixture.tokenizer, load_template("chatml", mixture.tokenizer))
    with pytest.raises(UserError, match=r"^task, one of the lines 1 of .*data: the text .* the tokenizer broke off"):
        mixture.encode(0, [0])
    assert "stack backtrace" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_tokenizer_that_never_ends_ends_the_process_with_a_message(tmp_path: Path) -> None:
    """Each of the words is below the limit of the engine, which no signal reaches."""
    folder = with_regex(tmp_path / "t", "(a+)+$")
    program = (
        "import fm9g.data.encode.encoding_limits as limits\n"
        "from fm9g.data.encode.tokenizer import load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(folder)!r})\n"
        "limits.BASE_SECONDS, limits._CHECK_INTERVAL = 0.2, 0.1\n"
        "limits.CHARACTERS_PER_SECOND = 10**12\n"
        "tokenizer.encode(('a' * 19 + 'b') * 100_000)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"fm9g: {folder}: the tokenizer takes more than 0 seconds. A regular expression")


class StandStill:
    """A clock of a program that is stopped for an hour at its first look at it, and then goes on."""

    def __init__(self, looks: int) -> None:
        self.now, self._left = 0.0, looks

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds if self.now else 3600.0
        self._left -= 1
        if not self._left:
            raise InterruptedError


@pytest.mark.parametrize(("looks", "ended"), [(50, False), (70, True)])
def test_a_program_that_was_stopped_has_its_time_to_encode_afterwards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, looks: int, ended: bool
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    watch = encoding_limits._EncodingWatchdog
    monkeypatch.setattr(watch, "_process", os.getpid())  # so that no thread starts
    monkeypatch.setattr(encoding_limits, "time", StandStill(looks))
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit if ended else InterruptedError), encoding_limits.bounded_encoding("t", 0):
        watch._watch()
    assert ("t: the tokenizer takes more than 60 seconds" in capsys.readouterr().err) is ended


@pytest.mark.parametrize(("seconds", "ended"), [(10, False), (30, True)])
def test_a_program_that_was_stopped_has_its_time_to_transform_afterwards(
    monkeypatch: pytest.MonkeyPatch, seconds: int, ended: bool
) -> None:
    clock = StandStill(1000)
    monkeypatch.setattr(transform, "time", clock)

    def block() -> None:
        with transform.guard_user_code("t", 20.0):
            for _ in range(seconds):
                clock.sleep(1.0)
                signal.raise_signal(signal.SIGALRM)

    if ended:
        with pytest.raises(UserError, match="t: takes more than 20 seconds"):
            block()
    else:
        block()


def test_usual_texts_are_far_from_the_limit_of_time() -> None:
    assert encoding_limits.BASE_SECONDS >= 60
    assert encoding_limits.CHARACTERS_PER_SECOND <= 50_000


HUGE = 10**9


@pytest.mark.parametrize("key", ["num_layers", "dim_model", "dim_ff", "num_heads", "num_kv_heads", "vocab_size"])
def test_a_size_that_no_model_has_is_named(tmp_path: Path, key: str) -> None:
    (tmp_path / "m.json").write_text(json.dumps(small_model().to_json() | {key: HUGE}))
    with pytest.raises(UserError, match=rf"m\.json: {key}: found {HUGE}, allowed: integer >= . and <= "):
        load_model_config(tmp_path / "m.json")


IN_HF = [
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_window_layers",
]


@pytest.mark.parametrize("key", IN_HF)
def test_a_size_that_no_model_has_is_named_in_a_config_json(key: str) -> None:
    hf = to_hf_config(small_model(qkv_bias=True), "float32", 1, 2)
    with pytest.raises(UserError, match=rf"^w: {key}: found {HUGE}, allowed: at most "):
        from_hf_config(hf | {key: HUGE, "use_sliding_window": True, "sliding_window": 8}, "w")
    with pytest.raises(UserError, match=rf"^w: {key}: found 1e\+30, allowed"):
        from_hf_config(hf | {key: 1e30}, "w")


def test_a_config_json_of_such_a_size_is_not_made_for_a_tokenizer_or_a_generation(tmp_path: Path) -> None:
    from fm9g.infer.generate import generate

    train_tokenizer(["a b"], 300, tmp_path / "t")
    hf = to_hf_config(small_model(qkv_bias=True), "float32", 1, 2) | {"num_hidden_layers": HUGE}
    (tmp_path / "t" / "config.json").write_text(json.dumps(hf))
    problem = rf"config\.json: num_hidden_layers: found {HUGE}"
    with pytest.raises(UserError, match=problem):
        load_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=problem):
        generate(tmp_path / "t", "a")


def test_a_transform_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.py").write_text("def transform(data, num_sample, r): return data")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    with pytest.raises(UserError, match="a: transforms: this user may not read it"):
        load_transform(tmp_path / "t.py", "a: transforms", 1.0)
