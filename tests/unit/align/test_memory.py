"""Options that save memory: the method stays the same, weights are shared packed, the optimiser's state is resumed."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_clip import tiny_vae
from tiny_reward import make_inputs, shake, tiny_reward_config

from dinalrm_align.align import memory
from dinalrm_align.align.config import Hpsv3Config, MemoryConfig
from dinalrm_align.align.memory import (
    check_memory_options,
    decoder,
    release_text_encoders,
    shrink_pipeline,
    text_pipeline,
    use_attention,
    use_kernels,
    visiting,
)
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.models.compilation import compile_blocks
from dinalrm_align.models.text import Conditions, PromptEncoder
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.train.config import OptimConfig
from dinalrm_align.train.state import adamw

CPU = torch.device("cpu")


def own_pipeline():
    from dinalrm_align.shapes.stack import StackConfig, build_pipeline

    pipeline = build_pipeline(StackConfig.tiny(), seed=0)
    for part in (pipeline.transformer, pipeline.vae):
        part.requires_grad_(False).eval()
    return pipeline


@pytest.mark.extra
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_policy_and_reward_share_a_quantised_base_and_pass_gradients(kind):
    pipeline, exact = own_pipeline(), own_pipeline()
    shrink_pipeline(pipeline, MemoryConfig(base_quant=kind), CPU)
    models = [build_reward_model(tiny_reward_config(), pipe.transformer, seed=1) for pipe in (pipeline, exact)]
    shake(models[0], seed=2), shake(models[1], seed=2)
    policy = Policy(pipeline.transformer, LoraConfig(4, 4.0), seed=0)
    owned = {id(p) for p in policy.transformer.parameters()}
    assert all(id(p) in owned for p in models[0].trunk.shared if isinstance(p, torch.nn.Parameter))

    inputs = make_inputs(pipeline.transformer)
    latents, noise, *text = inputs["latents"], inputs["noise"], inputs["prompt_embeds"], inputs["pooled_prompt_embeds"]
    latents.requires_grad_()
    scores = [model.eval()(latents, *text, 0.4, noise) for model in models]
    assert torch.corrcoef(torch.stack(scores).detach())[0, 1] > 0 and not torch.equal(*scores)
    policy.velocity(latents.detach(), 0.5, Conditions(["a", "b"], *text)).sum().backward()  # first, then the reward
    again = models[0](latents, *text, 0.4, noise)
    assert torch.equal(again, scores[0])
    (of_packed,), (of_exact,) = (torch.autograd.grad(score.sum(), latents, retain_graph=True) for score in scores)
    assert torch.nn.functional.cosine_similarity(of_packed.flatten(), of_exact.flatten(), dim=0) > 0.8
    assert all(p.grad is not None for name, p in policy.parameters.items() if "lora_B" in name)


@pytest.mark.extra
def test_eight_bit_adamw_learns_and_its_moments_come_back(tmp_path):
    """Two runs of four updates, one of them saved after two and put into a new optimiser by a checkpoint."""
    from accelerate import Accelerator

    from dinalrm_align.train.checkpoints import _check_moments, load_checkpoint, save_checkpoint
    from dinalrm_align.train.metrics import MetricsLog
    from dinalrm_align.train.state import RunState

    config = OptimConfig(name="adamw8bit", lr=1e-2)
    target = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def start():
        parameters = {"w": torch.nn.Parameter(torch.zeros(64, 128))}
        return parameters, adamw([{"params": list(parameters.values())}], config)

    def update(parameters, optimizer):
        optimizer.zero_grad()
        loss = (parameters["w"] - target).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    parameters, optimizer = start()
    losses = [update(parameters, optimizer) for _ in range(2)]
    accelerator, log = Accelerator(cpu=True), MetricsLog(tmp_path / "metrics.jsonl")
    state = RunState(parameters, optimizer, step=2)
    folder = save_checkpoint(tmp_path, state, log=log, accelerator=accelerator, keep_last=1)
    losses += [update(parameters, optimizer) for _ in range(2)]
    assert losses[-1] < losses[0]
    assert optimizer.state[parameters["w"]]["state1"].dtype == torch.uint8

    resumed, fresh = start()
    load_checkpoint(folder, RunState(resumed, fresh), steps=4, accelerator=accelerator)
    [update(resumed, fresh) for _ in range(2)]
    assert torch.equal(resumed["w"], parameters["w"])

    other = {"w": torch.nn.Parameter(torch.zeros(128, 64))}
    with pytest.raises(ValueError, match="expected|differ"):
        _check_moments(
            torch.load(folder / "optimizer.pt", weights_only=True)["state"],
            adamw([{"params": list(other.values())}], config), folder,
        )  # fmt: skip


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"adamw8bit: needs bitsandbytes: run `pip install 'dinalrm-align\[quant\]'`"):
        adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}], OptimConfig(name="adamw8bit"))
    with pytest.raises(ImportError, match="quant"):
        check_memory_options(MemoryConfig(base_quant="nf4"), CPU)


def test_kernels_are_chosen_on_cuda_alone():
    check_memory_options(MemoryConfig(), CPU)
    with pytest.raises(ValueError, match="memory.attention: got flash on cpu"):
        check_memory_options(MemoryConfig(attention="flash"), CPU)


@pytest.mark.parametrize(("name", "left"), [("auto", 3), ("efficient", 1), ("math", 0)])
def test_attention_keeps_one_kernel_and_math(name, left):
    enabled = torch.backends.cuda
    try:
        use_attention(name)
        on = [enabled.flash_sdp_enabled(), enabled.mem_efficient_sdp_enabled(), enabled.cudnn_sdp_enabled()]
        assert sum(on) == left and enabled.math_sdp_enabled()
    finally:
        enabled.enable_flash_sdp(True), enabled.enable_mem_efficient_sdp(True), enabled.enable_cudnn_sdp(True)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_used_where_it_is_asked_for(allowed):
    matmul, before = (
        torch.backends.cuda.matmul,
        (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
    )
    try:
        use_kernels(MemoryConfig(allow_tf32=allowed))
        assert (matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == ((True, True) if allowed else before)
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_judges_dtype_is_for_image_rewards_alone():
    run = ReflRun(memory=MemoryConfig(judge_dtype="bfloat16"), hpsv3=Hpsv3Config(base="x"))
    found = run.reward_options("dinalrm + hpsv3 + 2*pixel + my.module:judge - http://host:1")
    assert found == {"hpsv3": {"base": "x", "dtype": "bfloat16"}, "pixel": {"dtype": "bfloat16"}}
    assert ReflRun().reward_options("hpsv3 + pixel") == {"hpsv3": {}}


def test_text_encoders_are_released_after_encoding(tiny_pipeline):
    pipeline = copy.copy(tiny_pipeline)
    encoders = text_pipeline(pipeline, CPU)
    encoder = PromptEncoder(encoders, text_length=16)
    conditions = Conditions.encode(encoder, ["a red circle", ""], other_lengths={9})
    assert conditions.prompt_embeds.shape[1] == 32 and conditions.for_length(9)[0].shape[1] == 25
    release_text_encoders(encoders, pipeline)
    assert pipeline.text_encoder is None and tiny_pipeline.text_encoder is not None
    expected = PromptEncoder(tiny_pipeline, text_length=16)(["a red circle"])
    for got, wanted in zip(conditions.take([0]).for_length(16), expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="prompts need text encoders"):
        encoder(["another"])


def test_compiled_blocks_compute_the_same():
    pipeline = own_pipeline()
    text = make_inputs(pipeline.transformer)
    arguments = dict(
        hidden_states=text["latents"], timestep=torch.tensor([500.0, 500.0]),
        encoder_hidden_states=text["prompt_embeds"], pooled_projections=text["pooled_prompt_embeds"],
    )  # fmt: skip
    expected = pipeline.transformer(**arguments).sample
    compile_blocks(pipeline.transformer.transformer_blocks, backend="eager")
    assert all(block._compiled_call_impl is not None for block in pipeline.transformer.transformer_blocks)
    assert torch.allclose(pipeline.transformer(**arguments).sample, expected, atol=1e-5)


def test_decoding_in_parts_is_decoding_at_once():
    vae, latents = tiny_vae(), torch.randn(5, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = decoder(vae, CPU, batch=8)(latents)
        assert torch.allclose(decoder(vae, CPU, batch=2)(latents), whole, atol=1e-5)


def test_a_visitor_goes_home_whatever_happens():
    class Traveller(torch.nn.Linear):
        seen = ()

        def to(self, device):
            self.seen = (*self.seen, torch.device(device).type)
            return self

    module = Traveller(2, 2)
    with pytest.raises(RuntimeError, match="boom"), visiting(module, torch.device("meta")):
        raise RuntimeError("boom")
    assert module.seen == ("meta", "cpu")
    with visiting(module, CPU):
        pass
    assert module.seen == ("meta", "cpu")


def test_a_model_on_the_only_gpu_does_not_travel_to_it(monkeypatch):
    """Accelerate names the only GPU "cuda", parameters "cuda:0": after every batch the memory cache was emptied."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("empties the cache"))

    class Placed(torch.nn.Module):
        def parameters(self):
            return iter([SimpleNamespace(device=torch.device("cuda", 0))])

        def to(self, device):
            pytest.fail(f"moves to {device}")

    for name in ("cuda", "cuda:0"):
        with visiting(Placed(), torch.device(name)):
            pass


def test_slices_reach_the_pixel_parts_alone():
    from dinalrm_align.reward.pixel.base import PixelReward

    reward = PixelReward(tiny_vae())
    reward.set_decode_slice(2)
    assert reward.slice_size == 2


def test_options_of_hpsv3_are_those_that_differ():
    assert Hpsv3Config().options() == {}
    assert Hpsv3Config(quantization="nf4", base="x").options() == {"quantization": "nf4", "base": "x"}


@pytest.mark.parametrize(
    ("free", "images", "decodes", "expected"),
    [
        (10**9, (2, 2), False, (False, False)),
        (10**6, (2, 2), False, (False, True)),  # the policy's fit in half of it, but not the reward's as well
        (1000, (2, 2), False, (True, True)),
        (1000, (2, 0), False, (True, False)),  # the reward gives no gradient
        (10**9, (2, 2), True, (False, True)),  # the VAE keeps the most
        (10**9, (2, 0), True, (False, False)),
    ],
)
def test_what_fits_in_half_of_the_free_memory_is_kept(
    tiny_pipeline, monkeypatch, capsys, free, images, decodes, expected
):
    """4 blocks, 2 with attn2, width 16, float32: the policy keeps 64 x 2 (16 (4 x 18.3 + 2 x 11.3) + 28 x 4 x 18.3) =
    458,547 bytes for 2 images of 16 + 28 tokens, and a reward of 3 blocks 64 x 2 x 27.8 x 3 x 44 = 469,709.
    """
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    part = SimpleNamespace(config=SimpleNamespace(num_layers=3))
    reward = SimpleNamespace(noise_parts=[part], reads_images=decodes)
    place = dict(latent_shape=(16, 8, 8), text_tokens=28)
    arguments = (images, tiny_pipeline.transformer, [reward], Accelerator(cpu=True))
    assert memory.recomputation("auto", *arguments, **place) == expected
    assert "half of the free memory" in capsys.readouterr().out
    assert memory.recomputation(True, *arguments, **place) == (True, True)
    assert memory.recomputation(False, *arguments, **place) == (False, False)
