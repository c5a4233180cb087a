"""Prompts to embeddings, once each; images to scaled latents and back."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dinalrm_align.models.images import image_tensor
from dinalrm_align.models.pipeline import decode_latents, encode_images, load_vae
from dinalrm_align.models.text import Conditions, PromptEncoder


def random_images(batch=2, size=(64, 64), seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def expected_embeds(pipeline, prompts, length):
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return embeds, pooled


@pytest.mark.parametrize("length", [16, 6])
def test_embeddings_are_those_of_the_pipeline(tiny_pipeline, length):
    prompts = ["a red circle", "", "two blue squares"]
    embeds, pooled = PromptEncoder(tiny_pipeline, text_length=length)(prompts)
    expected, expected_pooled = expected_embeds(tiny_pipeline, prompts, length)
    assert embeds.shape[1] == 16 + length and not embeds.requires_grad
    torch.testing.assert_close(embeds, expected)
    torch.testing.assert_close(pooled, expected_pooled)


def test_prompts_are_encoded_where_the_text_encoders_are(tiny_pipeline, monkeypatch):
    """With the transformer on a GPU that has no room for T5, a pipeline reports the GPU as its device."""
    expected = PromptEncoder(tiny_pipeline, text_length=16)(["a red circle"])
    monkeypatch.setattr(type(tiny_pipeline), "device", property(lambda pipeline: torch.device("cuda")))
    found = PromptEncoder(tiny_pipeline, text_length=16, device="cpu")(["a red circle"])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_each_prompt_is_encoded_once(tiny_pipeline, monkeypatch):
    encoder, seen = PromptEncoder(tiny_pipeline, text_length=16), []
    original = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda prompts: seen.extend(prompts) or original(prompts))
    first, _ = encoder(["a", "b", "a"])
    second, _ = encoder(["b", "c"], batch_size=1)
    assert seen == ["a", "b", "c"]
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], second[0])


def test_the_oldest_prompts_leave_a_full_cache(tiny_pipeline, monkeypatch):
    encoder, seen = PromptEncoder(tiny_pipeline, text_length=16, max_cached=2), []
    original = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda prompts: seen.extend(prompts) or original(prompts))
    assert len(encoder(["a", "b", "c"])[0]) == 3
    encoder(["b", "c"])
    encoder(["a"])
    encoder(["c"])
    assert seen == ["a", "b", "c", "a"]
    encoder(["b"])
    assert seen[-1] == "b"


def test_autocast_around_changes_neither_latents_nor_embeddings(tiny_pipeline):
    latents = encode_images(tiny_pipeline.vae, random_images())
    embeds = PromptEncoder(tiny_pipeline, text_length=16)(["a red circle"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encode_images(tiny_pipeline.vae, random_images()), latents)
        again = PromptEncoder(tiny_pipeline, text_length=16)(["a red circle"])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, embeds, strict=True))


def test_empty_prompt(tiny_pipeline):
    encoder = PromptEncoder(tiny_pipeline, text_length=16)
    embeds, pooled = encoder.empty(3)
    assert embeds.shape[0] == pooled.shape[0] == 3
    assert torch.equal(embeds[2], encoder([""])[0][0])


def test_a_folder_is_loaded_at_the_first_prompt_and_without_transformer_and_vae(tiny_world, tiny_pipeline):
    encoder = PromptEncoder(tiny_world / "pipeline", text_length=16)
    assert encoder._pipeline is None
    embeds, pooled = encoder(["a red circle"])
    assert encoder._pipeline.transformer is None and encoder._pipeline.vae is None
    torch.testing.assert_close((embeds, pooled), expected_embeds(tiny_pipeline, ["a red circle"], 16))


def test_encoders_in_training_mode_are_used_in_evaluation_mode(tiny_pipeline):
    tiny_pipeline.text_encoder.train()
    try:
        PromptEncoder(tiny_pipeline, text_length=16)(["a red circle"])
        assert tiny_pipeline.text_encoder.training and not tiny_pipeline.text_encoder_2.training
    finally:
        tiny_pipeline.text_encoder.eval()


def test_a_bare_transformer_folder_has_no_text_encoders(tiny_world):
    with pytest.raises(ValueError, match="is not a pipeline folder .*pass pipeline=..., or prompt_embeds"):
        PromptEncoder(tiny_world / "pipeline" / "transformer", text_length=16)(["a"])


def test_pil_images_and_tensors_agree():
    pixels = (random_images() * 255).round() / 255
    pil = [Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for image in pixels]
    torch.testing.assert_close(image_tensor(pil), pixels)
    torch.testing.assert_close(image_tensor(pil[0]), pixels[:1])
    assert image_tensor([pil[0].convert("L")]).shape == (1, 3, 64, 64)


def test_latents_are_the_scaled_posterior_mean(tiny_pipeline):
    """(z - 0.5) * 2 with a shift of 0.5 and a scale of 2."""
    vae = AutoencoderKL.from_config({**tiny_pipeline.vae.config, "shift_factor": 0.5, "scaling_factor": 2.0}).eval()
    latents = encode_images(vae, random_images())
    z = vae.encode(2 * random_images() - 1).latent_dist.mean
    torch.testing.assert_close(latents, (z - 0.5) * 2)
    torch.testing.assert_close(decode_latents(vae, latents), (vae.decode(z).sample / 2 + 0.5).clamp(0, 1))
    assert latents.shape == (2, 16, 16, 16) and latents.dtype == torch.float32 and not latents.requires_grad


def test_decoding_is_differentiable_and_in_range(tiny_pipeline):
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    decoded = decode_latents(tiny_pipeline.vae, latents)
    decoded.sum().backward()
    assert decoded.shape == (1, 3, 16, 24) and decoded.dtype == torch.float32
    assert 0 <= decoded.min() and decoded.max() <= 1 and latents.grad.abs().max() > 0


def test_non_square_images_round_trip_in_shape(tiny_pipeline):
    latents = encode_images(tiny_pipeline.vae, random_images(1, (16, 24)))
    assert decode_latents(tiny_pipeline.vae, latents).shape == (1, 3, 16, 24)


@pytest.mark.parametrize(("images", "message"), [
    (torch.zeros(1, 3, 62, 64), "got 62 x 64 pixels; expected multiples of 4"),
    (torch.zeros(64, 64, 3), r"got torch.float32 \(64, 64, 3\); expected .* \(B, 3, H, W\)"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.int32), "got torch.int32"),
    (torch.full((1, 3, 64, 64), 255.0), r"got values in \[255, 255\]; expected \[0, 1\]: divide bytes by 255"),
    (torch.full((1, 3, 64, 64), float("nan")), r"got values in \[nan, nan\]"),
    (random_images() * 2 - 1, r"map \[-1, 1\] by x / 2 \+ 0.5"),
    ([], "got 0 images"),
    ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 4))], r"2 images .*width\) \[\(4, 8\), \(8, 8\)\]"),
])  # fmt: skip
def test_unusable_images_are_refused(tiny_pipeline, images, message):
    with pytest.raises(ValueError, match=message):
        encode_images(tiny_pipeline.vae, images)


def test_a_folder_without_vae_is_refused(tiny_reward_dir):
    with pytest.raises(ValueError, match="images need a VAE, and .* has no vae folder"):
        load_vae(tiny_reward_dir, device="cpu")


def test_conditions_hold_more_prompts_than_the_cache_of_an_encoder(tiny_pipeline):
    """12,000 prompts, with the embeddings of two text lengths; none is encoded again or lost."""
    encoder = PromptEncoder(tiny_pipeline, text_length=6)
    prompts = [f"{number} red circles" for number in range(12_000)]
    conditions = Conditions.encode(encoder, [*prompts, prompts[0]], other_lengths={9}, batch_size=500)
    assert len(conditions) == 12_001 and not encoder._cache
    last = conditions.take([10_001, 11_999, 12_000])
    assert last.prompts == [prompts[10_001], prompts[11_999], prompts[0]]
    for length in (6, 9):
        expected = PromptEncoder(tiny_pipeline, text_length=length)(last.prompts)
        for got, wanted in zip(last.for_length(length), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="text_length: got embeddings of 6, 9 T5 tokens; expected 16"):
        last.for_length(16)


def test_threads_may_bring_the_first_prompts(tiny_world):
    """Four threads at once, with text encoders that none of them has loaded yet, at two text lengths."""
    encoders = [PromptEncoder(tiny_world / "pipeline", text_length=length) for length in (6, 16)]
    prompts = [f"{number} blue squares" for number in range(4)]
    barrier = threading.Barrier(4)

    def encode(number):
        barrier.wait()
        return encoders[number % 2](prompts[: number + 1])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encode, range(4)))
    for number, embeds in enumerate(found):
        alone = PromptEncoder(tiny_world / "pipeline", text_length=(6, 16)[number % 2])(prompts[: number + 1])
        for got, wanted in zip(embeds, alone, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
