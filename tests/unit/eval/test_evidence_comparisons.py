"""The comparisons of examples/evidence on made-up runs: what is chosen, matched, shared and reported."""

import json
from argparse import Namespace

import frontier
import gains_by_kind
import hacking
import methods
import numpy as np
import pytest
from _curves import kind_of, kind_table
from _runs import Prompts, parse
from _unguided import Unguided
from frontier import Trial
from report_runs import GOLD, make_run

from dinalrm_align.eval.report.entries import read_entries
from dinalrm_align.eval.report.intervals import seeds_by_captions

PARTS = ("faithfulness", "faithfulness/objects", "aesthetics")
NOISE = np.array([-0.1, 0.1, -0.1, 0.1])
CAPTIONS = ["a small red circle on black", "a large green cross on white"]


def finish(job, out, gain, drift, **options):
    """Make the run of a job: evaluated at half of its updates and at the end, with half of the gain and drift."""
    steps = {2: (gain / 2, drift / 2), 4: (gain, drift)}
    seed, reward = job.options["seed"], job.options["reward"]
    gains = {step: list(mean + NOISE * (seed + 1)) for step, (mean, _) in steps.items()}
    folder = make_run(
        job.folder(out), gains, seed=seed, reward=reward, recipe=f"{job.method}_sd35", parts=PARTS, profiled=(1,),
        guidance_scale=1.2, **{"prompts": CAPTIONS * 2, **options},
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    drifts = {0: 0.0, **{step: value for step, (_, value) in steps.items()}}
    lines = [json.dumps(row | ({"drift": drifts[row["step"]]} if row["step"] in drifts else {})) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def few_figures(monkeypatch):
    """Leave out the curves of every part, which take seconds. tests/slow/test_examples.py draws them."""
    for module in (frontier, methods, hacking):
        monkeypatch.setattr(module, "draw_curves", lambda entries, folder, extra=(): [])


def plan_of(module, parser, out, *words, **changes):
    options, others = parse(parser, [str(out), *words])
    for name, value in changes.items():
        setattr(options, name, value)
    return module.Plan(options, others, Prompts.prepare(options))


@pytest.fixture
def plan(tmp_path):
    """Two rewards, two KL weights with two learning rates, two seeds."""
    trials = [Trial(2, 1e-3), Trial(2, 1e-4), Trial(6, 1e-3), Trial(6, 1e-4)]
    chosen = dict(method="refl", rewards=["dinalrm", "pixel"], trials=trials, updates=4)
    return plan_of(frontier, frontier.arguments("", "", [0, 1]), tmp_path, "--samples", "4", **chosen)


def test_the_best_learning_rate_of_every_kl_weight_is_kept_and_the_best_of_these_comes_first():
    gains = {Trial(2, 1e-3): 0.1, Trial(2, 1e-4): 0.2, Trial(6, 1e-3): 0.4, Trial(6, 1e-4): None, Trial(9, 1e-3): None}
    assert list(frontier.choose(gains).items()) == [(6, Trial(6, 1e-3)), (2, Trial(2, 1e-4))]
    assert frontier.choose({Trial(2, 1e-3): None}) == {}


def test_every_reward_gets_the_same_trials_and_reports_on_captions_that_no_trial_saw(plan):
    sweep = plan.sweep()
    settings = [[{**job.options, "reward": ""} for job in jobs.values()] for jobs in sweep.values()]
    assert settings[0] == settings[1] and len(settings[0]) == 4
    (first,) = (jobs for jobs in plan.seeds({"pixel": {6: Trial(6, 1e-3)}}).values())
    jobs = first[Trial(6, 1e-3)]
    assert [job.options["seed"] for job in jobs] == [0, 1]
    assert jobs[0].options["refl.kl_weight"] == 6 and jobs[0].options["refl.kl_unit"] == "reward_std"
    fresh, tuning = jobs[0].options["eval_prompts"], settings[0][0]["eval_prompts"]
    assert [
        plan.prompts.options(fresh, Namespace(samples=300, every=1, caption_seed=0))["evaluation.samples"]
        for fresh in (True, False)
    ] == [300, 256]  # 128 captions for tuning, each as often
    assert "fresh" in fresh and fresh != tuning
    assert len({job.name for jobs in sweep.values() for job in jobs.values()} | {job.name for job in jobs}) == 10


def test_equal_drift_by_hand(plan, tmp_path, capsys):
    """dinalrm gains 0.8 at drift 0.4, pixel 0.3 at 0.2: at drift 0.2 they have 0.4 and 0.3, after 2 and 4 updates.

    The noise of a caption is the same at both evaluations and for both rewards, so that the difference is 0.1 in all.
    """
    for jobs in plan.sweep().values():
        for one, job in jobs.items():
            finish(job, tmp_path, 0.5 if one.lr == 1e-3 else 0.1, 0.1)
    chosen = plan.chosen(plan.tuned())
    assert {one.lr for settings in chosen.values() for one in settings.values()} == {1e-3}
    for reward, settings in plan.seeds(chosen).items():
        for jobs in settings.values():
            for job in jobs:
                finish(job, tmp_path, *((0.8, 0.4) if reward == "dinalrm" else (0.3, 0.2)))
    frontier.report(plan)
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert not found["not_finished"] and found["chosen"]["pixel"][0] == [2, 1e-3]
    first, *_, last = found["equal_drift"]
    assert last["drift"] == pytest.approx(0.2) and first["drift"] == pytest.approx(0.05)
    assert [one["mean"] for one in last["gains"]["gold"]] == pytest.approx([0.4, 0.3, 0.1])
    assert [one["mean"] for one in last["gains"]["faithfulness/objects"]] == pytest.approx([0.2, 0.15, 0.05])
    difference = last["gains"]["gold"][2]
    assert (difference["seeds"], difference["captions"]) == (2, 2)
    assert difference["low"] == pytest.approx(0.1) and difference["detectable"] == pytest.approx(0, abs=1e-9)
    assert [one["updates"] for one in last["costs"]] == pytest.approx([2, 4])
    assert [one["seconds"] for one in last["costs"]] == pytest.approx([4, 8])
    text = (tmp_path / "frontier.md").read_text()
    assert "+0.100 [+0.100, +0.100], separated from 0 (2 seeds, 2 fresh captions" in text
    assert "holds" not in text.split("## How to read")[0] and "| dinalrm | 2 | 0.001 |" in text
    assert text.count("| dinalrm, KL 2, lr 0.001 | pixel, KL 6, lr 0.001 | 0.2000 | +0.400") == 1
    assert (tmp_path / "frontier.png").is_file()


def test_an_unfinished_comparison_says_what_is_missing(plan, tmp_path):
    for jobs in plan.sweep().values():
        for one, job in jobs.items():
            if one.lr == 1e-3:
                finish(job, tmp_path, 0.5, 0.1)
    with pytest.raises(SystemExit, match="no run on fresh captions has finished"):
        frontier.report(plan)
    chosen = {"dinalrm": {2: Trial(2, 1e-3)}, "pixel": {2: Trial(2, 1e-3)}}
    for settings in plan.seeds(chosen).values():
        finish(settings[Trial(2, 1e-3)][0], tmp_path, 0.3, 0.2)
    frontier.report(plan)
    text = (tmp_path / "frontier.md").read_text()
    assert "**Not finished, and left out: seeds_dinalrm_kl2_lr0.001_seed1" in text
    assert "failed or unfinished" in text and "one seed: not judged" in text


@pytest.mark.parametrize("kl", [2, 6])
def test_a_report_of_runs_without_a_common_seed_or_of_the_chosen_setting(plan, tmp_path, kl):
    """KL 2 is the chosen setting: one seed of each reward, but not the same. KL 6: the chosen setting has none."""
    for jobs in plan.sweep().values():
        for one, job in jobs.items():
            finish(job, tmp_path, 0.5 if one.kl == 2 else 0.1, 0.1)
    for seed, settings in enumerate(plan.seeds(plan.chosen(plan.tuned())).values()):
        (jobs,) = (jobs for one, jobs in settings.items() if one.kl == kl)
        finish(jobs[seed], tmp_path, 0.3, 0.2)
    frontier.report(plan)
    text = (tmp_path / "frontier.md").read_text()
    assert "at equal drift\n\n|" not in text and f"| dinalrm, KL {kl}, lr " in text and "Not finished" in text


def test_a_single_trial_needs_no_sweep(plan):
    plan.trials = [Trial(6, 1e-3)]
    assert plan.sweep() == {"dinalrm": {}, "pixel": {}}
    assert plan.chosen(plan.tuned()) == {"dinalrm": {6: Trial(6, 1e-3)}, "pixel": {6: Trial(6, 1e-3)}}


def test_trials_are_pairs_of_a_kl_weight_and_a_learning_rate():
    assert frontier.trial("6:3e-4") == Trial(6, 3e-4)
    with pytest.raises(frontier.ArgumentTypeError, match="got '6'; expected KL:LR"):
        frontier.trial("6")


@pytest.fixture
def oracle_plan(tmp_path):
    words = ["--samples", "4", "--nft.levels=1", "--refl.grad_steps=2"]
    chosen = dict(methods=["refl", "nft"], rewards=["dinalrm", "oracle"], sweep=True, rollout_guidance="default")
    return plan_of(methods, methods.arguments("", "", [0, 1]), tmp_path, *words, **chosen)


def test_a_sweep_keeps_the_samples_of_an_update():
    for method, trials in methods.SWEEPS.items():
        for name, factors in trials.items():
            groups = [
                value
                for key, value in factors.items()
                if key.partition(".")[2] in ("groups", "group_size", "batch_size")
            ]
            assert np.prod(groups) == pytest.approx(1), (method, name)
            assert "loop.steps" not in factors


def test_factors_scale_the_recipes_defaults():
    defaults = {"optim.lr": 7e-4, "grpo.groups": 6, "loop.steps": 20}
    assert methods.scaled(defaults, {"optim.lr": 0.5, "grpo.groups": 0.5}) == {"optim.lr": 3.5e-4, "grpo.groups": 3}
    with pytest.raises(ValueError, match="grpo.groups: got 6 x 0.25; expected a whole number"):
        methods.scaled(defaults, {"grpo.groups": 0.25})


def test_every_trial_of_the_oracle_fits_the_recipes(tmp_path):
    chosen = dict(methods=list(methods.KINDS), rewards=list(methods.ALL_REWARDS), sweep=True, rollout_guidance="own")
    plan = plan_of(methods, methods.arguments("", "", [0]), tmp_path, **chosen)
    sweep = plan.sweep()
    assert {*sweep} == {"dpo", "grpo", "nft"} and sweep["grpo"]["group x 2"].options["grpo.groups"] == 3
    assert sweep["nft"]["default"].options["nft.guidance_scale"] == "null"
    rewards = [(method, reward) for method, reward in plan.defaults_jobs()]
    assert ("lpo", "pixel") not in rewards and ("refl", "oracle") not in rewards and len(rewards) == 12


def test_settings_of_one_method_do_not_reach_the_others(oracle_plan):
    jobs = {key: runs[0].options for key, runs in oracle_plan.defaults_jobs().items()}
    assert [*jobs] == [("refl", "dinalrm"), ("nft", "dinalrm"), ("nft", "oracle")]
    assert "nft.levels" not in jobs["refl", "dinalrm"] and jobs["nft", "oracle"]["nft.levels"] == "1"
    assert "refl.grad_steps" not in jobs["nft", "oracle"]


def test_the_ceiling_is_the_best_trial_and_three_times_its_updates(oracle_plan):
    jobs = oracle_plan.ceiling_jobs({"nft": "lr x 2"})
    tuned, longer = (jobs["nft", f"oracle, {arm}"][0].options for arm in ("tuned", "longer"))
    default = oracle_plan.defaults("nft")
    assert tuned["optim.lr"] == longer["optim.lr"] == pytest.approx(2 * default["optim.lr"])
    assert "loop.steps" not in tuned and longer["loop.steps"] == 3 * default["loop.steps"]
    assert [arm for _, arm in oracle_plan.ceiling_jobs({"nft": "default"})] == ["oracle, longer"]
    assert oracle_plan.ceiling_jobs({"nft": None}) == {}


def test_shares_of_the_oracles_gain_with_and_without_guidance(oracle_plan, tmp_path, monkeypatch):
    """With guidance, NFT gains 0.3 of the oracle's 0.6; ReFL has no oracle. Without, 0.1 of 0.4."""
    gains = {"lora": 0.0}

    def sample(self, lora, guidance_scale):
        gain = 0.0 if lora is None else 0.4 if "oracle" in lora.parent.name else 0.1
        assert guidance_scale == 1.0
        return {name: [1.0 + gain] * 4 for name in ("gold", "gold_parts/faithfulness", "gold_parts/aesthetics")}

    monkeypatch.setattr(Unguided, "sample", sample)
    for jobs in oracle_plan.sweep().values():
        for name, job in jobs.items():
            finish(job, tmp_path, 0.5 if name == "lr x 2" else 0.1, 0.1)
    for (_, reward), jobs in oracle_plan.defaults_jobs().items():
        for job in jobs:
            finish(job, tmp_path, 0.6 if reward == "oracle" else 0.3, 0.1)
    methods.report(oracle_plan)
    found = json.loads((tmp_path / "methods.json").read_text())
    assert found["best_trials"] == {"nft": "lr x 2"}
    assert "nft_oracle_tunedlrx2_seed0" in found["not_finished"]
    by_way = {(one["evaluated"], one["method"], one["arm"]): one["shares"]["gold"] for one in found["results"]}
    assert by_way["guidance 1.2", "nft", "dinalrm"]["oracle"]["value"] == pytest.approx(0.5)
    assert by_way["no guidance", "nft", "dinalrm"]["oracle"]["value"] == pytest.approx(0.25)
    assert by_way["guidance 1.2", "refl", "dinalrm"] == {}
    text = (tmp_path / "methods.md").read_text()
    assert "## Evaluated with no guidance" in text and "0.25 [0.25, 0.25]" in text and gains
    assert (tmp_path / "methods.png").is_file()
    again = []
    monkeypatch.setattr(Unguided, "sample", lambda self, lora, scale: again.append(lora) or sample(self, lora, scale))
    methods.report(oracle_plan)
    assert not again
    (lora := tmp_path / "runs" / "nft_dinalrm_seed0" / "lora").mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"of a repeated run")
    methods.report(oracle_plan)
    assert again == [lora]
    oracle_plan.others["nft.guidance_scale"] = "2"
    with pytest.raises(ValueError, match="nft.guidance_scale"):  # not what the finished runs were started with
        methods.report(oracle_plan)


def test_a_hacked_run_reports_its_alarm_and_its_fall(tmp_path):
    """Gold rises by 0.3 until update 2 and ends at -0.2: a fall of 0.5."""
    options, others = parse(hacking.arguments("", "", [0, 1]), [str(tmp_path), "--samples", "4"])
    options.arms, options.reward, options.updates, options.lr = ["none", "ensemble"], "dinalrm", 4, 1e-3
    jobs = hacking.jobs_of(options, others, Prompts.prepare(options))
    assert jobs["ensemble"][0].options["refl.reward_sigma"] != jobs["none"][0].options["refl.reward_sigma"]
    for arm, runs in jobs.items():
        for job in runs:
            finish(job, tmp_path, -0.2 if arm == "none" else 0.6, 0.1, alarm=4 if arm == "none" else None)
            if arm == "none":
                path = job.folder(tmp_path) / "evaluations" / "000002.json"
                scores = json.loads(path.read_text())
                scores["gold"] = (np.array(scores["gold"]) + 0.4).tolist()
                path.write_text(json.dumps(scores))
    hacking.report(options, jobs, others)
    found = json.loads((tmp_path / "hacking.json").read_text())
    assert found["alarms"] == {"none": {"0": 4, "1": 4}, "ensemble": {"0": None, "1": None}}
    row = next(line for line in (tmp_path / "hacking.md").read_text().splitlines() if line.startswith("| none |"))
    assert "| 4, 4 | 2, 2 | +0.300" in row and "-0.500 [-0.500, -0.500]" in row
    assert (tmp_path / "hacking.png").is_file()


def test_gains_by_kind_of_caption(tmp_path):
    """Two pairs gain 0 and 0.2 with seed 0, and 0.1 more with seed 1; two captions of identical objects 0.5 more."""
    pairs = [f"a small red circle {where} a large blue square on gray" for where in ("left of", "above")]
    identical = ["three small green crosses on black", "two large red squares on white"]
    kinds = ["one object", "pair", "pair", "identical objects", "identical objects"]
    assert [kind_of(caption) for caption in [CAPTIONS[0], *pairs, *identical]] == kinds

    def rows(name, prompts, gains):
        folders = [tmp_path / f"{name}{seed}" for seed in (0, 1)]
        for seed, folder in enumerate(folders):
            own = {4: [gain + 0.1 * seed for gain in gains]}
            make_run(folder, own, seed=seed, prompts=prompts, guidance_scale=3.0, parts=PARTS)
        entries, _ = read_entries([], {"mine": folders})
        heading, *_ = text = kind_table(entries).splitlines()
        assert heading == "## By kind of caption, last update, guidance 3"
        return entries, [line for line in text if line.startswith("| mine |")]

    entries, (first, second) = rows("a", [*pairs, *identical], [0.0, 0.2, 0.5, 0.7])
    assert first.startswith("| mine | pair | 2 | +0.150 [") and "] | +0.075 [" in first
    assert second.startswith("| mine | identical objects | 2 | +0.650 [")
    _, (only,) = rows("b", [CAPTIONS[0], *pairs, identical[0]], [9.0, 0.0, 0.2, 9.0])  # one caption has no interval
    assert only.startswith("| mine | pair | 2 | +0.150 [")
    _, (only,) = rows("c", pairs * 2, [0.0, 0.2, 0.4, 0.6])  # two samples of each pair
    both = np.array([[0.2, 0.4], [0.3, 0.5]])
    assert f"| pair | 2 | {seeds_by_captions(both).brief} |" in only
    entries[0].runs[0].terms["model"] = "elsewhere"
    assert kind_table(entries) == ""


def test_gains_of_finished_runs_and_their_differences_by_kind(tmp_path, capsys):
    """The first run gains 0.3 more on one pair and 0.1 more on the other."""
    prompts = [f"a small red circle {where} a large blue square on gray" for where in ("left of", "above")]
    for name, gains in (("a", [0.5, 0.3]), ("b", [0.2, 0.2])):
        make_run(tmp_path / name, {4: gains * 2}, prompts=prompts * 2, guidance_scale=3.0, parts=PARTS)
    gains_by_kind.main(["--group", "first", f"{tmp_path / 'a'}", "--group", "other", f"{tmp_path / 'b'}"])
    base, *_, difference = printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert base == f"Gold of the base model: pair {np.mean(GOLD):.3f}."
    assert any(line.startswith("| first | pair | 2 | +0.400 [") for line in printed)
    found = seeds_by_captions(np.array([[0.3, 0.1]]))
    assert difference == f"| first less other | pair | {found.brief} | one seed |"
    assert found.mean == pytest.approx(0.2)
    make_run(tmp_path / "c", {4: [0.0] * 4}, prompts=prompts * 2, guidance_scale=1.0)
    with pytest.raises(SystemExit):
        gains_by_kind.main([f"{tmp_path / 'a'}", f"{tmp_path / 'c'}"])
    assert "expected runs with the same evaluation" in capsys.readouterr().err
