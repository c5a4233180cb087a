"""ClipReward against the stock transformers forward and the PIL processor, and its gradient to the latents."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pixel_checks import check_decoding
from tiny_clip import save_clip
from tiny_reward import encoded
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dinalrm_align.reward.pixel.clip import ClipReward

PROMPTS = ["a red circle", "a blue square on gray"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIPModel folder in PickScore's layout: 32 pixels, tokenizer and preprocessor beside it."""
    return save_clip(tmp_path_factory.mktemp("clip"), layers=2)


@pytest.fixture(scope="module")
def reward(folder, vae):
    return ClipReward.from_pretrained(str(folder), vae=vae)


def smooth_images():
    """Smooth images of several sizes, as photographs are."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), rng.integers(0, 256, (7, 5, 3), dtype=np.uint8)]
    return [
        Image.fromarray(data).resize(size, Image.Resampling.BICUBIC)
        for data, size in zip(small, [(90, 61), (40, 77)], strict=True)
    ]


def test_preprocess_agrees_with_the_pil_processor(reward, folder):
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    for image in smooth_images():
        want = processor(image, return_tensors="pt").pixel_values
        got = reward.preprocess(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
        assert got.shape == want.shape
        assert (got - want).abs().mean() < 0.01
        assert (got - want).abs().max() < 0.1


def test_images_of_the_crop_size_are_only_normalised(reward):
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (reward.preprocess.mean, reward.preprocess.std))
    torch.testing.assert_close(reward.preprocess(images), (images - mean) / std)


def test_score_equals_the_stock_forward(reward, folder):
    model, tokenizer = CLIPModel.from_pretrained(folder), reward.tokenizer
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        stock = model(**tokens, pixel_values=reward.preprocess(images)).logits_per_image.diagonal()
    torch.testing.assert_close(reward.score_images(images, PROMPTS), stock, atol=1e-5, rtol=1e-5)


def test_latents_score_as_their_decoded_images_do(reward, vae):
    check_decoding(reward, vae, PROMPTS)


def test_gradients_reach_the_latents_and_nothing_else(reward):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    score = reward(latents, prompts=PROMPTS)
    assert score.shape == (2,) and score.dtype == torch.float32
    score.sum().backward()
    assert latents.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())


def test_checkpointed_decode_gives_the_same_gradient(folder, vae, reward):
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    (plain,) = torch.autograd.grad(reward(latents, prompts=PROMPTS[:1]).sum(), latents)
    reward.enable_gradient_checkpointing()
    try:
        (checkpointed,) = torch.autograd.grad(reward(latents, prompts=PROMPTS[:1]).sum(), latents)
    finally:
        vae.disable_gradient_checkpointing()
    torch.testing.assert_close(checkpointed, plain)


def test_the_vae_is_borrowed(folder, vae):
    reward = ClipReward.from_pretrained(str(folder), vae=vae).to(torch.float64)
    assert vae.dtype == torch.float32
    assert not any(module is vae for module in reward.modules())
    assert all(name.startswith("clip.") for name in reward.state_dict())


def test_each_prompt_is_encoded_once(folder, monkeypatch):
    reward = ClipReward.from_pretrained(str(folder))
    asked = []
    encode = reward.clip.get_text_features

    def counting(input_ids, attention_mask):
        asked.append(len(input_ids))
        return encode(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(reward.clip, "get_text_features", counting)
    images = torch.rand(3, 3, 32, 32)
    first = reward.score_images(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    again = reward.score_images(images, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert asked == [2]
    assert torch.equal(first, again)


def test_pil_images_of_differing_sizes_score_in_one_call(reward):
    first, second = smooth_images()
    both = reward.score_images([first, second], PROMPTS)
    assert both.shape == (2,)
    torch.testing.assert_close(both[1:], reward.score_images([second], PROMPTS[1:]))


def test_a_processor_in_a_second_folder_is_used(folder, tmp_path):
    model, second = tmp_path / "model", tmp_path / "processor"
    CLIPModel.from_pretrained(folder).save_pretrained(model)
    tokenizer = ClipReward.from_pretrained(str(folder)).tokenizer
    tokenizer.save_pretrained(second)
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=32).save_pretrained(second)
    assert ClipReward.from_pretrained(str(model), processor=str(second)).preprocess.shortest_edge == 40


def test_missing_and_unexpected_weights_are_errors(folder, tmp_path):
    model = CLIPModel.from_pretrained(folder)
    weights = model.state_dict()
    weights["stranger"] = weights.pop("visual_projection.weight")
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="missing .*visual_projection.weight.*unexpected .*stranger"):
        ClipReward.from_pretrained(str(tmp_path), processor=str(folder))


def test_bad_inputs_are_named(reward, folder):
    latents = torch.zeros(2, 16, 8, 8)
    with pytest.raises(ValueError, match="got embeddings without text"):
        reward(latents, encoded(torch.zeros(2, 4, 8), torch.zeros(2, 8)))
    with pytest.raises(ValueError, match=r"got 1 for 2 samples"):
        reward(latents, prompts=PROMPTS[:1])
    with pytest.raises(ValueError, match="got 1 for 2 samples"):
        reward(latents, prompts="ab")
    with pytest.raises(ValueError, match=r"got shape \(2, 4, 8, 8\); expected \(B, 16, h, w\)"):
        reward(latents[:, :4], prompts=PROMPTS)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]: divide bytes"):
        reward.score_images(torch.full((2, 3, 8, 8), 2.0), PROMPTS)
    with pytest.raises(ValueError, match=r"got values in \[nan, nan\]"):
        reward.score_images(torch.full((2, 3, 8, 8), math.nan), PROMPTS)
    with pytest.raises(ValueError, match="latents: 2048 of 2048 values are NaN or infinite"):
        reward(latents / 0, prompts=PROMPTS)
    with pytest.raises(ValueError, match="no VAE"):
        ClipReward.from_pretrained(str(folder))(latents, prompts=PROMPTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 2}, "expected 3"),
        ({"do_center_crop": False}, "do_center_crop false"),
        ({"size": {"height": 8, "width": 8}}, "shortest_edge"),
    ],
)
def test_preprocessing_that_cannot_be_reproduced_is_refused(reward, change, message):
    config = {"size": 8, "crop_size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert type(reward.preprocess).from_config(config, "here").crop == (8, 8)
    with pytest.raises(ValueError, match=message):
        type(reward.preprocess).from_config({**config, **change}, "here")


def test_checkpointing_recomputes_the_vision_layers_and_stays_in_evaluation(folder, vae, monkeypatch):
    reward = ClipReward.from_pretrained(str(folder), vae=vae)
    layers = reward.clip.vision_model.encoder.layers
    calls, latents = [], torch.randn(1, 16, 8, 8, requires_grad=True)
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.autograd.grad(reward(latents, prompts=PROMPTS[:1]).sum(), latents)
    assert len(calls) == len(layers)
    reward.enable_gradient_checkpointing()
    reward.train()
    try:
        calls.clear()
        torch.autograd.grad(reward(latents, prompts=PROMPTS[:1]).sum(), latents)
    finally:
        reward.disable_gradient_checkpointing()
    assert len(calls) == 2 * len(layers)
    assert not reward.clip.vision_model.encoder.training and not any(layer.training for layer in layers)


def test_autocast_around_it_changes_nothing(reward):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(5))
    want = reward(latents, prompts=PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(latents, prompts=PROMPTS), want)
