"""Layouts of preference data as records: labels, groups, where images are, and what the check rejects."""

import json

import pytest
import torch
from tiny_prepare import hpdv3, pickapic, prepare

from dinalrm_align.data.formats import LAYOUTS, find_layout, read_preferences
from dinalrm_align.data.formats.record import Cell, Preference, check_preference
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
        ({"chosen": ""}, "^chosen: got ''"),
        ({"label": 1.5}, "^label: got 1.5"),
        ({"label": True}, "^label: got True"),
        ({"votes": (-1.0, 2.0)}, r"^votes: got \(-1.0, 2.0\)"),
        ({"concept": 3}, "^concept: got 3"),
    ],
)
def test_an_invalid_record_is_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        check_preference(Preference(**{"prompt": "a", "chosen": "c", "rejected": "r", **changes}))


def test_test_sets_may_hold_what_cannot_be_trained_on():
    for pair in (Preference(" ", "c", "r"), Preference("a", "c", "c")):
        assert check_preference(pair, strict=False) is pair
        with pytest.raises(ValueError):
            check_preference(pair)


def test_every_layout_is_documented():
    import dinalrm_align.data.formats as formats

    assert all(f"\n    {name} " in formats.__doc__ for name in LAYOUTS)
