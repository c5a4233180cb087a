"""DiNa-LRM's released layout: read in place, converted to shards, never executed."""

import csv
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny_prepare import encode_prompts, prepare, values_of

from dinalrm_align.data.formats import find_layout
from dinalrm_align.data.formats.released import load_latent, parse_results
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.data.released_pairs import ReleasedPairs

MANIFEST = PairManifest(1.0, 0.0, 3)


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def row(number, **changes):
    """A pair of prompt `number // 2`: chosen latents are of number / 255, rejected of 0; two sizes in turn."""
    shape = (2, 8, 8) if number % 2 else (2, 8, 4)
    latents = [npy(np.full(shape, value, dtype=np.float32)) for value in (number / 255, 0.0)]
    results = f"{{'votes_chosen': 9, 'votes_rejected': {number}, 'confidence': None, 'orig_h': 64}}"
    return {
        "prompt": f"prompt {number // 2}", "model1": "a", "model2": "b", "detailed_results": results,
        "image1_path": "c.png", "image2_path": "r.png", "latent1": latents[0], "latent2": latents[1],
        "latent1_shape": list(shape), "latent2_shape": list(shape), **changes,
    }  # fmt: skip


def released(folder, rows=None, per_part=6, row_group=3, index=None):
    """Two parts of two row groups each."""
    folder.mkdir()
    rows = [row(number) for number in range(12)] if rows is None else rows
    for part in range(0, len(rows), per_part):
        name = folder / f"part_rank{part // per_part:02d}.parquet"
        table = pyarrow.Table.from_pylist(rows[part : part + per_part])
        parquet.write_table(table, name, row_group_size=row_group, compression="zstd")
    if index is not None:
        with open(folder / "bucket_index.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [["global_id", "parquet_path", "row_group", "row_index", "width", "height", "bucket_id"], *index]
            )
    return folder


def open_released(folder, **changes):
    options = dict(encode_prompts=encode_prompts, manifest=MANIFEST, batch_size=2)
    return ReleasedPairs(folder, **{**options, **changes})


def test_every_row_is_read_as_it_was_written(tmp_path):
    pairs = open_released(released(tmp_path / "set"))
    assert values_of(pairs) == [(n // 2, n, 0) for n in range(12)]
    batch = pairs.batch_at(0)
    assert batch.latents.dtype == torch.float32 and batch.group_prompts is not None


def test_the_index_says_which_rows_are_read_whatever_folder_it_names(tmp_path):
    listed = [[0, "/some/where/part_rank00.parquet", 1, 2, 64, 64, 0], [1, "part_rank01.parquet", 0, 0, 64, 64, 0]]
    assert [n for _, n, _ in values_of(open_released(released(tmp_path / "set", index=listed)))] == [5, 6]


def test_an_epoch_reads_every_row_once_and_every_row_group_about_once(tmp_path, monkeypatch):
    from dinalrm_align.data import batches, released_pairs

    read = []
    original = released_pairs._read_group
    monkeypatch.setattr(batches, "AT_ONCE", 1)
    monkeypatch.setattr(
        released_pairs, "_read_group", lambda file, group: read.append((file, group)) or original(file, group)
    )
    folder = released(tmp_path / "set", [row(2 * n) for n in range(40)], per_part=20, row_group=5)
    pairs = open_released(folder)
    found = [n for step in range(20) for n in (255 * pairs.batch_at(step).latents[:2, 0, 0, 0]).round().tolist()]
    assert sorted(found) == [2 * n for n in range(40)] and found != sorted(found)
    assert len(set(read)) == 8 and len(read) == 8
    again = open_released(folder)
    assert [
        n for step in range(20) for n in (255 * again.batch_at(step).latents[:2, 0, 0, 0]).round().tolist()
    ] == found


def test_it_becomes_shards_without_an_encoder_of_images(tmp_path):
    folder = released(tmp_path / "set")
    assert find_layout(folder) == "released"
    work, calls = prepare(folder, tmp_path / "out", filter={"min_vote_share": 0.6})
    assert calls == [] and work.dropped.counts == {"share of votes at most 0.6": 6}
    pairs = LatentPairs(tmp_path / "out", batch_size=1)
    assert values_of(pairs) == [(n // 2, n, 0) for n in range(6)]
    assert {tuple(batch.latents.shape[2:]) for batch in pairs.in_order()} == {(8, 4), (8, 8)}


def test_a_broken_part_or_row_is_refused_by_name_or_left_out(tmp_path):
    folder = released(tmp_path / "set", [row(0), row(1, latent1_shape=[2, 9, 9]), *(row(n) for n in range(2, 12))])
    with pytest.raises(
        ValueError, match=r"part_rank00.parquet, row group 0, row 1: latents of two shapes.*--on_bad skip"
    ):
        open_released(folder)
    with pytest.warns(UserWarning, match="1 parts or rows left out"):
        assert len(values_of(open_released(folder, on_bad="skip"))) == 11
    part = folder / "part_rank01.parquet"
    part.write_bytes(part.read_bytes()[:-30])
    with pytest.warns(UserWarning, match="2 parts or rows left out.*part_rank01.parquet"):
        assert len(values_of(open_released(folder, on_bad="skip"))) == 5
    work, _ = prepare(folder, tmp_path / "out", on_bad="skip")
    assert work.dropped.counts == {"invalid record": 1, "unreadable file": 1}


def test_an_index_of_files_that_are_not_there_is_refused(tmp_path):
    folder = released(tmp_path / "set", index=[[0, "part_rank07.parquet", 0, 0, 64, 64, 0]])
    with pytest.raises(ValueError, match="names part_rank07.parquet"):
        open_released(folder)
    (folder / "bucket_index.csv").write_text("parquet_path,row_group,row_index\npart_rank00.parquet,x,0\n")
    with pytest.raises(ValueError, match="line 2: got row_group 'x'"):
        open_released(folder)


def test_nothing_is_unpickled_and_nothing_evaluated(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for data in (npy(np.array([Bomb()], dtype=object)), pickle.dumps(Bomb()), b"", None, npy(np.zeros((2, 2)))):
        with pytest.raises(ValueError, match="latent1: "):
            load_latent(data, "latent1")
    for text in (
        f"__import__('pathlib').Path({str(tmp_path / 'ran')!r}).touch()",
        "{'a': open}",
        "[1]",
        "{",
        None,
        "(" * 9999,
    ):
        with pytest.raises(ValueError, match="detailed_results"):
            parse_results(text)
    assert parse_results("{'votes_chosen': 3, 'confidence': None}") == {"votes_chosen": 3, "confidence": None}
    assert not (tmp_path / "ran").exists()
