"""What every pixel reward has from its base: the decode, its gradient, the checks, and images of differing sizes."""

import pytest
import torch
from PIL import Image
from torch import nn

from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.models.preprocess import centre_crop, normalise, pad_to_square, resize
from dinalrm_align.reward.pixel import base
from dinalrm_align.reward.pixel.base import PixelReward, cached, decode_in_slices

PROMPTS = ["a", "b", "c"]


class Redness(PixelReward):
    """mean red, times a frozen weight, plus the prompt's length; remembers the batches it was given."""

    def __init__(self, vae=None):
        super().__init__(vae)
        self.weight = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.seen = []

    def score_pixels(self, images, prompts):
        self.seen.append(tuple(images.shape))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return self.weight * images[:, 0].mean((1, 2)) + lengths


class Verdict(Redness):
    differentiable = False


def some_latents(batch=3, seed=0):
    return torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_latents_score_as_their_decoded_images(vae):
    reward = Redness(vae)
    score = reward(some_latents(), prompts=PROMPTS, sigma=0.4)
    assert score.shape == (3,) and score.dtype == torch.float32
    torch.testing.assert_close(score, reward.score_images(decode_latents(vae, some_latents()).detach(), PROMPTS))


@pytest.mark.parametrize("slice_size", [1, 2, 5])
def test_slices_give_the_same_scores_and_gradient(vae, slice_size):
    reward, latents = Redness(vae), some_latents().requires_grad_()
    plain = reward(latents, prompts=PROMPTS)
    (want,) = torch.autograd.grad(plain.sum(), latents)
    reward.enable_gradient_checkpointing()
    reward.set_decode_slice(slice_size)
    try:
        sliced = reward(latents, prompts=PROMPTS)
        (got,) = torch.autograd.grad(sliced.sum(), latents)
    finally:
        reward.disable_gradient_checkpointing()
    torch.testing.assert_close(sliced, plain)
    torch.testing.assert_close(got, want)
    assert not vae.decoder.gradient_checkpointing


def test_slices_hold_the_activations_of_one_slice(vae):
    """What autograd saves for the backward pass: the decoder's activations, or the latents of each slice alone."""

    def saved(slice_size):
        latents, sizes = some_latents().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            decode_in_slices(vae, latents, slice_size)
        return sum(sizes)

    vae.requires_grad_(False)
    assert saved(1) < saved(None) / 10


def test_slices_decode_as_many_images_at_a_time(vae, monkeypatch):
    sizes = []
    monkeypatch.setattr(base, "decode_latents", lambda vae, part: sizes.append(len(part)) or decode_latents(vae, part))
    with torch.no_grad():
        decode_in_slices(vae, some_latents(5), 2)
    assert sizes == [2, 2, 1]


def test_gradient_agrees_with_finite_differences(vae):
    """In float64; the decode itself returns float32, so that the step is 1e-2 and the tolerance 2%."""
    reward, latents = Redness(vae.to(torch.float64)), some_latents(1).double().requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(reward(latents, prompts=["a"]).sum(), latents)
        step = 1e-2 * gradient / gradient.norm()  # along the gradient, where the slope is its length
        with torch.no_grad():
            rise = reward(latents + step, prompts=["a"]) - reward(latents - step, prompts=["a"])
        assert rise.item() / 2e-2 == pytest.approx(gradient.norm().item(), rel=2e-2)
    finally:
        vae.float()


def test_a_reward_without_gradient_says_so_before_it_decodes(vae):
    reward, latents = Verdict(vae), some_latents()
    assert reward(latents, prompts=PROMPTS).shape == (3,)
    with pytest.raises(ValueError, match="Verdict is not differentiable.*GRPO"):
        reward(latents.requires_grad_(), prompts=PROMPTS)
    assert len(reward.seen) == 1
    with torch.no_grad():
        assert reward(latents, prompts=PROMPTS).shape == (3,)


def test_images_of_one_size_go_through_together_and_keep_their_places():
    reward = Redness()
    reds = [Image.new("RGB", size, (value, 0, 0)) for size, value in [((8, 6), 51), ((4, 4), 102), ((8, 6), 255)]]
    torch.testing.assert_close(reward.score_images(reds, ["", "1", "22"]), torch.tensor([0.4, 1.8, 4.0]))
    assert reward.seen == [(2, 3, 6, 8), (1, 3, 4, 4)]


def test_images_of_every_kind_get_the_same_scores():
    tensor = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0)).mul(255).round().byte()
    array = tensor.permute(0, 2, 3, 1).numpy()
    expected = Redness().score_images(tensor.float() / 255, PROMPTS)
    for images in (
        tensor,
        list(tensor),
        array,
        list(array),
        array / 255.0,
        [Image.fromarray(image) for image in array],
    ):
        assert torch.equal(Redness().score_images(images, PROMPTS), expected)
    for image in (tensor[0], array[0], Image.fromarray(array[0])):
        assert torch.equal(Redness().score_images(image, PROMPTS[:1]), expected[:1])
    with pytest.raises(ValueError, match="got 0 images"):
        Redness().score_images([], [])


def test_a_turned_image_reaches_the_reward_upright():
    image = Image.new("RGB", (8, 6), "red")
    image.getexif()[0x0112] = 6
    reward = Redness()
    reward.score_images([image], ["a"])
    assert reward.seen == [(1, 3, 8, 6)]


def test_bad_calls_are_named(vae):
    reward = Redness(vae)
    with pytest.raises(ValueError, match="this Redness has no VAE"):
        Redness()(some_latents(), prompts=PROMPTS)
    with pytest.raises(ValueError, match=r"expected \(B, 16, h, w\)"):
        reward(torch.zeros(0, 16, 8, 8), prompts=PROMPTS)
    with pytest.raises(TypeError, match="expected a floating tensor"):
        reward(some_latents().long(), prompts=PROMPTS)
    with pytest.raises(ValueError, match="got 2 for 3 samples"):
        reward(some_latents(), prompts=PROMPTS[:2])
    with pytest.raises(ValueError, match="slice_size: got 0"):
        reward.set_decode_slice(0)
    with pytest.raises(NotImplementedError, match="must implement score_pixels"):
        PixelReward(vae)(some_latents(), prompts=PROMPTS)


def test_a_score_that_is_not_finite_is_refused(vae):
    reward = Redness(vae)
    reward.weight.fill_(float("inf"))
    calls = [
        lambda: reward(some_latents(), prompts=PROMPTS),
        lambda: reward.score_images(torch.rand(3, 3, 8, 8), PROMPTS),
        lambda: reward.score_images([Image.new("RGB", (8, 8), "red")], ["a"]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Redness' returned . of . scores that are NaN or infinite"):
            call()


def test_the_reward_stays_in_evaluation_mode_and_the_vae_is_borrowed(vae):
    reward = Redness(vae)
    assert not reward.train().training and not vae.training
    assert list(reward.state_dict()) == ["weight"]
    assert reward.device == torch.device("cpu") and PixelReward().device == torch.device("cpu")


def test_padding_puts_the_odd_pixel_below_and_right():
    padded = pad_to_square(torch.ones(1, 3, 3, 2), 5)
    assert padded[0, 0].tolist() == [[0] * 5, *[[0, 1, 1, 0, 0]] * 3, [0] * 5]


def test_resize_crop_normalise():
    images = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize(images, (6, 6)), images)
    assert centre_crop(images, (2, 4)).shape == (1, 3, 2, 4)
    torch.testing.assert_close(normalise(images, [0.5] * 3, [0.25] * 3), (images - 0.5) / 0.25)
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1
    assert resize(step, (16, 16), clamp=False).max() > 1
    assert resize(step, (16, 16)).max() == 1
    with pytest.raises(ValueError, match="too narrow"):
        resize(images, (0, 6))


@pytest.mark.parametrize(("limit", "kept"), [(0, ""), (2, "bc"), (5, "abc")])
def test_a_full_cache_gives_every_prompt_its_features(limit, kept):
    cache, encoded = {"a": "A"}, []

    def encode(prompts):
        encoded.append(prompts)
        return [prompt.upper() for prompt in prompts]

    assert cached(cache, ["b", "a", "c", "b"], encode, limit) == ["B", "A", "C", "B"]
    assert encoded == [["b", "c"]] and "".join(cache) == kept


def test_another_thread_may_empty_the_cache_at_any_time():
    cache = {"a": "A"}

    def encode(prompts):
        cached(cache, ["x"], lambda prompts: ["X"], 1)  # what the other thread does meanwhile
        return [prompt.upper() for prompt in prompts]

    assert cached(cache, ["a", "b"], encode, 1) == ["A", "B"] and cache == {"b": "B"}


def test_a_misspelt_argument_is_named(vae):
    reward = Redness(vae)
    with pytest.raises(TypeError, match="'seed'.*expected one of sigma, noise, generator, seeds"):
        reward(torch.zeros(1, 16, 8, 8), ["a"], seed=[0])
    with pytest.raises(TypeError, match="'differentiabel'"):
        reward.score_images(torch.zeros(1, 3, 8, 8), ["a"], differentiabel=True)
