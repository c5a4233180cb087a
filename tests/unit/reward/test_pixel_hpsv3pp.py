"""HPSv3PlusPlusReward on tiny random weights in hpsv3++.pth's layout, against transformers' Qwen3-VL and processor."""

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from PIL import Image
from pixel_checks import check_decoding, check_recomputation
from tiny_qwen import save_tokenizer, smooth_images
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from dinalrm_align.align.config import Hpsv3Config
from dinalrm_align.reward.pixel import hpsv3
from dinalrm_align.reward.pixel.hpsv3pp import WEIGHTS, ConditionedHead, HPSv3PlusPlusReward
from dinalrm_align.reward.registry import load_reward

PROMPTS = ["a red circle", "a blue {square}"]
INSTRUCTION, SUFFIX = "\nRate it all.\nPrompt - {text_prompt}\n\n", "\nRating: <|Reward|>\n\nEND\n"
HASHES = tuple(hashlib.sha256(text.encode()).hexdigest() for text in (INSTRUCTION, SUFFIX))
WIDTH = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """config.json and tokenizer of a tiny Qwen3-VL."""
    path = tmp_path_factory.mktemp("base")
    text = dict(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048,
        rope_scaling={"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=WIDTH, num_position_embeddings=64,
        deepstack_visual_indexes=[0],
    )  # fmt: skip
    Qwen3VLConfig(text_config=text, vision_config=vision, **save_tokenizer(path)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def released(base):
    """A state dict under the released names, and transformers' model of it: 264 tokens, of weights that matter."""
    torch.manual_seed(0)
    config = Qwen3VLConfig.from_pretrained(base)
    config.text_config.vocab_size = 264
    model, head = Qwen3VLForConditionalGeneration(config).eval(), ConditionedHead(WIDTH)
    with torch.no_grad():
        for parameter in (*model.parameters(), *head.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return {**model.state_dict(), **head.state_dict()}, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, released):
    """As on the hub: the weights, and a config.json that is no Qwen3-VL's. The instruction lies beside them."""
    path = tmp_path_factory.mktemp("hpsv3pp")
    torch.save(released[0], path / WEIGHTS)
    (path / "config.json").write_text(json.dumps({"model_type": "film_hybrid", "cond_dim": 256}))
    (path / "data_collator_qwen.py").write_text(
        f"INSTRUCTION = {INSTRUCTION!r}\nprompt_with_special_token = {SUFFIX!r}\n"
    )
    return path


@pytest.fixture(scope="module")
def load(folder, base):
    def load(**options):
        defaults = dict(source=folder, base=base, template_sha256=HASHES, dtype=torch.float32)
        return HPSv3PlusPlusReward.from_pretrained(**(defaults | options))

    return load


@pytest.fixture(scope="module")
def reward(load, vae):
    return load(vae=vae)


def released_score(released, tokenizer, image, prompt, iteration):
    """mu of one PIL image as the released code computes it, every step built here again; its two sizes."""
    tensors, model = released
    first = smart_resize(*image.size[::-1], factor=28, min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28)
    image = image.resize(first[::-1], Image.Resampling.BICUBIC)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 65536, "longest_edge": 16777216},
        patch_size=16,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    inputs = processor(image, return_tensors="pt")
    count = int(inputs.image_grid_thw.prod()) // 4
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        f"{INSTRUCTION.format(text_prompt=prompt)}{SUFFIX}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        output = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **inputs)
        (h,) = output.last_hidden_state[ids == 263]

        def linear(x, name):
            return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

        c = linear(linear(h, "cap_encoder.proj"), "cap_encoder.out_proj").sigmoid()
        e = linear(F.gelu(linear(torch.cat([c, torch.tensor([iteration])]), "cond_encoder.0")), "cond_encoder.2")
        scale_shift = linear(linear(e, "film_gen.0").relu(), "film_gen.2")
        h = h * (1 + scale_shift[:WIDTH]) + scale_shift[WIDTH:]
        mu = linear(linear(linear(h, "rm_head.0").relu(), "rm_head.3").relu(), "rm_head.5")[0]
    return mu, first, tuple(16 * side for side in inputs.image_grid_thw[0, 1:].tolist())


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("iteration", [0.0, 0.7])
def test_score_is_that_of_the_released_computation(load, reward, released, iteration):
    image = smooth_images()[1]  # 448 x 448, which neither resize changes
    one = load(iteration=iteration)
    want = [released_score(released, reward.tokenizer, image, prompt, iteration)[0] for prompt in PROMPTS]
    torch.testing.assert_close(one.score_images([image, image], PROMPTS), torch.stack(want), atol=1e-5, rtol=1e-5)
    assert (want[0] - want[1]).abs() > 1e-3


def test_a_resized_image_scores_nearly_as_after_pils_two_resizes(reward, released):
    image = Image.fromarray(np.array(smooth_images()[0])).resize((1472, 832), Image.Resampling.BICUBIC)
    want, first, second = released_score(released, reward.tokenizer, image, PROMPTS[0], 0.0)
    assert (first, second) == ((336, 588), (320, 576))
    got = reward.score_images([image], PROMPTS[:1])[0]
    torch.testing.assert_close(got, want, atol=5e-3, rtol=0)
    assert not torch.equal(got, want)


@pytest.mark.parametrize("size", [(8, 1600), (100, 90), (1024, 768), (672, 1504)])
def test_both_resizes_give_the_processors_sizes(reward, size):
    first = smart_resize(*size, factor=28, min_pixels=200704, max_pixels=200704)
    second = smart_resize(*first, factor=32, min_pixels=65536, max_pixels=16777216)
    _, grid = reward._patches(torch.rand(1, 3, *size), patch=16, merge=2, frames=2)
    assert tuple(16 * side for side in grid) == second


def test_the_iteration_changes_scores_and_the_fingerprint(load, reward):
    one, images = load(), smooth_images()[1:]
    before, mark = one.score_images(images, PROMPTS[:1]), one.fingerprint()
    one.set_iteration(1.0)
    assert (one.score_images(images, PROMPTS[:1]) - before).abs() > 1e-4 and one.fingerprint() != mark
    one.set_iteration(0.0)
    assert torch.equal(one.score_images(images, PROMPTS[:1]), before) and one.fingerprint() == mark
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="iteration: got"):
            one.set_iteration(wrong)


def test_a_score_does_not_depend_on_what_it_is_batched_with(reward):
    both = reward.score_images(smooth_images(), PROMPTS)
    torch.testing.assert_close(both[1:], reward.score_images(smooth_images()[1:], PROMPTS[1:]))


def test_the_capability_is_a_share(reward):
    found = reward.head.capability(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (1,) and 0 < found < 1


def test_latents_score_as_their_decoded_images_do(reward, vae):
    check_decoding(reward, vae, PROMPTS)


def test_load_reward_knows_it_by_name(folder, base, reward, vae):
    own = {"base": base, "template_sha256": HASHES, "dtype": torch.float32, **Hpsv3Config(iteration=0.5).options()}
    found = load_reward(f"0.5*hpsv3pp={folder}", vae=vae, options={"hpsv3pp": own})
    (part,) = found.parts
    assert part.head.iteration == 0.5
    part.set_iteration(0)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(found(latents, prompts=PROMPTS[:1]), 0.5 * reward(latents, prompts=PROMPTS[:1]))


def test_the_full_size_is_qwen3_vl_8bs():
    """8,767,123,696 parameters with 151,936 embeddings and as many outputs; here 151,670 and no output layer."""
    text = dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, head_dim=128)
    text |= dict(num_key_value_heads=8, vocab_size=151670)
    with init_empty_weights():
        model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=dict(out_hidden_size=4096)))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 8_767_123_696 - (151_936 + 151_936 - 151_670) * 4096


def test_the_default_is_bfloat16_with_a_float32_head(load, reward):
    half, image = load(dtype=None), smooth_images()[1:]
    assert half.model.dtype == torch.bfloat16 and {p.dtype for p in half.head.parameters()} == {torch.float32}
    want = reward.score_images(image, PROMPTS[:1])
    torch.testing.assert_close(half.score_images(image, PROMPTS[:1]), want, atol=0.1, rtol=0.1)


def test_the_gradient_agrees_with_finite_differences(reward):
    """Along the gradient g, (s(x + h g) - s(x - h g)) / 2h = |g|^2; in float32, to 2 %."""
    image = torch.rand(1, 3, 448, 448, generator=torch.Generator().manual_seed(3), requires_grad=True)
    (gradient,) = torch.autograd.grad(reward.score_pixels(image, PROMPTS[:1]).sum(), image)
    squared = gradient.square().sum()
    assert squared > 1e-8
    h = 0.02 / squared.sqrt()
    with torch.no_grad():
        up, down = (reward.score_pixels(image + sign * h * gradient, PROMPTS[:1]) for sign in (1, -1))
    torch.testing.assert_close((up - down)[0] / (2 * h), squared, rtol=0.02, atol=0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reward.parameters())


def test_gradient_checkpointing_recomputes_every_layer_and_gives_the_same_gradient(load, vae):
    reward, calls = load(vae=vae), []
    for layer in (*reward.model.visual.blocks, *reward.model.language_model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    check_recomputation(reward, PROMPTS[:1], calls, reward.eval)


@pytest.mark.extra
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.1), ("nf4", 0.5)])
def test_quantised_layers_score_nearly_the_same_and_pass_gradients(load, reward, kind, tolerance):
    small = load(quantization=kind)
    assert small.model.visual.blocks[0].attn.qkv.weight.dtype in (torch.int8, torch.uint8)
    image = torch.rand(1, 3, 448, 448, generator=torch.Generator().manual_seed(5), requires_grad=True)
    got, want = (one.score_pixels(image, PROMPTS[:1]) for one in (small, reward))
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    assert not torch.equal(got, want)
    (gradient,) = torch.autograd.grad(got.sum(), image)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_state_dict_in_the_entry_model_is_read_too(load, released, reward, tmp_path):
    torch.save({"model": released[0], "step": 1}, tmp_path / "wrapped.pth")
    template = reward.template
    found = load(source=tmp_path / "wrapped.pth", template=_template(tmp_path, template))
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), reward.state_dict().values()))


def _template(folder, template):
    path = folder / "template.json"
    path.write_text(json.dumps({"INSTRUCTION": template.instruction, "prompt_with_special_token": template.suffix}))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rm_head.5.bias": None}, "1 missing: rm_head.rm_head.5.bias"),
        ({"cap_encoder.pool_attn.weight": None}, "1 missing: rm_head.cap_encoder.pool_attn.weight"),
        ({"iter_proj.weight": torch.zeros(1)}, "1 unexpected: iter_proj.weight"),
        ({"cond_encoder.0.weight": torch.zeros(256, 3)}, r"\(256, 3\), expected \(256, 2\)"),
        ({"model.language_model.embed_tokens.weight": torch.zeros(300, WIDTH)}, "embeddings of 300 tokens"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, released, load, tmp_path, change, message):
    tensors = released[0] | change
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load(source=tmp_path, template=folder / "data_collator_qwen.py")


def test_hpsv3s_weights_and_other_pickles_are_refused(folder, load, tmp_path):
    torch.save({"rm_head.0.weight": torch.zeros(1024, WIDTH), "visual.blocks.0.norm1.weight": torch.zeros(32)},
               tmp_path / WEIGHTS)  # fmt: skip
    with pytest.raises(ValueError, match="missing: model.visual.patch_embed"):
        load(source=tmp_path, template=folder / "data_collator_qwen.py")
    torch.save(Image.new("RGB", (1, 1)), tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="it asks for more than tensors"):
        load(source=tmp_path, template=folder / "data_collator_qwen.py")


def test_without_or_with_another_instruction_it_is_not_loaded(folder, load, tmp_path, monkeypatch):
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    monkeypatch.setattr(hpsv3.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="HPSv3[+][+] needs its instruction, .*; pass template="):
        load(source=tmp_path)
    with pytest.raises(ValueError, match="not the text that HPSv3[+][+] was trained with"):
        HPSv3PlusPlusReward.from_pretrained(folder)  # the hashes of the real one


def test_the_authors_config_beside_the_weights_is_not_the_base_models(folder, reward, base, tmp_path):
    """On the hub that is what lies there. A tokenizer beside the weights says that the base model's files do, too."""
    for path in (*folder.iterdir(), *base.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = HPSv3PlusPlusReward.from_pretrained(tmp_path, template_sha256=HASHES, dtype=torch.float32)
    image = smooth_images()[1:]
    assert torch.equal(found.score_images(image, PROMPTS[:1]), reward.score_images(image, PROMPTS[:1]))
    with pytest.raises(OSError, match="Qwen3-VL-8B-Instruct"):
        HPSv3PlusPlusReward.from_pretrained(folder, template_sha256=HASHES, local_files_only=True)


def test_an_iteration_for_hpsv3_is_refused(base, reward, tmp_path):
    options = {"base": base, "template": _template(tmp_path, reward.template), "template_sha256": HASHES}
    with pytest.raises(TypeError, match="unknown options ..iteration.."):
        load_reward(f"hpsv3={tmp_path}", options={"hpsv3": options | Hpsv3Config(iteration=0.5).options()})
