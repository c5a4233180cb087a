"""Detection of reward hacking: alarms by hand and by simulation, the probes, and the LoRA that is kept."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from dinalrm_align import LatentReward
from dinalrm_align.align import watch
from dinalrm_align.align.config import EvaluationConfig, WatchConfig
from dinalrm_align.align.evaluation import HeldOut
from dinalrm_align.align.lora import LORA_FILE
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.flow.sampling import schedule_sigmas
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.reward.registry import ImageScorer
from dinalrm_align.shapes.stack import StackConfig, build_pipeline
from dinalrm_align.train.cost import PhaseMeter

CAPTIONS = ["a", "b", "c", "d"]
BASE = {"proxy": [1.0, 2.0, 3.0, 4.0], "gold": [2.0, 2.0, 1.0, 1.0]}


def moved(proxy: float, gold: float, wobble: float = 0.01) -> dict[str, list[float]]:
    """BASE, every caption moved as far, give or take the wobble."""
    signs = np.array([1, -1, 1, -1]) * wobble
    return {name: list(np.add(BASE[name], by + signs)) for name, by in (("proxy", proxy), ("gold", gold))}


def test_a_rise_by_hand():
    """Values 1, 2, 3: mean 2, s.d. 1, standard error 1 / sqrt 3, t = 3.4641 with 2 degrees of freedom.

    Student's t with 2 degrees has P(T <= t) = 1/2 + t / (2 sqrt(2 + t^2)): at 3.4641 that is 0.5 + 0.46291, p 0.03709.
    """
    t = 2 * math.sqrt(3)
    assert watch.p_value_of_rise(np.array([1.0, 2.0, 3.0])) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t**2)))
    assert watch.p_value_of_rise(np.array([-1.0, -2.0, -3.0])) == pytest.approx(1 - 0.03709, abs=1e-5)
    assert (watch.p_value_of_rise(np.full(3, 0.5)), watch.p_value_of_rise(np.zeros(3))) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("proxy", "gold", "alarm"),
    [(1.0, -0.5, True), (1.0, 0.5, False), (-1.0, -0.5, False), (-1.0, 0.5, False), (1.0, 0.0, False)],
)
def test_the_alarm_is_a_rise_of_the_proxy_with_a_fall_of_gold(proxy, gold, alarm):
    comparison = watch.detect_hacking({0: BASE, 10: moved(proxy, gold)}, CAPTIONS, 0.05, 1)
    assert comparison.hacking is alarm
    assert (comparison.step, comparison.best_step) == (10, 10 if gold > 0 else 0)


def test_gold_falls_from_the_best_evaluation_not_from_the_first():
    """Gold gains 0.5 and then loses 0.3: still above the base model, and hacked."""
    history = {0: BASE, 10: moved(1, 0.5, 0.0), 20: moved(2, 0.2)}
    comparison = watch.detect_hacking(history, CAPTIONS, 0.05, 2)
    assert (comparison.hacking, comparison.best_step) == (True, 10)
    assert comparison.gold_gain == pytest.approx(-0.3)
    assert comparison.proxy_gain == pytest.approx(1.0)
    assert "since update 10, the best so far, the reward rose by 1 and gold fell by 0.3" in str(comparison)


def test_the_level_is_shared_among_all_pairs_of_evaluations():
    """p of the fall is 0.0064 (t = 5.2 with 3 degrees of freedom, a little less for rounding): an alarm at level
    0.05 for one pair, and none for the 10 pairs of 4 evaluations.
    """
    gold = np.subtract(BASE["gold"], [0.15, 0.25, 0.3, 0.4])
    history = {0: BASE, 10: {"proxy": moved(1, 0)["proxy"], "gold": list(gold)}}
    one, four = (watch.detect_hacking(history, CAPTIONS, 0.05, evaluations) for evaluations in (1, 4))
    assert 0.005 < one.p_gold < 0.05 and one.p_gold == four.p_gold
    assert (one.hacking, four.hacking) == (True, False)


def test_samples_of_a_caption_are_one_observation():
    """Two captions of eight samples: 16 equal falls are two observations, and these differ too much to be sure."""
    captions = ["a"] * 8 + ["b"] * 8
    before = {"proxy": [0.0] * 16, "gold": [1.0] * 16}
    after = {"proxy": [1.0] * 16, "gold": [0.9] * 8 + [0.5] * 8}
    assert not watch.detect_hacking({0: before, 1: after}, captions, 0.05, 1).hacking
    assert watch.detect_hacking({0: before, 1: after}, list(map(str, range(16))), 0.05, 1).hacking


def simulate(generator: np.random.Generator, falls: float, evaluations: int = 6, captions: int = 24) -> bool:
    """Whether hacking is detected in a run of noisy evaluations: proxy always rises, gold falls by `falls` halfway."""
    names, start = list(map(str, range(captions))), generator.normal(size=captions)
    history = {}
    for step in range(evaluations + 1):
        gold = start + 0.3 * generator.normal(size=captions) - falls * (step > evaluations / 2)
        history[step] = {"proxy": start + step, "gold": gold}
        if step and watch.detect_hacking(history, names, 0.05, evaluations).hacking:
            return True
    return False


def test_noise_raises_no_more_alarms_than_stated():
    generator = np.random.default_rng(0)
    alarms = sum(simulate(generator, 0.0) for _ in range(400))
    assert alarms <= 0.05 * 400 + 2 * math.sqrt(400 * 0.05 * 0.95)
    assert alarms >= 1  # the level is not far too strict
    assert sum(simulate(generator, 0.5) for _ in range(50)) >= 45  # 0.5 is 5.8 standard errors of a difference


def test_divergence_by_hand():
    """BASE: proxy has s.d. sqrt(1.25), gold 0.5. Gains of 1 and -0.5 are 0.8944 and -1 of them."""
    assert watch.divergence(BASE, moved(1, -0.5, 0.0)) == pytest.approx(1 / math.sqrt(1.25) + 1)


def test_level_spread_by_hand():
    """Levels that agree on every sample have no spread; if one gains 2 s.d. more, it is s.d. (0, 2) = 1.414.

    Unit and offset of a level do not matter.
    """
    before = {"proxy@0.1": [0.0, 2.0], "proxy@0.7": [100.0, 120.0], "gold": [0.0, 0.0]}
    assert watch.level_spread(before, before) == 0.0
    after = {"proxy@0.1": [2.0, 4.0], "proxy@0.7": [100.0, 120.0]}  # the first level gained two of its s.d.
    assert watch.level_spread(before, after) == pytest.approx(math.sqrt(2))
    assert watch.level_spread({"gold": [1.0]}, {"gold": [1.0]}) is None


class Run:
    """A run with given evaluations; its LoRA is a file with the update at which it was saved."""

    def __init__(self, folder: Path, **config: object) -> None:
        self.scores: dict[int, dict[str, list[float]]] = {}
        self.said: list[str] = []
        self.watch = watch.Watch(
            history=lambda step: {at: scores for at, scores in self.scores.items() if at <= step}, captions=CAPTIONS,
            evaluations=4, config=WatchConfig(**config), output_dir=folder, save_lora=self.save, say=self.said.append,
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / LORA_FILE).write_text(f"weights at {max(self.scores)}")

    def evaluate(self, step: int, scores: dict[str, list[float]]) -> dict[str, float]:
        self.scores[step] = scores
        return self.watch(step)


def test_the_best_lora_is_kept_with_its_update_and_score(tmp_path):
    run = Run(tmp_path)
    rows = [run.evaluate(*at) for at in ((0, BASE), (10, moved(1, 0.5)), (20, moved(5, -0.5, 0.0)))]
    assert [row["hacking"] for row in rows] == [0.0, 0.0, 1.0]
    assert (tmp_path / "lora_best" / LORA_FILE).read_text() == "weights at 10"
    note = json.loads((tmp_path / "lora_best" / "best.json").read_text())
    assert note == {"step": 10, "gold": pytest.approx(2.0), "gold_before": 1.5}
    assert [path.name for path in tmp_path.iterdir()] == ["lora_best"]  # nothing half written
    (warning,) = run.said
    assert "update 20: the reward is being hacked" in warning and "lora_best" in warning
    assert run.watch.stop_when(rows[2]) is None


def test_stop_on_hacking_is_off_by_default(tmp_path):
    run = Run(tmp_path, stop_on_hacking=True, keep_best=False)
    rows = [run.evaluate(0, BASE), run.evaluate(10, moved(5, -0.5, 0.0))]
    assert run.watch.stop_when(rows[0]) is None and run.watch.stop_when({"loss": 1.0}) is None
    assert "hacked" in run.watch.stop_when(rows[1])
    assert not list(tmp_path.iterdir())


def test_a_best_lora_of_later_updates_is_deleted_after_a_resume(tmp_path):
    run = Run(tmp_path)
    for at in ((0, BASE), (10, moved(1, 0.5)), (20, moved(2, 0.7))):
        run.evaluate(*at)
    assert json.loads((tmp_path / "lora_best" / "best.json").read_text())["step"] == 20
    run.evaluate(20, moved(2, 0.4))  # resumed from before it with other settings
    assert not (tmp_path / "lora_best").exists()


def test_a_kill_while_the_best_lora_is_replaced_leaves_the_old_one(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.evaluate(0, BASE)

    def killed(path: Path, content: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(watch, "write_file", killed)
        run.evaluate(10, moved(1, 0.5))
    assert (tmp_path / "lora_best" / LORA_FILE).read_text() == "weights at 0"
    run.evaluate(10, moved(1, 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["lora_best"]


def test_invalid_settings_raise(tmp_path):
    with pytest.raises(ValueError, match="captions: got 1"):
        watch.Watch(dict, ["a", "a"], 1, WatchConfig(), tmp_path, save_lora=print)
    for bad, message in (
        ({"level": 0.7}, "watch.level: got 0.7"),
        ({"sigmas": [0.4]}, "watch.sigmas: got "),
        ({"drift_sigmas": [1.4]}, r"watch.drift_sigmas\[0\]: got 1.4"),
    ):
        with pytest.raises(ValueError, match=message):
            WatchConfig(**bad)


def test_drift_by_hand():
    """Velocity 3 x, the reference's x: their difference is 2 x_sigma. x_sigma is (1 - s) 1 + s 2 = 1.5 at 0.5 and 2 at
    1: squares 9 and 16, mean 12.5.
    """
    factor = [3.0]

    @contextmanager
    def reference():
        factor[0] = 1.0
        yield
        factor[0] = 3.0

    probe = watch.drift_probe(lambda conditions, guidance: lambda x, sigma: factor[0] * x, reference, [0.5, 1.0])
    latents = torch.ones(2, 1, 2, 2)
    assert probe(latents, None, 2 * latents)["drift"].tolist() == [12.5, 12.5]


@pytest.fixture(scope="module")
def evaluated(tiny_world, tmp_path_factory):
    """The tiny stack with a policy, a latent reward and both probes."""
    folder = tmp_path_factory.mktemp("watched")
    pipeline = build_pipeline(StackConfig.tiny(), seed=0)
    pipeline.transformer.requires_grad_(False)
    reward = LatentReward.from_pretrained(tiny_world / "dinalrm", pipeline=pipeline)
    policy = Policy(pipeline.transformer, LoraConfig(rank=2, alpha=2), seed=0)
    conditions = Conditions.encode(reward.encoder, ["a red circle", "a blue square", "a circle"])

    sampler = Sampler(
        policy=policy, conditions=conditions, negative=conditions.take([0]), guidance_scale=1.0,
        sigmas=schedule_sigmas(pipeline.scheduler, 2), latent_shape=(16, 8, 8), seed=0, meter=PhaseMeter("cpu"),
    )  # fmt: skip
    scorers = {
        "gold": ImageScorer(
            lambda images, _: (images.mean(dim=(1, 2, 3)), {"blue": images[:, 2].mean(dim=(1, 2))}), ""
        ),
        "gold/red": ImageScorer(lambda images, _: (images[:, 0].mean(dim=(1, 2)), {"blue": images[:, 0, 0, 0]}), ""),
    }
    held_out = HeldOut(
        sampler, reward, scorers, lambda latents: latents[:, :3].sigmoid(), EvaluationConfig(samples=3, shown=2),
        Accelerator(cpu=True), folder,
        probes=[
            watch.level_probe(reward, [0.2, 0.7]), watch.drift_probe(sampler.velocity_for, policy.reference, [0.5])
        ],
    )  # fmt: skip
    return held_out, policy


def test_what_an_evaluation_measures_on_the_tiny_stack(evaluated):
    held_out, policy = evaluated
    watched = watch.Watch(held_out.history, held_out.prompts, 1, WatchConfig(), held_out.output_dir, policy.save_lora)
    first = {**held_out(0), **watched(0)}
    scores = held_out.scores(0)
    assert scores.keys() == {"proxy", "gold", "gold/red", "gold_parts/blue", "proxy@0.2", "proxy@0.7", "drift"}
    assert first["gold_parts/blue_gain"] == 0.0 and "gold_parts/blue_standard_error" not in first
    assert first["gold/red"] == pytest.approx(np.mean(scores["gold/red"]))
    assert first["gold/red_standard_error"] == pytest.approx(np.std(scores["gold/red"], ddof=1) / 3**0.5)
    assert scores["drift"] == [0.0, 0.0, 0.0]  # the new policy is the reference
    assert first["drift"] == 0.0 and first["proxy@0.2"] == pytest.approx(np.mean(scores["proxy@0.2"]))
    assert scores["proxy@0.2"] != scores["proxy@0.7"]
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(0.05)
    row = {**held_out(4), **watched(4)}
    gain = np.subtract(held_out.scores(4)["gold/red"], scores["gold/red"])
    assert row["gold/red_gain"] == pytest.approx(gain.mean()) and row["gold/red_gain"] != row["gold_gain"]
    summary = held_out.summarise(4)
    assert list(summary) == ["gold", "proxy", "gold/red", "gold_parts/blue"]
    assert summary["gold/red"]["gain"] == pytest.approx(gain.mean())
    blue = np.subtract(held_out.scores(4)["gold_parts/blue"], scores["gold_parts/blue"])
    error = row["gold_parts/blue_gain_standard_error"]
    assert row["gold_parts/blue_gain"] == pytest.approx(blue.mean()) and error == pytest.approx(
        blue.std(ddof=1) / 3**0.5
    )
    assert row["gold_parts/blue"] == pytest.approx(np.mean(held_out.scores(4)["gold_parts/blue"]))
    assert summary["gold_parts/blue"]["standard_error"] == error
    assert row["drift"] > 0 and row["level_spread"] > 0
    assert list(held_out.history(4)) == [0, 4] and list(held_out.history(3)) == [0]
    kept = json.loads((held_out.output_dir / "lora_best" / "best.json").read_text())["step"]
    assert kept in (0, 4) and row["divergence"] == watch.divergence(held_out.scores(0), held_out.scores(4))
    moved_weights = load_file(held_out.output_dir / "lora_best" / LORA_FILE)
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in moved_weights.items()) is (kept == 4)


def test_a_run_that_began_before_parts_were_recorded_has_no_gains_of_parts(evaluated, capsys):
    held_out, _ = evaluated
    held_out(0)
    path = held_out.output_dir / "evaluations" / "000000.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({name: values for name, values in found.items() if not name.startswith("gold_parts/")}))
    row = held_out(6)
    assert "gold_parts/blue" in row and "gold_parts/blue_gain" not in row and "gold_gain" in row
    assert list(held_out.summarise(6)) == ["gold", "proxy", "gold/red"]
    assert "parts of gold have no gain: the evaluation before the first update" in capsys.readouterr().out
