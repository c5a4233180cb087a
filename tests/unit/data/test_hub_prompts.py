"""Prompts from a data set on the hub, with a stand-in for the package `datasets`; names that mean files."""

import sys
from types import SimpleNamespace

import pytest

from dinalrm_align.data.hub_prompts import load_prompts


class Rows(list):
    def select_columns(self, columns):
        assert set(columns) <= self[0].keys()
        return Rows({name: row[name] for name in columns} for row in self)


@pytest.fixture
def hub(monkeypatch):
    """hub(rows): the data set that every name stands for; `asked` lists what was loaded."""
    asked = []

    def offer(rows):
        def load_dataset(name, *, split, streaming):
            asked.append((name, split, streaming))
            if isinstance(rows, Exception):
                raise rows
            return Rows(rows)

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    return offer


@pytest.mark.parametrize("column", ["prompt", "Prompt", "caption", "Prompts", "CAPTIONS"])
def test_the_distinct_prompts_of_a_data_set_in_order(hub, column):
    asked = hub([{"image": 0, column: text} for text in ("b", "a ", None, "b", " ", "c")])
    assert load_prompts("owner/name") == ["b", "a", "c"]
    assert load_prompts("owner/name:test") == ["b", "a", "c"]
    assert asked == [("owner/name", "train", True), ("owner/name", "test", True)]


def test_prompt_comes_before_caption(hub):
    hub([{"caption": "c", "prompt": "p"}])
    assert load_prompts("owner/name") == ["p"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], r"got the columns \['text'\]; expected one of prompt"),
        ([], r"got the columns \[\]"),
        ([{"prompt": None}, {"prompt": "  "}], "column prompt holds no prompts"),
        ([{"prompt": "a"}, {"prompt": 3}], "owner/name:train on the hub: row 1: got int"),
        ([{"prompt": ["a"]}], "row 0: got list"),
        ([{"prompt": "a" * 10_001}], "10000"),
        ([{"prompt": "a\ud800"}], "row 0"),
        ([{"prompt": "a\0"}], "row 0"),
        (FileNotFoundError("no such data set"), "no file owner/name, .* no such data set"),
        (ValueError("Bad split: train"), "Bad split"),
        (ConnectionError("offline"), "offline"),
        (RuntimeError("Dataset scripts are no longer supported"), "owner/name:train on the hub: Dataset scripts"),
        (ImportError("To support decoding images, please install 'Pillow'"), "owner/name:train on the hub: .*Pillow"),
        (type("ConnectError", (Exception,), {})("no route"), "no route"),  # httpx's is no OSError
    ],
)
def test_a_data_set_without_prompts_is_refused(hub, rows, message):
    hub(rows)
    with pytest.raises(ValueError, match=message):
        load_prompts("owner/name")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"no file owner/name; .* pip install 'dinalrm-align\[data\]'"):
        load_prompts("owner/name")


def test_a_file_wins_and_a_missing_file_is_not_asked_of_the_hub(hub, tmp_path, monkeypatch):
    asked = hub([{"prompt": "from the hub"}])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("from a file\n")
    assert load_prompts("owner/name") == ["from a file"]
    for missing in ("owner/absent.txt", "owner/absent.jsonl", "absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no prompt file"):
            load_prompts(missing)
    assert asked == []


class Dataset:
    """As `datasets.Dataset` and `IterableDataset` (datasets 4.4, arrow_dataset.py): rows are dicts, not a list."""

    def __init__(self, rows):
        self.rows = rows

    def select_columns(self, columns):
        return Dataset([{name: row[name] for name in columns} for row in self.rows])

    def __iter__(self):
        return iter(self.rows)


def test_a_data_set_in_memory_is_read_as_one_on_the_hub():
    rows = [{"image": 0, "Caption": text} for text in ("b", "a ", None, "b", " ")]
    assert load_prompts(Dataset(rows)) == load_prompts(rows) == load_prompts(iter(rows)) == ["b", "a"]


def test_prompts_in_memory_are_returned_as_they_are():
    assert load_prompts(["b", "a", "b"]) == load_prompts(iter(("b", "a", "b"))) == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"train": Dataset([]), "test": Dataset([])}, r"prompts: got the splits or columns \['test', 'train'\]"),
        (Dataset([{"text": "a"}]), r"prompts: got the columns \['text'\]"),
        ([{"prompt": 3}], "prompts: row 0: got int"),
        (["a", 3], r"prompts: \[1\]: got int"),
        (["a", "b\0"], r"prompts: \[1\]"),
        ([], "prompts: got the columns"),
        (7, "prompts: "),
    ],
)
def test_what_holds_no_prompts_in_memory_is_refused(source, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load_prompts(source)


@pytest.mark.extra
def test_real_data_sets_in_memory_and_streaming():
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    table = datasets.table.InMemoryTable(pyarrow.table({"prompt": ["b", "a", "b"], "seed": [1, 1, 1]}))
    rows = datasets.Dataset(table, fingerprint="given")  # from_list hashes classes that dill cannot always pickle
    assert load_prompts(rows) == load_prompts(rows.to_iterable_dataset()) == ["b", "a"]
    with pytest.raises(ValueError, match="expected one split"):
        load_prompts(datasets.DatasetDict(train=rows))
