import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.models.images import open_image
from dinalrm_align.models.pipeline import encode_images
from dinalrm_align.shapes.config import CONCEPTS, Generator, PairsConfig, StackConfig
from dinalrm_align.shapes.pairs import GRAIN, _damage, ensure_pairs, write_pairs
from dinalrm_align.shapes.scene import is_held_out, parse_caption
from dinalrm_align.shapes.stack import build_pipeline

HPDV3 = Path(__file__).parents[3] / "examples" / "evidence" / "hpdv3_folder.py"
MAKERS = {"few": Generator(num_steps=(1, 2), guidance_scale=(1.0, 1.0)), "spoiled": Generator("spoiled")}
TINY = PairsConfig(groups=6, images=3, heldout_groups=4, seed=1, generators=MAKERS, outside={})


def test_training_pairs_are_all_pairs_of_lists_of_training_captions(tiny_pipeline, tmp_path):
    write_pairs("train", tmp_path / "pairs", tiny_pipeline, TINY)
    pairs = LatentPairs(tmp_path / "pairs", batch_size=6, seed=0)
    batch = pairs.batch_at(0)
    assert batch.latents.shape == (18, 16, 16, 16) and len(batch.chosen) == 6 * 3
    assert not any(is_held_out(parse_caption(prompt)) for prompt in pairs.prompts)
    with pytest.raises(FileExistsError):
        write_pairs("train", tmp_path / "pairs", tiny_pipeline, TINY)


def test_concept_pairs_are_equally_many_held_out_pairs_of_each_concept(tiny_pipeline, tmp_path):
    write_pairs("concepts", tmp_path / "concepts", tiny_pipeline, PairsConfig(per_concept=2))
    pairs = LatentPairs(tmp_path / "concepts", batch_size=4, seed=0)
    names = [name for batch in pairs.in_order() for name in batch.concepts]
    assert sorted(names) == sorted(2 * CONCEPTS)
    assert all(is_held_out(parse_caption(prompt)) for prompt in pairs.prompts)


def test_concept_pairs_need_no_makers_and_do_not_depend_on_them(tiny_pipeline, tmp_path):
    folder = ensure_pairs("concepts", tmp_path / "concepts", tiny_pipeline, PairsConfig(per_concept=1))
    other = PairsConfig(per_concept=1, generators=MAKERS, outside={})
    assert ensure_pairs("concepts", folder, tiny_pipeline, other) == folder


def test_shifted_pairs_are_damaged_concept_pairs(tiny_pipeline, tmp_path):
    write_pairs("shifted", tmp_path / "shifted", tiny_pipeline, PairsConfig(per_shifted=1))
    pairs = LatentPairs(tmp_path / "shifted", batch_size=4, seed=0)
    assert sum(len(batch.chosen) for batch in pairs.in_order()) == len(CONCEPTS)
    flat = torch.full((2, 3, 64, 64), 0.5)
    damaged = _damage(flat, np.random.default_rng(0))
    assert damaged.shape == flat.shape and not torch.equal(damaged[0], damaged[1])
    assert 0.01 < float((damaged - flat).std()) < GRAIN and float(damaged.mean()) == pytest.approx(0.5, abs=0.01)


def test_held_out_pairs_are_lists_of_held_out_captions_labelled_as_in_training(tiny_pipeline, tmp_path):
    for _ in range(2):  # the second finds them there
        ensure_pairs("heldout", tmp_path / "pairs", tiny_pipeline, TINY)
    pairs = LatentPairs(tmp_path / "pairs", batch_size=4, seed=0)
    assert len(pairs.batch_at(0).chosen) == 4 * 3
    assert all(is_held_out(parse_caption(prompt)) for prompt in pairs.prompts)


def test_pairs_of_other_settings_are_not_taken_for_these(tiny_pipeline, tmp_path):
    config = dataclasses.replace(TINY, heldout_groups=2, images=2)
    folder = ensure_pairs("heldout", tmp_path / "pairs", tiny_pipeline, config)
    with pytest.raises(ValueError, match="heldout_groups: got 3; expected 2, as in"):
        ensure_pairs("heldout", folder, tiny_pipeline, dataclasses.replace(config, heldout_groups=3))
    with pytest.raises(ValueError, match="transformer: got"):
        ensure_pairs("heldout", folder, build_pipeline(StackConfig.tiny(), seed=7), config)
    (folder / "made_with.json").unlink()  # as earlier versions left it
    assert ensure_pairs("heldout", folder, tiny_pipeline, config) == folder


def test_a_folder_in_hpdv3s_layout_holds_the_pairs_of_training(tiny_pipeline, tmp_path):
    render_hpdv3 = runpy.run_path(str(HPDV3))["render_hpdv3"]
    build_pipeline(StackConfig.tiny(), seed=3).save_pretrained(tmp_path / "other")
    other = Generator(model=str(tmp_path / "other"), num_steps=(1, 1))  # its latents are encoded images, as of renders
    config = dataclasses.replace(TINY, groups=3, generators={"other": other, "spoiled": Generator("spoiled")})
    render_hpdv3(tmp_path / "world", tiny_pipeline, config)
    records = json.loads((tmp_path / "world" / "train.json").read_text())
    assert len(records) == 9 and len(list((tmp_path / "world" / "images").iterdir())) == 9
    write_pairs("train", tmp_path / "pairs", tiny_pipeline, config)
    batch = LatentPairs(tmp_path / "pairs", batch_size=3).in_order()[0]
    for number, record in enumerate(records):
        image = open_image(tmp_path / "world" / record["path1"])
        latents = encode_images(tiny_pipeline.vae, image)[0]
        differences = [
            (latents - batch.latents[rows[number]].float()).abs().mean() for rows in (batch.chosen, batch.rejected)
        ]
        assert differences[0] < 0.02 < differences[1], "the chosen image, to 8 bits, and not the rejected one"
        assert record["prompt"] == batch.conditions.prompts[batch.chosen[number]]
    with pytest.raises(FileExistsError, match="already holds a data set"):
        render_hpdv3(tmp_path / "world", tiny_pipeline, config)
