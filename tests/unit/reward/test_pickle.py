"""A reward is pickled as the call that loads it, and the copy scores alike."""

import copy
import io
import pickle
import shutil
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny_clip import save_clip
from tiny_reward import make_inputs

from dinalrm_align import LatentReward, load_reward
from dinalrm_align.models.pipeline import load_pipeline, load_vae
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.reward.protocol import RewardModule

PROMPTS = ["a small red circle left of a large blue square on gray", "three small green crosses on black"]
LARGEST = 20_000
"""Bytes of a pickle that holds no tensors. The tiny reward's weights take 400 kB."""


@pytest.fixture(scope="module")
def pipeline(tiny_world):
    """A pipeline that was loaded from a folder."""
    return load_pipeline(tiny_world / "pipeline", dtype=torch.float32)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def latents(tiny_pipeline):
    return make_inputs(tiny_pipeline.transformer, height=16, width=16)["latents"]


def mean_of_latents(latents):
    return latents.mean((1, 2, 3))


def mean_of_images(images, prompts):
    return images.mean((1, 2, 3))


def copied(reward):
    data = pickle.dumps(reward)
    assert len(data) < LARGEST and b"torch._utils" not in data
    return pickle.loads(data)


def test_a_reward_loads_its_weights_where_it_is_unpickled(tiny_reward_dir, pipeline, latents):
    for options in (
        {},
        {"sigma": 0.7, "subfolder": "", "revision": "main", "cache_dir": "cache", "local_files_only": True},
        {"dtype": "bfloat16"},
        {"dtype": torch.bfloat16, "share_weights": False},
        {"dtype": torch.bfloat16, "share_weights": False, "pipeline": pipeline},
        {"pipeline": pipeline},
        {"pipeline": pipeline, "share_weights": False},
        {"transformer": pipeline.transformer},
        {"transformer": pipeline.config["_name_or_path"]},
        {"pipeline": pipeline.config["_name_or_path"]},
    ):
        reward = LatentReward.from_pretrained(tiny_reward_dir, **options)
        again = copied(reward)
        assert type(again) is LatentReward and again.config == reward.config
        assert torch.equal(again(latents, PROMPTS), reward(latents, PROMPTS)), options
        images = torch.full((1, 3, 64, 64), 0.3)
        assert torch.equal(again.score_images(images, "a"), reward.score_images(images, "a")), options
        assert torch.equal(copied(again)(latents, PROMPTS), reward(latents, PROMPTS)), options


def test_a_pipeline_that_diffusers_loaded_is_found_again(tiny_world, tiny_reward_dir, latents):
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(tiny_world / "pipeline"))
    pipeline.transformer.requires_grad_(False)
    for options in ({"pipeline": pipeline}, {"transformer": pipeline.transformer}):
        reward = LatentReward.from_pretrained(tiny_reward_dir, **options)
        assert torch.equal(copied(reward)(latents, PROMPTS), reward(latents, PROMPTS))


def test_paths_are_found_from_another_folder(tiny_world, latents, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny_world)
    reward = LatentReward.from_pretrained("dinalrm", pipeline="pipeline", cache_dir="cache")
    data = pickle.dumps(reward)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(pickle.loads(data)(latents, PROMPTS), reward(latents, PROMPTS))


def test_a_cast_and_offloaded_reward_is_loaded_as_it_was(tiny_reward_dir, latents):
    reward = LatentReward.from_pretrained(tiny_reward_dir, share_weights=False).to(torch.bfloat16)
    expected = reward(latents, PROMPTS)
    reward.offload()
    again = copied(reward)
    assert again.backbone.dtype == torch.bfloat16 and torch.equal(again(latents, PROMPTS), expected)


def test_tokens_do_not_travel(tiny_reward_dir, clip_dir):
    assert b"hf_secret" not in pickle.dumps(LatentReward.from_pretrained(tiny_reward_dir, token="hf_secret"))
    pixel = load_reward(f"pixel={clip_dir}", options={"pixel": {"token": "hf_secret", "revision": "main"}})
    assert b"hf_secret" not in pickle.dumps(pixel)
    remote = load_reward("unifiedreward", options={"unifiedreward": {"api_key": "hf_secret"}})
    assert b"hf_secret" not in pickle.dumps(remote) and copied(remote).name == remote.name


def test_rewards_by_name_and_sums(tiny_reward_dir, clip_dir, pipeline, latents):
    """The image rewards of a sum decode with one VAE again."""
    for text in (
        f"pixel={clip_dir}",
        f"dinalrm={tiny_reward_dir}",
        f"dinalrm={tiny_reward_dir} + 0.2*pixel={clip_dir}",
        f"0.5*pixel={clip_dir} + 2*{__name__}:mean_of_images - {__name__}:mean_of_latents",
        "0.5*oracle",
    ):
        reward = load_reward(text, pipeline=pipeline)
        again = copied(reward)
        assert again.weights == reward.weights and again.name == reward.name
        assert torch.equal(again(latents, PROMPTS), reward(latents, PROMPTS)), text
        assert torch.equal(copied(again)(latents, PROMPTS), reward(latents, PROMPTS)), text


def test_functions(latents, pipeline):
    for function in (mean_of_latents, mean_of_images):
        reward = load_reward(function, vae=pipeline.vae)
        assert torch.equal(copied(reward)(latents, PROMPTS), reward(latents, PROMPTS))


def test_the_vae_keeps_its_dtype(clip_dir, tiny_world, latents):
    vae = load_vae(tiny_world / "pipeline", device="cpu").bfloat16()
    reward = load_reward(f"pixel={clip_dir}", vae=vae)
    assert torch.equal(copied(reward)(latents, PROMPTS), reward(latents, PROMPTS))


def test_a_reward_from_a_folder_or_a_pipelines_folder_by_name(tiny_reward_dir, clip_dir, tiny_world, latents, pipeline):
    text = f"dinalrm={tiny_reward_dir} + 0.2*pixel={clip_dir}"
    by_path = load_reward(text, pipeline=tiny_world / "pipeline")
    assert torch.equal(by_path(latents, PROMPTS), load_reward(text, pipeline=pipeline)(latents, PROMPTS))


def test_models_that_cannot_be_loaded_again_are_refused(tiny_reward_dir, clip_dir, tiny_pipeline):
    for name, model in (("pipeline", tiny_pipeline), ("transformer", tiny_pipeline.transformer)):
        reward = LatentReward.from_pretrained(tiny_reward_dir, **{name: model})
        with pytest.raises(TypeError, match=rf"{name}: got a .* not loaded from a folder or the hub.* save_pretrained"):
            pickle.dumps(reward)
    with pytest.raises(TypeError, match="vae: got a AutoencoderKL that was not loaded"):
        pickle.dumps(load_reward(f"pixel={clip_dir}", vae=tiny_pipeline.vae))
    parts = LatentReward.from_pretrained(tiny_reward_dir)
    built = LatentReward(build_reward_model(parts.config, tiny_pipeline.transformer), encoder=parts.encoder)
    with pytest.raises(TypeError, match="built from parts and cannot be pickled; save it with save_pretrained"):
        pickle.dumps(built)


def test_weights_that_were_changed_since_are_noticed(tiny_world, tiny_reward_dir, tmp_path):
    """Changed in memory before the reward was built, and on disk after."""
    pipeline = load_pipeline(tiny_world / "pipeline", dtype=torch.float32)
    pipeline.transformer.context_embedder.weight.data.mul_(1.01)
    data = pickle.dumps(LatentReward.from_pretrained(tiny_reward_dir, pipeline=pipeline))
    with pytest.raises(ValueError, match="weights: got other weights from .*pipeline than those of the pickled reward"):
        pickle.loads(data)
    shutil.copytree(tiny_world, tmp_path / "world")
    data = pickle.dumps(LatentReward.from_pretrained(tmp_path / "world" / "dinalrm"))
    other = LatentReward.from_pretrained(tiny_reward_dir)
    tensors = {name: 1.01 * tensor for name, tensor in other.model.tuned_tensors().items()}
    other.model.freeze(as_trained=tensors)
    other.save_pretrained(tmp_path / "world" / "dinalrm")
    with pytest.raises(ValueError, match="weights: got other weights from"):
        pickle.loads(data)


def test_weights_that_were_changed_after_loading_are_refused(tiny_reward_dir, clip_dir):
    for text in (f"dinalrm={tiny_reward_dir}", f"pixel={clip_dir}"):
        reward = load_reward(text)
        reward.load_state_dict({name: 1.01 * tensor for name, tensor in reward.state_dict().items()})
        with pytest.raises(ValueError, match="got other values than when the reward was built.* save the reward"):
            pickle.dumps(reward)
    reward = copy.deepcopy(LatentReward.from_pretrained(tiny_reward_dir))
    reward.model.head.query_tokens.data[:, 0] += 0.01
    with pytest.raises(ValueError, match="model.head.query_tokens .and 0 more"):
        pickle.dumps(reward)


def test_a_pipeline_that_was_loaded_without_its_t5_is_refused(tiny_world, tiny_reward_dir, tmp_path, latents):
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_world / "pipeline", text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    pipeline.transformer.requires_grad_(False)
    with pytest.raises(TypeError, match="pipeline: got one without T5.* save_pretrained"):
        pickle.dumps(LatentReward.from_pretrained(tiny_reward_dir, pipeline=pipeline))
    reward = LatentReward.from_pretrained(tiny_reward_dir, pipeline=load_pipeline(tmp_path, dtype=torch.float32))
    assert torch.equal(copied(reward)(latents, PROMPTS), reward(latents, PROMPTS))


def test_several_threads_load_at_once(tiny_reward_dir, clip_dir, tiny_world, latents):
    text = f"dinalrm={tiny_reward_dir} + 0.2*pixel={clip_dir}"
    data = pickle.dumps(load_reward(text, pipeline=str(tiny_world / "pipeline")))
    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(lambda _: pickle.loads(data)(latents, PROMPTS), range(6))
    assert all(torch.equal(other, first) for other in others)


def test_torch_save_of_a_config_that_holds_a_reward(tiny_reward_dir, latents):
    reward, buffer = LatentReward.from_pretrained(tiny_reward_dir), io.BytesIO()
    torch.save({"steps": 3, "reward": reward}, buffer)
    assert buffer.tell() < LARGEST
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)["reward"]
    assert torch.equal(again(latents, PROMPTS), reward(latents, PROMPTS))


def test_a_deep_copy_has_weights_of_its_own(tiny_reward_dir, clip_dir, pipeline, latents):
    for reward in (
        LatentReward.from_pretrained(tiny_reward_dir),
        LatentReward.from_pretrained(tiny_reward_dir, pipeline=pipeline),
        load_reward(f"dinalrm={tiny_reward_dir} + 0.2*pixel={clip_dir}", pipeline=pipeline),
    ):
        again, expected = copy.deepcopy(reward), reward(latents, PROMPTS)
        assert torch.equal(again(latents, PROMPTS), expected)
        pointers = [{weight.data_ptr() for weight in module.parameters()} for module in (reward, again)]
        assert not pointers[0] & pointers[1]
        assert torch.equal(copied(again)(latents, PROMPTS), expected)


class Own(RewardModule):
    """A user's reward: it is pickled with its weights, as any module."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(1, 1)))

    def forward(self, latents, prompts, **noise):
        return self.layers(latents.mean((1, 2, 3))[:, None])[:, 0]


def test_a_reward_of_ones_own_is_pickled_with_its_weights(latents):
    own = Own()
    for again in (pickle.loads(pickle.dumps(own)), copy.deepcopy(own)):
        assert torch.equal(again(latents, PROMPTS), own(latents, PROMPTS))
