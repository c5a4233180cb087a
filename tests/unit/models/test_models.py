"""What --model names stand for, and that the choice is quick, honest and never made for the user who named one."""

import dataclasses
import json
import time
from dataclasses import replace

import huggingface_hub
import pytest
import torch

from dinalrm_align.models import specs as models
from dinalrm_align.models.specs import MODELS, check_sides, hub_refusals, missing_files, resolve_model
from dinalrm_align.reward.registry import load_image_scorer

SD35_REPOSITORIES = 4


@pytest.fixture
def online(monkeypatch):
    """A machine whose hub client is allowed to ask, with an empty cache."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(models, "is_cached", lambda repository: False)


def write_pipeline(folder, *, sample_size=32, kind="StableDiffusion3Pipeline", vocabulary=49_408):
    """The files of a pipeline folder that a look at it reads; the weights are empty."""
    components = ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "scheduler"]
    index = {"_class_name": kind, **{part: ["library", "Class"] for part in components}, "text_encoder_3": [None, None]}
    for part in components:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(
            json.dumps({"sample_size": sample_size, "block_out_channels": [8] * 4, "vocab_size": vocabulary})
        )
    for part in ("transformer", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").touch()
    for part in ("text_encoder", "text_encoder_2"):
        (folder / part / "model.safetensors").touch()
    (folder / "tokenizer" / "vocab.json").touch()
    (folder / "scheduler" / "scheduler_config.json").touch()
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_auto_takes_sd35_when_everything_is_cached(online, monkeypatch):
    monkeypatch.setattr(models, "is_cached", lambda repository: True)
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda repository: pytest.fail("asked the hub needlessly"))
    spec, reason = resolve_model("auto")
    assert spec is MODELS["sd35"]
    assert "local cache" in reason and "--model shapes" in reason


def test_auto_takes_sd35_when_the_hub_grants_it(online, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "auth_check", asked.append)
    spec, reason = resolve_model("auto")
    assert spec is MODELS["sd35"] and "grants" in reason
    assert len(asked) == SD35_REPOSITORIES and MODELS["sd35"].pipeline in asked


def test_auto_takes_shapes_when_the_hub_refuses(online, monkeypatch):
    def refuse(repository):
        raise PermissionError("awaiting review")

    monkeypatch.setattr(huggingface_hub, "auth_check", refuse)
    spec, reason = resolve_model("auto")
    assert spec is MODELS["shapes"]
    assert "PermissionError: awaiting review" in reason
    assert "accept its licence" in reason and "hf auth login" in reason and "--model PATH" in reason


def test_auto_takes_shapes_in_time_when_the_hub_never_answers(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda repository: time.sleep(30))
    monkeypatch.setattr(models, "hub_refusals", lambda repositories: hub_refusals(repositories, seconds=0.2))
    start = time.monotonic()
    spec, reason = resolve_model("auto")
    assert spec is MODELS["shapes"] and "did not answer within 0.2 s" in reason
    assert time.monotonic() - start < 3


def test_one_grant_is_not_enough(monkeypatch):
    def refuse_the_second(repository):
        if repository == "b/b":
            raise PermissionError("gated")

    monkeypatch.setattr(huggingface_hub, "auth_check", refuse_the_second)
    assert hub_refusals(["a/a", "b/b"]).keys() == {"b/b"}
    assert hub_refusals(["a/a", "c/c"]) == {}


def test_offline_never_asks_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(models, "is_cached", lambda repository: False)
    monkeypatch.setattr(huggingface_hub, "auth_check", lambda repository: pytest.fail("asked the hub while offline"))
    spec, reason = resolve_model("auto")
    assert spec is MODELS["shapes"] and "HF_HUB_OFFLINE" in reason


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_named_model_is_taken_without_a_look_at_anything(name, monkeypatch):
    monkeypatch.setattr(models, "is_cached", lambda repository: pytest.fail("looked into the cache"))
    monkeypatch.setattr(models, "hub_refusals", lambda repositories: pytest.fail("asked the hub"))
    spec, reason = resolve_model(name)
    assert spec is MODELS[name] and "as given" in reason


def test_a_snapshot_counts_only_when_its_weights_are_there(tmp_path, monkeypatch):
    folder = write_pipeline(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, local_files_only: str(folder))
    assert models.is_cached(MODELS["sd35"].pipeline)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "blob-that-was-never-finished")
    assert not models.is_cached(MODELS["sd35"].pipeline)


def test_a_latent_reward_counts_only_when_head_and_adapter_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, local_files_only: str(tmp_path))
    (tmp_path / "checkpoint" / "backbone_lora").mkdir(parents=True)
    for file in models.RELEASED_REWARD_FILES:
        assert not models.is_cached(MODELS["sd35"].reward)
        (tmp_path / file).touch()
    assert models.is_cached(MODELS["sd35"].reward)


def test_every_shard_that_an_index_names_must_be_there(tmp_path):
    folder = write_pipeline(tmp_path)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "transformer" / "part-1.safetensors").touch()
    assert missing_files(folder) == ["transformer/part-2.safetensors"]


def test_a_pipeline_folder_takes_the_rewards_of_sd35_at_its_own_size(tmp_path):
    folder = write_pipeline(tmp_path / "my-sd3", sample_size=32)
    spec, reason = resolve_model(str(folder))
    sizes = dict(height=256, width=256, reward_size=256)
    assert spec == replace(MODELS["sd35"], name=str(folder), pipeline=str(folder), weights=str(tmp_path), **sizes)
    native, _ = resolve_model(str(write_pipeline(tmp_path / "sd35", sample_size=128)))
    assert (native.height, native.reward_size) == (512, 1024)  # sampled at 512 in alignment, trained on at 1024
    assert str(folder) in reason


def test_a_world_folder_takes_its_own_rewards_and_the_oracle(tmp_path):
    """Whether the rewards are there yet or not. Size and text length are those that its parts were made for."""
    folder = write_pipeline(tmp_path / "pipeline", sample_size=24, vocabulary=606)
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3" / "tokenizer_config.json").write_text('{"model_max_length": 20}')
    spec, _ = resolve_model(str(tmp_path))
    assert spec.reward == str(tmp_path / "dinalrm") and spec.pixel == str(tmp_path / "pixel")
    assert spec.gold == MODELS["shapes"].gold and (spec.height, spec.width, spec.text_length) == (192, 192, 20)
    assert spec.reward_size == 192


@pytest.mark.parametrize("name", ["sd35", "shapes", "someone/their-sd3"])
def test_a_text_length_replaces_the_models_own(name):
    own, _ = resolve_model(name)
    assert own.with_text_length(200) == replace(own, text_length=200) and own.with_text_length(None) == own
    with pytest.raises(ValueError, match="text_length: got 513"):
        own.with_text_length(513)


def test_a_hub_id_is_taken_as_one():
    spec, reason = resolve_model("someone/their-sd3")
    assert spec.pipeline == "someone/their-sd3" and "hub id" in reason


def test_bad_names_and_folders_say_what_would_do(tmp_path):
    with pytest.raises(ValueError, match=r"unknown model 'shape'; did you mean 'shapes'\? Known: auto, sd35, shapes"):
        resolve_model("shape")
    with pytest.raises(ValueError, match="unknown model '/no/such/folder'"):
        resolve_model("/no/such/folder")
    with pytest.raises(ValueError, match="lacks model_index.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ValueError, match="got a FluxPipeline"):
        resolve_model(str(write_pipeline(tmp_path / "flux", kind="FluxPipeline")))


def test_gold_is_a_callable_or_a_dotted_name():
    def count(images, prompts):
        return torch.zeros(len(images))

    assert torch.equal(load_image_scorer(count)(torch.rand(2, 3, 64, 64), ["a", "b"]), torch.zeros(2))
    oracle = load_image_scorer(MODELS["shapes"].gold)
    assert oracle(torch.rand(1, 3, 64, 64), ["a small red circle on white"]).shape == (1,)


def test_the_prompt_lists_of_sd35_are_distinct():
    spec = MODELS["sd35"]
    train, heldout = (
        path.read_text(encoding="utf-8").splitlines() for path in (spec.train_prompts, spec.heldout_prompts)
    )
    assert len(train) == len(set(train)) == 96 and len(heldout) == len(set(heldout)) == 32
    assert not set(train) & set(heldout)


@pytest.mark.parametrize(
    ("side", "good"),
    [(64, True), (192, True), (8, True), (200, False), (2048, False), (12, False), (0, False)],
)
def test_the_sides_of_an_image_are_checked_against_the_config_of_the_model(side, good):
    """The embedded world: 24 positions of 2 x 2 latents of 4 pixels each, so 192 pixels in multiples of 8."""
    check_sides(MODELS["shapes"], width=None)
    if good:
        check_sides(MODELS["shapes"], height=side)
    else:
        with pytest.raises(ValueError, match=f"height: got {side} pixels; expected a multiple of 8 from 8 to 192"):
            check_sides(MODELS["shapes"], height=side)


def test_a_hub_model_is_checked_if_its_config_is_in_the_cache(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="height: got 8192 pixels; expected a multiple of 16 from 16 to 6144"):
        check_sides(MODELS["sd35"], height=8192)  # known without a file
    other = dataclasses.replace(MODELS["sd35"], pipeline="owner/name")
    check_sides(other, height=99_999)  # not in the cache: checked when it is loaded
    for part, values in (("transformer", {"patch_size": 2, "pos_embed_max_size": 384}),
                         ("vae", {"block_out_channels": [128, 256, 512, 512]})):  # fmt: skip
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: str(tmp_path / file))
    check_sides(other, height=6144, width=2048)
    with pytest.raises(ValueError, match="width: got 6160 pixels; expected a multiple of 16 from 16 to 6144"):
        check_sides(other, height=1024, width=6160)
