"""The gold rewards of a run: tried on two samples, and one copy in memory of what is also trained on."""

import json
import shutil

import pytest
import torch
from paths import RECIPES
from tiny_clip import save_clip

from dinalrm_align.align import gold as gold_module
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import resolve
from dinalrm_align.align.setup import prepare, prepare_evaluation
from dinalrm_align.reward.pixel.clip import ClipReward
from dinalrm_align.reward.registry import ImageScorer, load_reward, sharing


@pytest.fixture
def world(tmp_path, tiny_world):
    """The tiny world with a pixel reward."""
    for name in ("pipeline", "dinalrm"):
        (tmp_path / name).symlink_to(tiny_world / name)
    save_clip(tmp_path / "pixel")
    (tmp_path / "prompts.txt").write_text("red circle\nblue square\na small red circle on white\n")
    return tmp_path


def resolved_run(world, *options):
    prompts = world / "prompts.txt"
    words = [f"--model={world}", f"--prompts={prompts}", f"--eval_prompts={prompts}", f"--output_dir={world / 'run'}"]
    words += ["--device=cpu", "--evaluation.samples=12", "--policy.rank=2", "--profile_every=0", *options]
    return resolve(ReflRun, "", RECIPES / "refl_sd35.py", words, gradient=True)


@pytest.fixture
def loads(monkeypatch):
    """The sources from which CLIP models are loaded."""
    found, load = [], ClipReward.from_pretrained.__func__

    def count(kind, source, **options):
        found.append(source)
        return load(kind, source, **options)

    monkeypatch.setattr(ClipReward, "from_pretrained", classmethod(count))
    return found


def test_gold_is_tried_on_the_first_and_the_longest_prompt(world, monkeypatch):
    """At full size, one batch of all samples took 400 s without a line."""
    seen, said = [], []

    def score(images, prompts):
        seen.append((tuple(images.shape), list(prompts)))
        return torch.zeros(len(images)), {}

    monkeypatch.setattr(gold_module, "load_image_scorer", lambda *_, **options: ImageScorer(score, ""))
    resolved = resolved_run(world, "--gold=pixel")
    samples = ["red circle", "blue square", "a small red circle on white"] * 4
    gold_module.load_gold(resolved, samples, torch.device("cpu"), said.append)
    assert seen == [((2, 3, *resolved.image_size), [samples[0], samples[2]])]
    assert len(said) == 1 and said[0].startswith("gold: loaded")


@pytest.mark.parametrize(
    ("options", "notice"),
    [
        (("--reward=pixel", "--gold=pixel"), True),
        (("--reward=dinalrm + 0.2*pixel", "--gold=0.5*pixel", "--anchor.reward=pixel"), True),
        (("--gold=pixel",), False),  # and gold/pixel, which the embedded world adds
    ],
)
def test_a_pixel_reward_is_loaded_once_for_training_and_for_gold(world, loads, capsys, options, notice):
    resolved = resolved_run(world, *options)
    setup = prepare(resolved)
    scorers = prepare_evaluation(setup).scorers
    assert loads == [str(world / "pixel")]
    assert ("is also trained on" in capsys.readouterr().out) == notice
    images, prompts = torch.rand(2, 3, 64, 64), ["red circle", "blue square"]
    alone = load_reward("pixel", spec=resolved.spec)
    weight = 0.5 if "+" in options[0] else 1
    torch.testing.assert_close(scorers["gold"](images, prompts), weight * alone.score_images(images, prompts))
    if options[0] == "--reward=pixel":
        assert setup.reward.vae is setup.pipeline.vae  # decodes, although gold loaded it without a VAE
        assert setup.identity["reward"] == setup.identity["gold"] == alone.fingerprint()


@pytest.mark.parametrize("options", [["--reward=dinalrm + 0.2*pixel", "--gold=0.5*pixel"], ["--gold=oracle"]])
def test_the_judges_dtype_reaches_every_image_reward_of_a_run(world, options):
    """Of training, the anchor, gold, and the embedded world's gold/pixel; they share one copy."""
    (world / "prompts.txt").write_text("a small red circle on white\na large blue square on gray\n")
    anchor = ["--anchor.reward=pixel"] if "+" in options[0] else []
    resolved = resolved_run(world, *options, *anchor, "--memory.judge_dtype=bfloat16")
    setup = prepare(resolved)
    prepare_evaluation(setup)
    (judge,) = setup.copies.values()
    assert {parameter.dtype for parameter in judge.parameters()} == {torch.bfloat16}
    assert setup.policy.transformer.dtype == torch.float32
    assert load_reward("pixel", spec=resolved.spec).fingerprint() != judge.fingerprint()
    if anchor:
        latents = torch.randn(2, *setup.latent_shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        (gradient,) = torch.autograd.grad(setup.anchor.reward(latents, ["red circle", "blue square"]).sum(), latents)
        assert bool(gradient.isfinite().all()) and gradient.any()


def test_the_models_latent_reward_as_gold_has_the_models_pipeline(world, tiny_world):
    """A released config names its base model on the hub, also where the pipeline is a folder."""
    (world / "dinalrm").unlink()
    copy = shutil.copytree(tiny_world / "dinalrm", world / "dinalrm")
    config = json.loads((copy / "config.json").read_text()) | {"base_model_id": "owner/not-here"}
    (copy / "config.json").write_text(json.dumps(config))
    resolved = resolved_run(world, "--reward=pixel", "--gold=dinalrm")
    gold = gold_module.load_gold(resolved, ["red circle"], torch.device("cpu"), print)
    assert gold["gold"](torch.rand(1, 3, 64, 64), ["red circle"]).shape == (1,)


def test_rewards_are_shared_within_the_context_only(world):
    spec = resolved_run(world).spec
    copies = {}
    with sharing(copies):
        first, again = load_reward("pixel", spec=spec), load_reward(f"pixel={world / 'pixel'}", spec=spec)
        other = load_reward("pixel", spec=spec, dtype=torch.bfloat16)
    assert first is again and other is not first and len(copies) == 2
    assert load_reward("pixel", spec=spec) is not first
