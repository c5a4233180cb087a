"""Parity with the released DiNa-LRM code: inputs and outputs of a run of it on tiny random weights, to 1e-5."""

import pytest
import torch
from tiny_reward import raw_scores

from dinalrm_align import LatentReward
from dinalrm_align.flow.noise import add_noise, scheduler_sigmas, snap_sigma, timestep_of
from dinalrm_align.models.pipeline import load_transformer
from dinalrm_align.models.weights import load_tensors
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.losses import preference_loss
from dinalrm_align.reward.model import build_reward_model

TOLERANCE = dict(rtol=0, atol=1e-5)
LEVELS = ("0.1", "0.4", "0.7")
LOSSES = {
    "loss_thurstone": LossConfig(preset="released"),
    "loss_thurstone-constant": LossConfig(likelihood="thurstone_fixed", preset="released"),
    "loss_bt": LossConfig(likelihood="bradley_terry", objective="nll"),
    "loss_bt-margin": LossConfig(likelihood="bradley_terry_margin", objective="nll"),
}


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "private"])
def reward(request, official):
    transformer = load_transformer(official / "transformer", dtype=torch.float32)
    return LatentReward.from_pretrained(official, transformer=transformer, share_weights=request.param)


@pytest.fixture(scope="module")
def trained(official):
    """The released weights in the module that is trained."""
    checkpoint = read_checkpoint(official)
    model = build_reward_model(checkpoint.config, load_transformer(official / "transformer", dtype=torch.float32))
    load_tensors(model.tuned_tensors(), checkpoint.tensors, checkpoint.where)
    return model


def text(golden):
    return {name: golden[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}


@pytest.mark.parametrize("level", LEVELS)
def test_raw_score_and_its_gradient_equal_the_released_code(reward, golden, level):
    latents = golden["latents"].clone().requires_grad_()
    raw = raw_scores(reward, latents, **text(golden), sigma=float(level), noise=golden["noise"])
    raw.sum().backward()
    torch.testing.assert_close(raw, golden[f"score_u{level}"][:, 0], **TOLERANCE)
    torch.testing.assert_close(latents.grad, golden[f"grad_u{level}"], **TOLERANCE)


def test_displayed_score_is_the_readmes_affine(reward, golden):
    score = reward(golden["latents"], **text(golden), sigma=0.4, noise=golden["noise"])
    torch.testing.assert_close(score, (golden["score_u0.4"][:, 0] + 10) / 10, **TOLERANCE)


def test_token_ensemble_equals_the_released_code(reward, golden):
    raw = raw_scores(reward, golden["latents"], **text(golden), sigma=(0.2, 0.5, 0.7), noise=golden["noise"])
    torch.testing.assert_close(raw, golden["score_ensemble_0.2_0.5_0.7"][:, 0], **TOLERANCE)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_snap_to_the_scheduler_table(golden, level):
    sigma = snap_sigma(torch.full((3,), float(level)), scheduler_sigmas())
    torch.testing.assert_close(sigma, golden[f"sigma_u{level}"], **TOLERANCE)
    torch.testing.assert_close(timestep_of(sigma), golden[f"timestep_u{level}"], rtol=0, atol=1e-3)


def test_tapped_features_equal_the_released_code(trained, golden):
    sigma = golden["sigma_u0.4"]
    x_sigma = add_noise(golden["latents"], golden["noise"], sigma)
    taps = trained.trunk(x_sigma, timestep_of(sigma), **text(golden))
    torch.testing.assert_close(taps.temb, golden["temb_u0.4"], **TOLERANCE)
    for index in range(3):
        torch.testing.assert_close(taps.visual[index], golden[f"visual_{index}_u0.4"], **TOLERANCE)
        torch.testing.assert_close(taps.text[index], golden[f"text_{index}_u0.4"], **TOLERANCE)


def scores_of_pair(model, golden):
    """Chosen and rejected in one forward, with the same noise and sigma."""
    raw = model(
        torch.cat([golden["latents"], golden["latents_rejected"]]),
        golden["prompt_embeds"].repeat(2, 1, 1),
        golden["pooled_prompt_embeds"].repeat(2, 1),
        sigma=golden["train_sigma"].repeat(2),
        noise=golden["noise"].repeat(2, 1, 1, 1),
    )
    return raw.chunk(2)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_training_step_equal_the_released_code(trained, golden, name):
    chosen, rejected = scores_of_pair(trained, golden)
    torch.testing.assert_close(chosen, golden["train_score_chosen"][:, 0], **TOLERANCE)
    torch.testing.assert_close(rejected, golden["train_score_rejected"][:, 0], **TOLERANCE)
    loss = preference_loss(chosen, rejected, golden["train_sigma"], config=LOSSES[name]).mean()
    torch.testing.assert_close(loss[None], golden[name], **TOLERANCE)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non_reentrant", "reentrant"])
def test_gradient_norms_of_a_training_step_equal_the_released_code(trained, golden, checkpointing):
    trained.zero_grad()
    trained.trunk.disable_gradient_checkpointing()
    if checkpointing is not None:
        trained.trunk.enable_gradient_checkpointing(use_reentrant=checkpointing)
    chosen, rejected = scores_of_pair(trained, golden)
    preference_loss(chosen, rejected, golden["train_sigma"], config=LOSSES["loss_thurstone"]).mean().backward()
    lora = torch.nn.utils.get_total_norm([p.grad for p in trained.trunk.lora_parameters().values()])
    head = torch.nn.utils.get_total_norm([p.grad for p in trained.head.parameters()])
    torch.testing.assert_close(lora[None], golden["grad_norm_lora"], **TOLERANCE)
    torch.testing.assert_close(head[None], golden["grad_norm_head"], **TOLERANCE)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_released_reward_alone_has_the_dtype_of_the_base_models_files(official, tmp_path, stored):
    """Its config names none; SD3.5's files are in bfloat16, and in float32 they would take twice the memory."""
    load_transformer(official / "transformer", dtype=stored).save_pretrained(tmp_path)
    assert LatentReward.from_pretrained(official, transformer=tmp_path).backbone.dtype is stored
    assert LatentReward.from_pretrained(official, transformer=tmp_path, dtype="float16").backbone.dtype is torch.float16


def test_released_layout_survives_saving_and_loading(official, golden, tmp_path):
    options = dict(transformer=official / "transformer")
    reward = LatentReward.from_pretrained(official, **options)
    reward.save_pretrained(tmp_path / "released", format="released")
    again = LatentReward.from_pretrained(tmp_path / "released", **options)
    first, second = read_checkpoint(official), read_checkpoint(tmp_path / "released")
    assert second.config == first.config
    assert second.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(second.tensors[name], first.tensors[name]) for name in first.tensors)
    arguments = dict(**text(golden), noise=golden["noise"])
    assert torch.equal(again(golden["latents"], **arguments), reward(golden["latents"], **arguments))


def test_released_adapter_we_write_is_one_that_peft_loads(official, tmp_path):
    import peft

    checkpoint = read_checkpoint(official)
    LatentReward.from_pretrained(official, transformer=official / "transformer").save_pretrained(tmp_path, "released")
    plain = load_transformer(official / "transformer", dtype=torch.float32)
    plain.transformer_blocks = plain.transformer_blocks[:4]
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "checkpoint" / "backbone_lora")
    state = peft.get_peft_model_state_dict(loaded)
    ours = {f"base_model.model.{k[9:]}": v for k, v in checkpoint.tensors.items() if k.startswith("backbone.")}
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], ours[name]) for name in ours)
    assert loaded.peft_config["default"].lora_alpha == 8
