import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dinalrm_align.align.config import LoraConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.models.pipeline import decode_latents, encode_images, load_pipeline
from dinalrm_align.models.specs import MODELS
from dinalrm_align.shapes import generators, pairs
from dinalrm_align.shapes.config import (
    OWN_SAMPLES,
    SCOUT_EMPHASIS,
    BuildConfig,
    Generator,
    MakerWeights,
    PairsConfig,
    StackConfig,
    default_generators,
    scout_generators,
)
from dinalrm_align.shapes.generators import (
    check_outside,
    draw_concepts,
    identities,
    make_lists,
    open_generators,
    plan_list,
    prompt_encoder,
    sample_latents,
    settings_of,
)
from dinalrm_align.shapes.oracle import oracle_score
from dinalrm_align.shapes.pairs import ensure_pairs, write_pairs
from dinalrm_align.shapes.render import Nuisance, concepts_of, lay_out_spoiled
from dinalrm_align.shapes.scene import is_held_out, parse_caption
from dinalrm_align.shapes.stack import build_pipeline
from dinalrm_align.train.digest import fingerprint

FEW = Generator(num_steps=(1, 2), guidance_scale=(1.0, 1.0))
MIXED = {"few": FEW, "guided": Generator(num_steps=(2, 3), guidance_scale=(4.0, 5.0)), "spoiled": Generator("spoiled")}
TINY = PairsConfig(groups=5, images=3, heldout_groups=4, per_concept=1, generators=MIXED, outside={})
PLAIN = dataclasses.replace(TINY, generators={"base": Generator(), "spoiled": Generator("spoiled")}, groups=2)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def save_lora(folder, scale=0.1):
    policy = Policy(build_pipeline(StackConfig.tiny(), seed=0).transformer, LoraConfig(rank=2, alpha=2), seed=0)
    with torch.no_grad():
        for name, p in policy.parameters.items():
            p.add_(scale if "lora_B" in name else 0.0)
    policy.save_lora(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tiny_pipeline, tmp_path_factory):
    """A folder as a build leaves it: pipeline, and beside it makers."""
    world = tmp_path_factory.mktemp("world")
    tiny_pipeline.save_pretrained(world / "pipeline")
    half = build_pipeline(StackConfig.tiny(), seed=5).transformer
    half.half().save_pretrained(world / "makers" / "half")
    outsider = build_pipeline(StackConfig.tiny(num_heads=3), seed=6).transformer
    outsider.half().save_pretrained(world / "makers" / "outsider")
    save_lora(world / "makers" / "aligned")
    save_lora(world / "makers" / "over_aligned", scale=0.3)
    return world


@pytest.fixture(scope="module")
def saved_pipeline(world):
    return load_pipeline(world / "pipeline", dtype=torch.float32)


NAMES = MakerWeights.words


def with_paths(makers, world):
    """The makers, with paths in place of the names of weights."""
    paths = {name: str(world / "makers" / name) for name in NAMES}
    return {
        name: dataclasses.replace(maker, checkpoint=paths.get(maker.checkpoint), lora=paths.get(maker.lora))
        for name, maker in makers.items()
    }


def test_default_makers_open_by_their_names(saved_pipeline, world):
    makers = default_generators() | PairsConfig().outside
    opened = open_generators(makers, saved_pipeline)
    assert list(opened) == ["base", "half", "aligned", "over_aligned", "outsider"]
    assert len({fingerprint(own.transformer) for own in opened.values()}) == 5
    assert fingerprint(opened["base"].transformer) == fingerprint(saved_pipeline.transformer)
    half = build_pipeline(StackConfig.tiny(), seed=5).transformer.half().float()
    assert fingerprint(opened["half"].transformer) == fingerprint(half)
    assert opened["outsider"].transformer.config.num_attention_heads == 3
    for own in opened.values():
        assert own.vae is saved_pipeline.vae and own.transformer.dtype == torch.float32
    assert identities(makers, saved_pipeline) == identities(with_paths(makers, world), saved_pipeline)


def test_makers_of_a_relative_pipeline_are_beside_it(world, monkeypatch):
    monkeypatch.chdir(world)
    opened = open_generators(PairsConfig().outside, load_pipeline("pipeline", dtype=torch.float32))
    assert opened["outsider"].transformer.config.num_attention_heads == 3


def test_default_lists_are_made_by_named_weights(saved_pipeline, tmp_path):
    config = PairsConfig(heldout_groups=1, images=2)
    assert config.held_out_kinds == ["heldout", "outside", "shifted", "concepts"]
    ensure_pairs("outside", tmp_path / "outside", saved_pipeline, config)
    assert LatentPairs(tmp_path / "outside", batch_size=1).in_order()[0].latents.shape == (2, 16, 16, 16)
    makers = json.loads((tmp_path / "outside" / "made_with.json").read_text())["generators"]
    assert makers == json.loads(json.dumps(identities(PairsConfig().outside, saved_pipeline)))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_maker_is_named_with_its_path(name, world, tmp_path):
    for folder in ("pipeline", "makers"):
        shutil.copytree(world / folder, tmp_path / folder)
    shutil.move(tmp_path / "makers" / name, tmp_path / name)
    pipeline = load_pipeline(tmp_path / "pipeline", dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match=f"{name}: got no {tmp_path / 'makers' / name};"):
        ensure_pairs("train", tmp_path / "pairs", pipeline, PairsConfig())
    assert not (tmp_path / "pairs").exists()


def test_a_pipeline_in_memory_has_no_named_makers(tiny_pipeline):
    with pytest.raises(FileNotFoundError, match="half: got no makers/half; .* pass other pairs.generators"):
        open_generators(default_generators(), tiny_pipeline)


def test_a_name_of_weights_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("half", "own"):
        Path(folder).mkdir()
    assert (Generator(checkpoint="half").checkpoint, Generator(lora="aligned").lora) == ("half", "aligned")
    assert Generator(checkpoint="./half").checkpoint == str(tmp_path / "half")
    assert Generator(lora="own").lora == str(tmp_path / "own")


def test_default_lists_are_the_same_draws_everywhere():
    """Captions, makers and seeds of the first lists."""
    config, text = PairsConfig(), []
    for kind, makers in (("train", config.generators), ("heldout", config.generators), ("outside", config.outside)):
        plans = [plan_list(index, kind, makers, config) for index in range(20)]
        text += [(plan.scene.caption, plan.names, plan.seeds) for plan in plans]
    assert hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16] == "a4250fd571092e1b"


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
    config = dataclasses.replace(TINY, groups=16, easy_share=0.0)
    found = list(make_lists("train", tiny_pipeline, prompt_encoder(tiny_pipeline), config))
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


def test_a_share_of_the_training_blocks_are_easy_lists_of_renders(tiny_pipeline, monkeypatch):
    asked, planned = [], []

    def sample(pipeline, encoder, prompts, **options):
        asked.append(prompts)
        return torch.zeros(len(prompts), 16, 16, 16)

    def plan(index, kind, makers, config):
        planned.append(sorted(makers))
        assert config.emphasis == (SCOUT_EMPHASIS if "unrelated" in makers else TINY.emphasis)
        return plan_list(index, kind, makers, config)

    monkeypatch.setattr(generators, "sample_latents", sample)
    monkeypatch.setattr(generators, "plan_list", plan)
    monkeypatch.setattr(generators, "BLOCK", 1)
    config = dataclasses.replace(TINY, groups=5, heldout_groups=5, easy_share=0.4)
    encoder = prompt_encoder(tiny_pipeline)
    found = list(make_lists("train", tiny_pipeline, encoder, config))
    easy = [makers == sorted(scout_generators()) for makers in planned]
    assert len(found) == 5 and easy == [False, False, True, False, True]
    assert {tuple(makers) for makers, is_easy in zip(planned, easy) if not is_easy} == {tuple(sorted(MIXED))}
    captions = [scenes[0].caption for scenes, *_ in found]
    sampled = {caption for captions in asked for caption in captions}
    assert sampled == {caption for caption, is_easy in zip(captions, easy) if not is_easy}
    planned.clear()
    list(make_lists("heldout", tiny_pipeline, encoder, config))
    assert planned == [sorted(MIXED)] * 5, "test sets have none"


def test_blocks_of_own_samples_are_evenly_spread_among_those_that_are_not_easy():
    config = dataclasses.replace(TINY, easy_share=0.2, own_share=0.5)
    kinds = [sorted(settings_of(block, "train", config).generators) for block in range(20)]
    easy, own = sorted(scout_generators()), [*OWN_SAMPLES]
    assert [index for index, names in enumerate(kinds) if names == easy] == [4, 9, 14, 19]
    rest = [names for names in kinds if names != easy]
    assert rest == [sorted(TINY.generators), own] * 8
    assert settings_of(1, "heldout", config).generators == TINY.generators, "test sets have none"
    scout = BuildConfig().pairs.easy()
    assert {tuple(settings_of(block, "train", scout).generators) for block in range(9)} == {tuple(scout_generators())}
    whole = dataclasses.replace(TINY, easy_share=0.0, own_share=1.0)
    assert all([*settings_of(block, "train", whole).generators] == own for block in range(9))


def test_own_samples_are_sampled_as_in_the_evaluation_of_a_policy(tiny_pipeline, monkeypatch):
    def sample(pipeline, encoder, prompts, *, steps, guidance, seed):
        asked.append((pipeline.transformer is tiny_pipeline.transformer, len(prompts), steps, guidance))
        return sample_latents(pipeline, encoder, prompts, steps=1, guidance=1.0, seed=seed)

    asked = []
    monkeypatch.setattr(generators, "sample_latents", sample)
    config = dataclasses.replace(TINY, groups=3, easy_share=0.0, own_share=1.0)
    ((scenes, latents, *_),) = make_lists("train", tiny_pipeline, prompt_encoder(tiny_pipeline), config)
    assert len(scenes) == 3 and len(latents) == 3 * config.images
    spec = MODELS["shapes"]
    assert asked == [(True, 3, spec.num_steps, spec.guidance_scale)] * config.images
    lacking = dataclasses.replace(config, generators={"gone": Generator(checkpoint="half")})
    assert [*make_lists("train", tiny_pipeline, prompt_encoder(tiny_pipeline), lacking)], (
        "a maker of no list is not read"
    )


def test_the_share_of_own_samples_belongs_to_the_identity_of_training_pairs_alone(tiny_pipeline, tmp_path):
    def made_with(kind, **changes):
        folder = tmp_path / f"{kind}{len([*tmp_path.iterdir()])}"
        few = dataclasses.replace(TINY, groups=1, heldout_groups=1, **changes)
        ensure_pairs(kind, folder, tiny_pipeline, few)
        return json.loads((folder / "made_with.json").read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "write_pairs", lambda kind, folder, *_: folder.mkdir(exist_ok=True))
        with_own = made_with("train", own_share=0.5)
        assert with_own["own_share"] == 0.5 and with_own["generators"]["own samples"]["num_steps"] == [12, 12]
        assert "own_share" not in made_with("train")
        assert made_with("heldout", own_share=0.5) == made_with("heldout")


def test_half_of_the_images_of_the_default_lists_are_samples():
    makers = default_generators().values()
    sampled = sum(maker.weight for maker in makers if maker.render is None) / sum(maker.weight for maker in makers)
    assert sampled * (1 - PairsConfig().easy_share) >= 0.5


def test_each_image_has_the_latents_of_its_caption_and_seed(tiny_pipeline):
    config = dataclasses.replace(TINY, generators={"few": FEW, "spoiled": Generator("spoiled")}, images=2)
    encoder = prompt_encoder(tiny_pipeline)
    ((scenes, latents, images, _),) = make_lists("train", tiny_pipeline, encoder, config)
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


def test_renders_can_have_several_flaws_or_show_another_caption(tiny_pipeline):
    makers = {
        "faithful": Generator("faithful"),
        "one": Generator("spoiled"),
        "four": Generator("spoiled", flaws=4),
        "unrelated": Generator("unrelated"),
    }
    config = PairsConfig(groups=32, images=4, generators=makers, outside={})
    ((scenes, _, images, _),) = make_lists("train", tiny_pipeline, prompt_encoder(tiny_pipeline), config)
    captions = [scene.caption for scene in scenes for _ in range(4)]
    gold = oracle_score(images, captions).view(32, 4)
    names = [plan_list(index, "train", makers, config).names for index in range(32)]
    mean = {name: gold[torch.tensor([[other == name for other in row] for row in names])].mean() for name in makers}
    assert mean["faithful"] > mean["one"] > mean["four"] + 0.5 and mean["four"] > mean["unrelated"] + 0.3


def test_flaws_are_different_concepts_drawn_by_their_weights():
    scene, config = parse_caption("a large red circle on white"), PairsConfig(emphasis={"blur": 200.0})
    drawn = [draw_concepts(scene, 3, config, np.random.default_rng(seed)) for seed in range(50)]
    assert all(len(set(concepts)) == 3 for concepts in drawn)
    assert sum(concepts[0] == "blur" for concepts in drawn) > 40
    assert sorted(draw_concepts(scene, 99, config, np.random.default_rng(0))) == sorted(concepts_of(scene))
    spoiled = lay_out_spoiled(scene, Nuisance(), [*concepts_of(scene)], np.random.default_rng(0))
    assert len(spoiled.marks) == 2 and spoiled.background != "white" and spoiled.edge > 1 and spoiled.contrast < 1


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


def test_finished_pairs_always_have_their_settings(tiny_pipeline, tmp_path, monkeypatch):
    """Also if the program is killed right after them; settings of pairs that were not finished bind nobody."""

    def killed(*arguments):
        write_pairs(*arguments)
        raise KeyboardInterrupt

    ensure = partial(ensure_pairs, "train", tmp_path / "pairs", tiny_pipeline)
    monkeypatch.setattr(pairs, "write_pairs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure(dataclasses.replace(TINY, seed=1))
    monkeypatch.setattr(pairs, "write_pairs", killed)
    with pytest.raises(KeyboardInterrupt):
        ensure(TINY)
    with pytest.raises(ValueError, match="seed: got 1"):
        ensure(dataclasses.replace(TINY, seed=1))
    ensure(TINY)


def test_a_lora_and_a_checkpoint_change_a_copy_of_the_transformer(tiny_pipeline, tmp_path):
    before, other = fingerprint(tiny_pipeline.transformer), build_pipeline(StackConfig.tiny(), seed=5).transformer
    stage = {name: p.detach() + 0.0 for name, p in other.named_parameters()} | {"layout.weight": torch.zeros(2)}
    save_file(stage, tmp_path / "ema.safetensors")
    lora = save_lora(tmp_path / "lora")
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
    ((_, latents, images, _),) = make_lists("outside", tiny_pipeline, prompt_encoder(tiny_pipeline), config)
    torch.testing.assert_close(decode_latents(tiny_pipeline.vae, latents), images, rtol=1e-4, atol=1e-4)


def test_files_that_do_not_fit_are_refused(tiny_pipeline, tmp_path):
    save_file({"pos_embed.proj.bias": torch.zeros(3)}, tmp_path / "part.safetensors")
    idle = save_lora(tmp_path / "idle", scale=0.0)
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
    ((scenes, latents, images, _),) = make_lists("outside", tiny_pipeline, prompt_encoder(tiny_pipeline), config)
    torch.testing.assert_close(latents, encode_images(tiny_pipeline.vae, images), rtol=1e-4, atol=1e-4)
    assert all(is_held_out(scene) for scene in scenes)


def test_outside_generators_must_not_occur_in_training(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "copy")
    lora = save_lora(tmp_path / "lora")
    shutil.copytree(tmp_path / "lora", tmp_path / "lora_copy")
    aligned = MIXED | {"aligned": Generator(lora=lora)}
    for outside, training, known in (
        (Generator(num_steps=(3, 8)), TINY, "guided"),
        (Generator(model=str(tmp_path / "copy")), PLAIN, "base"),
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
        ensure_pairs("train", tmp_path / "train", tiny_pipeline, dataclasses.replace(PLAIN, outside=spoiled))
    unrelated = dataclasses.replace(PLAIN, outside={"x": Generator("unrelated")})
    with pytest.raises(ValueError, match=r"pairs.outside.x: .* as 'easy unrelated'"):
        ensure_pairs("train", tmp_path / "train", tiny_pipeline, unrelated)
    check_outside(dataclasses.replace(unrelated, easy_share=0.0), tiny_pipeline)
    policy = dataclasses.replace(PLAIN, outside={"x": Generator(num_steps=(12, 12))}, own_share=0.5)
    policy = dataclasses.replace(policy, generators={"few": FEW})
    with pytest.raises(ValueError, match=r"pairs.outside.x: .* as 'own samples'"):
        check_outside(policy, tiny_pipeline)
    check_outside(dataclasses.replace(policy, own_share=0.0), tiny_pipeline)
    apart = dataclasses.replace(PLAIN, outside={"few_steps": FEW, "aligned": Generator(lora=lora)}, heldout_groups=1)
    assert apart.held_out_kinds == ["heldout", "outside", "shifted", "concepts"]
    assert PLAIN.held_out_kinds == ["heldout", "shifted", "concepts"]
    for kind in ("train", "outside"):
        ensure_pairs(kind, tmp_path / kind, tiny_pipeline, apart)
    with pytest.raises(ValueError, match="pairs.outside: got no generators"):
        write_pairs("outside", tmp_path / "none", tiny_pipeline, PLAIN)


def test_held_out_and_outside_lists_have_the_same_captions(tiny_pipeline, tmp_path):
    config = dataclasses.replace(TINY, outside={"long": Generator(num_steps=(5, 5))})
    for kind in ("heldout", "outside"):
        ensure_pairs(kind, tmp_path / kind, tiny_pipeline, config)
    inside, outside = (LatentPairs(tmp_path / kind, batch_size=4) for kind in ("heldout", "outside"))
    assert inside.prompts == outside.prompts and all(is_held_out(parse_caption(prompt)) for prompt in inside.prompts)
    assert len(outside.in_order()[0].chosen) == 4 * 3


def test_pairs_of_other_generators_are_not_taken_for_these(tiny_pipeline, tmp_path):
    lora = save_lora(tmp_path / "lora")
    config = dataclasses.replace(TINY, groups=2, generators=MIXED | {"aligned": Generator(lora=lora)})
    folder = ensure_pairs("train", tmp_path / "pairs", tiny_pipeline, config)
    before = contents(folder)
    shutil.move(lora, tmp_path / "moved")
    moved = MIXED | {"aligned": Generator(lora=str(tmp_path / "moved"))}
    outside = {"long": Generator(num_steps=(21, 21), guidance_scale=(1.0, 1.0))}
    ensure_pairs("train", folder, tiny_pipeline, dataclasses.replace(config, generators=moved, outside=outside))
    assert contents(folder) == before
    save_lora(tmp_path / "moved", scale=0.2)
    with pytest.raises(ValueError, match="generators.aligned.weights: got"):
        ensure_pairs("train", folder, tiny_pipeline, dataclasses.replace(config, generators=moved))
    few = MIXED | {"few": Generator(num_steps=(1, 3), guidance_scale=(1.0, 1.0))}
    with pytest.raises(ValueError, match=r"generators.few.num_steps: got \[1, 3\]; expected \[1, 2\], as in"):
        ensure_pairs("train", folder, tiny_pipeline, dataclasses.replace(TINY, groups=2, generators=few))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generator(num_steps=(5, 4)), r"generator.num_steps: got \[5, 4\]; expected \[lowest, highest\]"),
        (lambda: Generator(guidance_scale=(2.0, 1.0)), "generator.guidance_scale: got"),
        (lambda: Generator(num_steps=(0, 4)), r"generator.num_steps\[0\]: got 0"),
        (lambda: Generator(weight=0), "generator.weight: got 0"),
        (lambda: PairsConfig(generators={}), "pairs.generators: got none; expected at least one"),
        (lambda: PairsConfig(generators={"own samples": FEW}, own_share=0.5), "'own samples'.*; expected another name"),
        (lambda: Generator("blurred"), "generator.render: got 'blurred'"),
        (lambda: Generator("spoiled", lora="x"), "generator.render: got spoiled with weights"),
        (
            lambda: PairsConfig(emphasis={"fil": 2.0}),
            "pairs.emphasis: unknown concept 'fil'; did you mean 'fill'",
        ),
        (lambda: PairsConfig(raters=0), "pairs.raters: got 0"),
        (lambda: PairsConfig(tie_gap=-0.1), "pairs.tie_gap: got -0.1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
