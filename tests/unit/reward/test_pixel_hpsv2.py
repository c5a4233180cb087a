"""HPSv2 from files in open_clip's layout: against open_clip's arithmetic written out, and against CLIPModel's own."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from bomb import Bomb
from PIL import Image
from tiny_clip import LENGTH, SIZE, drop, open_clip_tensors, smooth_images, tiny_clip_h, tiny_vae, write_processor
from transformers import CLIPConfig, CLIPModel

from dinalrm_align.models.preprocess import CLIP_MEAN, CLIP_STD
from dinalrm_align.models.weights import read_tensors
from dinalrm_align.reward.pixel import clip_h
from dinalrm_align.reward.pixel.clip_h import from_open_clip
from dinalrm_align.reward.pixel.hpsv2 import HPSv2Reward, LongSide

PROMPTS = ["a red circle", "blue square"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with a processor, an HPS_v2.1_compressed.pt, and the CLIPModel whose weights are in it."""
    folder = tmp_path_factory.mktemp("hpsv2")
    tokenizer = write_processor(folder / "processor")
    clip = tiny_clip_h(tokenizer)
    torch.save({"state_dict": open_clip_tensors(clip), "epoch": 1}, folder / "HPS_v2.1_compressed.pt")
    return folder, clip, tokenizer


@pytest.fixture(scope="module")
def reward(world):
    return HPSv2Reward.from_pretrained(world[0], processor=str(world[0] / "processor"), vae=tiny_vae())


def attend(x, tensors, prefix, heads, mask):
    """x (B, N, D) through torch's own multi-head attention, as open_clip's blocks do."""
    x = x.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], heads, tensors[f"{prefix}attn.in_proj_weight"], tensors[f"{prefix}attn.in_proj_bias"],
        None, None, False, 0.0, tensors[f"{prefix}attn.out_proj.weight"], tensors[f"{prefix}attn.out_proj.bias"],
        attn_mask=mask, need_weights=False,
    )  # fmt: skip
    return out.transpose(0, 1)


def open_clip_tower(x, tensors, prefix, heads, mask=None):
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    layers = {name.split("resblocks.")[1].split(".")[0] for name in tensors if name.startswith(prefix + "transformer.")}
    for index in range(len(layers)):
        block = f"{prefix}transformer.resblocks.{index}."
        x = x + attend(norm(x, f"{block}ln_1"), tensors, block, heads, mask)
        up = F.linear(norm(x, f"{block}ln_2"), tensors[f"{block}mlp.c_fc.weight"], tensors[f"{block}mlp.c_fc.bias"])
        x = x + F.linear(F.gelu(up), tensors[f"{block}mlp.c_proj.weight"], tensors[f"{block}mlp.c_proj.bias"])
    return norm(x, "visual.ln_post" if prefix else "ln_final")


def open_clip_cosine(tensors, pixel_values, ids):
    """cos(text, image) as open_clip computes it, from its own state_dict."""
    patches = F.conv2d(pixel_values, tensors["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    start = tensors["visual.class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat([start, patches], dim=1) + tensors["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], tensors["visual.ln_pre.weight"], tensors["visual.ln_pre.bias"])
    image = open_clip_tower(x, tensors, "visual.", heads=2)[:, 0] @ tensors["visual.proj"]
    x = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    x = open_clip_tower(x, tensors, "", heads=2, mask=mask)
    text = x[torch.arange(len(ids)), ids.argmax(-1)] @ tensors["text_projection"]
    return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)


def test_score_is_open_clips_cosine(world, reward):
    """open_clip pads with 0 where the tokenizer here pads with its own token: what follows the end is not read."""
    folder, _, tokenizer = world
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    for row, prompt in zip(ids, PROMPTS, strict=True):
        tokens = tokenizer(prompt).input_ids
        row[: len(tokens)] = torch.tensor(tokens)
    images = smooth_images(2, SIZE, SIZE)
    tensors = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    want = open_clip_cosine(tensors, reward.preprocess(images), ids)
    torch.testing.assert_close(reward.score_images(images, PROMPTS), want, atol=1e-6, rtol=1e-5)


def test_score_is_the_cosine_of_the_stock_forward(world, reward):
    _, clip, tokenizer = world
    images = smooth_images(2, SIZE, SIZE, seed=1)
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, return_tensors="pt")
    stock = clip(**tokens, pixel_values=reward.preprocess(images)).logits_per_image.diagonal() / clip.logit_scale.exp()
    torch.testing.assert_close(reward.score_images(images, PROMPTS), stock, atol=1e-6, rtol=1e-5)


def test_long_side_is_resized_and_the_rest_is_zero_before_normalisation():
    """A white 64 x 48 image: 32 x 24 of white, 4 columns of black (0, normalised) on either side."""
    got = LongSide(32)(torch.ones(1, 3, 64, 48))
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    white, black = ((value - mean) / std for value in (1.0, 0.0))
    assert got.shape == (1, 3, 32, 32)
    torch.testing.assert_close(got[0, :, :, 4:28], white.expand(3, 32, 24))
    torch.testing.assert_close(got[0, :, :, :4], black.expand(3, 32, 4))
    torch.testing.assert_close(got[0, :, :, 28:], black.expand(3, 32, 4))


def test_overshoot_is_kept_since_tensors_are_resized():
    step = torch.zeros(1, 3, 64, 64)
    step[..., 32:] = 1
    white = (1 - CLIP_MEAN[0]) / CLIP_STD[0]
    assert LongSide(48)(step)[0, 0].max() > white + 0.01


def test_antialiasing_is_a_choice():
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    smooth, rough = LongSide(32)(noise), LongSide(32, antialias=False)(noise)
    assert smooth.std() < 0.6 * rough.std()


def test_pil_images_of_differing_sizes(reward):
    images = [Image.new("RGB", (90, 61), "red"), Image.new("RGB", (40, 77), "blue")]
    assert reward.score_images(images, PROMPTS).shape == (2,)


def test_gradient_agrees_with_finite_differences(world):
    """Along the gradient, through VAE and CLIP in float64: slope against central difference, 1%."""
    folder = world[0]
    vae = tiny_vae().to(torch.float64)
    reward = HPSv2Reward.from_pretrained(folder, processor=str(folder / "processor"), vae=vae, dtype=torch.float64)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    score = reward(latents, prompts=PROMPTS[:1])
    assert score.shape == (1,) and score.dtype == torch.float32
    (gradient,) = torch.autograd.grad(score.sum(), latents)
    step = 0.05 * gradient / gradient.norm()
    with torch.no_grad():
        rise = reward(latents + step, prompts=PROMPTS[:1]) - reward(latents - step, prompts=PROMPTS[:1])
    assert rise.item() / 0.1 == pytest.approx(gradient.norm().item(), rel=1e-2)
    assert all(p.grad is None for p in reward.parameters())


def test_dtype_is_the_towers_and_scores_stay_float32(world):
    folder = world[0]
    reward = HPSv2Reward.from_pretrained(folder, processor=str(folder / "processor"), dtype=torch.bfloat16)
    assert reward.clip.dtype == torch.bfloat16
    score = reward.score_images(smooth_images(2, SIZE, SIZE), PROMPTS)
    assert score.dtype == torch.float32 and score.isfinite().all()


def test_the_released_sizes_are_read_from_shapes():
    """CLIP ViT-H/14 as published: 986 million weights; nothing is allocated."""
    vision = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14)
    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=1024))
    tensors = from_open_clip(open_clip_tensors(clip))
    assert tensors.keys() == clip.state_dict().keys()
    assert sum(tensor.numel() for tensor in tensors.values()) == pytest.approx(0.986e9, rel=1e-3)
    config = clip_h._config(tensors, 49407, "here")
    got = vars(config.vision_config) | {"length": config.text_config.max_position_embeddings}
    assert {name: got[name] for name in vision} == vision and got["image_size"] == 224 and got["length"] == 77
    assert {name: vars(config.text_config)[name] for name in text} == text
    assert config.text_config.vocab_size == 49408 and config.projection_dim == 1024


def test_a_tokenizer_without_an_end_of_text_is_refused(world):
    with pytest.raises(ValueError, match="end of text: got None"):
        clip_h.build_clip_h(world[1].state_dict(), eos_token_id=None, dtype=torch.float32, device=None, where="here")


def test_the_file_itself_can_be_named_and_the_version_chosen(world, tmp_path):
    folder, clip, _ = world
    other = {name: 2 * tensor for name, tensor in open_clip_tensors(clip).items()}
    torch.save({"state_dict": other}, tmp_path / "HPS_v2_compressed.pt")
    processor = str(folder / "processor")
    version = HPSv2Reward.from_pretrained(tmp_path, file="HPS_v2_compressed.pt", processor=processor)
    named = HPSv2Reward.from_pretrained(folder / "HPS_v2.1_compressed.pt", processor=processor)
    assert torch.equal(version.clip.visual_projection.weight, 2 * named.clip.visual_projection.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("visual.proj"), "missing visual_projection.weight"),
        (drop("transformer.resblocks.1.attn.in_proj_bias"), "3 missing: .*layers.1.self_attn.k_proj.bias"),
        (lambda t: {**t, "stranger": torch.zeros(1)}, "1 unexpected: stranger"),
        (lambda t: {**t, "visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(1)}, "1 unexpected: .*ls_1.gamma"),
        (lambda t: {**t, "visual.ln_post.weight": torch.zeros(7)}, r"post_layernorm.weight \(7,\), expected"),
        (
            lambda t: {**t, "visual.conv1.weight": torch.zeros(768, 3, 32, 32)},
            r"patch_embedding.weight \(768, ",
        ),
        (lambda t: {**t, "visual.positional_embedding": torch.zeros(18, 160)}, "one more than a square"),
        (
            lambda t: {**t, "visual.conv1.weight": torch.zeros(160, 3)},
            "patch_embedding.weight: .*4 dimensions",
        ),
        (lambda t: {**t, "token_embedding.weight": torch.zeros(100, 128)}, "^.*end of text: got"),
        (lambda t: {**t, "logit_scale": torch.tensor(1)}, "of another type: logit_scale torch.int64"),
        (lambda t: {**t, "logit_scale": 1.0}, "expected names and tensors"),
        (lambda t: {}, "missing"),
    ],
)
def test_wrong_weights_are_named(world, tmp_path, change, message):
    folder, clip, _ = world
    torch.save({"state_dict": change(open_clip_tensors(clip))}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match=message):
        HPSv2Reward.from_pretrained(tmp_path, processor=str(folder / "processor"))


def test_an_old_files_causal_mask_is_not_a_weight(world, tmp_path):
    folder, clip, _ = world
    tensors = {**open_clip_tensors(clip), "attn_mask": torch.zeros(LENGTH, LENGTH)}
    torch.save({"state_dict": tensors}, tmp_path / "HPS_v2.1_compressed.pt")
    HPSv2Reward.from_pretrained(tmp_path, processor=str(folder / "processor"))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    path, mark = tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "mark"
    torch.save({"state_dict": Bomb(open, str(mark), "w")}, path)
    with pytest.raises(ValueError, match="asks for more than tensors: Unsupported global: GLOBAL io.open"):
        HPSv2Reward.from_pretrained(tmp_path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps({"state_dict": Bomb(open, str(mark), "w")}, protocol=2))
    with pytest.raises(ValueError, match="not a readable file of tensors"):
        HPSv2Reward.from_pretrained(tmp_path)
    assert not mark.exists()


def test_files_that_are_not_there_or_hold_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file HPS_v2.1_compressed.pt in"):
        HPSv2Reward.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no HPSv2 at .*neither an existing folder nor a hub id"):
        HPSv2Reward.from_pretrained(tmp_path / "nothing")
    with pytest.raises(TypeError, match="HPSv2: got int"):
        HPSv2Reward.from_pretrained(3)
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="got a list; expected a dict with the entry 'state_dict'"):
        read_tensors(tmp_path / "a.pt", "state_dict")
    torch.save({"model": {}}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"entries \['model'\]; expected a dict with the entry 'state_dict'"):
        read_tensors(tmp_path / "b.pt", "state_dict")
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="c.pt: not a readable file of tensors"):
        read_tensors(tmp_path / "c.pt")
