"""LoRA files: every program applies what is exported at one strength, and every LoRA file is read at its own."""

import copy
import json

import peft
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from dinalrm_align.align.lora import LORA_FILE, read_lora
from dinalrm_align.align.policy import PROJECTIONS, Policy
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.shapes.stack import StackConfig, build_pipeline

RANK, ALPHA = 4, 32.0
PROMPT = "a small red circle on white"


def transformer(seed: int = 0, **options):
    return build_pipeline(StackConfig.tiny(**options), seed=seed).transformer.requires_grad_(False)


def trained(model, rank: int = RANK, alpha: float = ALPHA) -> Policy:
    policy = Policy(model, LoraConfig(rank=rank, alpha=alpha), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    return policy


def updates(model) -> dict[str, torch.Tensor]:
    """The update of each projection's weight, by its name."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name: layer.get_delta_weight("policy").detach() for name, layer in layers.items()}


def assert_same(got: Policy, expected: dict[str, torch.Tensor]) -> None:
    for name, update in updates(got.transformer).items():
        torch.testing.assert_close(update, expected[name], rtol=1e-5, atol=1e-8)


def plain(model, tensors: dict[str, torch.Tensor]) -> None:
    """A reader that knows no scale: W + B A."""
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        model.get_submodule(layer).weight.data += tensors[name.replace("lora_A", "lora_B")] @ tensors[name]


def as_peft(model, tensors: dict[str, torch.Tensor]) -> None:
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS)
    peft.inject_adapter_in_model(config, model, adapter_name="default")
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert not set_peft_model_state_dict(model, named, adapter_name="default").unexpected_keys


@pytest.fixture(scope="module")
def world():
    return load_pipeline(MODELS["shapes"].pipeline, dtype=torch.float32)


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    """The folder of an exported LoRA, and the image that the policy draws with it."""
    pipeline = copied(world)
    policy = trained(pipeline.transformer)
    folder = tmp_path_factory.mktemp("lora")
    policy.save_lora(folder)
    return folder, image(pipeline)


def copied(world, kind=None):
    parts = {**world.components, "transformer": copy.deepcopy(world.transformer)}
    pipeline = (kind or type(world))(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pipeline, **options) -> torch.Tensor:
    options = dict(num_inference_steps=4, max_sequence_length=16, guidance_scale=2.0, output_type="pt") | options
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(5), **options).images


@pytest.mark.parametrize("reader", ["path", "state dict", "peft", "plain", "fused"])
def test_every_reader_of_an_exported_lora_draws_the_same_image(world, exported, reader):
    (folder, expected), pipeline = exported, copied(world)
    assert (image(pipeline) - expected).abs().max() > 0.02, "the LoRA changes the image"
    tensors = load_file(folder / LORA_FILE)
    if reader in ("path", "fused"):
        pipeline.load_lora_weights(folder)
    elif reader == "state dict":
        pipeline.load_lora_weights(tensors)
    else:
        {"peft": as_peft, "plain": plain}[reader](pipeline.transformer, tensors)
    if reader == "fused":
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    assert (image(pipeline) - expected).abs().max() <= 1e-5


def test_half_strength_is_half_in_every_way_and_another_pipeline_reads_the_file(world, exported):
    folder, _ = exported
    start = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    images = []
    for way in ("scale", "fused", "adapters"):
        pipeline, options = copied(world, StableDiffusion3Img2ImgPipeline), {"image": start, "strength": 0.5}
        pipeline.load_lora_weights(folder, adapter_name="ours")
        if way == "fused":
            pipeline.fuse_lora(lora_scale=0.5)
        elif way == "adapters":
            pipeline.set_adapters("ours", 0.5)
        else:
            options["joint_attention_kwargs"] = {"scale": 0.5}
        images.append(image(pipeline, **options))
    assert max((images[0] - other).abs().max() for other in images[1:]) <= 1e-5


def test_the_metadata_agrees_with_the_tensors(tmp_path):
    from safetensors import safe_open

    policy = trained(transformer())
    policy.save_lora(tmp_path)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert metadata["transformer.r"] == metadata["transformer.lora_alpha"] == RANK
        assert all("lora" in name for name in file.keys())  # diffusers refuses others for SD3
    lora = read_lora(tmp_path)
    expected = updates(policy.transformer)
    assert set(lora.layers) == set(expected)
    for layer, (a, b) in lora.layers.items():
        torch.testing.assert_close(b @ a, expected[layer], rtol=1e-5, atol=1e-8)


# ----------------------------------------------------------------------------- reading


def of_diffusers(policy, folder):
    """A file with alpha in its metadata alone, as this package used to write it and diffusers' scripts do."""
    type(build_pipeline(StackConfig.tiny(), seed=0)).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(policy.transformer, adapter_name="policy"),
        transformer_lora_adapter_metadata=policy.transformer.peft_config["policy"].to_dict(),
    )


def of_the_transformer(policy, folder):
    policy.transformer.save_lora_adapter(folder, adapter_name="policy")


def of_peft(policy, folder, **changes):
    tensors = get_peft_model_state_dict(policy.transformer, adapter_name="policy")
    folder.mkdir(exist_ok=True)
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def with_alphas(policy, folder):
    """The names of kohya's sd-scripts for the matrices, and a tensor named alpha for each projection."""
    tensors = get_peft_model_state_dict(policy.transformer, adapter_name="policy")
    layers = {name.rsplit(".lora_", 1)[0] for name in tensors}
    words = {"lora_A": "lora_down", "lora_B": "lora_up"}
    named = {n.replace(old, new): t for n, t in tensors.items() for old, new in words.items() if old in n}
    save_file(named | {f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}, folder / LORA_FILE)


def of_ours(policy, folder):
    policy.save_lora(folder)


WRITERS = [of_ours, of_diffusers, of_the_transformer, of_peft, with_alphas]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("rank", "alpha"), [(RANK, ALPHA), (RANK, 3.0), (7, 14.0)], ids=["same", "alpha", "wider"])
def test_a_policy_starts_from_any_lora_at_its_strength(writer, rank, alpha, tmp_path):
    policy = trained(transformer())
    writer(policy, tmp_path)
    other = Policy(transformer(), LoraConfig(rank=rank, alpha=alpha), seed=9)
    other.load_lora(tmp_path)
    assert_same(other, updates(policy.transformer))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in other.parameters.values())
    extra = [p[RANK:] for name, p in other.parameters.items() if "lora_A" in name]
    assert all(rows.abs().min() > 0 for rows in extra if len(rows)), "further rows of A start as those of a new LoRA"


def test_the_same_rank_and_alpha_is_read_back_exactly(tmp_path):
    policy = trained(transformer())
    policy.save_lora(tmp_path)
    other = Policy(transformer(), LoraConfig(rank=RANK, alpha=ALPHA), seed=9)
    other.load_lora(str(tmp_path / LORA_FILE))
    assert all(torch.equal(p, other.parameters[name]) for name, p in policy.parameters.items())


def test_rank_stabilised_and_patterned_scales_are_honoured(tmp_path):
    policy = trained(transformer())
    expected = updates(policy.transformer)
    of_peft(policy, tmp_path / "rs", use_rslora=True)
    of_peft(policy, tmp_path / "pattern", alpha_pattern={"attn.to_q": 2 * ALPHA, "attn2.to_k": ALPHA / 2})
    for name, factor in (("rs", lambda _: RANK**0.5), ("pattern", patterned)):
        other = Policy(transformer(), LoraConfig(rank=RANK, alpha=1.0), seed=9)
        other.load_lora(tmp_path / name)
        assert_same(other, {layer: update * factor(layer) for layer, update in expected.items()})


def patterned(layer: str) -> float:
    return 2.0 if layer.endswith("attn.to_q") else 0.5 if layer.endswith("attn2.to_k") else 1.0


def test_without_any_alpha_the_scale_is_1_as_in_diffusers(tmp_path):
    policy = trained(transformer(), alpha=RANK)
    tensors = get_peft_model_state_dict(policy.transformer, adapter_name="policy")
    save_file({f"transformer.{n}": t.to(torch.bfloat16) for n, t in tensors.items()}, tmp_path / LORA_FILE)
    other = Policy(transformer(), LoraConfig(rank=RANK, alpha=ALPHA), seed=9)
    other.load_lora(tmp_path)
    for layer, update in updates(other.transformer).items():
        torch.testing.assert_close(update, updates(policy.transformer)[layer], rtol=0.05, atol=5e-4)


def test_projections_that_the_file_lacks_start_at_zero(tmp_path):
    model = transformer()
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"]), "other")
    model.save_lora_adapter(tmp_path, adapter_name="other")
    policy = Policy(transformer(), LoraConfig(rank=RANK, alpha=ALPHA), seed=0)
    before = policy.weights()
    policy.load_lora(tmp_path)
    update = updates(policy.transformer)
    assert all((u.abs().max() > 0) == name.endswith("to_q") for name, u in update.items())
    assert all(torch.equal(p, before[n]) for n, p in policy.parameters.items() if "lora_A" in n and ".to_q." not in n)


def test_a_larger_rank_and_another_model_are_refused(tmp_path):
    trained(transformer(), rank=6).save_lora(tmp_path)
    small = Policy(transformer(), LoraConfig(rank=RANK, alpha=ALPHA), seed=0)
    before = small.weights()
    with pytest.raises(ValueError, match=r"got rank 6; expected at most the policy's, 4: set policy.rank to 6"):
        small.load_lora(tmp_path)
    shallow = Policy(transformer(depth=3), LoraConfig(rank=8, alpha=ALPHA), seed=0)
    with pytest.raises(ValueError, match="a LoRA on .* layers that the policy does not train"):
        shallow.load_lora(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in small.parameters.items())


def test_a_folder_of_a_run_names_its_lora_first(tmp_path):
    policy = trained(transformer())
    policy.save_lora(tmp_path / "lora")
    for step in range(3):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
        save_file({"weight": torch.ones(1)}, tmp_path / "checkpoints" / f"step_{step}" / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=f"it holds lora/{LORA_FILE}, checkpoints/step_0"):
        read_lora(tmp_path)


def test_a_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    of_ours(trained(transformer()), tmp_path / "run" / "lora")
    assert read_lora("~/run/lora").path == tmp_path / "run" / "lora" / LORA_FILE
