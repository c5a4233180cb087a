"""Layouts of preference data as records: labels, groups, where images are, and what the check rejects."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny_prepare import hpdv3, pickapic, prepare

from dinalrm_align.data.formats import LAYOUTS, find_layout, read_preferences
from dinalrm_align.data.formats.record import Cell, Dropped, Preference, Row, check_preference
from dinalrm_align.data.formats.rows import image_source
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.mined_pairs import MinedPair, write_manifest, write_shard
from dinalrm_align.data.pairs import PairManifest


def test_a_ranked_list_becomes_all_its_pairs(tmp_path):
    """Ranks 2, 1, 2: the second image is preferred to both others, which are tied."""
    path = tmp_path / "test.json"
    path.write_text(json.dumps([{"prompt": "a", "generations": ["0.png", "1.png", "2.png"], "ranking": [2, 1, 2]}]))
    assert find_layout(path) == "rankings"
    pairs = list(read_preferences(path, "rankings"))
    assert [(pair.chosen, pair.rejected, pair.label) for pair in pairs] == [
        ("0.png", "1.png", 0.0), ("0.png", "2.png", 0.5), ("1.png", "2.png", 1.0),
    ]  # fmt: skip
    assert {pair.group for pair in pairs} == {0}


def test_an_image_in_a_parquet_file_is_read_when_it_is_asked_for(tmp_path):
    folder = pickapic(tmp_path / "pickapic")
    pairs = list(read_preferences(folder, find_layout(folder)))
    assert [pair.label for pair in pairs] == [0.0, 0.5, 1.0] and [pair.group for pair in pairs] == [0, 1, 3]
    assert pairs[2].chosen == Cell(str(folder / "train-00000.parquet"), 1, 1, "jpg_0")
    assert image_source(pairs[2].chosen, folder).startswith(b"\xff\xd8")


def test_our_shards_are_records_whose_cells_are_rows_of_the_latents(tmp_path):
    prepare(hpdv3(tmp_path / "data"), tmp_path / "out")
    assert find_layout(tmp_path / "out") == "latents"
    pairs = list(read_preferences(tmp_path / "out", "latents"))
    batches = LatentPairs(tmp_path / "out", batch_size=1).in_order()
    assert [pair.prompt for pair in pairs] == [batch.conditions.prompts[0] for batch in batches]
    assert [pair.chosen.row for pair in pairs[:3]] == [0, 2, 4] and pairs[3].chosen.file.endswith("00001.safetensors")


def test_mined_pairs_carry_their_scores(tmp_path):
    pair = MinedPair("a", 0, torch.zeros(2, 2, 4, 4), [0.5, 2.0], 1, 0, torch.zeros(3, 5), torch.zeros(4))
    write_manifest(tmp_path / "set", PairManifest(1.0, 0.0, 3), shards=1, mining={})
    write_shard(tmp_path / "set" / "pairs" / "pairs-00000.parquet", [pair], dtype="float32")
    assert find_layout(tmp_path / "set") == "mined"
    (found,) = read_preferences(tmp_path / "set", "mined")
    assert (found.prompt, found.scores, found.chosen.column) == ("a", {"score": (2.0, 0.5)}, "img_win_latents")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "^prompt: got int 3"),
        ({"prompt": "a" * 10_001}, "^prompt: got 10001 characters"),
        ({"prompt": "a\ud800"}, r"^prompt: got '\\ud800' at character 2"),
        ({"prompt": "\0"}, r"^prompt: got '\\x00' at character 1"),
        ({"prompt": " \n"}, "^prompt: got .*blank"),
        ({"prompt": ""}, "^prompt: got '', a blank"),
        ({"prompt": " ", "encoded": True}, "^prompt: got ' ', a blank"),
        ({"chosen": ""}, "^chosen: got ''"),
        ({"rejected": "\udcff.png"}, "^rejected: got "),
        ({"label": 1.5}, "^label: got 1.5"),
        ({"label": True}, "^label: got True"),
        ({"label": "1"}, "^label: got '1'"),
        ({"label": math.nan}, "^label: got nan"),
        ({"label": 10**400}, "^label: got a huge integer"),
        ({"votes": (-1.0, 2.0)}, r"^votes: got \(-1.0, 2.0\)"),
        ({"votes": (0, 0)}, r"^votes: got \(0, 0\)"),
        ({"votes": (math.nan, 1)}, "^votes: got nan"),
        ({"votes": (1e308, 1e308)}, r"^votes: got \(1e\+308, 1e\+308\); .* a finite sum"),
        ({"chosen": f"images/{'é' * 128}.png"}, "^chosen: got 'images/é"),
        ({"concept": "\ud800"}, r"^concept: got '\\ud800'"),
        ({"votes": (math.inf, 1)}, "^votes: got inf"),
        ({"votes": (1, 2, 3)}, r"^votes: got \(1, 2, 3\); expected two numbers"),
        ({"votes": (True, 1)}, "^votes: got True"),
        ({"confidence": math.inf}, "^confidence: got inf"),
        ({"confidence": "high"}, "^confidence: got 'high'"),
        ({"scores": {"clip": (1, math.nan)}}, "^scores.clip: got nan"),
        ({"scores": {"clip": None}}, "^scores.clip: got None"),
        ({"concept": 3}, "^concept: got 3"),
    ],
)
def test_an_invalid_record_cannot_be_made(changes, message):
    with pytest.raises(ValueError, match=message):
        Preference(**{"prompt": "a", "chosen": "c", "rejected": "r", **changes})


def test_numbers_of_numpy_are_numbers():
    assert Preference("a", "c", "r", label=np.float32(0.5), votes=(np.int64(3), 1)).is_tie


def test_test_sets_may_hold_what_cannot_be_trained_on():
    pair = Preference("a", "c", "c")
    assert check_preference(pair, strict=False) is pair
    with pytest.raises(ValueError, match="^chosen and rejected: got one image"):
        check_preference(pair)


def test_an_unknown_caption_is_empty_where_embeddings_are_stored():
    assert check_preference(Preference("", "c", "r", encoded=True)).prompt == ""


JSONL = {"prompt": "a", "chosen": "c.png", "rejected": "r.png"}
HPDV3 = {"prompt": "a", "path1": "c.png", "path2": "r.png"}
HPDV2 = {"prompt": "a", "file_path": ["c.png", "r.png"], "human_preference": [1, 0]}
RANKINGS = {"prompt": "a", "generations": ["c.png", "r.png"], "ranking": [1, 2]}
GENAI = {"prompt": "a", "left_image": "c.png", "right_image": "r.png", "vote_type": "leftvote"}
PICKAPIC = {"caption": "a", "jpg_0": "c.png", "jpg_1": "r.png", "label_0": 1, "has_label": True}
MINED = {"prompt": "a", "win_score": 1.0, "lose_score": 0.0, "extra_info": None}
RELEASED = {"prompt": "a", "latent1_shape": [2, 8, 8], "latent2_shape": [2, 8, 8], "detailed_results": ""}
BAD = [
    ("jsonl", JSONL, {"prompt": "\ud800"}, "prompt"),
    ("jsonl", JSONL, {"prompt": None}, "prompt"),
    ("jsonl", JSONL, {"prompt": ["a"]}, "prompt"),
    ("jsonl", JSONL, {"label": math.nan}, "label"),
    ("jsonl", JSONL, {"label": 1.5}, "label"),
    ("jsonl", JSONL, {"label": None}, "label"),
    ("jsonl", JSONL, {"label": 10**400}, "label"),
    ("jsonl", JSONL, {"votes": [0, 0]}, "votes"),
    ("jsonl", JSONL, {"votes": [1]}, "votes"),
    ("jsonl", JSONL, {"votes": {"chosen": 1}}, "votes"),
    ("jsonl", JSONL, {"votes": [math.nan, math.nan]}, "votes"),
    ("jsonl", JSONL, {"confidence": math.nan}, "confidence"),
    ("jsonl", JSONL, {"scores": []}, "scores"),
    ("jsonl", JSONL, {"scores": {"clip": [1, None]}}, "scores.clip"),
    ("jsonl", JSONL, {"scores": {"clip": [1, math.inf]}}, "scores.clip"),
    ("jsonl", JSONL, {"scores": {"clip": 3}}, "scores.clip"),
    ("hpdv3", HPDV3, {"choice_dist": [0, 0]}, "votes"),
    ("hpdv3", HPDV3, {"choice_dist": [3, 2, 1]}, "choice_dist"),
    ("hpdv3", HPDV3, {"choice_dist": [math.inf, 0]}, "choice_dist"),
    ("hpdv3", HPDV3, {"confidence": math.inf}, "confidence"),
    ("hpdv3", HPDV3, {"path1": ["c.png"]}, "chosen"),
    ("hpdv2", HPDV2, {"file_path": "ab"}, "file_path"),
    ("hpdv2", HPDV2, {"file_path": 3}, "file_path"),
    ("hpdv2", HPDV2, {"human_preference": [math.nan, 1]}, "human_preference"),
    ("hpdv2", HPDV2, {"human_preference": [1, 1]}, "human_preference"),
    ("rankings", RANKINGS, {"ranking": [1, math.nan]}, "rank"),
    ("rankings", RANKINGS, {"ranking": [1, True]}, "rank"),
    ("genai_bench", GENAI, {"vote_type": ["leftvote"]}, "vote_type"),
    ("pickapic", PICKAPIC, {"label_0": math.nan}, "label_0"),
    ("pickapic", PICKAPIC, {"label_0": None}, "label_0"),
    ("pickapic", PICKAPIC, {"caption": ""}, "prompt"),
    ("mined", MINED, {"win_score": math.nan}, "scores.score"),
    ("mined", MINED, {"lose_score": None}, "scores.score"),
    ("mined", MINED, {"prompt": None}, "prompt"),
    ("mined", MINED, {"prompt": [{"role": "user"}]}, "prompt"),
    ("mined", MINED, {"prompt": [{"role": "user", "content": 3}]}, "prompt"),
    ("released", RELEASED, {"detailed_results": "{'votes_chosen': 3}"}, "votes_chosen, votes_rejected"),
    ("released", RELEASED, {"detailed_results": "{'votes_chosen': 0, 'votes_rejected': 0}"}, "votes"),
    ("released", RELEASED, {"detailed_results": "{'confidence': 1e999}"}, "confidence"),
    ("released", RELEASED, {"latent2_shape": [2, 8, 4]}, "shape"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "record", "changes", "field"), BAD)
def test_a_bad_record_of_any_layout_is_named_or_skipped_and_counted(monkeypatch, layout, record, changes, field):
    """The record between two good ones; no layout raises anything else than ValueError."""
    rows = [Row(f"file, row {n}", n, {**record, **(changes if n == 1 else {})}) for n in range(3)]
    if layout in ("mined", "released"):
        rows = [replace(row, cell=Cell("file", 0, row.number, "")) for row in rows]
    monkeypatch.setitem(LAYOUTS, layout, (lambda source, bad: iter(rows), LAYOUTS[layout][1]))
    with pytest.raises(ValueError, match=f"^file, row 1: .*{field}.*--on_bad skip$"):
        list(read_preferences(None, layout, Dropped("refuse").bad))
    dropped = Dropped("skip")
    assert len(list(read_preferences(None, layout, dropped.bad))) == 2
    assert dropped.counts == {"invalid record": 1} and dropped.named["invalid record"][0].startswith("file, row 1: ")


def _jsonl(path, caption):
    good = json.dumps(JSONL).encode()
    path.write_bytes(b"\n".join([good, good.replace(b'"a"', b'"' + caption + b'"'), good]))


def _json(path, caption):
    good = json.dumps(HPDV3).encode()
    path.write_bytes(b"[" + b",".join([good, good.replace(b'"a"', b'"' + caption + b'"'), good]) + b"]")


def _parquet(path, caption):
    table = pyarrow.table({name: [value] * 3 for name, value in PICKAPIC.items()})
    texts = pyarrow.array([b"a", caption, b"a"]).view(pyarrow.string())
    parquet.write_table(table.set_column(0, "caption", texts), path)


@pytest.mark.parametrize(
    ("write", "name", "layout"),
    [(_jsonl, "p.jsonl", "jsonl"), (_json, "p.json", "hpdv3"), (_parquet, "p.parquet", "pickapic")],
)
def test_a_caption_that_is_not_utf8_is_one_bad_record_of_its_file(tmp_path, write, name, layout):
    write(tmp_path / name, "café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"(line 2|entry 1|row 1): prompt: got '\\udce9' at character 4"):
        list(read_preferences(tmp_path / name, layout, Dropped("refuse").bad))
    dropped = Dropped("skip")
    assert len(list(read_preferences(tmp_path / name, layout, dropped.bad))) == 2
    assert dropped.counts == {"invalid record": 1}


def test_absent_scores_are_no_fault(tmp_path):
    lines = [JSONL | {"scores": None}, JSONL | {"scores": {"clip": None, "vqa": [1, 0]}}, JSONL]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [pair.scores for pair in read_preferences(tmp_path / "p.jsonl", "jsonl")] == [{}, {"vqa": (1.0, 0.0)}, {}]


def test_a_bad_first_record_does_not_hide_the_layout(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([3, {"prompt": "a"}, HPDV3]))
    assert find_layout(tmp_path / "train.json") == "hpdv3"


def test_every_layout_is_documented():
    import dinalrm_align.data.formats as formats

    assert all(f"\n    {name} " in formats.__doc__ for name in LAYOUTS)
