"""recipes/grpo_sd35.py, lpo_sd35.py and nft_sd35.py on the tiny stack: whole runs, their resume, what they refuse."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from same_run import differences
from tiny_recipes import make_world, stand_in

from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.resolve import resolve
from dinalrm_align.models.specs import SHAPES_WEIGHTS
from dinalrm_align.train.metrics import read_metrics

RECIPES = Path(__file__).parents[3] / "recipes"
RUNS = {"grpo": GrpoRun, "lpo": LpoRun, "nft": NftRun}
SMALL = {
    "grpo": ["--grpo.groups=2", "--grpo.group_size=3", "--grpo.num_steps=4", "--grpo.window_range=[0,3]"],
    "lpo": [
        "--lpo.batch_size=2",
        "--lpo.candidates=3",
        "--lpo.num_steps=4",
        "--lpo.steps=[0,3]",
        "--lpo.threshold=[0,0]",
    ],  # fmt: skip
    "nft": ["--nft.groups=2", "--nft.group_size=3", "--nft.num_steps=4"],
}
RECORDED = {
    "grpo": {
        "reward",
        "kl",
        "step_kl",
        "ratio_spread",
        "clipped",
        "group_variance",
        "reward_noise_variance",
        "dropped_groups",
    },
    "lpo": {"reward", "kl", "accuracy", "clipped", "pairs", "pairs_kept", "preference"},
    "nft": {"reward", "kl", "moved", "group_variance", "reward_noise_variance", "dropped_groups"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_policy_world")
    make_world(folder)
    return folder


@pytest.fixture(params=list(RUNS))
def method(request):
    return request.param


@pytest.fixture
def start(method, world, monkeypatch, tmp_path):
    """start(folder, *options): a run of seconds by the recipe's own command line."""
    main = runpy.run_path(str(RECIPES / f"{method}_sd35.py"))["main"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", stand_in)
    arguments = [
        f"--model={world}", f"--prompts={world / 'prompts.txt'}", f"--eval_prompts={world / 'prompts.txt'}",
        "--device=cpu", "--policy.rank=2", "--optim.lr=0.01", "--profile_every=0", "--loop.steps=3",
        "--loop.checkpoint_every=1", "--loop.keep_last=9", "--evaluation.samples=2", "--evaluation.shown=1",
        "--evaluation.every=0", *SMALL[method],
    ]  # fmt: skip

    def run(folder: str, *options: str) -> Path:
        main([*arguments, f"--output_dir={folder}", *options])
        return tmp_path / folder

    run.main = main
    return run


def test_a_run_leaves_everything(method, start, capsys):
    folder = start("run")
    left = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "curves.png", "before_after.png", "lora"} <= left
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "gold" in row] == [0, 3]
    phases = {f"seconds/{phase}" for phase in ("rollout", "reward", "policy", "backward")}
    assert RECORDED[method] | phases | {"loss", "grad_norm", "lr"} <= rows[1].keys()
    assert rows[1]["kl"] < 1e-9 < rows[3]["kl"]
    summary = json.loads((folder / "summary.json").read_text())
    assert f"gold {summary['gold']['before']:.4f} -> {summary['gold']['after']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(("cut", "dtype"), [(1, "float32"), (2, "float32"), (1, "bfloat16")])
def test_a_resumed_run_is_the_uninterrupted_one(method, start, cut, dtype):
    """Two updates of two micro-steps from each rollout: cut in the middle of one, and between two."""
    more = [f"--{method}.minibatches=2", "--loop.accumulate=2", f"--dtype={dtype}"]
    if method == "nft":
        more.append("--nft.old_slope=0.2")
    whole = start("whole", *more)
    folder = start("cut", *more, f"--loop.steps={cut}")
    start.main(["--resume", "cut", "--loop.steps=3"])
    # the cut run was evaluated once more, at its cut, and may have found its best there
    found = [one for one in differences(whole, folder) if one.startswith(("checkpoints", "lora/"))]
    assert found == []
    for one, other in zip(*(read_metrics(each / "metrics.jsonl") for each in (whole, folder)), strict=True):
        named = {name for name in one if not name.startswith(("seconds", "elapsed"))} & other.keys()
        assert {"loss", "reward", "kl"} <= named or one["step"] == 0
        assert all(one[name] == other[name] for name in named), one["step"]


def test_a_reward_of_images_ranks_samples_and_cannot_score_steps(method, start, world, capsys):
    if not (world / "pixel").exists():
        shutil.copytree(SHAPES_WEIGHTS / "pixel", world / "pixel")
    if method == "lpo":
        with pytest.raises(SystemExit, match="2"):
            start("pixel", "--reward=pixel")
        assert "LPO needs a reward that reads noisy latents" in capsys.readouterr().err
        return
    rows = read_metrics(start("pixel", "--reward=pixel", "--loop.steps=1") / "metrics.jsonl")
    assert rows[1]["grad_norm"] > 0 and rows[1]["group_variance"] > 0
    assert "reward_noise_variance" not in rows[1]  # nothing is drawn, so nothing is drawn twice


@pytest.mark.parametrize("method", ["grpo"], indirect=True)
def test_parts_of_a_sum_of_rewards_are_normalised_one_by_one(start, world):
    if not (world / "pixel").exists():
        shutil.copytree(SHAPES_WEIGHTS / "pixel", world / "pixel")
    by_parts, together = (
        read_metrics(
            start(how, "--reward=dinalrm + 0.2*pixel", f"--grpo.advantage_of={how}", "--loop.steps=1") / "metrics.jsonl"
        )
        for how in ("parts", "sum")
    )
    assert by_parts[1]["reward"] == pytest.approx(together[1]["reward"])
    assert by_parts[1]["advantage_size"] != pytest.approx(together[1]["advantage_size"])


def test_the_settings_for_sd35_are_read_and_fit(method, monkeypatch, tmp_path):
    """The user's options override the settings file, and the method accepts each value of the file."""
    monkeypatch.chdir(tmp_path)
    resolved = resolve(RUNS[method], "", RECIPES / f"{method}_sd35.py", ["--model=sd35", "--loop.steps=7"])
    run = resolved.run
    assert resolved.spec.name == "sd35" and run.loop.steps == 7 and run.gradient_checkpointing
    expected = {"grpo": (32, 64, 5e-5, 24), "lpo": (64, 64, 1e-5, 1), "nft": (32, 64, 3e-4, 864)}[method]
    assert (run.policy.rank, run.policy.alpha, run.optim.lr, run.loop.accumulate) == expected


def test_a_run_without_a_learning_signal_warns_and_says_so_at_the_end(method, start, capsys):
    """A constant reward; for LPO, a threshold that no margin exceeds. The weights stay those of the base model."""
    silent = {"lpo": ["--lpo.threshold=[0.9999,0.9999]"]}.get(method, ["--reward=tiny_align:half"])
    folder = start("run", *silent, f"--{method}.minibatches=2", "--loop.steps=6")
    printed = capsys.readouterr().out
    assert printed.count("warning: the last 3 rollouts gave no learning signal") == 1
    last = printed.strip().splitlines()[-1]
    assert last.startswith("warning: the policy learned nothing from reward") and "3 of 3 rollouts" in last
    rows = read_metrics(folder / "metrics.jsonl")
    assert {row["signal"] for row in rows[1:]} == {0.0} and [row["rollout"] for row in rows[1:]] == [0, 0, 1, 1, 2, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["rollouts"], summary["rollouts_without_signal"]) == (3, 3)
    assert rows[-1]["kl"] < 1e-9
