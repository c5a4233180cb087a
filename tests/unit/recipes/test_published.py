"""recipes/*_sd35*.yaml: values of public runs on SD3.5-M."""

import dataclasses
import pickle
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from paths import RECIPES

from dinalrm_align import LatentReward, load_reward
from dinalrm_align.align import resolve as resolve_module
from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import resolve
from dinalrm_align.align.savings.config import SavingsRun
from dinalrm_align.eval import evaluator
from dinalrm_align.eval.evaluator import Candidate
from dinalrm_align.flow.noise import sample_sigma, scheduler_sigmas, seeded_generator
from dinalrm_align.models.specs import MODELS, resolve_model
from dinalrm_align.reward.checkpoint import RELEASED_DEFAULTS, read_checkpoint
from dinalrm_align.reward.config import RewardConfig

RUNS = {"refl": ReflRun, "dpo": DpoRun, "grpo": GrpoRun, "lpo": LpoRun, "nft": NftRun}


@pytest.fixture
def resolved(monkeypatch, tmp_path):
    """resolved(method, *options): the settings of a new run with --model sd35."""
    monkeypatch.chdir(tmp_path)

    def settings(method: str, *options: str):
        kind, recipe = RUNS[method], RECIPES / f"{method}_sd35.py"
        return resolve(kind, "", recipe, ["--model=sd35", *options], gradient=method == "refl").run

    return settings


def read(name: str) -> dict:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def test_the_second_settings_file_of_nft_overrides_all_of_the_first():
    first, second = read("nft_sd35"), read("nft_sd35_flow_factory")
    for section, values in first.items():
        assert section in second, section
        assert not isinstance(values, dict) or values.keys() <= second[section].keys(), section


def test_nft_as_in_its_public_code(resolved):
    run = resolved("nft")
    assert (run.nft.advantage_std, run.nft.levels, run.nft.earliest, run.nft.latest) == ("global", 9, 0.0, 1.0)
    assert (run.nft.keep_equal, run.nft.schedule, run.nft.kl_beta, run.optim.lr) == (True, "diffusers", 1e-4, 3e-4)
    assert (run.nft.groups * run.nft.group_size * run.nft.levels) % run.loop.accumulate == 0


def test_nft_as_in_flow_factory(resolved):
    run = resolved("nft", f"--config={RECIPES / 'nft_sd35_flow_factory.yaml'}")
    assert (run.nft.num_steps, run.nft.groups, run.nft.group_size, run.nft.advantage_std) == (14, 48, 16, "group")
    assert (run.nft.levels, run.nft.kl_beta, run.optim.lr, run.nft.schedule) == (4, 0.0, 1e-4, "linear")
    assert (run.nft.old_slope, run.nft.old_limit, run.loop.accumulate) == (0.001, 0.5, 384)
    levels = torch.arange(14, 0, -1) / 14  # Flow-Factory trains where 1000 sigma >= 500, but for the last such step
    noisy = int((3 * levels / (1 + 2 * levels) >= 0.5).sum()) - 1
    assert round(run.nft.latest * run.nft.num_steps) == noisy == 10


def test_dpo_draws_the_levels_that_flow_grpo_draws(resolved):
    """flow_grpo: entry floor(1000 u) of the scheduler's levels, u logit-normal(0, 1); median .751, 6.5 % below .4."""
    run = resolved("dpo")
    drawn = sample_sigma(run.dpo.sigma.density, 100_000, generator=seeded_generator(0), **run.dpo.sigma.parameters())
    u = torch.sigmoid(torch.randn(100_000, generator=seeded_generator(1)))
    source = scheduler_sigmas()[(1000 * u).long()]
    for sigma in (drawn, source):
        assert sigma.median().item() == pytest.approx(0.751, abs=0.004)
        assert (sigma < 0.4).float().mean().item() == pytest.approx(0.065, abs=0.004)
    for share in (0.05, 0.25, 0.75, 0.95):
        assert drawn.quantile(share).item() == pytest.approx(source.quantile(share).item(), abs=0.006)
    assert (run.dpo.draws, run.dpo.sampler, run.dpo.beta, run.optim.lr) == (39, "reference", 100.0, 3e-4)


def test_lpo_updates_once_per_four_pairs(resolved):
    run = resolved("lpo")
    states = run.lpo.batch_size * (run.lpo.num_steps - 1)
    assert run.lpo.steps is None and states / (run.lpo.minibatches * run.lpo.epochs) == 4
    assert run.loop.steps == 5 * 4000 // (4 * run.lpo.batch_size) * run.lpo.minibatches
    assert run.loop.steps / run.evaluation.every <= 50 and run.loop.steps / run.loop.checkpoint_every <= 50


@pytest.mark.parametrize(
    ("reward", "rate"),
    [
        ("dinalrm", 1e-4),
        ("pickscore", 1e-4),
        ("hpsv3", 3e-5),
        ("hpsv3=/some/folder", 3e-5),
        ("hpsv3 + 0.1*pickscore", 3e-5),
        ("my_module:hpsv3", 1e-4),
        ("someone/hpsv3", 1e-4),
    ],
)
def test_hpsv3_has_its_own_learning_rate(resolved, reward, rate):
    run = resolved("refl", f"--reward={reward}")
    assert run.optim.lr == rate and run.refl.kl_weight == 0 and run.policy.rank == 32
    assert resolved("refl", f"--reward={reward}", "--optim.lr=1e-3").optim.lr == 1e-3
    assert resolved("grpo", f"--reward={reward}").optim.lr == 5e-5  # has no such file


def test_the_settings_of_a_reward_are_for_sd35_only(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = resolve(ReflRun, "", RECIPES / "refl_sd35.py", ["--model=shapes", "--reward=hpsv3"], gradient=True).run
    assert run.optim.lr == 1e-3


def test_grpo_stops_at_a_mismatch_that_the_clip_would_hide(resolved):
    run = resolved("grpo")
    assert run.grpo.largest_mismatch == pytest.approx(1e-6) and run.grpo.largest_mismatch < run.grpo.clip_range


def test_whatever_meets_a_released_reward_reads_128_tokens(official):
    """As its training code; the default of a preparation is the model's, and of the counted savings the same."""
    lengths = [RewardConfig().text_length, RELEASED_DEFAULTS["text_length"], MODELS["sd35"].text_length]
    assert [*lengths, SavingsRun().text_length, read("train_reward_sd35")["reward"]["text_length"]] == [128] * 5
    assert read_checkpoint(official).config.text_length == 128
    prepare = runpy.run_path(str(RECIPES / "prepare_pairs.py"))["settings_and_model"]
    for words, expected in ((["--model=sd35"], 128), (["--model=sd35", "--text_length=256"], 256)):
        assert prepare(["--source=x", *words])[0].text_length == expected


@pytest.mark.parametrize("method", sorted(RUNS))
def test_every_alignment_recipe_takes_a_text_length(method, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kind, recipe = RUNS[method], RECIPES / f"{method}_sd35.py"
    for words, expected in (([], 128), (["--text_length=77"], 77)):
        assert resolve(kind, "", recipe, ["--model=sd35", *words]).spec.text_length == expected
    file = resolve(kind, "", recipe, ["--model=sd35", f"--config={settings_file(tmp_path, 'text_length: 300')}"])
    assert file.spec.text_length == 300


def settings_file(folder: Path, content: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(content)
    return path


def test_a_reward_can_be_loaded_and_evaluated_with_another_text_length(tiny_reward_dir):
    own = LatentReward.from_pretrained(tiny_reward_dir)
    other = LatentReward.from_pretrained(tiny_reward_dir, text_length=9)
    assert (own.config.text_length, other.config.text_length, other.encoder.text_length) == (16, 9, 9)
    assert own(torch.zeros(1, 16, 8, 8), ["a"]) != other(torch.zeros(1, 16, 8, 8), ["a"])
    assert pickle.loads(pickle.dumps(other)).config.text_length == 9
    for candidate, expected in ((None, 16), (9, 9)):
        described = Candidate.from_checkpoint(tiny_reward_dir, lambda: None, candidate)
        assert described.config.text_length == expected
    part = load_reward(f"dinalrm={tiny_reward_dir}", options={"dinalrm": {"text_length": 9}})
    assert part.text_lengths == {9}


@pytest.mark.parametrize(("words", "expected"), [([], (32, 32)), (["--size=48"], (48, 48))])
def test_an_evaluation_resizes_images_to_the_size_that_the_reward_was_trained_at(
    words, expected, tiny_world, tmp_path, monkeypatch
):
    """Not to the size that the policy is aligned at; for SD3.5-M these are 1024 and 512."""
    main = runpy.run_path(str(RECIPES / "evaluate_reward.py"))["main"]
    spec = dataclasses.replace(resolve_model(str(tiny_world))[0], reward_size=32)
    monkeypatch.setattr(resolve_module, "resolve_model", lambda name: (spec, "a model"))
    seen = []

    def stop(sets: object, encoders: object, size: tuple[int, int], *rest: object) -> None:
        seen.append(size)
        raise ValueError("far enough")

    monkeypatch.setattr(evaluator, "Evaluator", stop)
    (tmp_path / "latents").mkdir()
    with pytest.raises(ValueError, match="far enough"):
        main(
            [f"--test_sets={{own: {tmp_path / 'latents'}}}", "--device=cpu", f"--output_dir={tmp_path / 'out'}", *words]
        )
    assert seen == [expected]
    assert (MODELS["sd35"].height, MODELS["sd35"].reward_size) == (512, 1024)
