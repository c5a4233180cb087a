"""LrmReward on tiny random weights in LRM's layout, against an independent loop with hooks on the stock classes."""

import json
import pickle
import shutil
import threading

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from paths import load_recipe
from PIL import Image
from public_sets import write_hpdv3
from tiny_clip import tiny_vae
from tiny_lrm import SCALES, one_file, save_lrm, tiny_vae_of
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dinalrm_align import load_reward
from dinalrm_align.models.pipeline import decode_latents, encode_images
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.lrm import LrmReward
from dinalrm_align.reward.names import parse_reward, reward_sources

PROMPTS = ["a red circle", "two blue squares on gray", "a red circle"]
STAGES = {"sd15": (2, 5, 8, 11), "sdxl": (2, 5, 8)}
"""Places of the stages among the residuals of a stock UNet, in Kwai-Kolors/LPO@9c2e8b8."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_lrm(tmp_path_factory.mktemp(family), family) for family in STAGES}


@pytest.fixture(scope="module")
def rewards(folders):
    return {name: LrmReward.from_pretrained(lrm, family=name, base=base) for name, (lrm, base) in folders.items()}


@pytest.fixture(params=STAGES)
def family(request):
    return request.param


@pytest.fixture
def reward(rewards, family):
    return rewards[family]


def some_latents(count=3, channels=4, size=8, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Stock:
    """LRM's arithmetic in float64, by hooks on the stock classes: every sample and every prompt alone."""

    def __init__(self, lrm, base, family):
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        self.family, parts = family, list(kinds)[: 1 + (family == "sdxl")]
        self.unet = UNet2DConditionModel.from_pretrained(str(lrm / "unet")).double().eval()
        self.head = torch.load(lrm / "state_dict.pt", weights_only=True)
        self.tokenizer = CLIPTokenizer.from_pretrained(str(base / "tokenizer"))
        self.encoders = [kinds[part].from_pretrained(str(lrm / part)).double().eval() for part in parts]
        self.residuals, self.middles, self.penultimate = [], [], []
        self.unet.conv_in.register_forward_hook(lambda module, given, output: self.residuals.append(output))
        for block in self.unet.down_blocks:
            block.register_forward_hook(lambda module, given, output: self.residuals.extend(output[1]))
        self.unet.mid_block.register_forward_hook(lambda module, given, output: self.middles.append(output))
        for encoder in self.encoders:
            (layer,) = [module for name, module in encoder.named_modules() if name.endswith("layers.1")]
            layer.register_forward_hook(lambda module, given, output: self.penultimate.append(output))

    def text(self, prompt):
        """The states for cross-attention (1, L, C) and the pooled feature (1, D)."""
        ids = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
        ).input_ids
        self.penultimate.clear()
        outputs = [encoder(ids) for encoder in self.encoders]
        if self.family == "sdxl":
            return torch.cat([layer.reshape(1, 16, -1) for layer in self.penultimate], -1), outputs[1].text_embeds
        last = outputs[0].last_hidden_state
        return last, last[:, int((ids[0] == self.tokenizer.eos_token_id).nonzero()[0])]

    @torch.no_grad()
    def scores(self, latents, timesteps, prompts):
        return torch.cat([self.score(*row) for row in zip(latents, timesteps, prompts, strict=True)])

    def score(self, latent, timestep, prompt):
        self.middles.clear()
        for text in ("", prompt):
            self.residuals.clear()
            states, feature = self.text(text)
            added = {"text_embeds": feature, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
            added = added if self.family == "sdxl" else None
            self.unet(latent[None].double(), timestep, states, added_cond_kwargs=added)
        parts = [self.residuals[index].mean((2, 3)) for index in STAGES[self.family]]
        empty, prompted = (middle.mean((2, 3)) for middle in self.middles)
        parts.append(empty + 7.5 * (prompted - empty))
        image = torch.cat(parts, -1) @ self.head["visual_projection"]["weight"].double().T
        if self.family == "sd15":
            feature = feature @ self.head["text_projection"]["weight"].double().T
        return self.head["logit_scale"].double().exp() * (image * feature).sum(-1) / image.norm() / feature.norm()


def test_scores_of_clean_and_noisy_latents_equal_those_of_the_stock_classes(reward, folders, family):
    lrm, base = folders[family]
    stock = Stock(lrm, base, family)
    exact = LrmReward.from_pretrained(lrm, family=family, base=base, dtype=torch.float64)
    clean, timesteps = some_latents(), torch.tensor([51, 401, 951])
    noisy = DDPMScheduler().add_noise(clean, some_latents(seed=1), timesteps)
    wanted = {"clean": stock.scores(clean, [1, 1, 1], PROMPTS), "noisy": stock.scores(noisy, timesteps, PROMPTS)}
    for kind, found in (("float64", exact), ("float32", reward)):
        got = {"clean": found(clean, PROMPTS), "noisy": found.score_timestep(noisy, timesteps, PROMPTS)}
        for name, scores in got.items():
            difference = (scores - wanted[name]).abs().max()
            print(f"{reward.name} {kind} {name}: largest difference {difference:.1e}")
            assert scores.shape == (3,) and scores.dtype == torch.float32
            assert difference < {"float64": 1e-6, "float32": 1e-4}[kind]
    assert wanted["clean"].std() > 0.1 and (wanted["clean"] - wanted["noisy"]).abs().min() > 1e-3


def test_scores_depend_on_prompt_and_timestep(reward):
    latents = some_latents(1).repeat(3, 1, 1, 1)
    scores = reward.score_timestep(latents, torch.tensor([1, 1, 401]), ["a red circle", "blue", "a red circle"])
    assert (scores[0] - scores[1:]).abs().min() > 1e-3
    for clean in (1, torch.tensor(1), torch.ones(3, dtype=torch.int32)):
        assert torch.equal(reward.score_timestep(latents, clean, ["blue"] * 3), reward(latents, ["blue"] * 3))


def test_gradient_equals_finite_differences(folders, family):
    lrm, base = folders[family]
    model = LrmReward.from_pretrained(lrm, family=family, base=base, dtype=torch.float64).model
    latents, step = some_latents(2).double().requires_grad_(), 1e-5
    timesteps, prompts = torch.tensor([1, 601]), PROMPTS[:2]
    (gradient,) = torch.autograd.grad(model(latents, timesteps, prompts).sum(), latents)
    with torch.no_grad():
        for seed in range(3):
            direction = some_latents(2, seed=seed + 5).double()
            ends = [model(latents + sign * step * direction, timesteps, prompts).sum() for sign in (1, -1)]
            want = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close((gradient * direction).sum(), want, rtol=1e-6, atol=1e-8)
            assert want.abs() > 1e-3


def test_gradients_reach_latents_and_images_and_no_weight(reward):
    latents, images = some_latents().requires_grad_(), torch.rand(2, 3, 40, 56).requires_grad_()
    (of_latents,) = torch.autograd.grad(reward(latents, PROMPTS).sum(), latents)
    (of_images,) = torch.autograd.grad(reward.score_images(images, PROMPTS[:2], differentiable=True).sum(), images)
    assert all(part.abs().sum() > 0 for part in (*of_latents, *of_images))
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_recomputed_activations_leave_the_gradient(reward):
    latents = some_latents().requires_grad_()
    (plain,) = torch.autograd.grad(reward(latents, PROMPTS).sum(), latents)
    blocks = []
    handle = reward.model.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    reward.enable_gradient_checkpointing()
    try:
        (recomputed,) = torch.autograd.grad(reward(latents, PROMPTS).sum(), latents)
    finally:
        reward.disable_gradient_checkpointing()
        handle.remove()
    assert len(blocks) == 2
    torch.testing.assert_close(recomputed, plain)


def test_up_blocks_are_not_kept(reward, folders, family):
    stock = UNet2DConditionModel.from_pretrained(str(folders[family][0] / "unet"))
    kept = {name for name, _ in reward.model.unet.named_parameters()}
    dropped = {name for name, _ in stock.named_parameters()} - kept
    assert dropped and all(name.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for name in dropped)


def test_images_are_squeezed_to_the_square_and_encoded(reward, folders, family):
    images = torch.rand(2, 3, 96, 72, generator=torch.Generator().manual_seed(3))
    square = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    latents = encode_images(reward.encoder, square)
    assert reward.encoder.config.scaling_factor == SCALES[family] and latents.shape == (2, 4, 8, 8)
    assert torch.equal(reward.score_images(images, PROMPTS[:2]), reward(latents, PROMPTS[:2]))


def test_latents_of_another_model_are_decoded_and_encoded(folders, family):
    lrm, base = folders[family]
    vae, latents = tiny_vae(), some_latents(2, 16, 16).requires_grad_()
    reward = LrmReward.from_pretrained(lrm, family=family, base=base, vae=vae)
    scores = reward(latents, PROMPTS[:2])
    torch.testing.assert_close(scores, reward.score_images(decode_latents(vae, latents), PROMPTS[:2]))
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    assert gradient.abs().sum() > 0


def test_the_familys_own_vae_decodes_nothing(folders, rewards, family):
    lrm, base = folders[family]
    vae = tiny_vae_of(SCALES[family])
    vae.decode = None
    reward = LrmReward.from_pretrained(lrm, family=family, base=base, vae=vae)
    assert torch.equal(reward(some_latents(), PROMPTS), rewards[family](some_latents(), PROMPTS))
    assert reward.encoder is vae


def test_one_file_scores_as_the_folder(folders, rewards, family, tmp_path):
    lrm, base = folders[family]
    path = one_file(lrm, tmp_path / "lrm.pt")
    reward = LrmReward.from_pretrained(path, family=family, base=base)
    want = rewards[family](some_latents(), PROMPTS)
    torch.testing.assert_close(reward(some_latents(), PROMPTS), want, rtol=0, atol=1e-4)  # memory-mapped: rounding
    assert reward.fingerprint() == rewards[family].fingerprint()


def test_a_folder_or_hub_id_above(folders, rewards, family, tmp_path, monkeypatch):
    lrm, base = folders[family]
    inner = tmp_path / f"lrm_{family}"
    inner.symlink_to(lrm)
    calls = []

    def download(name, *, allow_patterns, **options):
        calls.append((name, allow_patterns, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for source, options in ((tmp_path, {}), ("somebody/LRM", {"revision": "abc"})):
        reward = LrmReward.from_pretrained(source, family=family, base=base, **options)
        assert torch.equal(reward(some_latents(), PROMPTS), rewards[family](some_latents(), PROMPTS))
    files = [f"lrm_{family}/{file}" for file in ("unet/*", "text_encoder/*", "text_encoder_2/*", "state_dict.pt")]
    assert calls == [("somebody/LRM", files, {"revision": "abc"})]


def test_logit_scale_may_be_a_number(folders, rewards, tmp_path):
    lrm, base = folders["sd15"]
    for part in ("unet", "text_encoder"):
        (tmp_path / part).symlink_to(lrm / part)
    head = torch.load(lrm / "state_dict.pt", weights_only=True)
    torch.save(head | {"logit_scale": head["logit_scale"].item() + 1}, tmp_path / "state_dict.pt")
    reward = LrmReward.from_pretrained(tmp_path, family="sd15", base=base)
    want = torch.tensor(1.0).exp() * rewards["sd15"](some_latents(), PROMPTS)
    torch.testing.assert_close(reward(some_latents(), PROMPTS), want)


def test_load_reward_knows_the_names_and_pickles_the_call(folders, rewards, family):
    lrm, base = folders[family]
    name, options = f"lrm-{family}", {f"lrm-{family}": {"base": str(base), "timestep": 51}}
    reward = load_reward(f"{name}={lrm}", options=options)
    data = pickle.dumps(reward)
    assert reward.name == name and len(data) < 3000
    want = rewards[family].score_timestep(some_latents(), 51, PROMPTS)
    for found in (reward, pickle.loads(data)):
        assert torch.equal(found(some_latents(), PROMPTS), want)


def test_the_base_model_may_lie_beside_the_weights(folders, rewards, family, tmp_path):
    for folder in folders[family]:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    reward = load_reward(f"lrm-{family}={tmp_path}")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(reward.score_images(images, "a"), rewards[family].score_images(images, "a"))


def test_evaluate_reward_scores_a_public_set(folders, rewards, tmp_path):
    """The stored scores are those of the images, called by hand."""
    for folder in folders["sd15"]:
        shutil.copytree(folder, tmp_path / "lrm", dirs_exist_ok=True)
    sets = write_hpdv3(tmp_path / "hpdv3")
    words = [f"--reward=lrm-sd15={tmp_path / 'lrm'}", f"--test_sets={{hpdv3: {sets}}}", "--device=cpu"]
    load_recipe("evaluate_reward").main([*words, f"--output_dir={tmp_path / 'out'}", "--bootstrap=100"])
    pair = json.loads((tmp_path / "out" / "pairs_hpdv3.jsonl").read_text().split("\n")[0])
    images = [Image.open(sets / pair[place]) for place in ("first", "second")]
    want = [rewards["sd15"].score_images(image, pair["prompt"]).item() for image in images]
    assert pair["scores"]["score"] == pytest.approx(want, abs=1e-3) and want[0] != want[1]


def test_names_with_a_hyphen_in_sums():
    terms = parse_reward("0.5*lrm-sd15 - lrm-sdxl=a/b + dinalrm-pickscore")
    assert [(term.name, term.weight, term.source) for term in terms] == [
        ("lrm-sd15", 0.5, None), ("lrm-sdxl", -1, "a/b"), ("dinalrm", 1, None), ("pickscore", -1, None),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="unknown reward 'lrm'"):
        parse_reward("lrm-sd155")


def test_a_sum_decodes_once_for_lrm_and_another_reward(folders):
    lrm, base = folders["sd15"]
    vae, latents = tiny_vae(), some_latents(2, 16, 16)
    text = f"lrm-sd15={lrm} + 2*{__name__}:redness"
    reward = load_reward(text, vae=vae, options={"lrm-sd15": {"base": base}})
    alone = LrmReward.from_pretrained(lrm, family="sd15", base=base, vae=vae)
    want = alone(latents, PROMPTS[:2]) + 2 * decode_latents(vae, latents)[:, 0].mean((1, 2))
    torch.testing.assert_close(reward(latents, PROMPTS[:2]), want)


def test_the_two_names_share_no_weights():
    one, other = (reward_sources(name, MODELS["sd35"]) for name in ("lrm-sd15", "lrm-sdxl"))
    assert one.isdisjoint(other) and one == reward_sources("dinalrm + lrm-sd15", MODELS["sd35"]) - reward_sources(
        "dinalrm", MODELS["sd35"]
    )


def redness(images, prompts):
    return images[:, 0].mean((1, 2))


def test_offloaded_it_refuses_and_comes_back(folders, family):
    lrm, base = folders[family]
    reward = LrmReward.from_pretrained(lrm, family=family, base=base)
    want = reward(some_latents(), PROMPTS)
    reward.offload()
    for score in (lambda: reward(some_latents(), PROMPTS), lambda: reward.score_images(torch.rand(1, 3, 64, 64), "a")):
        with pytest.raises(ValueError, match=f"lrm-{family}' is offloaded"):
            score()
    reward.onload()
    assert torch.equal(reward(some_latents(), PROMPTS), want)


def test_threads_and_batches_score_alike(reward):
    latents, results = some_latents(8), {}
    prompts = [f"red {index % 3}" for index in range(8)]
    want = torch.cat([reward(latents[row : row + 1], prompts[row]) for row in range(8)])
    torch.testing.assert_close(reward(latents, prompts), want, rtol=0, atol=1e-4)

    def score(row):
        results[row] = reward(latents[row : row + 1], prompts[row])

    threads = [threading.Thread(target=score, args=(row,)) for row in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.equal(torch.cat([results[row] for row in range(8)]), want)


def test_bfloat16_and_inference_mode(folders, rewards):
    lrm, base = folders["sd15"]
    with torch.inference_mode():
        reward = LrmReward.from_pretrained(lrm, family="sd15", base=base, dtype=torch.bfloat16)
        scores = reward(some_latents(), PROMPTS)
    torch.testing.assert_close(scores, rewards["sd15"](some_latents(), PROMPTS), rtol=0, atol=0.3)
    latents = some_latents().requires_grad_()
    reward(latents, PROMPTS).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_a_flow_matching_sigma_is_refused_with_the_reason(reward):
    with pytest.raises(TypeError, match="flow-matching sigma.*DDPM.*score_timestep"):
        reward.score_noisy(some_latents(), 0.4, PROMPTS)


def test_latents_of_another_family_are_refused_by_name(reward, family):
    title = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL"}[family]
    with pytest.raises(ValueError, match=rf"\(3, 16, 8, 8\).*latents of {title}, 4 channels.*{SCALES[family]}"):
        reward(some_latents(channels=16), PROMPTS)
