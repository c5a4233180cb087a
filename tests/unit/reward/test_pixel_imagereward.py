"""ImageRewardReward on tiny random weights in ImageReward.pt's layout, against BLIP's arithmetic on its own names."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bomb import Bomb
from PIL import Image
from pixel_checks import check_decoding, check_recomputation
from transformers import BertTokenizer

from dinalrm_align.models.weights import rename
from dinalrm_align.reward.pixel.imagereward import NAMES, TEXT_CONFIG, WEIGHTS, ImageRewardReward, preprocess
from dinalrm_align.reward.registry import load_reward

PROMPTS = ["a red circle", "two blue squares on gray"]
WIDTH, TEXT_WIDTH, SIDE, PATCH = 128, 32, 32, 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "squares", "two", "on", "gray"]
SIZES = dict(
    architectures=["BertModel"],
    attention_probs_dropout_prob=0.1,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    hidden_size=TEXT_WIDTH,
    intermediate_size=64,
    layer_norm_eps=1e-12,
    max_position_embeddings=40,
    num_attention_heads=4,
    num_hidden_layers=2,
    vocab_size=len(WORDS) + 2,
    encoder_width=768,
    add_cross_attention=True,
)


def linear(name, wide, high):
    return {f"{name}.weight": torch.randn(high, wide) / math.sqrt(wide), f"{name}.bias": 0.1 * torch.randn(high)}


def norm(name, wide):
    return {f"{name}.weight": 1 + 0.2 * torch.randn(wide), f"{name}.bias": 0.2 * torch.randn(wide)}


def released():
    """Random tensors under the names of ImageReward.pt, with those that scoring does not need."""
    torch.manual_seed(0)
    tensors = {
        "blip.visual_encoder.cls_token": torch.randn(1, 1, WIDTH),
        "blip.visual_encoder.pos_embed": torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        "blip.visual_encoder.patch_embed.proj.weight": torch.randn(WIDTH, 3, PATCH, PATCH) / 28,
        "blip.visual_encoder.patch_embed.proj.bias": torch.randn(WIDTH),
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.text_encoder.embeddings.word_embeddings.weight": torch.randn(SIZES["vocab_size"], TEXT_WIDTH),
        "blip.text_encoder.embeddings.position_embeddings.weight": torch.randn(40, TEXT_WIDTH),
        **norm("blip.visual_encoder.norm", WIDTH),
        **norm("blip.text_encoder.embeddings.LayerNorm", TEXT_WIDTH),
        **linear("blip.vision_proj", WIDTH, 256),
        **linear("blip.text_proj", TEXT_WIDTH, 256),
    }
    for index in range(2):
        block = f"blip.visual_encoder.blocks.{index}"
        tensors |= norm(f"{block}.norm1", WIDTH) | norm(f"{block}.norm2", WIDTH)
        tensors |= linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH) | linear(f"{block}.attn.proj", WIDTH, WIDTH)
        tensors |= linear(f"{block}.mlp.fc1", WIDTH, 256) | linear(f"{block}.mlp.fc2", 256, WIDTH)
        layer = f"blip.text_encoder.encoder.layer.{index}"
        for attention, source in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            tensors |= linear(f"{layer}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            tensors |= linear(f"{layer}.{attention}.self.key", source, TEXT_WIDTH)
            tensors |= linear(f"{layer}.{attention}.self.value", source, TEXT_WIDTH)
            tensors |= linear(f"{layer}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            tensors |= norm(f"{layer}.{attention}.output.LayerNorm", TEXT_WIDTH)
        tensors |= linear(f"{layer}.intermediate.dense", TEXT_WIDTH, 64)
        tensors |= linear(f"{layer}.output.dense", 64, TEXT_WIDTH) | norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    for place, (wide, high) in zip((0, 2, 4, 6, 7), ((TEXT_WIDTH, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))):
        tensors |= linear(f"mlp.layers.{place}", wide, high)
    return tensors


def expected_score(tensors, pixel_values, ids, mask):
    """BLIP's ViT and its BERT with cross-attention, written out on the file's own names."""

    def apply(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def layer_norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def attend(query, key, value, heads, mask=None):
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    eye = "blip.visual_encoder."
    x = F.conv2d(
        pixel_values, tensors[f"{eye}patch_embed.proj.weight"], tensors[f"{eye}patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([tensors[f"{eye}cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + tensors[f"{eye}pos_embed"]
    for index in range(2):
        block = f"{eye}blocks.{index}."
        x = x + apply(
            f"{block}attn.proj",
            attend(*apply(f"{block}attn.qkv", layer_norm(f"{block}norm1", x, 1e-6)).chunk(3, -1), 2),
        )
        x = x + apply(f"{block}mlp.fc2", F.gelu(apply(f"{block}mlp.fc1", layer_norm(f"{block}norm2", x, 1e-6))))
    seen = layer_norm(f"{eye}norm", x, 1e-6)

    read = "blip.text_encoder.embeddings."
    y = tensors[f"{read}word_embeddings.weight"][ids] + tensors[f"{read}position_embeddings.weight"][: ids.shape[1]]
    y = layer_norm(f"{read}LayerNorm", y, 1e-12)
    for index in range(2):
        layer = f"blip.text_encoder.encoder.layer.{index}."
        for name, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            own, other = f"{layer}{name}.self.", y if source is None else source
            mixed = attend(apply(f"{own}query", y), apply(f"{own}key", other), apply(f"{own}value", other), 4, hidden)
            y = layer_norm(f"{layer}{name}.output.LayerNorm", apply(f"{layer}{name}.output.dense", mixed) + y, 1e-12)
        mixed = apply(f"{layer}output.dense", F.gelu(apply(f"{layer}intermediate.dense", y)))
        y = layer_norm(f"{layer}output.LayerNorm", mixed + y, 1e-12)
    score = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        score = apply(f"mlp.layers.{place}", score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagereward")
    torch.save(released(), path / WEIGHTS)
    (path / TEXT_CONFIG).write_text(json.dumps(SIZES))
    return path


@pytest.fixture(scope="module")
def reward(folder, tokenizer, vae):
    return ImageRewardReward.from_pretrained(folder, tokenizer=tokenizer, vae=vae)


def test_score_equals_blips_arithmetic_on_the_files_own_tensors(reward, folder):
    tensors = torch.load(folder / WEIGHTS, weights_only=True)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(2, 35, dtype=torch.long)  # [CLS] words [SEP], padded to 35
    for row, prompt in enumerate(PROMPTS):
        words = [2, *(WORDS.index(word) for word in prompt.split()), 3]
        ids[row, : len(words)] = torch.tensor(words)
    want = expected_score(tensors, preprocess(images, SIDE), ids, ids != 0)
    got = reward.score_images(images, PROMPTS)
    assert got.shape == (2,) and got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want[0] - want[1]).abs() > 1e-2


def test_autocast_around_a_call_changes_nothing(reward):
    images = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.score_images(images, PROMPTS)
    assert torch.equal(scores, reward.score_images(images, PROMPTS))


def test_half_precision_scores_nearly_the_same(reward, folder, tokenizer):
    half = ImageRewardReward.from_pretrained(folder, tokenizer=tokenizer, dtype=torch.bfloat16)
    images = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(2))
    scores = half.score_images(images, PROMPTS)
    assert scores.dtype == torch.float32 and {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(scores, reward.score_images(images, PROMPTS), atol=0.05, rtol=0.05)


def test_prompts_are_cut_off_at_35_tokens(reward):
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))[:1].repeat(2, 1, 1, 1)
    scores = reward.score_images(images, ["red " * 33, "red " * 40])
    torch.testing.assert_close(scores[0], scores[1])


def test_a_score_does_not_depend_on_what_it_is_batched_with(reward):
    images = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(2))
    both = reward.score_images(images, PROMPTS)
    torch.testing.assert_close(both[1:], reward.score_images(images[1:], PROMPTS[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(61, 90), (77, 40), (32, 32), (224, 235)])
def test_preprocess_agrees_with_pil(size):
    """torchvision's transforms on a PIL image: short side resized, int() of the long one, round() of the margins."""
    rng = np.random.default_rng(0)
    height, width = size
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    scale = SIDE / min(size)
    wide, high = (SIDE if side == min(size) else int(SIDE * side / min(size)) for side in (width, height))
    resized = image.resize((wide, high), Image.BICUBIC)
    left, top = round((wide - SIDE) / 2), round((high - SIDE) / 2)
    cropped = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    want = torch.from_numpy((cropped - mean) / std).float().permute(2, 0, 1)[None]
    got = preprocess(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255, SIDE)
    assert got.shape == want.shape and scale <= 1
    assert (got - want).abs().mean() < 0.01
    assert (got - want).abs().max() < 0.1


def test_latents_score_as_their_decoded_images_do(reward, vae):
    check_decoding(reward, vae, PROMPTS)


def test_the_gradient_agrees_with_finite_differences(reward):
    """Along the gradient g, (s(x + h g) - s(x - h g)) / 2h = |g|^2; in float32, to 2 %."""
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(latents, prompts=PROMPTS).sum(), latents)
    squared = gradient.square().sum()
    assert squared > 1e-6 and (gradient.flatten(1).norm(dim=1) > 0).all()
    h = 0.01 / squared.sqrt()
    with torch.no_grad():
        up, down = (reward(latents + sign * h * gradient, prompts=PROMPTS).sum() for sign in (1, -1))
    torch.testing.assert_close((up - down) / (2 * h), squared, rtol=0.02, atol=0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reward.parameters())


def test_gradient_checkpointing_recomputes_every_layer_and_gives_the_same_gradient(folder, tokenizer, vae):
    reward = ImageRewardReward.from_pretrained(folder, tokenizer=tokenizer, vae=vae)
    calls = []
    for part in (*(layer.mlp for layer in reward.vision.encoder.layers), *reward.text.encoder.layer):
        inner = part if part.__class__.__name__ == "BlipMLP" else part.output
        inner.register_forward_pre_hook(lambda *_: calls.append(1))
    check_recomputation(reward, PROMPTS[:1], calls, reward.train)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.layers.7.bias": None}, "1 missing: head.7.bias"),
        ({"blip.visual_encoder.pos_embed": None}, "missing vision.embeddings.position_embedding"),
        (
            {"blip.visual_encoder.pos_embed": torch.zeros(1, 6, 128)},
            "image positions: got 6",
        ),
        ({"blip.visual_encoder.blocks.1.attn.qkv.weight": None}, "1 missing: vision.encoder.layers.1.self_attn.qkv"),
        ({"blip.visual_encoder.stranger": torch.zeros(1)}, "1 unexpected: vision.stranger"),
        ({"blip.text_encoder.stranger": torch.zeros(1)}, "1 unexpected: text.stranger"),
        ({"stranger": torch.zeros(1)}, "1 unexpected: stranger"),
        ({"mlp.layers.0.weight": torch.zeros(1024, 16)}, r"head.0.weight \(1024, 16\), expected \(1024, 32\)"),
        ({"mlp.layers.0.weight": "text"}, "expected names and tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, tokenizer, tmp_path, change, message):
    tensors = torch.load(folder / WEIGHTS, weights_only=True) | change
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        ImageRewardReward.from_pretrained(tmp_path / WEIGHTS, tokenizer=tokenizer, med_config=folder / TEXT_CONFIG)


def test_a_file_that_holds_code_is_refused_and_the_code_not_run(folder, tokenizer, tmp_path):
    torch.save({"model": Bomb(open, str(tmp_path / "ran"), "w")}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="it asks for more than tensors"):
        ImageRewardReward.from_pretrained(tmp_path / WEIGHTS, tokenizer=tokenizer, med_config=folder / TEXT_CONFIG)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 30524}, "15 tokens with .* expected 30524"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"add_cross_attention": False}, "add_cross_attention"),
        ({"num_attention_heads": 5}, "text config"),
        ({"intermediate_size": 63}, "text.encoder.layer.0.intermediate.dense.weight"),
    ],
)
def test_text_configs_that_do_not_fit_are_named(folder, tokenizer, tmp_path, change, message):
    sizes = {name: value for name, value in (SIZES | change).items() if value is not None}
    (tmp_path / TEXT_CONFIG).write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match=message):
        ImageRewardReward.from_pretrained(folder, tokenizer=tokenizer, med_config=tmp_path / TEXT_CONFIG)


def test_what_lies_beside_the_weights_goes_with_them(folder, tokenizer, reward, tmp_path):
    for path in (*tokenizer.iterdir(), *folder.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(2))
    for source in (tmp_path, tmp_path / WEIGHTS):
        found = ImageRewardReward.from_pretrained(source)
        assert torch.equal(found.score_images(images, PROMPTS), reward.score_images(images, PROMPTS))


def test_load_reward_knows_it_by_name(folder, tokenizer, reward, vae):
    found = load_reward(f"imagereward={folder}", vae=vae, options={"imagereward": {"tokenizer": tokenizer}})
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(found(latents, prompts=PROMPTS), reward(latents, prompts=PROMPTS))


def test_missing_files_are_named(folder, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        ImageRewardReward.from_pretrained(tmp_path, tokenizer=tokenizer)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(FileNotFoundError, match=TEXT_CONFIG):
        ImageRewardReward.from_pretrained(tmp_path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no tokenizer at"):
        ImageRewardReward.from_pretrained(folder, tokenizer=str(tmp_path / "none"))


def test_names_are_mapped_one_to_one():
    tensors = released()
    assert len(rename(tensors, NAMES)) == len(tensors) - 5  # both projections and the positions' ids are not needed
