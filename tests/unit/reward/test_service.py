"""A reward inside another program: noise by seed, inputs as people have them, autocast, precision modes, offloading."""

import json
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from tiny_clip import save_clip
from tiny_reward import make_inputs

from dinalrm_align import LatentReward, load_reward
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.combine import RewardSum
from dinalrm_align.reward.pixel.clip import ClipReward

PROMPTS = ["a red circle", "two blue squares", "a green triangle", ""]


@pytest.fixture(scope="module")
def reward(tiny_reward_dir, tiny_pipeline):
    return LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tiny_pipeline):
    return ClipReward.from_pretrained(str(save_clip(tmp_path_factory.mktemp("clip"))), vae=tiny_pipeline.vae)


@pytest.fixture(scope="module")
def latents(tiny_pipeline):
    return make_inputs(tiny_pipeline.transformer, batch=4, height=16, width=16)["latents"]


def noise_of(seed, shape=(16, 16, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ noise


def test_a_call_leaves_every_global_random_state_alone(tiny_reward_dir, latents):
    """The text encoders and the VAE are loaded by these calls."""
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    alone = LatentReward.from_pretrained(tiny_reward_dir)
    first = alone(latents, PROMPTS)
    alone.score_images(torch.zeros(1, 3, 64, 64), "a red circle")
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    torch.manual_seed(4)
    assert torch.equal(alone(latents, PROMPTS), first)


def test_by_default_all_samples_get_the_noise_of_seed_0(reward, latents):
    expected = reward(latents, PROMPTS, noise=noise_of(0).expand(4, -1, -1, -1))
    assert torch.equal(reward(latents, PROMPTS), expected)
    assert torch.equal(reward(latents, PROMPTS, seeds=[0] * 4), expected)
    same = reward(latents[:1].expand(4, -1, -1, -1), PROMPTS[:1] * 4)
    torch.testing.assert_close(same, same[:1].expand(4))


@pytest.mark.parametrize("sigma", [0.4, (0.2, 0.7)], ids=str)
def test_the_noise_of_a_seed_does_not_depend_on_the_batch(reward, latents, sigma):
    seeds, order = [7, 2**32 - 1, 0, 7], [2, 0, 3, 1]
    expected = reward(latents, PROMPTS, sigma=sigma, seeds=seeds)
    noise = torch.stack([noise_of(seed) for seed in seeds])
    assert torch.equal(reward(latents, PROMPTS, sigma=sigma, noise=noise), expected)
    permuted = reward(latents[order], [PROMPTS[i] for i in order], sigma=sigma, seeds=tuple(seeds[i] for i in order))
    torch.testing.assert_close(permuted, expected[order])
    alone = [reward(latents[i], PROMPTS[i], sigma=sigma, seeds=seeds[i]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), expected)
    other = reward(latents, PROMPTS, sigma=sigma, seeds=[8, *seeds[1:]])
    assert other[0] != expected[0]
    torch.testing.assert_close(other[1:], expected[1:])


@pytest.mark.parametrize("seeds", [
    (1, 2, 3, 4), range(1, 5), torch.arange(1, 5), np.arange(1, 5, dtype=np.uint32), [np.int64(i) for i in range(1, 5)],
], ids=lambda seeds: type(seeds).__name__)  # fmt: skip
def test_seeds_in_every_documented_form(reward, latents, seeds):
    assert torch.equal(reward(latents, PROMPTS, seeds=seeds), reward(latents, PROMPTS, seeds=[1, 2, 3, 4]))


@pytest.mark.parametrize(("seeds", "error", "message"), [
    ([1, 2], ValueError, "seeds: got 2 for 4 samples; expected 4 integers from 0"),
    (7, ValueError, "seeds: got 1 for 4 samples"),
    ([1, 2, 3, -4], ValueError, r"seeds\[3\]: got -4; expected"),
    ([2**32, 2, 3, 4], ValueError, r"seeds\[0\]: got 4294967296; expected .* 32 bits"),
    ([1.0, 2, 3, 4], TypeError, r"seeds\[0\]: got float 1.0"),
    ([True, 2, 3, 4], TypeError, r"seeds\[0\]: got bool True"),
    ("1234", TypeError, "got str '1234'"),
    (torch.ones(4), TypeError, "got float 1.0"),
    (torch.ones(4, 1, dtype=torch.int64), TypeError, r"seeds\[0\]: got list"),
])  # fmt: skip
def test_wrong_seeds(reward, latents, seeds, error, message):
    with pytest.raises(error, match=message):
        reward(latents, PROMPTS, seeds=seeds)


def test_noise_has_one_source(reward, latents):
    with pytest.raises(ValueError, match="got both generator and seeds; pass one of them"):
        reward(latents, PROMPTS, seeds=[1, 2, 3, 4], generator=torch.Generator())
    with pytest.raises(TypeError, match="generator: got list .* a list of integers is passed as seeds"):
        reward(latents, PROMPTS, generator=[1, 2, 3, 4])


def test_seeds_reach_the_rewards_of_a_sum_and_images(reward, clip, latents):
    both = RewardSum({"dinalrm": reward, "pixel": clip}, {"dinalrm": 1.0, "pixel": 0.5})
    seeds = [5, 6, 7, 8]
    expected = reward(latents, PROMPTS, seeds=seeds) + 0.5 * clip(latents, PROMPTS)
    torch.testing.assert_close(both(latents, PROMPTS, seeds=seeds), expected)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores = both.score_images(images, PROMPTS[:2], seeds=seeds[:2])
    expected = reward.score_images(images, PROMPTS[:2], seeds=seeds[:2]) + 0.5 * clip.score_images(images, PROMPTS[:2])
    torch.testing.assert_close(scores, expected)
    assert not torch.equal(scores, both.score_images(images, PROMPTS[:2]))


def test_a_callable_may_take_the_seeds(latents):
    seen = load_reward(lambda latents, seeds: torch.tensor(seeds, dtype=torch.float32))
    assert seen(latents, PROMPTS, seeds=[1, 2, 3, 4]).tolist() == [1, 2, 3, 4] and seen.reads_noise


def test_two_threads_with_seeds_get_the_scores_of_one(tiny_reward_dir, latents):
    """Also while the text encoders are loaded for the first time."""
    alone = LatentReward.from_pretrained(tiny_reward_dir)
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda i: alone(latents[i], PROMPTS[i], seeds=i), range(4)))
    assert torch.equal(torch.cat(at_once), torch.cat([alone(latents[i], PROMPTS[i], seeds=i) for i in range(4)]))


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize("form", [
    list, tuple, lambda x: x.numpy(), lambda x: list(x.numpy()), lambda x: x.double().numpy(),
    lambda x: np.flip(np.flip(x.numpy(), 0), 0), lambda x: x.numpy().astype(">f4"), lambda x: np.asfortranarray(x),
], ids=["list", "tuple", "numpy", "list of numpy", "float64", "negative strides", "big endian", "Fortran"])  # fmt: skip
def test_latents_in_every_documented_form(reward, clip, latents, form):
    for scored in (reward, clip):
        assert torch.equal(scored(form(latents), PROMPTS), scored(latents, PROMPTS))


def test_one_latent_is_a_batch_of_one(reward, clip, latents):
    for scored in (reward, clip):
        expected = scored(latents[:1], PROMPTS[:1])
        assert expected.shape == (1,)
        for one in (latents[0], latents[0].numpy(), [latents[0]]):
            assert torch.equal(scored(one, PROMPTS[0]), expected)
    assert torch.equal(reward(latents[0], PROMPTS[0], noise=noise_of(3)), reward(latents[0], PROMPTS[0], seeds=3))


def test_gradients_reach_latents_in_a_list(reward, latents):
    rows = [row.clone().requires_grad_() for row in latents]
    whole = latents.clone().requires_grad_()
    reward(rows, PROMPTS).sum().backward()
    reward(whole, PROMPTS).sum().backward()
    assert torch.equal(torch.stack([row.grad for row in rows]), whole.grad)


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda x: [], ValueError, "latents: got a list of 0"),
    (lambda x: [x[0], x[1, :, :8]], ValueError, r"latents: got a list of 2: .*\(16, 16, 16\).*\(16, 8, 16\)"),
    (lambda x: [x[0], x[1].bfloat16()], ValueError, "one shape, dtype and device"),
    (lambda x: [row[None] for row in x], ValueError, r"latents: got a list of 4: .*\(1, 16, 16, 16\)"),
    (lambda x: x[0].tolist(), TypeError, r"latents\[0\]: got list"),
    (lambda x: (255 * x).byte(), ValueError, "latents: got torch.uint8"),
    (lambda x: (255 * x.numpy()).astype(np.uint8), ValueError, "latents: got a NumPy array of uint8"),
    (lambda x: x.numpy().astype(object), ValueError, "latents: got a NumPy array of object"),
    (lambda x: x.numpy().astype(np.complex64), ValueError, "latents: got a NumPy array of complex64"),
    (lambda x: [row.byte() for row in x], ValueError, "latents: got torch.uint8"),
])  # fmt: skip
def test_latents_that_are_refused(reward, latents, change, error, message):
    with pytest.raises(error, match=message):
        reward(change(latents), PROMPTS)


def test_prompts_in_every_documented_form(reward, clip, latents):
    for scored in (reward, clip):
        expected = scored(latents, PROMPTS)
        for prompts in (tuple(PROMPTS), np.array(PROMPTS), np.array(PROMPTS, dtype=object)):
            assert torch.equal(scored(latents, prompts), expected)
        assert torch.equal(scored(latents[0], np.array(PROMPTS[0])), scored(latents[0], PROMPTS[0]))


@pytest.mark.parametrize(("prompts", "error"), [
    ("a red circle", ValueError), (np.array([PROMPTS]), TypeError), (np.arange(4), TypeError),
    (np.array([b"a"] * 4), TypeError), (np.array(3), TypeError), (iter(PROMPTS), TypeError),
])  # fmt: skip
def test_prompts_that_are_refused(reward, latents, prompts, error):
    with pytest.raises(error, match="prompts"):
        reward(latents, prompts)


def test_sigma_may_be_a_numpy_number_or_array(reward, latents):
    assert torch.equal(reward(latents, PROMPTS, sigma=np.float32(0.5)), reward(latents, PROMPTS, sigma=0.5))
    levels = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(reward(latents, PROMPTS, sigma=levels.numpy()), reward(latents, PROMPTS, sigma=levels))


# ------------------------------------------------------------------------------------------------ images


def test_scores_of_images_are_differentiable_on_request(reward, clip):
    for scored in (reward, clip):
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        assert not scored.score_images(images, PROMPTS[:2]).requires_grad
        scores = scored.score_images(images, PROMPTS[:2], differentiable=True)
        assert torch.equal(scores.detach(), scored.score_images(images, PROMPTS[:2]))
        scores[0].backward()
        assert images.grad[0].abs().sum() > 0 and not images.grad[1].any()
        with torch.no_grad():
            assert not scored.score_images(images, PROMPTS[:2], differentiable=True).requires_grad


def test_the_gradient_of_an_image_score_is_its_derivative(reward, tiny_pipeline):
    """Compared with a finite difference; the VAE gets no gradient, even if it was not frozen."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tiny_pipeline.vae.requires_grad_(True)
    try:
        reward.score_images(images, "a red circle", differentiable=True).sum().backward()
        assert all(weight.grad is None for weight in tiny_pipeline.vae.parameters())
    finally:
        tiny_pipeline.vae.requires_grad_(False)
    step = 0.02 * images.grad / images.grad.norm()
    images = images.detach().clamp(0.05, 0.95)
    low, high = (reward.score_images(images + sign * step, "a red circle").item() for sign in (-1, 1))
    assert high > low


def test_a_reward_that_is_not_differentiable_refuses_images_with_a_gradient(tiny_pipeline):
    oracle = load_reward("oracle", vae=tiny_pipeline.vae)
    with pytest.raises(ValueError, match="oracle is not differentiable"):
        oracle.score_images(torch.zeros(1, 3, 64, 64, requires_grad=True), ["a"], differentiable=True)


# ------------------------------------------------------------------------------------------------ sigma


def test_sigma_at_construction_overrides_both_defaults(tiny_reward_dir, tiny_pipeline, reward, latents, tmp_path):
    """The released reward has 0.4 for latents and 0.1 for images."""
    released = tmp_path / "released"
    reward.save_pretrained(released, format="dinalrm")
    config = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps(config | {"image_sigma": 0.1}))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for given in (0.7, (0.2, 0.5)):
        by_class = LatentReward.from_pretrained(released, pipeline=tiny_pipeline, sigma=given)
        by_name = load_reward(f"dinalrm={released}", pipeline=tiny_pipeline, options={"dinalrm": {"sigma": given}})
        for mine in (by_class, by_name):
            assert torch.equal(mine(latents, PROMPTS), reward(latents, PROMPTS, sigma=given))
            expected = reward.score_images(images, PROMPTS[0], sigma=given)
            assert torch.equal(mine.score_images(images, PROMPTS[0]), expected)


@pytest.mark.parametrize(("sigma", "error"), [(1.5, ValueError), ("0.4", TypeError), ((), ValueError)])
def test_a_wrong_sigma_at_construction(tiny_reward_dir, tiny_pipeline, sigma, error):
    with pytest.raises(error, match="sigma: got"):
        LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline, sigma=sigma)


# ------------------------------------------------------------------------------------------------ modes of torch


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference mode": torch.inference_mode,
    "no gradient": lambda: torch.set_grad_enabled(False),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic algorithms": deterministic,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_a_call_does_not_change_the_scores(tiny_reward_dir, clip, latents, mode, dtype):
    """Scores of latents, noisy latents and images, and the gradient; text encoders and VAE are loaded in the mode."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def scores(where):
        alone = LatentReward.from_pretrained(tiny_reward_dir, dtype=dtype)
        with where():
            found = [alone(latents, PROMPTS, seeds=[1, 2, 3, 4]), alone.score_noisy(latents, 0.3, PROMPTS)]
            found += [alone.score_images(images, PROMPTS[0]), clip(latents, PROMPTS)]
        leaf = latents.clone().requires_grad_()
        found.append(torch.autograd.grad(alone(leaf, PROMPTS).sum(), leaf)[0])
        pixels = images.clone().requires_grad_()
        score = alone.score_images(pixels, PROMPTS[0], differentiable=True)
        return [*found, torch.autograd.grad(score.sum(), pixels)[0]]

    for got, expected in zip(scores(MODES[mode]), scores(ExitStack), strict=True):
        assert torch.equal(got, expected) and got.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_a_reward_that_is_loaded_in_a_mode_is_the_same(tiny_reward_dir, latents, mode):
    with MODES[mode]():
        loaded = LatentReward.from_pretrained(tiny_reward_dir)
    leaf = latents.clone().requires_grad_()
    scores = loaded(leaf, PROMPTS)
    scores.sum().backward()
    assert torch.equal(scores.detach(), LatentReward.from_pretrained(tiny_reward_dir)(latents, PROMPTS))


def test_autocast_around_a_callable_does_not_change_its_scores(latents, tiny_pipeline):
    def of_latents(latents):
        return (latents.flatten(1) @ torch.ones(latents[0].numel(), 1)).flatten()

    def of_images(images, prompts):
        return (images.flatten(1) @ torch.ones(images[0].numel(), 1)).flatten()

    for function in (of_latents, of_images):
        mine = load_reward(function, vae=tiny_pipeline.vae)
        expected = mine(latents, PROMPTS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(mine(latents, PROMPTS), expected)


# ------------------------------------------------------------------------------------------------ lengths of text


def test_embeddings_of_another_length_draw_one_warning_with_both_numbers(tiny_reward_dir, tiny_pipeline):
    def inputs(tokens):
        return make_inputs(tiny_pipeline.transformer, tokens=tokens)

    def score(reward, tokens, stated=None):
        given = inputs(tokens)
        conditions = Conditions(["a", "b"], given["prompt_embeds"], given["pooled_prompt_embeds"], stated)
        return [reward(given["latents"], conditions), reward(**given)]

    for pipeline in (tiny_pipeline, None):  # without a pipeline, the number of CLIP tokens is read from the base model
        reward = LatentReward.from_pretrained(tiny_reward_dir, pipeline=pipeline)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            score(reward, 32, stated=16)
        with pytest.warns(UserWarning, match=r"got 16 \+ 256 tokens; this reward was trained with 16 \+ 16 ") as seen:
            score(reward, 272)
            score(reward, 9)
        assert len(seen) == 1
    with pytest.raises(ValueError, match="text_length: got embeddings of 256 T5 tokens; expected 16, this reward's"):
        score(reward, 272, stated=256)


# ------------------------------------------------------------------------------------------------ offloading


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_an_offloaded_reward_says_how_to_go_on(tiny_reward_dir, tiny_pipeline, latents, shared):
    reward = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline if shared else None)
    expected, digest = reward(latents, PROMPTS), reward.fingerprint()
    images = torch.zeros(1, 3, 64, 64)
    for _ in range(2):
        reward.offload()
    for call in (
        lambda: reward(latents, PROMPTS), lambda: reward.raw(latents, PROMPTS),
        lambda: reward.score_noisy(latents, 0.3, PROMPTS), lambda: reward.score_images(images, PROMPTS[0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"dinalrm' is offloaded to the CPU; call reward.onload\(\)"):
            call()
    for _ in range(2):
        reward.onload()
    assert torch.equal(reward(latents, PROMPTS), expected) and reward.fingerprint() == digest
    reward.offload()
    reward.onload("cpu")
    assert torch.equal(reward(latents, PROMPTS), expected)
    with pytest.raises(ValueError, match="device: got"):
        reward.onload("gpu")


def test_offloading_moves_only_what_the_reward_owns(tiny_reward_dir, tiny_pipeline, monkeypatch):
    shared = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)
    private, moved = LatentReward.from_pretrained(tiny_reward_dir), []
    private(torch.zeros(1, 16, 16, 16), "a red circle")
    private.score_images(torch.zeros(1, 3, 64, 64), "a red circle")
    for kind in (torch.nn.Module, type(tiny_pipeline)):
        monkeypatch.setattr(kind, "to", lambda part, device: moved.append(part))
    shared.offload()
    assert moved == [shared.model.head]
    private.offload()
    assert moved[1:] == [private, private.encoder._pipeline, private._borrowed["vae"]]


def test_rewards_of_every_kind_are_offloaded(reward, clip, latents):
    both = RewardSum({"dinalrm": reward, "pixel": clip}, {"dinalrm": 1.0, "pixel": 0.5})
    expected = both(latents, PROMPTS)
    both.offload()
    for call in (lambda: both(latents, PROMPTS), lambda: clip(latents, PROMPTS), lambda: reward(latents, PROMPTS)):
        with pytest.raises(ValueError, match="is offloaded to the CPU"):
            call()
    both.onload()
    assert torch.equal(both(latents, PROMPTS), expected)
