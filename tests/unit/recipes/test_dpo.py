"""recipes/dpo_sd35.py on the tiny stack: online and offline, its resume, what it leaves, what it refuses."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from same_run import differences
from tiny_recipes import PROMPTS, make_world

from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.data.formats.mined import shard_path
from dinalrm_align.train.checkpoints import checkpoint_to_resume
from dinalrm_align.train.metrics import read_metrics

RECIPE = Path(__file__).parents[3] / "recipes" / "dpo_sd35.py"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(RECIPE))["main"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo_world")
    make_world(folder)
    return folder


@pytest.fixture
def arguments(world):
    """A run of seconds: two prompts an update, three samples of each, two steps a sample."""
    return [
        f"--model={world}", f"--prompts={world / 'prompts.txt'}", f"--eval_prompts={world / 'prompts.txt'}",
        "--device=cpu", "--policy.rank=2", "--dpo.batch_size=2", "--dpo.group_size=3", "--dpo.num_steps=2",
        "--dpo.refresh_every=0", "--gradient_checkpointing=false", "--profile_every=0", "--optim.lr=0.01",
        "--loop.steps=4", "--loop.checkpoint_every=1", "--loop.ema_decay=0.5", "--loop.keep_last=9",
        "--evaluation.samples=3", "--evaluation.shown=2", "--evaluation.every=2",
    ]  # fmt: skip


def run(main, arguments: list[str], folder: Path, *more: str) -> Path:
    main([*arguments, f"--output_dir={folder}", *more])
    return folder


def offline(path: Path) -> list[str]:
    return ["--dpo.mode=offline", f"--pairs={path}"]


def test_a_run_leaves_everything(main, arguments, tmp_path, capsys):
    folder = run(main, arguments, tmp_path / "run")
    left = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "curves.png", "before_after.png", "lora"} <= left
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "gold" in row] == [0, 2, 4]
    trained = {
        "loss", "implicit_accuracy", "margin", "chosen_gain", "rejected_gain", "kl", "reward", "reward_best",
        "reward_worst", "grad_norm", "seconds/rollout", "seconds/reward", "seconds/policy", "seconds/backward",
    }  # fmt: skip
    assert trained <= rows[1].keys()
    assert rows[1]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[1]["kl"] == 0.0
    assert rows[4]["kl"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["gold"]["after"] - summary["gold"]["before"] == pytest.approx(summary["gold"]["gain"])
    assert f"gold {summary['gold']['before']:.4f} ->" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_run_is_the_uninterrupted_one(main, arguments, world, tmp_path, mode):
    """Online the reference becomes a copy of the policy before update 3: the run is cut before that, and after it."""
    more = offline(world / "pairs") if mode == "offline" else ["--dpo.refresh_every=2", "--loop.accumulate=2"]
    whole = run(main, arguments, tmp_path / "whole", *more)
    for steps in (2, 3):
        cut = run(main, arguments, tmp_path / f"cut{steps}", *more, f"--loop.steps={steps}")
        torch.manual_seed(123)
        main([f"--resume={cut}", "--loop.steps=4"])
        assert differences(checkpoint_to_resume(whole), checkpoint_to_resume(cut)) == []
    if mode == "online":
        state = load_file(checkpoint_to_resume(whole) / "method_0.safetensors")
        second = load_file(whole / "checkpoints" / "step_000002" / "weights.safetensors")
        assert state.keys() == {f"reference.{name}" for name in second}
        assert all(torch.equal(state[f"reference.{name}"], tensor) for name, tensor in second.items())


def test_every_kind_of_pairs_is_read(main, arguments, world, tmp_path):
    lines = []
    for index, prompt in enumerate(PROMPTS[:2]):
        for name, value in (("light", 230), ("dark", 20)):
            Image.new("RGB", (64, 64), (value, value, value + index)).save(tmp_path / f"{name}{index}.png")
        lines.append({"prompt": prompt, "chosen": f"light{index}.png", "rejected": f"dark{index}.png"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kinds = [world / "pairs", tmp_path / "pairs.jsonl"]
    mine = runpy.run_path(str(RECIPE.with_name("mine_pairs.py")))["main"]
    mine([*arguments[:2], f"--output_dir={tmp_path / 'mined'}", "--device=cpu", "--mine.candidates=2",
          "--mine.num_steps=2"])  # fmt: skip
    kinds += [tmp_path / "mined", shard_path(tmp_path / "mined", 0)]
    for number, path in enumerate(kinds):
        folder = run(main, arguments, tmp_path / f"run{number}", *offline(path), "--loop.steps=2")
        rows = read_metrics(folder / "metrics.jsonl")
        assert rows[1]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[2]["kl"] > 0, path
        assert "reward" not in rows[1] and "gold" in rows[2]


def test_a_run_on_other_pairs_is_not_resumed(main, arguments, world, tmp_path, capsys):
    cut = run(main, arguments, tmp_path / "cut", *offline(world / "pairs"), "--loop.steps=1")
    from dinalrm_align.data.latent_pairs import LatentPairs, LatentPairsWriter

    there = LatentPairs(world / "pairs", batch_size=1)
    with LatentPairsWriter(tmp_path / "other", there.manifest) as writer:
        for batch in (there.in_order()[1], there.in_order()[2]):
            writer.add(
                batch.conditions.prompts[0], batch.latents, prompt_embeds=batch.conditions.prompt_embeds[0],
                pooled_prompt_embeds=batch.conditions.pooled_prompt_embeds[0],
            )  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([f"--resume={cut}", f"--pairs={tmp_path / 'other'}", "--dpo.mode=offline", "--loop.steps=2"])
    assert stopped.value.code == 2 and "belongs to another run: its pairs is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dpo.mode=offline"], "--dpo.mode offline needs --pairs; recipes/mine_pairs.py makes some"),
        (["--pairs=somewhere"], "/somewhere in online mode"),
        (["--dpo.mode=offline", "--pairs=absent"], "absent holds no index.json"),
        (["--dpo.beta=0"], "dpo.beta: got 0"),
        (["--dpo.group_size=1"], "dpo.group_size: got 1"),
        (["--reward=beauty"], "unknown reward 'beauty'"),
        (["--dpo.betta=3"], "--dpo.betta"),
    ],
)
def test_bad_arguments_end_with_status_2_and_a_sentence(
    main, arguments, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_pairs_of_another_text_length_are_refused(main, arguments, tmp_path, capsys):
    from dinalrm_align.data.latent_pairs import LatentPairsWriter
    from dinalrm_align.data.pairs import PairManifest

    with LatentPairsWriter(tmp_path / "pairs", PairManifest(1.0, 0.0, 20)) as writer:
        writer.add(
            "a", torch.randn(2, 16, 8, 8), prompt_embeds=torch.randn(20, 32), pooled_prompt_embeds=torch.randn(32)
        )
    with pytest.raises(SystemExit):
        main([*arguments, *offline(tmp_path / "pairs"), "--dpo.batch_size=1"])
    assert "text_length 20, expected 16" in capsys.readouterr().err


def test_the_users_settings_override_the_public_ones_for_sd35(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from dinalrm_align.align.resolve import resolve

    resolved = resolve(DpoRun, "", RECIPE, ["--model=sd35", "--loop.steps=7"])
    settings = resolved.run
    assert (resolved.spec.name, settings.loop.steps, settings.loop.accumulate) == ("sd35", 7, 8)
    assert (settings.policy.rank, settings.policy.alpha, settings.dpo.beta) == (32, 64, 100.0)
    assert settings.dpo.sigma.density == "logit_normal" and settings.dpo.group_size == 24
