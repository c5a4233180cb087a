"""Invalid items of every layout: named, or left out and counted, in training batches and in evaluation alike."""

import io
import json

import numpy as np
import pyarrow
import pytest
import torch
from paths import load_recipe
from PIL import Image
from pyarrow import parquet
from tiny_prepare import encode_prompts, prepare, write_image

from dinalrm_align.data import source
from dinalrm_align.data.formats.record import Cell
from dinalrm_align.data.formats.released import load_latent
from dinalrm_align.data.formats.rows import image_source
from dinalrm_align.data.latent_pairs import LatentPairs, LatentPairsWriter
from dinalrm_align.data.mined_pairs import MinedPair, MinedPairs, write_shard
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.data.released_pairs import ReleasedPairs
from dinalrm_align.data.source import Encoders, ImagePairs, open_pairs
from dinalrm_align.models.latent_space import LatentSpace
from dinalrm_align.train.files import InputError

MANIFEST = PairManifest(1.0, 0.0, 16)
TEXT = {"prompt_embeds": torch.zeros(3, 5), "pooled_prompt_embeds": torch.zeros(4)}


def write_latents(folder, *shapes, labels=None):
    """One pair of each shape of latents, all of ones."""
    with LatentPairsWriter(folder, MANIFEST) as writer:
        for number, shape in enumerate(shapes):
            writer.add(f"prompt {number}", torch.ones(2, *shape), **TEXT)
    return folder


def spoiled_latents(folder):
    from safetensors.torch import load_file, save_file

    file = write_latents(folder, *[(16, 4, 4)] * 4) / "latents-00000.safetensors"
    tensors = load_file(file)
    tensors["latents"][2] = float("nan")
    save_file(tensors, file)
    return lambda **order: LatentPairs(folder, **order), "pairs, group 1: latents"


def npy(value):
    file = io.BytesIO()
    np.save(file, np.full((16, 4, 4), value, dtype=np.float32))
    return file.getvalue()


def spoiled_released(folder):
    folder.mkdir()
    rows = [
        {"prompt": f"prompt {n}", "latent1": npy(np.inf if n == 1 else 1.0), "latent2": npy(0.0),
         "latent1_shape": [16, 4, 4], "latent2_shape": [16, 4, 4], "detailed_results": None}
        for n in range(4)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "part_rank00.parquet")
    options = dict(encode_prompts=encode_prompts, manifest=MANIFEST)
    return lambda **order: ReleasedPairs(folder, **options, **order), "row 1, latent1: latents"


def spoiled_mined(folder):
    folder.mkdir()
    pairs = [MinedPair(f"p {n}", n, torch.ones(2, 16, 4, 4), [1.0, 0.0], 0, 1, *TEXT.values()) for n in range(4)]
    write_shard(folder / "a.parquet", pairs, dtype="float32")
    table = parquet.read_table(folder / "a.parquet")
    column = table.column("img_win_latents").to_pylist()
    data = io.BytesIO()
    torch.save(torch.full((16, 4, 4), torch.nan), data)
    column[1] = data.getvalue()
    place = table.column_names.index("img_win_latents")
    table = table.set_column(place, "img_win_latents", pyarrow.array(column, pyarrow.large_binary()))
    parquet.write_table(table, folder / "a.parquet", row_group_size=1)
    return lambda **order: MinedPairs(folder / "a.parquet", manifest=MANIFEST, **order), "row group 1.*latents"


def spoiled_images(folder):
    folder.mkdir()
    write_image(folder / "a.png", 9)
    write_image(folder / "b.png", 10)
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:800])  # the header is whole
    images = ["a.png", "cut.png", "a.png", "a.png"]
    lines = [{"prompt": f"prompt {n}", "chosen": image, "rejected": "b.png"} for n, image in enumerate(images)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = dict(encode_images=lambda images: images, encode_prompts=encode_prompts, manifest=MANIFEST, size=(16, 16))
    return lambda **order: ImagePairs(folder / "p.jsonl", **options, **order), "cut.png"


KINDS = pytest.mark.parametrize("spoil", [spoiled_latents, spoiled_released, spoiled_mined, spoiled_images])


@KINDS
def test_an_item_that_cannot_be_used_is_named(tmp_path, spoil):
    make, name = spoil(tmp_path / "pairs")
    with pytest.raises(InputError, match=name):
        make(batch_size=4).batch_at(0)
    with pytest.raises(InputError, match=name):
        list(make(batch_size=4).in_order())


@KINDS
@pytest.mark.parametrize("size", [1, 4])
def test_or_it_is_left_out_and_counted(tmp_path, spoil, size):
    """With batches of one item, the batch of the bad item is replaced by the next."""
    make, name = spoil(tmp_path / "pairs")
    pairs = make(batch_size=size, on_bad="skip")
    with pytest.warns(UserWarning, match=f"an item is left out, 1 in all: .*{name}"):
        batches = [pairs.batch_at(step) for step in range(4 // size)]
    assert sum(len(batch.chosen) for batch in batches) == (4 if size == 1 else 3)
    assert sum(len(batch.chosen) for batch in pairs.in_order()) == 3
    assert pairs.dropped.counts == {"unreadable item": 1}


def test_a_bad_record_of_our_own_files_is_named_or_left_out(tmp_path):
    folder = write_latents(tmp_path / "pairs", *[(16, 4, 4)] * 3)
    (folder / "prompts.json").write_text(json.dumps(["a", "\ud800", "c"]))
    with pytest.raises(ValueError, match="pairs, group 1: prompt: got '.ud800'"):
        LatentPairs(folder, batch_size=1)
    with pytest.warns(UserWarning, match="1 of 3 groups are left out"):
        pairs = LatentPairs(folder, batch_size=1, on_bad="skip")
    assert len(pairs) == 2 and pairs.dropped.counts == {"invalid record": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [1.5]}, "label: got 1.5"),
        ({"label": ["1"]}, "label: got '1'"),
        ({"label": [float("nan")]}, "label: got nan"),
        ({"prompt": "\ud800"}, "prompt: got"),
        ({"prompt": " "}, "prompt: got ' '"),
        ({"chosen": [1]}, "chosen and rejected: got one image"),
        ({"rejected": [1, 0]}, "zip"),
        ({"concepts": [3]}, "concept: got 3"),
    ],
)
def test_our_writer_checks_every_record(tmp_path, changes, message):
    arguments = {"prompt": "a", "latents": torch.ones(2, 16, 4, 4), **TEXT, **changes}
    with pytest.raises(ValueError, match=message):
        LatentPairsWriter(tmp_path, MANIFEST).add(**arguments)


@pytest.mark.parametrize("label", [np.array([0.25], dtype=np.float32), torch.tensor([0.25])])
def test_our_writer_takes_labels_of_numpy_and_torch(tmp_path, label):
    with LatentPairsWriter(tmp_path, MANIFEST) as writer:
        writer.add("a", torch.ones(2, 16, 4, 4), label=label, **TEXT)
    assert LatentPairs(tmp_path, batch_size=1).batch_at(0).label.tolist() == [0.25]


@pytest.mark.parametrize("dtype", [">f4", ">f2", "float64", "longdouble"])
def test_released_latents_of_any_floating_dtype_are_read(dtype):
    file = io.BytesIO()
    np.save(file, np.full((1, 2, 3), 0.1, dtype=dtype))
    assert torch.from_numpy(load_latent(file.getvalue(), "latent1"))[0, 1, 2].item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to_sparse(), "row group 0, row 0.*img_win_latents: .*expected a dense tensor with data"),
        (lambda tensor: tensor.to("meta"), "row group 0, row 0.*img_win_latents: .*expected a dense tensor with data"),
        (lambda tensor: [tensor], "row group 0, row 0.*img_win_latents: got a saved list"),
        (lambda tensor: tensor.double() * 1e300, "latents: got torch.float32 .* expected finite"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), None),
    ],
)
def test_saved_tensors_that_are_not_plain(tmp_path, change, message):
    pair = MinedPair("p", 0, torch.ones(2, 16, 4, 4), [1.0, 0.0], 0, 1, *TEXT.values())
    write_shard(tmp_path / "a.parquet", [pair], dtype="float32")
    table, data = parquet.read_table(tmp_path / "a.parquet"), io.BytesIO()
    torch.save(change(torch.ones(16, 4, 4)), data)
    for name in ("img_win_latents", "img_lose_latents"):
        column = pyarrow.array([data.getvalue()], pyarrow.large_binary())
        table = table.set_column(table.column_names.index(name), name, column)
    parquet.write_table(table, tmp_path / "a.parquet")
    pairs = MinedPairs(tmp_path / "a.parquet", manifest=MANIFEST, batch_size=1)
    if message is None:
        assert torch.equal(pairs.batch_at(0).latents, torch.ones(2, 16, 4, 4))
    else:
        with pytest.raises(InputError, match=message):
            pairs.batch_at(0)


# ----------------------------------------------------------------------------------------- latents that the model reads

SPACE = LatentSpace(channels=16, patch=2, max_side=8)


@pytest.mark.parametrize("shape", [(16, 5, 4), (16, 4, 10), (4, 4, 4), (16, 0, 4)])
def test_latents_that_a_model_does_not_read(shape):
    problem = "16 channels, sides that are multiples of 2 and at most 8"
    assert problem in SPACE.problem(shape) and SPACE.problem((16, 8, 2)) is None


def test_a_pipeline_has_a_latent_space(tiny_world, tiny_pipeline):
    config = tiny_pipeline.transformer.config
    assert LatentSpace.of(tiny_world / "pipeline") == LatentSpace(16, 2, 2 * config.pos_embed_max_size)


def test_a_manifest_needs_no_weights(tiny_world, monkeypatch):
    """Two numbers of a config: a whole VAE was loaded for them."""
    monkeypatch.setattr(source, "load_vae", lambda *_, **options: pytest.fail("loaded a VAE"))
    manifest = Encoders(tiny_world / "pipeline", text_length=9, device="cpu", dtype=torch.float32).manifest()
    assert manifest == PairManifest(1.0, 0.0, 9)


def test_odd_latents_are_refused_before_training_or_left_out(tmp_path, tiny_world):
    encoders = Encoders(tiny_world / "pipeline", text_length=16, device="cpu", dtype=torch.float32)
    folder = write_latents(tmp_path / "pairs", (16, 4, 4), (16, 5, 4), (16, 4, 4))
    opened = lambda on_bad: open_pairs(  # noqa: E731
        folder, MANIFEST, encoders, size=(64, 64), batch_size=1, on_bad=on_bad
    )
    assert encoders.manifest().vae_scaling_factor == 1.0
    with pytest.raises(ValueError, match="pairs, group 1: latents: got 16 x 5 x 4; the model reads 16 channels"):
        opened("refuse")
    pairs = opened("skip")
    assert len(pairs) == 2 and pairs.dropped.counts == {"latents that the model does not read": 1}


@pytest.mark.parametrize("shape", [(2, 5, 4), (4, 4, 4)])
def test_released_latents_must_fit_to_be_prepared(tmp_path, shape):
    rows = []
    for number, size in enumerate([(2, 4, 4), shape]):
        file = io.BytesIO()
        np.save(file, np.ones(size, dtype=np.float32))
        latents = {"latent1": file.getvalue(), "latent2": file.getvalue(), "latent1_shape": size, "latent2_shape": size}
        rows.append({"prompt": f"prompt {number}", **latents})
    (tmp_path / "source").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "source" / "part_rank00.parquet")
    with pytest.raises(ValueError, match="row 1, latent1: latents: got .*; the model reads 2 channels"):
        prepare(tmp_path / "source", tmp_path / "refused")
    work, _ = prepare(tmp_path / "source", tmp_path / "out", on_bad="skip")
    assert work.dropped.counts.total() == 1 and len(LatentPairs(tmp_path / "out", batch_size=1)) == 1


def test_mined_latents_must_fit_and_be_of_one_size(tmp_path):
    pair = MinedPair("p", 0, torch.ones(2, 16, 5, 4), [1.0, 0.0], 0, 1, *TEXT.values())
    write_shard(tmp_path / "a.parquet", [pair], dtype="float32")
    with pytest.raises(InputError, match="row group 0.* got 16 x 5 x 4; the model reads"):
        MinedPairs(tmp_path / "a.parquet", manifest=MANIFEST, batch_size=1, space=SPACE).check_latents()


# ------------------------------------------------------------------------------------------------- cells and settings


def test_a_parquet_cell_holds_bytes_or_a_path_or_both(tmp_path):
    kinds = [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}]
    parquet.write_table(pyarrow.Table.from_pylist([{"image": kind} for kind in kinds]), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"image": ["b.png"]}), tmp_path / "b.parquet")
    cells = [Cell(str(tmp_path / "a.parquet"), 0, n, "image") for n in range(3)]
    assert [image_source(cell, tmp_path) for cell in cells[:2]] == [b"x", tmp_path / "a.png"]
    assert image_source(Cell(str(tmp_path / "b.parquet"), 0, 0, "image"), tmp_path) == tmp_path / "b.png"
    with pytest.raises(ValueError, match="expected the bytes or the path of an image"):
        image_source(cells[2], tmp_path)


@pytest.mark.parametrize("length", [0, 513, 600])
def test_a_text_length_that_no_reward_reads_is_refused_at_once(length, capsys):
    with pytest.raises(SystemExit) as stop:
        load_recipe("prepare_pairs").main(["--source=absent.json", f"--text_length={length}"])
    assert stop.value.code == 2 and f"text_length: got {length}" in capsys.readouterr().err.replace("'", "")
