"""LatentReward: where weights come from, reproducible scores, prompts and images, saving."""

import io
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from huggingface_hub import ModelCard
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_reward import make_inputs, raw_scores

from dinalrm_align import LatentReward
from dinalrm_align.models.pipeline import encode_images, load_vae
from dinalrm_align.models.text import PromptEncoder


@pytest.fixture(scope="module")
def reward(tiny_reward_dir, tiny_pipeline):
    return LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)


def images(batch=2, seed=0):
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_score_is_the_checkpoints_affine_of_the_raw_score(reward, tiny_inputs):
    torch.testing.assert_close(reward(**tiny_inputs), 2.0 * raw_scores(reward, **tiny_inputs) + 0.5)
    assert reward(**tiny_inputs).dtype == torch.float32


def test_sources_of_the_transformer_agree(reward, tiny_reward_dir, tiny_world, tiny_pipeline, tiny_inputs):
    expected = reward(**tiny_inputs)
    for options in (
        {},
        {"transformer": tiny_pipeline.transformer},
        {"transformer": tiny_world / "pipeline"},
        {"transformer": str(tiny_world / "pipeline" / "transformer"), "share_weights": False},
    ):
        other = LatentReward.from_pretrained(str(tiny_reward_dir), **options)
        torch.testing.assert_close(other(**tiny_inputs), expected)


def test_a_world_can_be_moved_as_a_whole(tiny_world, tiny_inputs, reward, tmp_path):
    shutil.copytree(tiny_world, tmp_path / "elsewhere")
    moved = LatentReward.from_pretrained(tmp_path / "elsewhere" / "dinalrm")
    torch.testing.assert_close(moved(**tiny_inputs), reward(**tiny_inputs))


def test_a_turned_image_is_scored_upright(reward):
    """Half white, half black; stored on its side, with the orientation in a file that PIL has not decoded yet."""
    upright = Image.new("RGB", (64, 48))
    upright.paste((255, 255, 255), (0, 0, 64, 24))
    buffer, info = io.BytesIO(), PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", pnginfo=info)
    noise = torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(0))
    scores = [
        reward.score_images(image, ["a"], noise=noise)
        for image in (upright, Image.open(buffer), Image.open(buffer).convert("RGB"), np.asarray(upright))
    ]
    assert all(torch.equal(score, scores[0]) for score in scores)


def test_a_seed_means_one_score(reward, tiny_inputs):
    del tiny_inputs["noise"]
    scores = [reward(**tiny_inputs, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    noise = torch.randn(tiny_inputs["latents"].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reward(**tiny_inputs, noise=noise), scores[0])


def test_default_sigma_is_the_configs(reward, tiny_inputs):
    assert torch.equal(reward(**tiny_inputs), reward(**tiny_inputs, sigma=0.4))
    assert not torch.equal(reward(**tiny_inputs), reward(**tiny_inputs, sigma=0.5))


@pytest.mark.parametrize("sigma", [0, 1, torch.tensor(0.3), torch.tensor([0.1, 0.9]), (0.2, 0.5, 0.7), [0.5]])
def test_sigma_in_every_documented_form(reward, tiny_inputs, sigma):
    assert reward(**tiny_inputs, sigma=sigma).shape == (2,)


def test_an_ensemble_of_one_level_is_that_level(reward, tiny_inputs):
    assert torch.equal(reward(**tiny_inputs, sigma=[0.5]), reward(**tiny_inputs, sigma=0.5))


def test_latents_of_half_precision_are_scored(reward, tiny_inputs):
    rounded = {**tiny_inputs, "latents": tiny_inputs["latents"].bfloat16()}
    torch.testing.assert_close(reward(**rounded), reward(**tiny_inputs), rtol=0.05, atol=0.05)


def test_prompts_score_like_their_embeddings(reward, tiny_pipeline):
    inputs = make_inputs(tiny_pipeline.transformer)
    prompts = ["a red circle", "two blue squares"]
    embeds, _, pooled, _ = tiny_pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    arguments = dict(latents=inputs["latents"], noise=inputs["noise"])
    by_embeds = reward(**arguments, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    torch.testing.assert_close(reward(**arguments, prompts=prompts), by_embeds)
    one = {name: value[:1] for name, value in arguments.items()}
    torch.testing.assert_close(reward(**one, prompts=prompts[0]), by_embeds[:1])


def test_with_embeddings_no_text_encoder_is_touched(tiny_reward_dir, tiny_inputs, monkeypatch):
    def fail(*_):
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr(PromptEncoder, "_load", fail)
    reward = LatentReward.from_pretrained(tiny_reward_dir)
    assert reward(**tiny_inputs).shape == (2,)
    with pytest.raises(AssertionError):
        reward(tiny_inputs["latents"], prompts=["a", "b"])


def test_text_encoders_and_vae_are_loaded_from_the_base_model(tiny_reward_dir, reward):
    alone = LatentReward.from_pretrained(tiny_reward_dir)
    seed = torch.Generator().manual_seed
    score = alone.score_images(images(), ["a red circle", "a blue square"], generator=seed(0))
    torch.testing.assert_close(
        score, reward.score_images(images(), ["a red circle", "a blue square"], generator=seed(0))
    )
    assert not any("encoder" in name or "vae" in name for name, _ in alone.named_modules())


def test_threads_load_one_vae(tiny_reward_dir, monkeypatch):
    alone, loaded = LatentReward.from_pretrained(tiny_reward_dir), []

    def slow_load(*source, **options):
        threading.Event().wait(0.1)
        loaded.append(load_vae(*source, **options))
        return loaded[-1]

    monkeypatch.setattr("dinalrm_align.reward.latent.load_vae", slow_load)
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(lambda _: alone.score_images(images(), ["a", "b"], seeds=[0, 0]), range(2)))
    torch.testing.assert_close(*scores)
    assert len(loaded) == 1


def test_images_score_like_their_latents(reward, tiny_pipeline):
    prompts = ["a red circle", "a blue square"]
    latents = encode_images(tiny_pipeline.vae, images())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    score = reward.score_images(images(), prompts, noise=noise)
    torch.testing.assert_close(score, reward(latents, prompts, noise=noise))
    assert not score.requires_grad


def test_images_have_a_default_sigma_of_their_own(tiny_reward_dir, tiny_pipeline, tmp_path):
    shutil.copytree(tiny_reward_dir, tmp_path / "reward")
    values = json.loads((tmp_path / "reward" / "config.json").read_text())
    (tmp_path / "reward" / "config.json").write_text(json.dumps(values | {"image_sigma": [0.1, 0.2]}))
    reward = LatentReward.from_pretrained(tmp_path / "reward", pipeline=tiny_pipeline)
    noise = torch.zeros(1, 16, 16, 16)
    arguments = (images(1), ["a red circle"])
    expected = reward.score_images(*arguments, sigma=(0.1, 0.2), noise=noise)
    torch.testing.assert_close(reward.score_images(*arguments, noise=noise), expected)


@pytest.mark.parametrize("format", ["dinalrm", "released"])
@pytest.mark.parametrize("share_weights", [True, False], ids=["shared", "merged"])
def test_saving_and_loading_changes_nothing(
    tiny_reward_dir, tiny_pipeline, tiny_inputs, tiny_world, format, share_weights
):
    first = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline, share_weights=share_weights)
    folder = tiny_world / "copies" / f"{format}_{share_weights}"
    first.save_pretrained(folder, format=format)
    second = LatentReward.from_pretrained(folder)
    assert second.config.base_model_id == "../../pipeline"
    torch.testing.assert_close(second(**tiny_inputs), first(**tiny_inputs))
    second.save_pretrained(folder, format=format)
    third = LatentReward.from_pretrained(folder)
    assert third.config == second.config
    assert torch.equal(third(**tiny_inputs), second(**tiny_inputs))
    assert not list(folder.rglob("*.tmp"))


def test_a_bfloat16_reward_is_saved_as_it_was_trained(tiny_reward_dir, tiny_world, tiny_inputs, reward):
    rough = LatentReward.from_pretrained(tiny_reward_dir, dtype="bfloat16")
    assert rough.model.trunk.dtype == torch.bfloat16 and rough(**tiny_inputs).dtype == torch.float32
    torch.testing.assert_close(rough(**tiny_inputs), reward(**tiny_inputs), rtol=0.1, atol=0.2)
    rough.save_pretrained(tiny_world / "copies" / "from_bfloat16")
    again = LatentReward.from_pretrained(tiny_world / "copies" / "from_bfloat16")
    assert torch.equal(again(**tiny_inputs), LatentReward.from_pretrained(tiny_reward_dir)(**tiny_inputs))


def test_a_reward_that_was_cast_is_saved_as_it_was_trained(tiny_reward_dir, tiny_world):
    from safetensors.torch import load_file

    cast = LatentReward.from_pretrained(tiny_reward_dir, share_weights=False).to(torch.bfloat16)
    cast.save_pretrained(tiny_world / "copies" / "from_cast")
    first, again = (
        load_file(folder / "model.safetensors") for folder in (tiny_reward_dir, tiny_world / "copies" / "from_cast")
    )
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_autocast_around_the_reward_keeps_float32_scores(reward, tiny_inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = reward(**tiny_inputs)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, reward(**tiny_inputs), rtol=0.1, atol=0.2)


@pytest.mark.gpu
def test_a_cpu_generator_gives_the_same_score_on_cuda(tiny_reward_dir, tiny_inputs):
    del tiny_inputs["noise"]
    scores = []
    for device in ("cpu", "cuda"):
        reward = LatentReward.from_pretrained(tiny_reward_dir, device=device)
        inputs = {name: value.to(device) for name, value in tiny_inputs.items()}
        scores.append(reward(**inputs, generator=torch.Generator().manual_seed(0)).cpu())
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-3)


def test_a_pipeline_of_another_task_has_the_same_parts(tiny_pipeline, tiny_reward_dir, tiny_inputs):
    expected = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)(**tiny_inputs)
    for kind in (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline):
        reward = LatentReward.from_pretrained(tiny_reward_dir, pipeline=kind(**tiny_pipeline.components))
        assert torch.equal(reward(**tiny_inputs), expected)
    with pytest.raises(TypeError, match="pipeline: got int; expected one of StableDiffusion3Pipeline"):
        LatentReward.from_pretrained(tiny_reward_dir, pipeline=3)


def test_a_reward_is_saved_with_a_card_and_pushed_to_the_hub(tiny_pipeline, tiny_reward_dir, tmp_path, monkeypatch):
    """The hub client is replaced by one that copies the folder; a card that is there is kept."""
    reward = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)
    reward.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| base model | ../" in card and "first 3 transformer blocks" in card and "16 T5" in card
    assert "base_model" not in ModelCard(card).data.to_dict()  # the hub takes no paths
    (tmp_path / "saved" / "README.md").write_text("mine")
    reward.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "mine"

    class Hub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert (private, exist_ok) == (True, True)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub")
            return f"https://hub/{repo_id}: {commit_message}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    where = reward.push_to_hub("a-reward", private=True, token="secret", commit_message="first")
    assert where == "https://hub/me/a-reward: first"
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert 'from_pretrained("me/a-reward"' in (tmp_path / "hub" / "README.md").read_text()


def test_a_reward_may_lie_in_a_subfolder(tiny_pipeline, tiny_reward_dir, tiny_inputs):
    reward = LatentReward.from_pretrained(tiny_reward_dir.parent, pipeline=tiny_pipeline, subfolder="dinalrm")
    expected = LatentReward.from_pretrained(tiny_reward_dir, pipeline=tiny_pipeline)(**tiny_inputs)
    assert torch.equal(reward(**tiny_inputs), expected)
