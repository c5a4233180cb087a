"""Every stage of the embedded world's build, on the tiny stack for a few updates."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from dinalrm_align.data.latent_pairs import LatentPairs, LatentPairsWriter
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.reward.pixel.clip import ClipReward
from dinalrm_align.shapes import build_base
from dinalrm_align.shapes.build import (
    _slot_classes,
    _slot_loss,
    _slots,
    random_images,
    save_clip_reward,
    train_clip,
    train_pixel,
    train_text,
    train_vae,
    vae_gate,
)
from dinalrm_align.shapes.build_base import LAYOUT_MAPS, Muon, Together, _layout, scores_by_guidance, train_base
from dinalrm_align.shapes.config import BuildConfig, Generator, PairsConfig, StackConfig
from dinalrm_align.shapes.generators import prompt_encoder
from dinalrm_align.shapes.pairs import write_pairs
from dinalrm_align.shapes.render import Drawing, Mark
from dinalrm_align.shapes.scene import is_held_out, parse_caption
from dinalrm_align.shapes.stack import build_pipeline
from dinalrm_align.train.metrics import read_metrics


@pytest.fixture
def config(tmp_path):
    config = BuildConfig(output_dir=str(tmp_path), stack=StackConfig.tiny(), cached_images=64)
    for stage in (config.vae, config.text, config.base, config.clip, config.pixel):
        stage.batch_size, stage.loop.steps, stage.optim.warmup_steps = 8, 6, 0
    return config


@pytest.fixture
def pipeline():
    pipeline = build_pipeline(StackConfig.tiny(), seed=0)
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        pipeline.components[name].requires_grad_(False)
    return pipeline


def losses(config, stage):
    return [row["loss"] for row in read_metrics(Path(config.output_dir) / stage / "metrics.jsonl") if "loss" in row]


def test_the_autoencoder_learns_and_sets_its_scaling(config, pipeline):
    before = vae_gate(pipeline.vae, seed=0, number=64)["psnr"]
    config.vae.loop.steps, config.vae.optim.lr = 30, 1e-2
    train_vae(pipeline, config, Accelerator(cpu=True))
    assert vae_gate(pipeline.vae, seed=0, number=64)["psnr"] > before + 1
    assert pipeline.vae.config.scaling_factor != 1.0
    assert not any(p.requires_grad for p in pipeline.vae.parameters())


def test_the_text_encoders_learn_the_content_of_captions(config, pipeline):
    config.text.loop.steps, config.text.batch_size = 20, 32
    train_text(pipeline, config, Accelerator(cpu=True))
    loss = losses(config, "text")
    assert loss[-1] < 0.85 * loss[0]


def test_slots_of_a_caption_name_its_attributes():
    scene = parse_caption("a large striped red circle left of a small outlined blue square on gray")
    classes = _slot_classes()
    assert classes == [7, *[5, 7, 4, 6] * 3, 5, 4]
    assert _slots(scene) == [2, 1, 1, 3, 2, 2, 3, 1, 5, 0, 0, 0, 0, 1, 2]
    assert _slots(parse_caption("six medium red crosses on white")) == [6, *[4, 1, 2, 1] * 3, 0, 1]
    assert _slots(None) == [0] * len(classes)
    loss = _slot_loss(torch.zeros(1, sum(classes)), torch.tensor([_slots(scene)]), classes)
    assert loss.item() == pytest.approx(sum(map(math.log, classes)) / len(classes))


def test_random_images_are_of_training_captions_with_slots_in_range():
    images, scenes, drawings = random_images(100, np.random.default_rng(0), 64)
    assert images.shape == (100, 3, 64, 64) and not any(map(is_held_out, scenes))
    assert [len(drawing.marks) for drawing in drawings] == [len(scene.items) for scene in scenes]
    for scene in scenes:
        assert all(slot < number for slot, number in zip(_slots(scene), _slot_classes(), strict=True))


def test_the_base_model_trains_evaluates_and_resumes(config, pipeline, tmp_path):
    config.base.loop.steps = 2
    train_base(pipeline, config, Accelerator(cpu=True))
    assert "oracle" in read_metrics(tmp_path / "base" / "metrics.jsonl")[-1]
    assert (tmp_path / "base" / "grid_000002.png").stat().st_size > 0
    halfway = {name: p.clone() for name, p in pipeline.transformer.named_parameters()}
    config.base.loop.steps = 4
    train_base(pipeline, config, Accelerator(cpu=True))
    assert any(not torch.equal(p, halfway[name]) for name, p in pipeline.transformer.named_parameters())
    assert [row["step"] for row in read_metrics(tmp_path / "base" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_images_with_another_caption_have_only_the_layout_loss(config, pipeline, monkeypatch, tmp_path):
    config.mismatched_share = 0.5
    checked = []

    def check(name, config, accelerator, parameters, closures, **options):
        x0, layout, embeds, pooled, sigma, noise, mismatched = closures.make_batch(0)
        assert mismatched.tolist() == [True] * 4 + [False] * 4

        cached = load_file(tmp_path / "cache" / "images.safetensors")["latents"].float()
        captions = json.loads((tmp_path / "cache" / "captions.json").read_text())
        own = [captions[int((cached - latents).abs().sum((1, 2, 3)).argmin())] for latents in x0]
        encoder = prompt_encoder(pipeline)
        texts = [*own, ""]
        known = encoder(texts)[0]
        read = [texts[int((known - row).abs().sum((1, 2)).argmin())] for row in embeds]
        assert all(text in (own[row - 1], "") for row, text in enumerate(read[:4]))
        assert all(text in (own[row], "") for row, text in enumerate(read[4:], start=4))
        assert sum(text != "" for text in read[:4]) > 1 and len(set(own)) == 8

        def metrics(rows):
            other = torch.where(rows.view(-1, 1, 1, 1), noise + 1, noise)
            return closures.make_step((x0, layout, embeds, pooled, sigma, other, mismatched))[1]

        before = metrics(torch.zeros(8, dtype=torch.bool))
        assert metrics(mismatched)["flow"] == before["flow"] and metrics(mismatched)["layout"] != before["layout"]
        assert metrics(~mismatched)["flow"] != before["flow"]
        checked.append(name)

    monkeypatch.setattr(build_base, "run_stage", check)
    train_base(pipeline, config, Accelerator(cpu=True))
    assert checked == ["base"]


def test_a_layout_has_a_map_for_each_shape_and_each_fill():
    marks = (Mark("square", "red", 16, 16, 10, "striped"), Mark("circle", "blue", 48, 48, 8))
    found = dict(zip(LAYOUT_MAPS, _layout(Drawing(marks, "white", 1.0, 1.0), 16).float(), strict=True))
    assert torch.equal(found["square"], found["striped"]) and torch.equal(found["circle"], found["solid"])
    assert found["square"][4, 4] == found["circle"][12, 12] == 255
    assert found["square"][12, 12] == found["circle"][4, 4] == 0
    assert sum(maps.sum() > 0 for maps in found.values()) == 4


def test_the_outsider_has_its_own_folder_width_and_seed(config, pipeline, monkeypatch, tmp_path):
    judged = build_base._judged
    monkeypatch.setattr(build_base, "_judged", lambda *given: judged(*given[:4], 8))  # of 64 or 192 images otherwise
    config.base.loop.steps = config.outsider.loop.steps = 1
    config.outsider.batch_size, config.outsider.optim.warmup_steps = 8, 0
    base = pipeline.transformer
    train_base(pipeline, config, Accelerator(cpu=True))
    wide = build_pipeline(StackConfig.tiny(num_heads=3), seed=1).transformer.requires_grad_(False)
    before = {name: p.clone() for name, p in base.named_parameters()}
    pipeline.register_modules(transformer=wide)
    train_base(pipeline, config, Accelerator(cpu=True), name="outsider")
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    first, other = (read_metrics(tmp_path / name / "metrics.jsonl")[0]["flow"] for name in ("base", "outsider"))
    assert first != other
    found = scores_by_guidance(pipeline, config)
    assert len(found) == 12 and all(0 <= value <= 3 for value in found.values())


def test_muon_in_float32_steps_as_torchs_does_up_to_its_rounding():
    options = dict(lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    shapes, generator = ((16, 16), (16, 16), (48, 16), (16, 48)), torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        for p, other in zip(ours, theirs):
            other.data.copy_(p.data)
            p.grad = torch.randn(p.shape, generator=generator)
            other.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, other, start in zip(ours, theirs, before):
            assert (p - other).norm() < 0.05 * (other - start).norm()


def test_optimisers_together_step_and_restore_as_they_do_apart():
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def make():
        return Together(torch.optim.Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.1))

    def step(optimizer):
        (matrix.square().sum() + vector.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    first = make()
    step(first)
    saved, at = copy.deepcopy(first.state_dict()), (matrix.detach().clone(), vector.detach().clone())
    assert sorted(saved["state"]) == [0, 1] and len(saved["param_groups"]) == 2
    step(first)
    went_to = matrix.detach().clone(), vector.detach().clone()

    matrix.data, vector.data = at[0].clone(), at[1].clone()
    second = make()
    second.load_state_dict(saved)
    step(second)
    assert torch.equal(matrix, went_to[0]) and torch.equal(vector, went_to[1])


def test_the_pixel_reward_trains_and_loads_as_a_clip_reward(config, pipeline, tmp_path):
    makers = {"few": Generator(num_steps=(1, 2), guidance_scale=(1.0, 1.0)), "spoiled": Generator("spoiled")}
    write_pairs("train", tmp_path / "pairs", pipeline, PairsConfig(groups=8, images=3, generators=makers, outside={}))
    pairs = LatentPairs(tmp_path / "pairs", batch_size=4)
    accelerator = Accelerator(cpu=True)
    clip = train_pixel(train_clip(pipeline, config, accelerator), pipeline, pairs, config, accelerator)
    save_clip_reward(clip, pipeline.tokenizer, tmp_path / "pixel")
    reward = ClipReward.from_pretrained(str(tmp_path / "pixel"), vae=pipeline.vae)
    latents = torch.randn(2, 16, 16, 16, requires_grad=True)
    score = reward(latents, ["a small red circle on white", "a large blue square on gray"])
    score.sum().backward()
    assert score.shape == (2,) and latents.grad.abs().sum() > 0


def test_the_pixel_reward_learns_from_soft_labels(config, pipeline, tmp_path):
    """A pair with label 0 is the swapped pair with label 1; a label of one half teaches equality, not preference."""
    latents, texts = torch.randn(2, 16, 16, 16), (torch.randn(16, 32), torch.randn(32))
    weights, accelerator = {}, Accelerator(cpu=True)
    config.clip.loop.steps = 1
    start = train_clip(pipeline, config, accelerator)
    for name, chosen, label in (("first", 0, 1.0), ("swapped", 1, 0.0), ("tie", 0, 0.5)):
        with LatentPairsWriter(tmp_path / name, PairManifest(1.0, 0.0, 16)) as writer:
            text = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), texts))
            pair = dict(chosen=[chosen], rejected=[1 - chosen], label=torch.tensor([label]))
            writer.add("a small red circle on white", latents, **text, **pair)
        own = dataclasses.replace(config, output_dir=str(tmp_path / f"run_{name}"))
        lists = LatentPairs(tmp_path / name, batch_size=1)
        clip = train_pixel(copy.deepcopy(start), pipeline, lists, own, accelerator)
        weights[name] = torch.cat([p.flatten() for p in clip.parameters()])
    torch.testing.assert_close(weights["first"], weights["swapped"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights["first"], weights["tie"], rtol=1e-4, atol=1e-6)


def test_a_build_refuses_captions_that_would_be_cut():
    with pytest.raises(ValueError, match="stack.text_length: got 15; expected at least 16, for the longest captions"):
        BuildConfig(stack=StackConfig(text_length=15))


def test_a_clip_model_learns_to_match_renders_and_captions(config, pipeline):
    config.clip.loop.steps, config.clip.batch_size = 30, 16
    train_clip(pipeline, config, Accelerator(cpu=True))
    loss = losses(config, "clip")
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
