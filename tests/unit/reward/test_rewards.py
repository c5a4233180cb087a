"""load_reward: every name gives a module with LatentReward's call; sums decode once; image scorers; errors."""

import copy
import importlib
import inspect
import sys
import types
from dataclasses import replace

import pytest
import torch
from tiny_clip import SIZE, open_clip_tensors, tiny_clip_h, tiny_vae, write_processor

import dinalrm_align
from dinalrm_align import LatentReward, load_reward
from dinalrm_align.models.specs import MODELS
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.combine import RewardSum
from dinalrm_align.reward.names import BERT, REWARDS
from dinalrm_align.reward.pixel import base
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.clip import ClipReward
from dinalrm_align.reward.pixel.hpsv2 import HPSv2Reward
from dinalrm_align.reward.protocol import RewardModule
from dinalrm_align.reward.registry import load_image_scorer
from dinalrm_align.train.digest import fingerprint

PROMPTS = ["a red circle", "blue square"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with clip/ (CLIPModel, tokenizer, preprocessor) and hpsv2/ (open_clip's file, tokenizer beside it)."""
    folder = tmp_path_factory.mktemp("weights")
    clip = tiny_clip_h(write_processor(folder / "clip"))
    clip.save_pretrained(folder / "clip")
    write_processor(folder / "hpsv2")
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"state_dict": open_clip_tensors(clip)}, folder / "hpsv2" / name)
    return folder


@pytest.fixture(scope="module")
def spec(tiny_world, weights):
    return replace(
        MODELS["shapes"],
        name="tiny",
        pipeline=str(tiny_world / "pipeline"),
        reward=str(tiny_world / "dinalrm"),
        pixel=str(weights / "clip"),
        gold=f"{__name__}:tiny_gold",
    )


def tiny_gold(images, prompts):
    """Greenness, rounded to bytes: no gradient."""
    return (images.detach()[:, 1] * 255).round().mean((1, 2)) / 255


def blueness(images, prompts):
    return images[:, 2].mean((1, 2))


def energy(latents):
    return latents.square().mean((1, 2, 3))


@pytest.fixture
def load(tiny_pipeline, spec):
    return lambda text, **settings: load_reward(text, spec=spec, pipeline=tiny_pipeline, **settings)


def some_latents(seed=0):
    return torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def noise():
    return torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(9))


def test_names_of_the_model_at_hand(load, tiny_pipeline, spec, tiny_reward_dir):
    latents = some_latents()
    with torch.no_grad():
        want = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)(latents, PROMPTS, noise=noise())
        assert torch.equal(load("dinalrm")(latents, prompts=PROMPTS, noise=noise()), want)
        pixel = ClipReward.from_pretrained(spec.pixel, vae=tiny_pipeline.vae)
        assert torch.equal(load("pixel")(latents, prompts=PROMPTS, sigma=0.3), pixel(latents, prompts=PROMPTS))
        oracle = load("oracle")
        assert torch.equal(oracle(latents, prompts=PROMPTS), tiny_gold(oracle.decode(latents), PROMPTS))


def test_without_a_model_the_embedded_worlds_are_meant(tmp_path):
    vae = tiny_vae()
    pixel, oracle = load_reward("pixel", vae=vae), load_reward("oracle", vae=vae)
    assert pixel.clip.config.vision_config.image_size == 64
    image, caption = torch.full((1, 3, 64, 64), 0.5), ["a small red circle on gray"]
    assert oracle.score_images(image, caption).shape == pixel.score_images(image, caption).shape == (1,)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("pickscore={weights}/clip", ClipReward),
        ("clipscore={weights}/clip", ClipReward),
        ("pixel={weights}/clip", ClipReward),
        ("hpsv2={weights}/hpsv2", HPSv2Reward),
        ("hpsv2.1={weights}/hpsv2", HPSv2Reward),
    ],
)
def test_weights_from_a_folder_with_its_own_processor(load, weights, text, kind):
    reward = load(text.format(weights=weights))
    assert type(reward) is kind and reward.preprocess(torch.rand(1, 3, 64, 64)).shape[-2:] == (SIZE, SIZE)
    latents = some_latents().requires_grad_()
    score = reward(latents, prompts=PROMPTS)
    assert score.shape == (2,) and score.dtype == torch.float32 and reward.differentiable
    assert torch.autograd.grad(score.sum(), latents)[0].abs().sum() > 0


def test_versions_of_hpsv2_are_their_files(load, weights, tmp_path):
    for version in ("hpsv2", "hpsv2.1"):
        other = "HPS_v2.1_compressed.pt" if version == "hpsv2" else "HPS_v2_compressed.pt"
        (tmp_path / version).mkdir()
        (tmp_path / version / other).symlink_to(weights / "hpsv2" / other)
        with pytest.raises(FileNotFoundError, match=f"no file HPS_{version.removeprefix('hps')}_compressed.pt"):
            load(f"{version}={tmp_path / version}")


def test_mps_needs_its_file_named(load):
    with pytest.raises(ValueError, match="mps: .* not on the hub; pass mps=/path/to/MPS_overall_checkpoint.pth"):
        load("mps")


def test_options_go_to_the_part_they_name(load, weights, tmp_path):
    write_processor(tmp_path / "other")
    text = f"pickscore={weights}/clip + dinalrm"
    reward = load(text, options={"pickscore": {"processor": str(tmp_path / "other"), "dtype": torch.bfloat16}})
    assert reward.parts[0].clip.dtype == torch.bfloat16
    assert load("pixel", dtype="bfloat16").clip.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype: got 'half'; expected float32, bfloat16, float16"):
        load("pixel", dtype="half")
    with pytest.raises(ValueError, match=r"options: got \['hpsv3'\]"):
        load(text, options={"hpsv3": {}})


def test_adapters_of_other_modules_are_called_as_agreed(load, monkeypatch, tiny_pipeline):
    """hpsv3, imagereward and unifiedreward: module:class.from_pretrained(source, vae=, device=, dtype=, ...)."""
    calls = {}

    class Stand(PixelReward):
        @classmethod
        def from_pretrained(cls, source, *, vae, device, dtype, local_files_only="not given", **companion):
            assert companion in ({}, {"base": "Qwen/Qwen2-VL-7B-Instruct"}, {"tokenizer": BERT})
            calls[source] = (vae, device, dtype, local_files_only)
            return cls(vae)

    for name in ("hpsv3", "imagereward", "unifiedreward"):
        module, _, kind = REWARDS[name].kind.partition(":")
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{kind: Stand}))
    assert isinstance(load("hpsv3", device="cpu", dtype=torch.float64), Stand)
    load("imagereward")
    load("unifiedreward", local_files_only=True)
    load("unifiedreward=http://localhost:8000/v1")
    assert calls == {
        "MizzenAI/HPSv3": (tiny_pipeline.vae, "cpu", torch.float64, False),
        "THUDM/ImageReward": (tiny_pipeline.vae, torch.device("cpu"), None, False),
        "http://127.0.0.1:8080/v1": (tiny_pipeline.vae, torch.device("cpu"), None, "not given"),
        "http://localhost:8000/v1": (tiny_pipeline.vae, torch.device("cpu"), None, "not given"),
    }


@pytest.mark.parametrize("name", [name for name, entry in REWARDS.items() if entry.kind])
def test_every_class_of_the_table_is_there_and_takes_what_is_agreed(name):
    entry = REWARDS[name]
    module, _, kind = entry.kind.partition(":")
    found = getattr(importlib.import_module(module), kind)
    classes = [
        kind for kind in reversed(found.__mro__) if "from_pretrained" in vars(kind)
    ]  # later ones pass options on
    takes = {n: p for kind in classes for n, p in inspect.signature(kind.from_pretrained).parameters.items()}
    wanted = {"vae", "device", "dtype", *entry.options} | ({"hub"} if not entry.served else set())
    assert wanted <= takes.keys() and list(takes)[0] == "source"
    assert issubclass(found, PixelReward) and found.differentiable == entry.differentiable
    assert takes["source"].default in (inspect.Parameter.empty, entry.source)


def test_a_missing_package_is_named_with_its_extra(load, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'qwen_tools'", name="qwen_tools")

    monkeypatch.setattr("dinalrm_align.reward.registry.importlib.import_module", missing)
    with pytest.raises(ImportError, match=r"hpsv3 needs the package qwen_tools.*pip install 'dinalrm-align\[quant\]'"):
        load("hpsv3")
    with pytest.raises(ImportError, match="imagereward needs the package qwen_tools.*pip install qwen_tools"):
        load("imagereward")


def test_a_sum_is_the_weighted_sum_of_its_parts(load, weights):
    text = f"dinalrm + 0.2*pixel - 3*{__name__}:blueness + 0.5*clipscore={weights}/clip"
    reward, latents = load(text), some_latents().requires_grad_()
    parts = reward.score_parts(latents, prompts=PROMPTS, noise=noise())
    assert list(parts) == ["dinalrm", "pixel", f"{__name__}:blueness", f"clipscore={weights}/clip"]
    singles = [load(name)(latents, prompts=PROMPTS, noise=noise()) for name in parts]
    for got, want in zip(parts.values(), singles, strict=True):
        torch.testing.assert_close(got, want)
    want = singles[0] + 0.2 * singles[1] - 3 * singles[2] + 0.5 * singles[3]
    score = reward(latents, prompts=PROMPTS, noise=noise())
    torch.testing.assert_close(score, want)
    torch.testing.assert_close(reward.add_up(parts), want)
    assert score.dtype == torch.float32 and reward.differentiable
    (gradient,) = torch.autograd.grad(score.sum(), latents)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), latents)[0])


def test_latents_are_decoded_once(load, weights, monkeypatch):
    decoded, decode = [], base.decode_latents
    monkeypatch.setattr(base, "decode_latents", lambda vae, z: decoded.append(len(z)) or decode(vae, z))
    latents = some_latents().requires_grad_()
    load(f"dinalrm + pixel + clipscore={weights}/clip + hpsv2={weights}/hpsv2")(latents, prompts=PROMPTS)
    assert decoded == [2]
    load(f"dinalrm + {__name__}:energy")(latents, prompts=PROMPTS)
    assert decoded == [2], "nothing reads images, nothing is decoded"


def test_a_sum_takes_text_and_embeddings_together(load):
    """Parts that read latents take the embeddings, and touch no text encoder; parts that read images the text."""
    reward, latents = load("dinalrm + pixel"), some_latents()
    (dinalrm,) = reward.noise_parts
    embeds = dinalrm.encoder(PROMPTS[::-1])
    with torch.no_grad():
        parts = reward.score_parts(latents, Conditions(PROMPTS, *embeds), noise=noise())
        assert torch.equal(parts["dinalrm"], dinalrm(latents, PROMPTS[::-1], noise=noise()))
        assert torch.equal(parts["pixel"], load("pixel")(latents, prompts=PROMPTS))
    with pytest.raises(ValueError, match="prompts: got embeddings without text"):
        reward(latents, Conditions(["", ""], *embeds))


def test_parts_have_names_and_weights_whatever_the_reward(load):
    latents = some_latents()
    reward = load("dinalrm - 2*pixel")
    with torch.no_grad():
        assert list(reward.score_parts(latents, PROMPTS)) == ["dinalrm", "pixel"]
        single = load("pixel")
        scores = single.score_parts(latents, PROMPTS)
        assert list(scores) == ["reward"] and torch.equal(scores["reward"], single(latents, prompts=PROMPTS))
    assert reward.weights == {"dinalrm": 1.0, "pixel": -2.0} and single.weights == {"reward": 1.0}
    assert single.noise_parts == () and len(reward.noise_parts) == 1


def test_a_nan_from_a_part_of_a_sum_is_refused(load, monkeypatch):
    """Whichever kind the part is of: an image reward, a latent one, a callable."""
    for part in ("pixel", "dinalrm", f"{__name__}:energy"):
        reward = load(f"dinalrm + pixel + {__name__}:energy")
        broken = reward.named_parts[part]
        at = "score_pixels" if part == "pixel" else "forward"
        monkeypatch.setattr(type(broken), at, lambda self, latents, *_, **__: torch.full((len(latents),), torch.nan))
        with torch.no_grad(), pytest.raises(ValueError, match="NaN or infinite"):
            reward(some_latents(), PROMPTS)
        monkeypatch.undo()


def test_sums_differ_in_their_fingerprints_by_weights(load):
    one, two, again = (fingerprint(load(text)) for text in ("2*pixel", "3*pixel", "2*pixel"))
    assert one == again != two


def test_a_part_without_gradient_is_named_before_anything_is_computed(load):
    reward, latents = load("dinalrm + 0.1*oracle"), some_latents()
    assert not reward.differentiable
    with torch.no_grad():
        assert reward(latents, prompts=PROMPTS).shape == (2,)
    with pytest.raises(ValueError, match="oracle is not differentiable"):
        reward(latents.requires_grad_(), prompts=PROMPTS)
    with pytest.raises(ValueError, match="not differentiable"):
        load("oracle")(latents, prompts=PROMPTS)


def test_checkpointing_reaches_every_part_and_changes_no_gradient(load, tiny_pipeline):
    reward, latents = load("dinalrm + pixel"), some_latents().requires_grad_()

    def gradient():
        return torch.autograd.grad(reward(latents, prompts=PROMPTS, noise=noise()).sum(), latents)[0]

    plain = gradient()
    reward.enable_gradient_checkpointing()
    reward.set_decode_slice(1)
    try:
        assert tiny_pipeline.vae.decoder.gradient_checkpointing and reward.parts[1].slice_size == 1
        torch.testing.assert_close(gradient(), plain)
    finally:
        reward.disable_gradient_checkpointing()
    assert not tiny_pipeline.vae.decoder.gradient_checkpointing


def test_parts_with_other_vaes_are_refused(load, tiny_pipeline):
    other = copy.deepcopy(tiny_pipeline.vae)
    parts = {"one": load("pixel"), "two": load("pixel", vae=other)}
    with pytest.raises(ValueError, match="one, two decode with 2 different VAEs"):
        RewardSum(parts, {"one": 1.0, "two": 1.0})
    with pytest.raises(ValueError, match="'two': got a reward without a weight"):
        RewardSum(parts, {"one": 1.0})
    with pytest.raises(ValueError, match="'two': got a weight without a reward"):
        RewardSum({"one": parts["one"]}, {"one": 1.0, "two": 1.0})
    with pytest.raises(ValueError, match="parts: got none"):
        RewardSum({}, {})
    with pytest.raises(ValueError, match="weight of one: got nan"):
        RewardSum({"one": parts["one"]}, {"one": float("nan")})


def test_a_weighted_sum_that_overflows_is_refused(load):
    reward, images = load(f"{__name__}:blueness + 3e38*{__name__}:tiny_gold"), torch.ones(2, 3, 64, 64)
    assert reward.score_images(images, PROMPTS).isfinite().all()
    with pytest.raises(ValueError, match="returned 1 of 2 scores that are NaN or infinite"):
        reward.add_up({name: torch.tensor([1.0, 2.0]) for name in reward.weights})
    with pytest.raises(ValueError, match="returned 2 of 2 scores that are NaN or infinite"):
        load(f"3e38*{__name__}:tiny_gold + 3e38*{__name__}:blueness").score_images(images, PROMPTS)


class Own(RewardModule):
    def forward(self, latents, prompts, **noise):
        return latents.mean((1, 2, 3))


own = Own()


def test_callables_and_modules_are_taken_as_they_are(load):
    assert load(own) is own and load(f"{__name__}:own") is own
    latents = some_latents()
    assert torch.equal(load(energy)(latents), energy(latents))
    assert load(blueness)(latents, prompts=PROMPTS).shape == (2,)
    pixel = load("pixel")
    assert load(pixel) is pixel
    with pytest.raises(TypeError, match="expected the first to be named images"):
        load(lambda x: x)


def test_bad_calls_of_a_sum_are_named(load):
    reward = load("dinalrm + pixel")
    with pytest.raises(ValueError, match="got 1 for 2 samples"):
        reward(some_latents(), prompts=PROMPTS[:1])
    with pytest.raises(ValueError, match=r"expected \(B, 16, h, w\)"):
        reward(some_latents()[:, :4], prompts=PROMPTS)
    with pytest.raises(ValueError, match="this ClipReward has no VAE"):
        load_reward("2*pixel")(some_latents(), prompts=PROMPTS)


def test_unknown_names_and_specs_that_are_none(load):
    with pytest.raises(ValueError, match="unknown reward 'pickscor'; did you mean 'pickscore'"):
        load("pickscor")
    with pytest.raises(ValueError, match="no reward at 'no/such folder'"):
        load("no/such folder")
    with pytest.raises(ImportError, match="there is no module 'no_such_module'"):
        load("no_such_module:f")
    with pytest.raises(ValueError, match="reward oracle: got model sd35"):
        load_reward("oracle", spec=MODELS["sd35"])


def broken_gold(images, prompts):
    return torch.full((len(prompts),), torch.nan)


def test_image_scorers_by_name(load, spec, tiny_pipeline, weights):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_image_scorer(tiny_gold)(images, PROMPTS), tiny_gold(images, PROMPTS))
    with pytest.raises(ValueError, match="broken_gold.* returned 2 of 2 scores that are NaN or infinite"):
        load_image_scorer(broken_gold)(images, PROMPTS)
    assert torch.equal(load_image_scorer("oracle", spec=spec)(images, PROMPTS), tiny_gold(images, PROMPTS))
    assert torch.equal(load_image_scorer(spec.gold, spec=spec)(images, PROMPTS), tiny_gold(images, PROMPTS))
    pixel = load_image_scorer("pixel", spec=spec)(images, PROMPTS)
    assert torch.equal(pixel, load("pixel").score_images(images, PROMPTS))
    dinalrm = load_image_scorer("dinalrm", spec=spec, pipeline=tiny_pipeline)
    assert torch.equal(dinalrm(images, PROMPTS), dinalrm(images, PROMPTS)), "the same noise in every call"
    both = load_image_scorer("dinalrm + 2*pixel", spec=spec, pipeline=tiny_pipeline)(images, PROMPTS)
    torch.testing.assert_close(both, dinalrm(images, PROMPTS) + 2 * pixel)
    with pytest.raises(ValueError, match="energy' reads latents and cannot score images"):
        load_image_scorer(f"{__name__}:energy")
    with pytest.raises(ValueError, match="reads latents and cannot score images"):
        load_image_scorer(f"pixel + {__name__}:energy", spec=spec)


def test_load_reward_is_public():
    assert dinalrm_align.load_reward is load_reward
