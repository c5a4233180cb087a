"""The trunk against hooks on the stock SD3 transformer, what it skips, and where its LoRA lies."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from tiny_reward import make_inputs, tiny_reward_config

from dinalrm_align.models.pipeline import load_transformer
from dinalrm_align.reward.backbones.sd3 import TEXT_SIDE, SD3Trunk


@pytest.fixture
def transformer(tiny_pipeline):
    return tiny_pipeline.transformer


def trunk_inputs(transformer, **sizes):
    values = make_inputs(transformer, **sizes)
    timestep = torch.linspace(100.0, 700.0, len(values["latents"]))
    return values["latents"], timestep, values["prompt_embeds"], values["pooled_prompt_embeds"]


def hooked(transformer, latents, timestep, prompt_embeds, pooled_prompt_embeds):
    """What the stock forward computes after every block (0: before the first): image streams, text streams."""
    visual, text = [], []

    def before(_, __, values):
        visual.append(values["hidden_states"])
        text.append(values["encoder_hidden_states"])

    def after(_, __, output):
        text.append(output[0])
        visual.append(output[1])

    blocks = transformer.transformer_blocks
    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after) for block in blocks]
    with torch.no_grad():
        transformer(latents, prompt_embeds, pooled_prompt_embeds, timestep)
    for handle in handles:
        handle.remove()
    return visual, text


@pytest.mark.parametrize("size", [(16, 16), (8, 20), (2, 4), (48, 6)])
def test_taps_equal_hooks_on_the_stock_model(transformer, size):
    config = tiny_reward_config(num_layers=4, visual_taps=(0, 1, 2, 3, 4), text_taps=(0, 1, 2, 3), tuning="none")
    trunk = SD3Trunk(transformer, config, share_weights=True)
    inputs = trunk_inputs(transformer, height=size[0], width=size[1])
    visual, text = hooked(transformer, *inputs)
    taps = trunk(*inputs)
    assert len(taps.visual) == 5 and len(taps.text) == 4
    for got, expected in zip((*taps.visual, *taps.text), (*visual, *text[:4]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_a_last_block_without_tapped_text_skips_its_text_half(transformer):
    config = tiny_reward_config(num_layers=3, visual_taps=(1, 3), text_taps=(1, 2), tuning="none")
    trunk = SD3Trunk(transformer, config, share_weights=True)
    inputs = trunk_inputs(transformer)
    calls = []
    trunk.transformer_blocks[2].attn.to_add_out.register_forward_hook(lambda *_: calls.append("to_add_out"))
    visual, text = hooked(transformer, *inputs)
    taps = trunk(*inputs)
    assert calls == [] and trunk.transformer_blocks[2].ff_context is None
    assert transformer.transformer_blocks[2].ff_context is not None
    torch.testing.assert_close(taps.visual[1], visual[3], rtol=0, atol=1e-6)
    torch.testing.assert_close(taps.text[1], text[2], rtol=0, atol=1e-6)


def test_without_text_taps_the_last_block_computes_its_image_half_alone(transformer):
    inputs = trunk_inputs(transformer)
    both = SD3Trunk(transformer, tiny_reward_config(tuning="none", text_taps=(3,)), share_weights=True)
    image = SD3Trunk(transformer, tiny_reward_config(tuning="none", text_taps=()), share_weights=True)
    assert image.transformer_blocks[2].ff_context is None and both.transformer_blocks[2].ff_context is not None
    found, expected = image(*inputs), both(*inputs)
    assert found.text == () and len(found.visual) == 2
    torch.testing.assert_close(found.visual, expected.visual)
    assert [part.text for part in found.split(2)] == [(), ()]


def test_blocks_after_the_last_tap_do_not_run(transformer):
    config = tiny_reward_config(num_layers=4, visual_taps=(1,), text_taps=(1,), tuning="none")
    trunk = SD3Trunk(transformer, config, share_weights=True)
    calls = []
    for index, block in enumerate(trunk.transformer_blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    trunk(*trunk_inputs(transformer))
    assert calls == [0]


def test_lora_lies_on_the_eight_projections_of_every_used_block(transformer):
    """Four blocks with dual attention in 0 and 1: 8 projections each, 4 more in attn2, A and B: (3 * 8 + 2 * 4) * 2."""
    trunk = SD3Trunk(transformer, tiny_reward_config(), share_weights=True)
    names = trunk.lora_parameters()
    assert len(names) == 64
    assert "transformer_blocks.0.attn2.to_out.0.lora_A.weight" in names
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in names.values())


def test_text_side_of_the_last_block_has_no_lora_when_its_text_is_not_tapped(transformer):
    trunk = SD3Trunk(transformer, tiny_reward_config(text_taps=(0, 2)), share_weights=True)
    names = trunk.lora_parameters()
    assert not any(f"transformer_blocks.2.attn.{side}." in name for name in names for side in TEXT_SIDE)
    assert any("transformer_blocks.1.attn.to_add_out." in name for name in names)


def test_lora_that_no_tap_can_reach_does_not_train(transformer):
    """Every trainable parameter gets a gradient: none is decayed or averaged that no loss depends on."""
    config = tiny_reward_config(num_layers=3, visual_taps=(2,), text_taps=(1,))
    trunk = SD3Trunk(transformer, config, share_weights=True)
    taps = trunk(*trunk_inputs(transformer))
    sum(tokens.square().sum() for tokens in (*taps.visual, *taps.text)).backward()
    trainable = {name: p for name, p in trunk.lora_parameters().items() if p.requires_grad}
    assert trainable and not any(name.startswith("transformer_blocks.2.") for name in trainable)
    assert all(parameter.grad is not None for parameter in trainable.values())


def test_hooks_of_the_policy_do_not_fire_in_the_trunk(transformer):
    fired = []
    handle = transformer.transformer_blocks[0].register_forward_hook(lambda *_: fired.append(1))
    trunk = SD3Trunk(transformer, tiny_reward_config(), share_weights=True)
    handle.remove()
    trunk(*trunk_inputs(transformer))
    assert fired == []


def test_blocks_that_are_not_used_are_not_kept_alive(transformer):
    whole = copy.deepcopy(transformer)
    last = weakref.ref(whole.transformer_blocks[-1])
    trunk = SD3Trunk(whole, tiny_reward_config(), share_weights=True)
    del whole
    gc.collect()
    assert last() is None
    trunk.check_shared()


def test_reentrant_checkpointing_asks_for_no_gradient_that_nobody_needs(transformer):
    trunk = SD3Trunk(transformer, tiny_reward_config(), share_weights=True).requires_grad_(False)
    trunk.enable_gradient_checkpointing(use_reentrant=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taps = trunk(*trunk_inputs(transformer))
    assert not any(tokens.requires_grad for tokens in (*taps.visual, *taps.text))


def test_text_tap_on_a_block_without_text_is_refused(transformer):
    config = tiny_reward_config(num_layers=4, visual_taps=(4,), text_taps=(4,))
    with pytest.raises(ValueError, match="text tap 4: this transformer's block 4 returns no text; tap 3 at most"):
        SD3Trunk(transformer, config, share_weights=True)


def test_more_layers_than_the_transformer_has_are_refused(transformer):
    with pytest.raises(ValueError, match="num_layers: got 12; expected at most 4"):
        SD3Trunk(transformer, tiny_reward_config(num_layers=12), share_weights=True)


def test_wrappers_of_a_transformer_are_refused(transformer):
    with pytest.raises(TypeError, match="got Sequential; expected diffusers' SD3Transformer2DModel"):
        SD3Trunk(torch.nn.Sequential(transformer), tiny_reward_config(), share_weights=True)


def test_bfloat16_trunk_is_near_float32(transformer):
    config = tiny_reward_config()
    exact = SD3Trunk(transformer, config, share_weights=True)
    rough = SD3Trunk(copy.deepcopy(transformer).to(torch.bfloat16), config, share_weights=False)
    inputs = trunk_inputs(transformer)
    got, expected = rough(*inputs).visual[-1], exact(*inputs).visual[-1]
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("part", ["", "transformer"])
def test_load_transformer_takes_pipeline_and_bare_folders(tiny_world, transformer, part):
    loaded = load_transformer(tiny_world / "pipeline" / part, dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.proj_out.weight, transformer.proj_out.weight)
