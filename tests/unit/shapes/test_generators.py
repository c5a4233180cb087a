import dataclasses
import hashlib
import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from dinalrm_align.align.config import LoraConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.models.pipeline import decode_latents, encode_images
from dinalrm_align.shapes import generators, pairs
from dinalrm_align.shapes.config import Generator, PairsConfig, SceneConfig, StackConfig
from dinalrm_align.shapes.generators import mixed_lists, open_generators, plan_list, prompt_encoder
from dinalrm_align.shapes.pairs import ensure_pairs, held_out_kinds, write_pairs
from dinalrm_align.shapes.scene import is_held_out, parse_caption
from dinalrm_align.shapes.stack import build_pipeline
from dinalrm_align.train.digest import fingerprint

FEW = Generator(num_steps=(1, 2), guidance_scale=(1.0, 1.0))
MIXED = {"few": FEW, "guided": Generator(num_steps=(2, 3), guidance_scale=(4.0, 5.0)), "spoiled": Generator("spoiled")}
TINY = PairsConfig(groups=5, images=3, heldout_groups=4, per_concept=1, generators=MIXED)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_lora(folder, pipeline, scale=0.1):
    policy = Policy(build_pipeline(StackConfig.tiny(), seed=0).transformer, LoraConfig(rank=2, alpha=2), seed=0)
    with torch.no_grad():
        for name, p in policy.parameters.items():
            p.add_(scale if "lora_B" in name else 0.0)
    policy.save_lora(folder)
    return str(folder)


def test_a_list_mixes_generators_by_their_weights():
    makers = {
        "a": Generator(weight=2),
        "b": Generator(),
        "c": Generator("faithful", 0.5),
        "d": Generator("spoiled", 0.5),
    }
    config = PairsConfig(generators=makers, images=4)
    plans = [plan_list(index, "train", makers, config) for index in range(400)]
    assert all(Counter(plan.names)["a"] == 2 and Counter(plan.names)["b"] == 1 for plan in plans)
    number = Counter(name for plan in plans for name in plan.names)
    assert number["c"] + number["d"] == 400 and 150 < number["c"] < 250
    assert 150 < sum(plan.names[0] == "a" for plan in plans) < 250, "any generator at any position"
    assert len({seed for plan in plans for seed in plan.seeds}) == 1600
    assert not any(is_held_out(plan.scene) for plan in plans)


def test_samples_are_at_least_half_of_a_list_on_average():
    makers = {"a": Generator(weight=0.5), "b": Generator(weight=0.5), "c": Generator("faithful")}
    plans = [plan_list(index, "train", makers, PairsConfig(generators=makers, images=3)) for index in range(400)]
    assert {Counter(plan.names)["c"] for plan in plans} == {1, 2}
    assert 550 < sum(Counter(plan.names)["c"] for plan in plans) < 650


def test_images_come_from_their_generator_with_settings_in_its_ranges(tiny_pipeline, monkeypatch):
    asked, sample = [], generators.sample_latents

    def spy(pipeline, encoder, prompts, **options):
        asked.append((len(prompts), options["steps"], options["guidance"]))
        return sample(pipeline, encoder, prompts, **options)

    monkeypatch.setattr(generators, "sample_latents", spy)
    monkeypatch.setattr(generators, "BLOCK", 8)
    config = dataclasses.replace(TINY, groups=16)
    found = list(mixed_lists("train", tiny_pipeline, prompt_encoder(tiny_pipeline), config))
    assert len(found) == 2 and sum(number for number, *_ in asked) == 16 * 2
    assert {(steps, round(guidance)) for _, steps, guidance in asked} <= {
        (1, 1),
        (2, 1),
        (2, 4),
        (3, 4),
        (2, 5),
        (3, 5),
    }
    assert len({(steps, guidance) for _, steps, guidance in asked if guidance > 1}) > 2, (
        "they differ by block and position"
    )
    assert len(asked) <= 2 * 2 * 3, "one call for each block, position and generator"
    for scenes, latents, images, rngs in found:
        assert len(scenes) == len(rngs) == 8 and latents.shape == (24, 16, 16, 16) and images.shape == (24, 3, 64, 64)


def test_each_image_has_the_latents_of_its_caption_and_seed(tiny_pipeline):
    config = dataclasses.replace(TINY, generators={"few": FEW, "spoiled": Generator("spoiled")}, images=2)
    encoder = prompt_encoder(tiny_pipeline)
    ((scenes, latents, images, _),) = mixed_lists("train", tiny_pipeline, encoder, config)
    for index, scene in enumerate(scenes):
        plan = plan_list(index, "train", config.generators, config)
        assert plan.scene == scene
        position = plan.names.index("few")
        options = FEW.at(*generators.sampler_settings(0, "train", config)[position])
        alone = generators.sample_latents(tiny_pipeline, encoder, [scene.caption], seed=plan.seeds[position], **options)
        torch.testing.assert_close(latents[2 * index + position], alone[0], rtol=1e-4, atol=1e-4)
        render = 2 * index + 1 - position
        again = encode_images(tiny_pipeline.vae, images[render][None])[0]
        torch.testing.assert_close(latents[render], again, rtol=1e-4, atol=1e-4)


def test_captions_are_those_of_the_configured_scenes():
    scenes = SceneConfig(fills=("striped",), medium=True)
    config = PairsConfig(generators=MIXED, images=3, scenes=scenes)
    text = " ".join(plan_list(index, "train", MIXED, config).scene.caption for index in range(30))
    assert "striped" in text and "medium" in text


def test_lists_do_not_depend_on_those_that_follow(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(generators, "BLOCK", 2)
    for groups in (3, 5):
        write_pairs("train", tmp_path / str(groups), tiny_pipeline, dataclasses.replace(TINY, groups=groups))
    short, long = (LatentPairs(tmp_path / name, batch_size=1) for name in "35")
    assert long.prompts[:3] == short.prompts
    for a, b in zip(short.in_order(), long.in_order()):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-2, atol=1e-3)
        assert torch.equal(a.chosen, b.chosen) and torch.equal(a.label, b.label)


def test_an_interrupted_data_set_starts_again_identically(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(generators, "BLOCK", 2)
    ensure_pairs("train", tmp_path / "whole", tiny_pipeline, TINY)
    calls, rate = [], pairs.rate_lists

    def stop(*arguments):
        calls.append(1)
        return rate(*arguments) if len(calls) != 2 else 1 / 0

    monkeypatch.setattr(pairs, "rate_lists", stop)
    with pytest.raises(ZeroDivisionError):
        ensure_pairs("train", tmp_path / "cut", tiny_pipeline, TINY)
    assert not (tmp_path / "cut" / "index.json").exists()
    ensure_pairs("train", tmp_path / "cut", tiny_pipeline, TINY)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_lora_and_a_checkpoint_change_a_copy_of_the_transformer(tiny_pipeline, tmp_path):
    before, other = fingerprint(tiny_pipeline.transformer), build_pipeline(StackConfig.tiny(), seed=5).transformer
    stage = {name: p.detach() + 0.0 for name, p in other.named_parameters()} | {"layout.weight": torch.zeros(2)}
    save_file(stage, tmp_path / "ema.safetensors")
    lora = save_lora(tmp_path / "lora", tiny_pipeline)
    file = str(tmp_path / "ema.safetensors")
    makers = {
        "stage": Generator(checkpoint=file),
        "aligned": Generator(lora=lora),
        "both": Generator(checkpoint=file, lora=lora),
    }
    opened = open_generators(makers | {"render": Generator("faithful")}, tiny_pipeline)
    assert list(opened) == ["stage", "aligned", "both"] and fingerprint(tiny_pipeline.transformer) == before
    assert fingerprint(opened["stage"].transformer) == fingerprint(other)
    assert len({fingerprint(own.transformer) for own in opened.values()} | {before}) == 4
    expected = build_pipeline(StackConfig.tiny(), seed=0)
    expected.load_lora_weights(lora)
    inputs = torch.ones(1, 16, 16, 16), torch.ones(1, 20, 32), torch.ones(1, 32), torch.tensor([300.0])
    with torch.no_grad():
        got, wanted = (own.transformer(*inputs, return_dict=False)[0] for own in (opened["aligned"], expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_generator_can_be_another_transformer_of_another_width(tiny_pipeline, tmp_path):
    other = build_pipeline(StackConfig.tiny(num_heads=3), seed=3)
    other.transformer.save_pretrained(tmp_path / "transformer")
    config = dataclasses.replace(TINY, outside={"other": Generator(checkpoint=str(tmp_path / "transformer"))})
    opened = open_generators(config.outside, tiny_pipeline)["other"]
    assert fingerprint(opened.transformer) == fingerprint(other.transformer) and opened.vae is tiny_pipeline.vae
    ((_, latents, images, _),) = mixed_lists("outside", tiny_pipeline, prompt_encoder(tiny_pipeline), config)
    torch.testing.assert_close(decode_latents(tiny_pipeline.vae, latents), images, rtol=1e-4, atol=1e-4)


def test_files_that_do_not_fit_are_refused(tiny_pipeline, tmp_path):
    save_file({"pos_embed.proj.bias": torch.zeros(3)}, tmp_path / "part.safetensors")
    idle = save_lora(tmp_path / "idle", tiny_pipeline, scale=0.0)
    for maker, error, message in (
        (Generator(checkpoint=str(tmp_path / "part.safetensors")), ValueError, "do not fit the model"),
        (Generator(checkpoint=str(tmp_path / "absent.safetensors")), FileNotFoundError, "no file"),
        (Generator(lora=str(tmp_path / "absent")), (ValueError, FileNotFoundError), "LoRA"),
        (Generator(lora=idle), ValueError, "generator it: the LoRA in .* does not change the transformer"),
        (Generator(model=str(tmp_path / "absent")), ValueError, "absent"),
    ):
        with pytest.raises(error, match=message):
            open_generators({"it": maker}, tiny_pipeline)


def test_images_of_another_pipeline_are_encoded_with_this_ones_autoencoder(tiny_pipeline, tmp_path):
    other = build_pipeline(StackConfig.tiny(num_heads=3), seed=3)
    other.save_pretrained(tmp_path)
    config = dataclasses.replace(TINY, outside={"other": Generator(model=str(tmp_path), num_steps=(2, 2))})
    opened = open_generators(config.outside, tiny_pipeline)["other"]
    assert fingerprint(opened.transformer) == fingerprint(other.transformer) and opened.vae is not tiny_pipeline.vae
    ((scenes, latents, images, _),) = mixed_lists("outside", tiny_pipeline, prompt_encoder(tiny_pipeline), config)
    torch.testing.assert_close(latents, encode_images(tiny_pipeline.vae, images), rtol=1e-4, atol=1e-4)
    assert all(is_held_out(scene) for scene in scenes)


def test_outside_generators_must_not_occur_in_training(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "copy")
    lora = save_lora(tmp_path / "lora", tiny_pipeline)
    shutil.copytree(tmp_path / "lora", tmp_path / "lora_copy")
    aligned = MIXED | {"aligned": Generator(lora=lora)}
    unmixed = dataclasses.replace(TINY, generators={}, sampled_share=0, groups=2)
    for outside, training, known in (
        (Generator(num_steps=(3, 8)), TINY, "guided"),
        (Generator(model=str(tmp_path / "copy")), unmixed, "base"),
        (Generator(lora=str(tmp_path / "lora_copy")), dataclasses.replace(TINY, generators=aligned), "aligned"),
    ):
        config = dataclasses.replace(training, outside={"x": outside})
        for kind in ("train", "outside"):
            with pytest.raises(
                ValueError, match=f"pairs.outside.x: got a generator that occurs in training, as '{known}'"
            ):
                ensure_pairs(kind, tmp_path / kind, tiny_pipeline, config)
    spoiled = {"x": FEW, "y": Generator("spoiled")}
    with pytest.raises(ValueError, match=r"pairs.outside.y: .* as 'spoiled'"):
        ensure_pairs("train", tmp_path / "train", tiny_pipeline, dataclasses.replace(unmixed, outside=spoiled))
    apart = dataclasses.replace(unmixed, outside={"few_steps": FEW, "aligned": Generator(lora=lora)}, heldout_groups=1)
    assert held_out_kinds(apart) == ["heldout", "outside", "shifted", "concepts"]
    assert held_out_kinds(unmixed) == ["heldout", "shifted", "concepts"]
    for kind in ("train", "outside"):
        ensure_pairs(kind, tmp_path / kind, tiny_pipeline, apart)
    with pytest.raises(ValueError, match="pairs.outside: got no generators"):
        write_pairs("outside", tmp_path / "none", tiny_pipeline, unmixed)


def test_held_out_and_outside_lists_have_the_same_captions(tiny_pipeline, tmp_path):
    config = dataclasses.replace(TINY, outside={"long": Generator(num_steps=(5, 5))})
    for kind in ("heldout", "outside"):
        ensure_pairs(kind, tmp_path / kind, tiny_pipeline, config)
    inside, outside = (LatentPairs(tmp_path / kind, batch_size=4) for kind in ("heldout", "outside"))
    assert inside.prompts == outside.prompts and all(is_held_out(parse_caption(prompt)) for prompt in inside.prompts)
    assert len(outside.in_order()[0].chosen) == 4 * 3


def test_pairs_of_other_generators_are_not_taken_for_these(tiny_pipeline, tmp_path):
    lora = save_lora(tmp_path / "lora", tiny_pipeline)
    config = dataclasses.replace(TINY, groups=2, generators=MIXED | {"aligned": Generator(lora=lora)})
    folder = ensure_pairs("train", tmp_path / "pairs", tiny_pipeline, config)
    before = contents(folder)
    shutil.move(lora, tmp_path / "moved")
    moved = MIXED | {"aligned": Generator(lora=str(tmp_path / "moved"))}
    outside = {"long": Generator(num_steps=(21, 21), guidance_scale=(1.0, 1.0))}
    ensure_pairs("train", folder, tiny_pipeline, dataclasses.replace(config, generators=moved, outside=outside))
    assert contents(folder) == before
    save_lora(tmp_path / "moved", tiny_pipeline, scale=0.2)
    with pytest.raises(ValueError, match="generators.aligned.weights: got"):
        ensure_pairs("train", folder, tiny_pipeline, dataclasses.replace(config, generators=moved))
    few = MIXED | {"few": Generator(num_steps=(1, 3), guidance_scale=(1.0, 1.0))}
    with pytest.raises(ValueError, match=r"generators.few.num_steps: got \[1, 3\]; expected \[1, 2\], as in"):
        ensure_pairs("train", folder, tiny_pipeline, dataclasses.replace(TINY, groups=2, generators=few))


def test_pairs_of_earlier_versions_are_taken_if_the_new_settings_are_the_defaults(tiny_pipeline, tmp_path):
    config = PairsConfig(heldout_groups=2, images=2, sampled_share=0)
    folder = ensure_pairs("heldout", tmp_path, tiny_pipeline, config)
    stored = json.loads((folder / "made_with.json").read_text())
    new = ("generators", "outside", "raters", "rater_spread", "noise_per_object", "noise_of_flaws", "tie_gap")
    (folder / "made_with.json").write_text(json.dumps({k: v for k, v in stored.items() if k not in new}))
    assert ensure_pairs("heldout", folder, tiny_pipeline, config) == folder
    with pytest.raises(ValueError, match="raters: got 3; expected None, as in"):
        ensure_pairs("heldout", folder, tiny_pipeline, dataclasses.replace(config, raters=3))
    with pytest.raises(ValueError, match=r"generators\.few\."):
        ensure_pairs("heldout", folder, tiny_pipeline, dataclasses.replace(config, generators=MIXED))


def test_the_defaults_make_the_pairs_of_earlier_versions(tiny_pipeline, tmp_path):
    """Captions and labels of the version before mixed lists and several raters."""
    config = PairsConfig(groups=8, images=3, sampled_share=0.4, seed=1, heldout_groups=5)
    for kind, expected in (("train", "f98fc1425c28ba69"), ("heldout", "a19b75bcfb454e2a")):
        write_pairs(kind, tmp_path / kind, tiny_pipeline, config)
        texts = (tmp_path / kind / name for name in ("prompts.json", "groups.safetensors"))
        assert hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()[:16] == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generator(num_steps=(5, 4)), r"generator.num_steps: got \[5, 4\]; expected \[lowest, highest\]"),
        (lambda: Generator(guidance_scale=(2.0, 1.0)), "generator.guidance_scale: got"),
        (lambda: Generator(num_steps=(0, 4)), r"generator.num_steps\[0\]: got 0"),
        (lambda: Generator(weight=0), "generator.weight: got 0"),
        (lambda: Generator("blurred"), "generator.render: got 'blurred'"),
        (lambda: Generator("spoiled", lora="x"), "generator.render: got spoiled with weights"),
        (
            lambda: PairsConfig(generators={"a": Generator(), "b": Generator("faithful", 1.5)}),
            "pairs.generators: got weights with 40% samples; expected at least half samples",
        ),
        (lambda: PairsConfig(outside={"b": Generator("faithful")}), "pairs.outside: got weights with 0% samples"),
        (lambda: PairsConfig(raters=0), "pairs.raters: got 0"),
        (lambda: PairsConfig(tie_gap=-0.1), "pairs.tie_gap: got -0.1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
