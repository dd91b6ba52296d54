"""Indexed datasets: both kinds of index are read, and mismatches with the data are noticed."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from helpers.common import index_dataset, make_records, write_jsonl

from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.load.record_sample import RecordSample
from fm9g.errors import UserError

PAIRS = [{"input": "问题", "output": "回答一"}, {"input": "", "output": "second"}, {"input": "", "output": "最后"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    return write_jsonl(tmp_path / "raw" / "a.jsonl", PAIRS)


@pytest.fixture
def dataset(tmp_path: Path, source: Path) -> Path:
    index_dataset(source, tmp_path / "out", "zh")
    return tmp_path / "out"


def test_every_record_is_read_the_first_one_included(dataset: Path) -> None:
    opened = IndexedDataset(dataset)
    assert [opened[i] for i in range(len(opened))] == PAIRS
    with pytest.raises(IndexError):
        opened[3]


@pytest.mark.parametrize("keep", ["index", "index.h5"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_either_index_file_and_both_kinds_of_bounds_are_read(
    dataset: Path, keep: str, published: bool, chunked: bool
) -> None:
    bounds = h5py.File(dataset / "index.h5")["index"][:]
    if published:  # the published converter wrote the N line ends only
        bounds = bounds[1:]
    (dataset / "index").write_text("\n".join(map(str, bounds)) + "\n")
    with h5py.File(dataset / "index.h5", "w") as file:
        file.create_dataset("index", data=bounds, chunks=(1,) if chunked else None)
    os.remove(dataset / ("index" if keep == "index.h5" else "index.h5"))
    opened = IndexedDataset(dataset)
    assert [opened[i] for i in range(len(opened))] == PAIRS


def test_an_index_that_does_not_match_its_data_is_refused(dataset: Path) -> None:
    data = dataset / "data.jsonl"
    full = data.read_bytes()
    data.write_bytes(full + b'{"output": "more"}\n')
    with pytest.raises(UserError, match="one of them was changed; index it again"):
        IndexedDataset(dataset)
    data.write_bytes(full.replace(b'"}\n{', b'"}{\n'))  # as long as before, other line ends
    opened = IndexedDataset(dataset)
    with pytest.raises(UserError, match=r"data.jsonl, line 1: the index does not match the data"):
        opened[0]


def test_a_broken_or_missing_index_is_reported(dataset: Path) -> None:
    (dataset / "index.h5").write_bytes(b"garbage")
    with pytest.raises(UserError, match="the index cannot be read"):
        IndexedDataset(dataset)
    os.remove(dataset / "index.h5")
    os.remove(dataset / "index")
    with pytest.raises(UserError, match=r"found neither index.h5 nor index"):
        IndexedDataset(dataset)
    with pytest.raises(UserError, match="no indexed dataset here"):
        IndexedDataset(dataset.parent)


_MANY_FILES = """
import os, resource, sys
from pathlib import Path
from fm9g.data.load.indexed_dataset import IndexedDataset
from fm9g.data.load.record_sample import RecordSample
from fm9g.errors import UserError

folders = sorted(Path(sys.argv[1]).iterdir())
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
datasets = [IndexedDataset(folder) for folder in folders]
for dataset in datasets * 2:
    assert dataset[1]["output"] == "2"
print(len(datasets), len(os.listdir("/proc/self/fd")) < 40)
del dataset, datasets
print(len(os.listdir("/proc/self/fd")) < 8)
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    IndexedDataset(folders[0])
except UserError as error:
    print(error)
"""


def test_there_may_be_more_datasets_than_open_files(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", [{"input": "", "output": str(i)} for i in (1, 2)])
    index_dataset(source, tmp_path / "dataset", "en")
    (tmp_path / "many").mkdir()
    for number in range(100):
        (tmp_path / "many" / str(number)).symlink_to(tmp_path / "dataset")
    words = [sys.executable, "-c", _MANY_FILES, str(tmp_path / "many")]
    done = subprocess.run(words, capture_output=True, encoding="utf-8")
    assert done.stderr == ""
    counted, closed, message = done.stdout.splitlines()
    assert (counted, closed) == ("100 True", "True")
    assert "this process may have only 64 files open" in message
    assert "`ulimit -n 65536`" in message
    assert "index it again" not in message


def test_a_dataset_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "s.jsonl", [{"input": "", "output": "a"}])
    index_dataset(source, tmp_path / "dataset", "en")
    dataset = IndexedDataset(tmp_path / "dataset")
    index_dataset(source, tmp_path / "dataset", "en", overwrite=True)
    with pytest.raises(UserError, match="was changed or replaced while it was read"):
        dataset[0]


def test_a_record_of_an_index_that_is_too_long_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"input": "", "output": "a"}, {"input": "", "output": "b" * 3000}])
    index_dataset(tmp_path / "a.jsonl", tmp_path / "out", "en")
    dataset = IndexedDataset(tmp_path / "out", max_record_bytes=1000)
    assert dataset[0]["output"] == "a"
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: has 0 MB, but a record at most"):
        dataset[1]


def test_the_folder_of_a_split_is_named_with_its_parts(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_records(40))
    for part in ("train", "validation"):
        index_dataset(source, tmp_path / "out" / part, "en")
    with pytest.raises(UserError, match=r"out: contains the datasets train and validation; give .*out/train"):
        IndexedDataset(tmp_path / "out")


def test_a_sample_has_its_records_its_lines_and_its_checksum(dataset: Path) -> None:
    two = IndexedDataset(dataset, sample=RecordSample(2, 0, 1))
    rest = IndexedDataset(dataset, sample=RecordSample(0, 2, 1))
    lines = [opened.line_number(index) for opened in (two, rest) for index in range(len(opened))]
    assert sorted(lines) == [1, 2, 3]
    assert [two[0], two[1], rest[0]] == [PAIRS[line - 1] for line in lines]
    assert len({opened.checksum() for opened in (two, rest, IndexedDataset(dataset))}) == 3
    assert two.used_bytes + rest.used_bytes == pytest.approx(two.nbytes)
    assert len(IndexedDataset(dataset, 1, sample=RecordSample(2))) == 1
    with pytest.raises(UserError, match="sample_skip 3 leaves none of its 3 records"):
        IndexedDataset(dataset, sample=RecordSample(1, 3))
