"""Broken and mutated files: whatever they hold, nothing but our own error class comes out."""

import contextlib
import gzip
import json
import random
import shutil
import tempfile
from pathlib import Path

from helpers.common import index_dataset, make_records, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fm9g.config.mixture import load_mixture
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.prepare.record_formats import BadRecord, canonicalize
from fm9g.data.prepare.records import to_line
from fm9g.errors import UserError

QUICK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

CHATS = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
    {"instruction": "i", "input": "", "output": "o", "history": [["q", "a"]], "system": "s"},
    {"prompt": "p", "chosen": "c", "rejected": "r"},
    {"text": "t"},
    {
        "messages": [
            {"role": "assistant", "content": [{"type": "text", "text": "a", "weight": 0}], "thinking": "t"},
            {"role": "tool", "content": "3", "tool_call_id": "c", "name": "f"},
            {"role": "assistant", "content": "ab", "content_weights": [[1, 0], [1, 1]], "tool_calls": [{"name": "f"}]},
        ],
        "loss_mask": [0, 1, 1],
    },
]
LINES = [json.dumps(record, ensure_ascii=False).encode() for record in [*make_records(6), *CHATS]]
SEEDS = {
    "jsonl": b"\n".join(LINES) + b"\n",
    "json": b"[" + b",".join(LINES) + b"]",
    "csv": b'input,output\na,b\n"c ""d""",e\n',
    "txt": "one\n二\n".encode(),
    "md": b"# one\n\ntwo",
    "jsonl.gz": gzip.compress(b"\n".join(LINES)),
}
PIECES = [
    b"\x00",
    b"\xff",
    b'"',
    b"\\",
    b"\n",
    b"\r",
    b"{",
    b"}",
    b"[",
    b",",
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"\xef\xbb\xbf",
]

mutations = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.one_of(st.sampled_from(PIECES), st.binary(max_size=8))),
    max_size=4,
)


def mutated(data: bytes, changes: list) -> bytes:
    for place, cut, new in changes:
        at = int(place * len(data))
        data = data[:at] + new + data[at + cut :]
    return data


@QUICK
@given(st.sampled_from(sorted(SEEDS)), mutations, st.booleans(), st.booleans())
def test_the_converter(kind: str, changes: list, skip_bad: bool, as_is: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name) / f"a.{kind}", Path(name) / "out"
        source.write_bytes(mutated(SEEDS[kind], changes))
        try:
            meta = index_dataset(source, output, "zh", skip_bad=skip_bad, as_is=as_is)
        except UserError as error:
            assert str(source) in str(error)  # noqa: PT017
            assert not output.exists()
        else:
            opened = IndexedDataset(output)
            assert len(opened) == meta["nlines"] == len([opened[i] for i in range(len(opened))])


ROLES = ["user", "assistant", "human", "gpt"]
keys = st.sampled_from(
    """input output text instruction history system messages conversations role content from value tools tool_calls
    function name arguments chosen rejected label prompt query response reasoning thinking weight mask train loss_mask
    content_weights tool_call_id id type""".split()  # noqa: SIM905
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "[]", '{"role": "user"}', '[{"name": "f"}]']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)


@QUICK
@given(st.dictionaries(keys, values, max_size=5))
def test_records_of_any_shape(record: dict) -> None:
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "a.json"
        source.write_text(json.dumps(record), encoding="utf-8")
        with contextlib.suppress(UserError):
            index_dataset(source, Path(name) / "out", "en")
            assert len(IndexedDataset(Path(name) / "out")) == 1


weights = st.sampled_from([0, 1, 0.5, True, None])
parts = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=2)}, optional={"weight": weights})
beside = {"mask": weights, "name": st.sampled_from(["f", 3, None]), "id": st.just("x"), "content_weights": st.none()}
turns = st.one_of(
    st.fixed_dictionaries({"role": st.just("user"), "content": st.sampled_from(["", "q"])}, optional=beside),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.just("ab") | st.lists(parts)},
        optional={
            **beside,
            "mask": st.booleans(),
            "thinking": st.sampled_from(["", "t"]),
            "tool_calls": st.sampled_from([[{"name": "f", "arguments": "{}", "id": "c"}], [], None]),
        },
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": st.just("ab"),
            "content_weights": st.sampled_from([[[1, 0], [1, 2]], [[2, 1]], [[1, 1], [0, 3], [1, 1]]]),
        },
        optional={"weight": weights},
    ),
)
chats = st.fixed_dictionaries(
    {"messages": st.lists(turns, min_size=1, max_size=4)},
    optional={"weight": st.sampled_from([0, 2, 0.5]), "tools": st.sampled_from(["[]", [{"name": "f"}]])},
)


def test_what_is_canonical_stays_as_it_is_also_when_it_was_stored() -> None:
    records: list[dict] = []

    @settings(QUICK, max_examples=800)
    @given(chats | st.dictionaries(keys, values, max_size=5))
    def check(record: dict) -> None:
        with contextlib.suppress(BadRecord):
            result = canonicalize(record)[1]
            assert canonicalize(result)[1] is result
            read = json.loads(to_line(result))
            assert read == result
            assert canonicalize(read)[1] is read
            records.append(result)

    check()
    keys_seen = {key for record in records for turn in record.get("messages", []) for key in turn}
    assert keys_seen >= {"weight", "content_weights", "reasoning_content", "tool_calls", "name"}  # else it says nothing


@QUICK
@given(st.sampled_from(["data.jsonl", "index", "index.h5"]), mutations, st.booleans())
def test_the_index_reader(name: str, changes: list, text_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "dataset"
        shutil.copytree(_dataset(), copy)
        file = copy / name
        file.write_bytes(mutated(file.read_bytes(), changes))
        if text_only:
            (copy / "index.h5").unlink()
        with contextlib.suppress(UserError):
            opened = IndexedDataset(copy)
            for number in range(len(opened)):
                with contextlib.suppress(UserError):
                    assert isinstance(opened[number], dict)


def _dataset() -> Path:
    folder = Path(tempfile.gettempdir()) / "fm9g-fuzz"
    if not hasattr(_dataset, "made"):
        shutil.rmtree(folder, ignore_errors=True)
        index_dataset(write_jsonl(folder.with_suffix(".jsonl"), make_records(12, 1)), folder, "en")
        _dataset.made = True  # type: ignore[attr-defined]
    return folder


MIXTURE = json.dumps([{"task_name": "a", "path": "a", "abs_weight": 1.0, "incontext_weight": [1, 2]}]).encode()
entries = st.dictionaries(
    st.sampled_from(
        [
            "task_name",
            "path",
            "abs_weight",
            "weight",
            "transforms",
            "allow_repeat",
            "nlines",
            "chat_template",
            "train_on",
            "oversize_rule",
        ]
    ),
    values,
    max_size=6,
)


@QUICK
@given(st.one_of(mutations.map(lambda changes: mutated(MIXTURE, changes)), st.lists(entries).map(json.dumps)))
def test_the_mixture_configuration(content: bytes | str) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "mixture.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        try:
            load_mixture(file)
        except UserError as error:
            assert str(file) in str(error)  # noqa: PT017


def test_mutations_do_reach_the_code() -> None:
    """Else the tests above would say nothing."""
    source = random.Random(0)
    changed = [mutated(SEEDS["jsonl"], [(source.random(), 3, b'"')]) for _ in range(50)]
    assert len(set(changed)) > 45
