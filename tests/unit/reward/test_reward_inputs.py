"""Every input that cannot be scored as meant: the error says what was got, what was expected and what to do."""

import warnings

import pytest
import torch
from tiny_reward import make_inputs

from dinalrm_align import LatentReward
from dinalrm_align.reward import inputs
from dinalrm_align.reward.inputs import statistics, statistics_warning
from dinalrm_align.reward.latent import STATISTICS_CALLS


@pytest.fixture(scope="module")
def reward(tiny_reward_dir, tiny_pipeline):
    return LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)


def latents(*shape, **options):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**options)


def with_bad_value(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


BAD_LATENTS = [
    (latents(2, 4, 16, 16), ValueError, "got 4 channels, the backbone takes 16; use latents of the VAE"),
    (latents(2, 16, 15, 16), ValueError, "height x width 15 x 16; expected multiples of the patch size 2"),
    (latents(2, 16, 16, 50), ValueError, "16 x 50; the backbone has positions for at most 48 x 48"),
    (latents(2, 16, 0, 16), ValueError, "height x width 0 x 16"),
    (latents(16, 16), ValueError, r"of shape \(16, 16\); expected at least one, floating: scaled latents"),
    (latents(16, 16, 16), ValueError, "one prompt per latent: got 1 latents, 2 prompt_embeds"),
    (latents(0, 16, 16, 16), ValueError, r"of shape \(0, 16, 16, 16\); expected at least one"),
    (latents(2, 16, 16, 16, dtype=torch.int64), ValueError, "latents: got torch.int64"),
    (with_bad_value(latents(2, 16, 16, 16), float("nan")), ValueError, "latents: 1 of 8192 values are NaN or infinite"),
    (
        with_bad_value(latents(2, 16, 16, 16), float("-inf")),
        ValueError,
        "latents: 1 of 8192 values are NaN or infinite",
    ),
    (latents(2, 16, 16, 16, device="meta"), ValueError, "latents are on meta, the reward is on cpu: move one"),
    ([[0.0]], TypeError, r"latents\[0\]: got list; expected a tensor or a NumPy array"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_LATENTS)
def test_latents(reward, tiny_inputs, bad, error, message):
    with pytest.raises(error, match=message):
        reward(**{**tiny_inputs, "latents": bad})


@pytest.mark.parametrize(("prompts", "error", "message"), [
    (["one"], ValueError, "prompts: got 1 for 2 samples; expected one per sample .repeat a prompt"),
    ("one", ValueError, "got 1 for 2 samples"),
    (["one", "two", "three"], ValueError, "got 3 for 2 samples"),
    (["one", None], TypeError, "got NoneType None; expected a string"),
])  # fmt: skip
def test_prompts(reward, prompts, error, message):
    with pytest.raises(error, match=message):
        reward(latents(2, 16, 16, 16), prompts)


def test_both_or_neither_of_prompts_and_embeddings(reward, tiny_inputs):
    with pytest.raises(ValueError, match="got both prompts and embeddings; pass prompts, or prompt_embeds with"):
        reward(**tiny_inputs, prompts=["a", "b"])
    with pytest.raises(ValueError, match="got neither prompts nor embeddings; pass prompts, or prompt_embeds with"):
        reward(tiny_inputs["latents"])


@pytest.mark.parametrize(("lacking", "message"), [
    ("pooled_prompt_embeds", "got prompt_embeds without pooled_prompt_embeds; pass both"),
    ("prompt_embeds", "got pooled_prompt_embeds without prompt_embeds; pass both"),
])  # fmt: skip
def test_one_kind_of_embeddings_alone(reward, tiny_inputs, lacking, message):
    del tiny_inputs[lacking]
    with pytest.raises(ValueError, match=message):
        reward(**tiny_inputs)


@pytest.mark.parametrize(("name", "bad", "message"), [
    ("prompt_embeds", latents(2, 9, 30), "prompt_embeds: got width 30, the backbone takes 32; encode the prompts with"),
    ("prompt_embeds", latents(3, 9, 32), r"got 2 latents, 3 prompt_embeds; expected .* of shape \(2, L, 32\)"),
    ("prompt_embeds", latents(2, 32), r"prompt_embeds: got \(2, 32\); expected a floating .* shape \(2, L, 32\)"),
    ("prompt_embeds", with_bad_value(latents(2, 9, 32), float("inf")), "prompt_embeds: 1 of 576 values are NaN or inf"),
    ("pooled_prompt_embeds", latents(2, 31), "pooled_prompt_embeds: got width 31, the backbone takes 32"),
    ("pooled_prompt_embeds", latents(1, 32), "got 2 latents, 1 pooled_prompt_embeds"),
    ("pooled_prompt_embeds", [1.0], r"pooled_prompt_embeds: got list; expected a floating tensor of shape \(2, 32\)"),
])  # fmt: skip
def test_embeddings(reward, tiny_inputs, name, bad, message):
    with pytest.raises(ValueError, match=message):
        reward(**{**tiny_inputs, name: bad})


@pytest.mark.parametrize(("sigma", "error", "message"), [
    (1.5, ValueError, r"sigma: got 1.5, outside \[0, 1\]; expected a float, a \(2,\) tensor, or a list"),
    (400, ValueError, r"sigma: got 400, outside .* \(a timestep is 1000 sigma\)"),
    (-0.1, ValueError, "sigma: got -0.1, outside"),
    (float("nan"), ValueError, "sigma: got nan, outside"),
    ((0.2, 1.2), ValueError, "sigma: got 1.2, outside"),
    (torch.tensor([0.5, 2.0]), ValueError, "sigma: got 2, outside"),
    (torch.tensor([0.5, 0.5, 0.5]), ValueError, r"sigma: got a tensor of shape \(3,\); expected a float, a \(2,\)"),
    ((), TypeError, r"sigma: got \(\); expected a float"),
    ("0.5", TypeError, "sigma: got '0.5'; expected a float"),
    (True, TypeError, "sigma: got True; expected a float"),
])  # fmt: skip
def test_sigma(reward, tiny_inputs, sigma, error, message):
    with pytest.raises(error, match=message):
        reward(**tiny_inputs, sigma=sigma)


def test_noise(reward, tiny_inputs):
    with pytest.raises(ValueError, match="got both noise and generator; pass one of them"):
        reward(**tiny_inputs, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"noise: got \(1, 16, 16, 12\); expected the latents' \(2, 16, 16, 12\), or"):
        reward(**{**tiny_inputs, "noise": tiny_inputs["noise"][:1]})
    with pytest.raises(ValueError, match="noise: 1 of 6144 values are NaN"):
        reward(**{**tiny_inputs, "noise": with_bad_value(tiny_inputs["noise"], float("nan"))})


def test_score_images_checks_the_scaling_of_the_vae(reward, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(reward.config, "vae_scaling_factor", 1.5)
    with pytest.raises(ValueError, match=r"the VAE scales latents by .* = \(1.0, 0.0\), this reward was trained with"):
        reward.score_images(torch.zeros(1, 3, 64, 64), ["a"])


def test_an_unknown_dtype_is_refused(tiny_reward_dir):
    with pytest.raises(ValueError, match="dtype: got 'int8'; expected float32, bfloat16, float16"):
        LatentReward.from_pretrained(tiny_reward_dir, dtype="int8")


def test_a_wrong_transformer_is_refused(tiny_reward_dir, tiny_pipeline):
    with pytest.raises(TypeError, match="transformer: got AutoencoderKL; expected diffusers' SD3Transformer2DModel"):
        LatentReward.from_pretrained(tiny_reward_dir, transformer=tiny_pipeline.vae)


def test_a_transformer_that_was_moved_after_the_reward_was_built_is_noticed(reward, tiny_inputs, monkeypatch):
    monkeypatch.setattr(type(reward), "device", torch.device("meta"))
    with pytest.raises(ValueError, match="the backbone's weights are on meta, the reward's head is on cpu: the transf"):
        reward(**tiny_inputs)


@pytest.mark.parametrize(("scale", "shift", "factor", "expected"), [
    (1.0, 0.0, 1.5305, None),
    (0.8, 0.1, 1.5305, None),
    (1.6, 0.0, 1.5305, None),
    (0.0, 0.3, 1.5305, "collapsed: a sample has standard deviation 0"),
    (1 / 1.5305, 0.0609, 1.5305, "unscaled: standard deviation 0.65"),
    (5.5, 0.0, 0.18215, "unscaled: standard deviation 5.5"),
    (8.0, 0.0, 1.0, "unscaled: standard deviation 8"),
])  # fmt: skip
def test_statistics_of_latents(scale, shift, factor, expected):
    message = statistics_warning(statistics(scale * latents(4, 16, 16, 16) + shift).tolist(), factor)
    assert message is None if expected is None else expected in message


def test_odd_statistics_warn_once_and_are_scored(tiny_reward_dir, tiny_pipeline):
    reward = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)
    flat = make_inputs(tiny_pipeline.transformer)
    flat["latents"] = torch.full_like(flat["latents"], 0.2)
    with pytest.warns(UserWarning, match="latents look collapsed: .* scaled latents have about 1 .shown once"):
        assert reward(**flat).shape == (2,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(**flat)


def test_statistics_of_the_first_calls_alone_are_looked_at(tiny_reward_dir, tiny_pipeline, tiny_inputs, monkeypatch):
    reward, looked = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline), []
    monkeypatch.setattr(inputs, "statistics_warning", lambda *arguments: looked.append(1))
    for _ in range(STATISTICS_CALLS + 2):
        reward(**tiny_inputs)
    assert len(looked) == STATISTICS_CALLS
