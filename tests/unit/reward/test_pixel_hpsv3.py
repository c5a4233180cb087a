"""HPSv3Reward on tiny random weights in HPSv3.safetensors' layout, against transformers' Qwen2-VL and PIL processor."""

import hashlib
import json

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from pixel_checks import check_decoding, check_recomputation
from safetensors.torch import load_file, save_file
from tiny_qwen import save_tokenizer, smooth_images
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dinalrm_align.models.weights import rename
from dinalrm_align.reward.pixel import hpsv3
from dinalrm_align.reward.pixel.hpsv3 import (
    BASE,
    NAMES,
    PIXELS,
    WEIGHTS,
    HPSTemplate,
    HPSv3Reward,
    add_reward_token,
    fitted_size,
    image_patches,
    load_template,
    rank_head,
)
from dinalrm_align.reward.registry import load_reward

PROMPTS = ["a red circle", "a blue {square}"]
INSTRUCTION, SUFFIX = "\nRate it.\nPrompt - {text_prompt}\n\n", "\nRating: <|Reward|>\n\nEND\n"
HASHES = tuple(hashlib.sha256(text.encode()).hexdigest() for text in (INSTRUCTION, SUFFIX))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """config.json and tokenizer of a tiny Qwen2-VL: single bytes and the special tokens, 263 of them."""
    path = tmp_path_factory.mktemp("base")
    ids = save_tokenizer(path)
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
        ),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, patch_size=14),
        **ids,
    )
    config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(base):
    """Qwen2-VL as transformers has it, with one more token, and HPSv3's head, of weights that matter."""
    torch.manual_seed(0)
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = 264
    model, head = Qwen2VLForConditionalGeneration(config).eval(), rank_head(32).eval()
    with torch.no_grad():
        for parameter in (*model.parameters(), *head.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model, head


def released(stock):
    """The tensors under the names of HPSv3.safetensors, those of transformers 4.45."""
    model, head = stock
    tensors = {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        tensors[name] = tensor.clone()
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory, stock):
    path = tmp_path_factory.mktemp("hpsv3")
    save_file(released(stock), path / WEIGHTS)
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A data_collator_qwen.py with a small instruction, and code that must not run."""
    path = tmp_path_factory.mktemp("template") / "data_collator_qwen.py"
    path.write_text(
        f"import package_that_is_not_there\nINSTRUCTION = {INSTRUCTION!r}\nprompt_with_special_token = {SUFFIX!r}\n"
    )
    return path


@pytest.fixture(scope="module")
def load(folder, base, template):
    def load(**options):
        defaults = dict(source=folder, base=base, template=template, template_sha256=HASHES, dtype=torch.float32)
        return HPSv3Reward.from_pretrained(**(defaults | options))

    return load


@pytest.fixture(scope="module")
def reward(load, vae):
    return load(vae=vae)


def processor():
    return Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})


# -------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1024, 1024), (448, 448)),
        ((512, 512), (448, 448)),
        ((448, 448), (448, 448)),
        ((1024, 768), (504, 364)),
        ((832, 1472), (336, 588)),
        ((64, 64), (448, 448)),
    ],
)
def test_sizes_are_those_of_the_released_code(size, fitted):
    assert fitted_size(*size, factor=28, pixels=PIXELS) == fitted


def test_preprocessing_agrees_with_the_pil_processor():
    for shown, mean, largest in zip(smooth_images(), (0.01, 1e-6), (0.2, 1e-5), strict=True):
        want = processor()(shown, return_tensors="pt")
        image = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 255
        got, grid = image_patches(image, pixels=PIXELS)
        assert want.image_grid_thw.tolist() == [[1, *grid]]
        assert got.shape == want.pixel_values.shape
        assert (got - want.pixel_values).abs().mean() < mean
        assert (got - want.pixel_values).abs().max() < largest


def test_a_batch_is_its_images_one_after_another():
    images = torch.rand(2, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    both, _ = image_patches(images, pixels=PIXELS)
    one, _ = image_patches(images[1:], pixels=PIXELS)
    torch.testing.assert_close(both[len(one) :], one)


def test_a_very_long_image_is_refused():
    with pytest.raises(ValueError, match="over 200 times"):
        fitted_size(8, 1601, factor=28, pixels=PIXELS)


# --------------------------------------------------------------------------------------------------------------- scores


def stock_score(stock, tokenizer, image, prompt):
    """HPSv3's mean out of transformers' model, text and all built here again."""
    model, head = stock
    inputs = processor()(image, return_tensors="pt")
    count = int(inputs.image_grid_thw.prod()) // 4
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        f"{INSTRUCTION.format(text_prompt=prompt)}{SUFFIX}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.max() == 263
    with torch.no_grad():
        hidden = model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1),
            **inputs,
        ).last_hidden_state
        return head(hidden[ids == 263])[0, 0]


def test_score_equals_the_stock_forward_on_the_stock_pixels(reward, stock):
    image = smooth_images()[1]  # of the fitted size, where the two preprocessings agree exactly
    want = torch.stack([stock_score(stock, reward.tokenizer, image, prompt) for prompt in PROMPTS])
    got = reward.score_images([image, image], PROMPTS)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (want[0] - want[1]).abs() > 1e-3


def test_a_resized_image_scores_nearly_as_on_the_stock_pixels(reward, stock):
    image = smooth_images()[0]
    want = stock_score(stock, reward.tokenizer, image, PROMPTS[0])
    got = reward.score_images([image], PROMPTS[:1])[0]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
    assert not torch.equal(got, want)


def test_autocast_around_a_call_changes_nothing(reward):
    with torch.autocast("cpu", torch.bfloat16):
        scores = reward.score_images(smooth_images()[:1], PROMPTS[:1])
    assert torch.equal(scores, reward.score_images(smooth_images()[:1], PROMPTS[:1]))


def test_position_ids_are_those_that_the_released_forward_leaves_to_the_text_model(reward, stock):
    """Given embeddings alone, as the released forward gives them, Qwen2-VL's text model counts positions up by one."""
    model, head = stock
    image = smooth_images()[1]
    inputs = processor()(image, return_tensors="pt")
    ids = torch.tensor([reward.token_ids(PROMPTS[0], 256)])
    with torch.no_grad():
        embeds = model.model.language_model.embed_tokens(ids)
        features = model.model.visual(inputs.pixel_values, grid_thw=inputs.image_grid_thw).pooler_output
        embeds[ids == model.config.image_token_id] = features
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids))
        want = head(hidden.last_hidden_state[ids == 263])[:, 0]
    torch.testing.assert_close(reward.score_images([image], PROMPTS[:1]), want, atol=1e-4, rtol=1e-4)


def test_a_score_does_not_depend_on_what_it_is_batched_with(reward):
    both = reward.score_images(smooth_images(), PROMPTS)
    assert both.shape == (2,) and both.dtype == torch.float32
    torch.testing.assert_close(both[1:], reward.score_images(smooth_images()[1:], PROMPTS[1:]))


def test_latents_score_as_their_decoded_images_do(reward, vae):
    check_decoding(reward, vae, PROMPTS)


def test_both_generations_of_names_are_read(load, stock, reward, tmp_path):
    tensors = {f"rm_head.{name}": tensor for name, tensor in stock[1].state_dict().items()}
    save_file(tensors | {k: v.clone() for k, v in stock[0].state_dict().items()}, tmp_path / "newer.safetensors")
    newer = load(source=tmp_path / "newer.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(newer.state_dict().values(), reward.state_dict().values()))


def test_what_lies_beside_the_weights_goes_with_them(folder, base, template, reward, tmp_path):
    for path in (*base.iterdir(), folder / WEIGHTS, template):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for source in (tmp_path, tmp_path / WEIGHTS):
        found = HPSv3Reward.from_pretrained(source, template_sha256=HASHES, dtype=torch.float32)
        assert torch.equal(found.score_images(smooth_images(), PROMPTS), reward.score_images(smooth_images(), PROMPTS))


def test_load_reward_knows_it_by_name(folder, base, template, reward, vae):
    own = {"base": base, "template": template, "template_sha256": HASHES, "dtype": torch.float32}
    found = load_reward(f"0.5*hpsv3={folder}", vae=vae, options={"hpsv3": own})
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(found(latents, prompts=PROMPTS[:1]), 0.5 * reward(latents, prompts=PROMPTS[:1]))


def test_the_full_size_is_qwen2_vl_7bs():
    """8,291,375,616 parameters with 152,064 embeddings and the output layer; here 151,658 and no output layer."""
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    text |= dict(
        num_key_value_heads=4, vocab_size=151658, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}
    )
    with init_empty_weights():
        model = Qwen2VLModel(Qwen2VLConfig(text_config=text))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 8_291_375_616 - 152_064 * 3584 - (152_064 - 151_658) * 3584


def test_the_default_is_bfloat16_with_a_float32_head(load, reward):
    half = load(dtype=None)
    assert half.model.dtype == torch.bfloat16 and half.head[0].weight.dtype == torch.float32
    assert all(buffer.dtype == torch.float32 for name, buffer in half.model.named_buffers() if "inv_freq" in name)
    image = smooth_images()[:1]
    torch.testing.assert_close(
        half.score_images(image, PROMPTS[:1]), reward.score_images(image, PROMPTS[:1]), atol=0.1, rtol=0.1
    )


# ------------------------------------------------------------------------------------------------------------ gradients


def test_the_gradient_agrees_with_finite_differences(reward):
    """Along the gradient g, (s(x + h g) - s(x - h g)) / 2h = |g|^2; in float32, to 2 %."""
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    score = reward(latents, prompts=PROMPTS[:1])
    (gradient,) = torch.autograd.grad(score.sum(), latents)
    squared = gradient.square().sum()
    assert squared > 1e-8
    h = 0.02 / squared.sqrt()
    with torch.no_grad():
        up, down = (reward(latents + sign * h * gradient, prompts=PROMPTS[:1]) for sign in (1, -1))
    torch.testing.assert_close((up - down)[0] / (2 * h), squared, rtol=0.02, atol=0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in reward.parameters())


def test_gradient_checkpointing_recomputes_every_layer_and_gives_the_same_gradient(load, vae, monkeypatch):
    reward = load(vae=vae)
    calls = []
    for name, layer in [
        *reward.model.visual.blocks.named_children(),
        *reward.model.language_model.layers.named_children(),
    ]:
        layer.register_forward_pre_hook(lambda *_: None)
        layer.mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    check_recomputation(reward, PROMPTS[:1], calls, reward.eval)


# ------------------------------------------------------------------------------------------------------------- template


def test_the_template_is_read_from_python_source_without_running_it(template):
    read = load_template(template, sha256=HASHES)
    assert read == HPSTemplate(INSTRUCTION, SUFFIX)
    assert read.fill("{x}") == INSTRUCTION.replace("{text_prompt}", "{x}") + SUFFIX


def test_the_template_is_read_from_json(tmp_path):
    path = tmp_path / "template.json"
    path.write_text(json.dumps({"INSTRUCTION": INSTRUCTION, "prompt_with_special_token": SUFFIX}))
    assert load_template(path, sha256=HASHES) == HPSTemplate(INSTRUCTION, SUFFIX)


def test_the_template_is_found_in_an_installed_package(template, tmp_path, monkeypatch):
    package = tmp_path / "hpsv3" / "dataset"
    package.mkdir(parents=True)
    (tmp_path / "hpsv3" / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data_collator_qwen.py").write_text(template.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert load_template(sha256=HASHES) == HPSTemplate(INSTRUCTION, SUFFIX)


def test_without_the_package_the_error_says_how_to_get_the_template(monkeypatch):
    monkeypatch.setattr(hpsv3.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install --no-deps hpsv3"):
        load_template()


def test_another_template_is_refused_before_any_weight_is_read(template, tmp_path):
    with pytest.raises(ValueError, match="INSTRUCTION is not the text that HPSv3 was trained with"):
        HPSv3Reward.from_pretrained(tmp_path / "nothing here", template=template)
    changed = tmp_path / "changed.py"
    changed.write_text(template.read_text().replace("END", "end"))
    with pytest.raises(ValueError, match="prompt_with_special_token is not the text"):
        load_template(changed, sha256=HASHES)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "def (", "not Python source"),
        ("a.py", "INSTRUCTION = f'{x}'", "no text INSTRUCTION"),
        ("a.json", "[]", "expected an object"),
        ("a.json", '{"INSTRUCTION": 1}', "no text INSTRUCTION"),
    ],
)
def test_files_that_hold_no_template_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_template(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="data_collator_qwen.py"):
        load_template(tmp_path / "none.py")


def test_an_instruction_without_its_field_is_refused():
    with pytest.raises(ValueError, match="got 0 {text_prompt}"):
        HPSTemplate("Rate it", SUFFIX)


def test_the_token_count_is_that_of_text_and_image(reward):
    """One byte a token, special tokens one each: the chat with 7 special tokens, the filled text, the image."""
    chat = len("system\nYou are a helpful assistant.\nuser\n\nassistant\n") + 7
    filled = len(INSTRUCTION.replace("{text_prompt}", "")) + len(SUFFIX.replace("<|Reward|>", "")) + 1
    assert len(reward.token_ids("", 256)) == chat + filled + 256
    assert len(reward.token_ids("abc", 256)) == chat + filled + 259


@pytest.mark.hub
def test_a_square_image_and_no_prompt_are_786_tokens_under_the_released_template():
    """Needs the package hpsv3 (--no-deps) and Qwen2-VL-7B-Instruct's tokenizer in the hub's cache."""
    template, tokenizer = load_template(), AutoTokenizer.from_pretrained(BASE)
    add_reward_token(tokenizer)
    with init_empty_weights():
        model = Qwen2VLModel(Qwen2VLConfig(text_config=dict(num_hidden_layers=0), vision_config=dict(depth=0)))
    reward = HPSv3Reward(model, rank_head(8), tokenizer, template)
    assert len(tokenizer) == 151_658 and reward.reward_id == 151_657
    assert len(reward.token_ids("", 256)) == 786


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>"])
def test_prompts_that_hold_a_token_of_the_model_are_refused(reward, token):
    with pytest.raises(ValueError, match="take them out of the prompt"):
        reward.score_images(smooth_images()[:1], [f"a {token}"])


# ---------------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rm_head.5.bias": None}, "1 missing: rm_head.5.bias"),
        ({"visual.merger.mlp.0.weight": None, "model.norm.weight": None}, "2 missing"),
        ({"visual.stranger": torch.zeros(1)}, "1 unexpected: model.visual.stranger"),
        ({"stranger": torch.zeros(1)}, "1 unexpected: stranger"),
        ({"rm_head.0.weight": torch.zeros(1024, 16)}, r"rm_head.0.weight \(1024, 16\), expected \(1024, 32\)"),
        ({"model.embed_tokens.weight": torch.zeros(300, 32)}, "embeddings of 300 tokens"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, load, tmp_path, change, message):
    tensors = load_file(folder / WEIGHTS) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load(source=tmp_path)


def test_files_that_are_none_are_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load(source=tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="safetensors"):
        load(source=tmp_path)
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        load(source="no such place")
    with pytest.raises(FileNotFoundError, match="in the cache or that the hub grants"):
        load(source="nobody/nothing-here", local_files_only=True)
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        load(base="no such place")


def test_a_base_model_with_another_tokenizer_is_refused(base, load, tmp_path):
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": 5}))
    with pytest.raises(ValueError, match="by its config.json expected 5"):
        load(base=tmp_path)


def test_the_names_are_those_of_the_released_file(stock):
    """Those of transformers 4.45, with which HPSv3 was trained and saved: 12 tensors a block, 7 + 3 + 6 beside them."""
    linears = ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2", "norm1", "norm2"]
    vision = [f"visual.blocks.{i}.{name}.{kind}" for i in range(2) for name in linears for kind in ("bias", "weight")]
    around = [f"visual.merger.{name}.{kind}" for name in ("ln_q", "mlp.0", "mlp.2") for kind in ("bias", "weight")]
    layer = [f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("bias", "weight")]
    layer += ["self_attn.o_proj.weight", *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    text = [f"model.layers.{i}.{name}" for i in range(2) for name in layer]
    ends = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "visual.patch_embed.proj.weight"]
    head = [f"rm_head.{place}.{kind}" for place in (0, 3, 5) for kind in ("bias", "weight")]
    assert sorted(released(stock)) == sorted(vision + around + text + ends + head)


def test_names_are_mapped_one_to_one(stock):
    tensors = released(stock)
    assert len(rename(tensors, NAMES)) == len(tensors) - 1  # without lm_head.weight


# --------------------------------------------------------------------------------------------------------- quantization


def test_quantization_is_checked_first(load, monkeypatch):
    with pytest.raises(ValueError, match="known: none, int8, nf4"):
        load(quantization="fp4")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"dinalrm-align\[quant\]"):
        load(quantization="nf4")


@pytest.mark.extra
@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.1), ("nf4", 0.5)])
def test_quantised_layers_score_nearly_the_same_and_pass_gradients(load, reward, kind, tolerance):
    small = load(quantization=kind)
    assert small.model.language_model.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    image = torch.rand(1, 3, 448, 448, generator=torch.Generator().manual_seed(5), requires_grad=True)
    scores = [one.score_pixels(image, PROMPTS[:1]) for one in (small, reward)]
    torch.testing.assert_close(scores[0], scores[1], atol=tolerance, rtol=tolerance)
    assert not torch.equal(scores[0], scores[1])
    (gradient,) = torch.autograd.grad(scores[0].sum(), image)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
