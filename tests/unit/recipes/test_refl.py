"""recipes/refl_sd35.py on the tiny stack: a whole run, its resume, what it leaves, what it refuses."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import HfApi
from paths import RECIPES, load_recipe
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import save_clip

from dinalrm_align.align import refl, setup, watch
from dinalrm_align.align.lora import LORA_FILE
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import resolve
from dinalrm_align.train.checkpoints import checkpoint_to_resume
from dinalrm_align.train.metrics import METRICS, read_metrics

RECIPE = RECIPES / "refl_sd35.py"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("refl_sd35")


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    """The tiny world with a pixel reward beside its latent one."""
    folder = tmp_path_factory.mktemp("refl_world")
    for part in ("pipeline", "dinalrm"):
        (folder / part).symlink_to(tiny_world / part)
    save_clip(folder / "pixel", side=64, patch=16)
    return folder


@pytest.fixture
def arguments(world, tmp_path):
    """A run of seconds: three samples of two steps, updates of two."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle on white\na large blue square on gray\na small green cross on black\n")
    return [
        f"--model={world}", f"--prompts={prompts}", f"--eval_prompts={prompts}", "--device=cpu", "--policy.rank=2",
        "--policy.alpha=4", "--refl.batch_size=2", "--refl.num_steps=3", "--refl.kl_weight=0.1", "--optim.lr=0.01",
        "--loop.steps=4", "--loop.checkpoint_every=2", "--evaluation.samples=3", "--evaluation.shown=2",
        "--evaluation.batch_size=3", "--evaluation.every=2",
    ]  # fmt: skip


def run(recipe, arguments: list[str], folder: Path, *more: str) -> Path:
    recipe.main([*arguments, f"--output_dir={folder}", *more])
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_to_resume(folder) / "weights.safetensors")


def test_a_run_leaves_everything_and_its_lora_reloads(recipe, arguments, world, tmp_path, monkeypatch, capsys):
    drawn, plot = [], setup.plot_run
    monkeypatch.setattr(
        setup, "plot_run", lambda folder: (drawn.append(read_metrics(folder / METRICS)[-1]), plot(folder))
    )
    folder = run(recipe, arguments, tmp_path / "run")
    assert [(row["step"], "gold" in row) for row in drawn] == [(2, True), (4, True)]  # after each evaluation, once
    left = {path.name for path in folder.iterdir()}
    assert left == {
        "config.yaml", "metrics.jsonl", "summary.json", "curves.png", "before_after.png", "grid_000000.png",
        "grid_000002.png", "grid_000004.png", "evaluations", "lora", "lora_best", "checkpoints",
    }  # fmt: skip
    for name in ("curves.png", "before_after.png", "grid_000004.png"):
        Image.open(folder / name).verify()
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "gold" in row] == [0, 2, 4]
    watched = {"hacking", "divergence", "drift", "level_spread", "gold/pixel", "proxy@0.1"}
    assert all(watched <= row.keys() for row in (rows[0], rows[2], rows[4]))
    assert (rows[0]["drift"], rows[0]["divergence"], rows[4]["drift"] > 0) == (0.0, 0.0, True)
    trained = {"loss", "reward", "kl", "grad_norm", "lr", "elapsed", "start_sigma"}
    phases = ("rollout", "policy", "reward", "backward")
    assert trained | {f"memory_mib/{phase}" for phase in phases} <= rows[1].keys()  # the profiled update
    assert trained | {f"seconds/{phase}" for phase in phases} <= rows[2].keys()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["gold"]["after"] - summary["gold"]["before"] == pytest.approx(summary["gold"]["gain"])
    assert rows[-1]["gold_gain"] == pytest.approx(summary["gold"]["gain"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"model in {world}, an embedded world")
    assert f"gold {summary['gold']['before']:.4f} -> {summary['gold']['after']:.4f}" in printed
    part = summary["gold_parts/aesthetics"]
    assert rows[-1]["gold_parts/aesthetics_gain_standard_error"] == pytest.approx(part["standard_error"])
    error = f"({part['gain']:+.3f} ± {part['standard_error']:.3f}): sharpness "
    assert f"  aesthetics {part['before']:.3f} -> {part['after']:.3f} {error}" in printed
    scores = json.loads((folder / "evaluations" / "000004.json").read_text())
    score = scores["gold_parts/faithfulness"][1] * (2.5 + 0.5 * scores["gold_parts/aesthetics"][1])
    assert scores["gold"][1] == pytest.approx(score, abs=1e-6)

    pipeline = StableDiffusion3Pipeline.from_pretrained(world / "pipeline")
    pipeline.load_lora_weights(folder / "lora")
    average = load_file(checkpoint_to_resume(folder) / "ema.safetensors")
    loaded = {n.replace("default_0", "policy"): p for n, p in pipeline.transformer.named_parameters() if ".lora_" in n}
    assert loaded.keys() == average.keys()
    for name in average:  # the file holds B x alpha / rank, since its own alpha is the rank
        scale = 4 / 2 if ".lora_B." in name else 1.0
        torch.testing.assert_close(loaded[name], average[name] * scale, rtol=1e-6, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one(recipe, arguments, tmp_path, monkeypatch, capsys):
    """Also with two gold rewards, of which the second gives twice the first one's scores."""
    arguments = [*arguments, "--gold=[oracle, 2*oracle]"]
    whole = run(recipe, arguments, tmp_path / "whole")
    cut = run(recipe, arguments, tmp_path / "cut", "--loop.steps=2")
    torch.manual_seed(123)
    monkeypatch.chdir(tmp_path)
    recipe.main(["--resume", "cut", "--loop.steps=4"])
    expected, got = weights(whole), weights(cut)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    golds = [
        [row["gold"] for row in read_metrics(folder / "metrics.jsonl") if "gold" in row] for folder in (whole, cut)
    ]
    assert golds[0] == golds[1]
    rows, summary = read_metrics(cut / "metrics.jsonl"), json.loads((cut / "summary.json").read_text())
    for name in ("gold", "gold_gain", "gold_gain_standard_error"):
        assert rows[-1][name.replace("gold", "gold/2oracle")] == pytest.approx(2 * rows[-1][name], abs=1e-6)
    assert summary["gold/2oracle"]["after"] == pytest.approx(2 * summary["gold"]["after"])
    printed = capsys.readouterr().out
    assert f"gold/2oracle {summary['gold/2oracle']['before']:.4f} -> " in printed and "gold/pixel" not in printed
    assert yaml.safe_load((cut / "config.yaml").read_text())["refl"]["kl_weight"] == 0.1


def test_a_run_starts_from_a_lora_which_is_part_of_its_identity(recipe, arguments, tmp_path, capsys):
    first = run(recipe, arguments, tmp_path / "first", "--loop.ema_decay=0")
    more = [f"--policy.init_from={first / 'lora'}", "--policy.rank=3", "--optim.lr=0", "--loop.ema_decay=0"]
    second = run(recipe, arguments, tmp_path / "second", *more)
    ended, started = (read_metrics(folder / "metrics.jsonl") for folder in (first, second))
    for name in ("gold", "proxy", "drift"):
        assert started[0][name] == pytest.approx(ended[-1][name], rel=1e-4)
        assert started[-1][name] == started[0][name]  # nothing was learned with a learning rate of 0
    assert started[0]["drift"] > 0, "the base model remains the reference"

    recipe.main([f"--resume={second}", "--loop.steps=6"])
    lora = load_file(first / "lora" / LORA_FILE)
    save_file({name: tensor + 0.1 for name, tensor in lora.items()}, first / "lora" / LORA_FILE)
    with pytest.raises(SystemExit):
        recipe.main([f"--resume={second}", "--loop.steps=8"])
    assert "initial LoRA" in capsys.readouterr().err
    (first / "lora").rename(first / "aside")  # a file that is gone is not needed: the checkpoint holds the weights
    recipe.main([f"--resume={second}", "--loop.steps=7"])
    assert "policy.init_from" in capsys.readouterr().out
    assert read_metrics(second / "metrics.jsonl")[-1]["drift"] == started[0]["drift"]


def test_a_resumed_run_keeps_the_measured_unit_of_the_kl(recipe, arguments, tmp_path, monkeypatch, capsys):
    """The number is in summary.json and in the checkpoint; on resume it is not measured again."""
    whole = run(recipe, arguments, tmp_path / "whole", "--refl.kl_weight=50")
    assert "reward_std 0." in capsys.readouterr().out
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["kl_weight"] == pytest.approx(50 * summary["reward_std"])
    cut = run(recipe, arguments, tmp_path / "cut", "--refl.kl_weight=50", "--loop.steps=2")
    saved = load_file(checkpoint_to_resume(cut) / "method_0.safetensors")
    assert saved["reward_std"].item() == summary["reward_std"]
    monkeypatch.setattr(refl, "base_spreads", None)
    recipe.main([f"--resume={cut}", "--loop.steps=4"])
    assert all(torch.equal(tensor, weights(cut)[name]) for name, tensor in weights(whole).items())
    assert json.loads((cut / "summary.json").read_text())["reward_std"] == summary["reward_std"]


def test_a_run_with_a_raw_weight_has_the_files_of_older_runs(recipe, arguments, tmp_path):
    """Checkpoints of runs without kl_unit resume: their config.yaml means raw, and they hold no state of the method."""
    folder = run(recipe, arguments, tmp_path / "run", "--refl.kl_unit=raw", "--loop.steps=2")
    assert not (checkpoint_to_resume(folder) / "method_0.safetensors").exists()
    assert "reward_std" not in json.loads((folder / "summary.json").read_text())
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    del settings["refl"]["kl_unit"]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    recipe.main([f"--resume={folder}", "--loop.steps=3"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["refl"]["kl_unit"] == "raw"


def test_the_kl_unit_of_each_model(tmp_path, monkeypatch):
    """The embedded world's weight is per standard deviation; the published settings of SD3.5 are raw."""
    monkeypatch.chdir(tmp_path)
    units = {model: resolve(ReflRun, "", RECIPE, [f"--model={model}"]).run.refl for model in ("shapes", "sd35")}
    assert {model: (found.kl_unit, found.kl_weight) for model, found in units.items()} == {
        "shapes": ("reward_std", 24.5), "sd35": ("raw", 0.0)
    }  # fmt: skip


def test_the_evaluation_has_its_own_guidance_and_steps(recipe, arguments, tmp_path, capsys):
    """Base model and policy are evaluated with them; on resume they cannot change. Training keeps its own."""
    options = ["--evaluation.guidance_scale=1", "--evaluation.num_steps=2"]
    folder = run(recipe, arguments, tmp_path / "run", "--loop.steps=2", *options)
    plain = run(recipe, arguments, tmp_path / "plain", "--loop.steps=2")
    for step in ("000000", "000002"):
        found, default = (
            json.loads((each / "evaluations" / f"{step}.json").read_text())["terms"] for each in (folder, plain)
        )
        assert (found["guidance_scale"], len(found["sigmas"])) == (1.0, 3)
        assert (default["guidance_scale"], len(default["sigmas"])) == (3.0, 13)
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(folder).items())
    with pytest.raises(SystemExit) as stopped:
        recipe.main([f"--resume={folder}", "--loop.steps=4", "--evaluation.guidance_scale=2"])
    assert stopped.value.code == 2 and "guidance_scale" in capsys.readouterr().err


def test_a_run_that_is_too_short_for_its_average_judges_and_exports_the_last_weights(
    recipe, arguments, tmp_path, capsys
):
    """With ema_every 8, such runs exported the untouched LoRA; every gain was exactly 0."""
    for name, every, kept in (("last", 8, "weights"), ("average", 2, "ema")):
        folder = run(recipe, arguments, tmp_path / name, "--loop.steps=2", f"--loop.ema_every={every}")
        summary, printed = json.loads((folder / "summary.json").read_text()), capsys.readouterr().out
        assert summary["weights"] == name and f"LoRA: {folder / 'lora'} (weights: {name})" in printed
        assert ("loop.ema_every: got 8, more than the 2 updates of this run" in printed) == (name == "last")
        assert summary["gold"]["gain"] != 0 and summary["proxy"]["gain"] != 0
        exported = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
        saved = load_file(checkpoint_to_resume(folder) / f"{kept}.safetensors")
        scales = {"lora_A": 1.0, "lora_B": 4 / 2}  # the file holds B x alpha / rank
        for part, scale in scales.items():
            norms = [
                sum(float(tensor.square().sum()) for key, tensor in tensors.items() if part in key)
                for tensors in (exported, saved)
            ]
            assert norms[0] == pytest.approx(norms[1] * scale**2, rel=1e-5) and norms[0] > 0


def test_fewer_samples_than_images_shown_by_default(recipe, arguments, tmp_path):
    few = [word for word in arguments if "shown" not in word]
    folder = run(recipe, few, tmp_path / "run", "--loop.steps=1", "--evaluation.samples=4")
    assert json.loads((folder / "evaluations" / "000001.json").read_text())["terms"]["shown"] == 4


def test_first_lines_name_a_gold_that_is_trained_on_and_many_passes(recipe, arguments, world, tmp_path, capsys):
    options = ["--loop.steps=16", "--loop.checkpoint_every=0", "--evaluation.every=0", "--watch.drift_sigmas=[]"]
    same = f"--reward=dinalrm + 0.1*pixel={world / 'pixel'}"
    run(recipe, arguments, tmp_path / "run", *options, "--gold=pixel", same, "--refl.num_steps=1")
    printed = capsys.readouterr().out
    assert "warning: gold pixel is also trained on" in printed
    assert "16 rollouts of 2 prompts are 11 passes over 3 training prompts" in printed
    run(recipe, arguments, tmp_path / "other", "--loop.steps=1")
    printed = capsys.readouterr().out
    assert "trained on" not in printed and "passes" not in printed


def test_a_hacked_run_warns_or_stops_by_itself(recipe, arguments, tmp_path, monkeypatch, capsys):
    """An alarm at update 2 of 4: a warning, or with --watch.stop_on_hacking an early stop with a checkpoint."""
    detect_hacking = watch.detect_hacking

    def alarmed(history, *rest):
        return dataclasses.replace(detect_hacking(history, *rest), hacking=max(history) == 2)

    monkeypatch.setattr(watch, "detect_hacking", alarmed)
    warned = run(recipe, arguments, tmp_path / "warned")
    stopped = run(recipe, arguments, tmp_path / "stopped", "--watch.stop_on_hacking=true")
    printed = capsys.readouterr().out
    assert printed.count("warning: update 2: the reward is being hacked") == 2
    assert "stopped after update 2 of 4, because the reward was being hacked" in printed
    for folder, updates in ((warned, 4), (stopped, 2)):
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["updates"], summary["hacking_alarm"]) == (updates, 2)
        assert checkpoint_to_resume(folder).name == f"step_{updates:06d}"
        assert [row.get("hacking") for row in read_metrics(folder / "metrics.jsonl")][:3] == [0.0, None, 1.0]
        assert json.loads((folder / "lora_best" / "best.json").read_text())["step"] in (0, 2, 4)


def test_one_caption_cannot_be_watched(recipe, arguments, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("a small red circle on white\n")
    folder = run(recipe, arguments, tmp_path / "run", f"--eval_prompts={tmp_path / 'one.txt'}", "--loop.steps=1")
    printed = capsys.readouterr().out
    assert "reward hacking is not detected in this run" in printed and "standard errors are over samples" in printed
    assert "hacking" not in read_metrics(folder / "metrics.jsonl")[-1]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_without_its_package_is_refused(recipe, arguments, name, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*arguments, f"--tracker={name}"])
    assert stopped.value.code == 2
    assert f"pip install 'dinalrm-align[{name}]'" in capsys.readouterr().err


def test_the_lora_is_uploaded_after_training_and_the_login_is_checked_before(recipe, arguments, tmp_path, monkeypatch):
    asked, pushed = [], []
    monkeypatch.setattr(setup, "check_login", asked.append)
    monkeypatch.setattr(setup, "push_run", lambda *which: pushed.append((*which, which[0].joinpath("lora").is_dir())))
    tracked = []
    monkeypatch.setattr(setup, "track_folder", lambda _, lora, name: tracked.append((name, sorted(lora.iterdir()))))
    folder = run(recipe, arguments, tmp_path / "run", "--push_to_hub=me/lora", "--loop.steps=1")
    assert (asked, pushed) == (["me/lora"], [(folder, "me/lora", True)])
    assert tracked == [("run-lora", [folder / "lora" / LORA_FILE])]
    assert (folder / "summary.json").is_file()  # which the card reads


def test_a_run_without_login_does_not_start(recipe, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(HfApi, "whoami", lambda self: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*arguments, f"--output_dir={tmp_path / 'run'}", "--push_to_hub=me/lora"])
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert "the hub cannot be used (no network): run `hf auth login`" in capsys.readouterr().err


def test_an_anchored_run_trains_on_both_rewards_and_resumes_as_it_was(recipe, arguments, tmp_path):
    anchor = ["--anchor.reward=pixel", "--anchor.every=2", "--anchor.weight=0.5"]
    whole = run(recipe, arguments, tmp_path / "whole", *anchor)
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows if "anchor" in row] == [2, 4]
    cut = run(recipe, arguments, tmp_path / "cut", "--loop.steps=2", *anchor)
    recipe.main(["--resume", str(cut), "--loop.steps=4"])
    expected, got = weights(whole), weights(cut)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    with pytest.raises(SystemExit):  # another anchor would be another run
        recipe.main(["--resume", str(cut), "--loop.steps=6", "--anchor.weight=1.0"])


def test_seeds_differ_and_a_seed_repeats(recipe, arguments, tmp_path):
    first, again, other = (
        weights(run(recipe, arguments, tmp_path / name, "--loop.steps=1", f"--seed={seed}"))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_pixel_reward_takes_the_same_road(recipe, arguments, tmp_path):
    folder = run(recipe, arguments, tmp_path / "run", "--reward=pixel", "--loop.steps=2")
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[-1]["grad_norm"] > 0
    assert json.loads((folder / "summary.json").read_text())["reward"] == "pixel"


@pytest.mark.parametrize(
    "reward", ["dinalrm + 0.2*pixel", "my_reward:redness", "dinalrm={world}/dinalrm - 2*my_reward:energy"]
)
def test_sums_and_callables_take_the_same_road(recipe, arguments, world, tmp_path, monkeypatch, reward):
    """Resuming too: a checkpoint identifies a reward without weights by its name."""
    (tmp_path / "my_reward.py").write_text(
        "def redness(images, prompts): return images[:, 0].mean((1, 2))\n"
        "def energy(latents): return latents.square().mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = run(recipe, arguments, tmp_path / "run", f"--reward={reward.format(world=world)}", "--loop.steps=2")
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    recipe.main([f"--resume={folder}", "--loop.steps=3"])
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 3
    with pytest.raises(SystemExit):
        recipe.main([f"--resume={folder}", "--loop.steps=4", "--reward=my_reward:energy"])


@pytest.mark.parametrize(
    "options",
    [
        ["--refl.grad_steps=2", "--refl.guided_gradient=true", "--gradient_checkpointing=false"],
        ["--refl.pretrain_weight=0.5", "--refl.pretrain_samples=2", "--refl.reward_sigma_range=[0.1,0.6]"],
        ["--refl.loss=relu", "--refl.reward_sigma=[0.2,0.5]", "--loop.ema_decay=0", "--loop.accumulate=2"],
    ],
)
def test_other_settings_run(recipe, arguments, tmp_path, options):
    folder = run(recipe, arguments, tmp_path / "run", "--loop.steps=1", *options)
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 1


def test_pretraining_images_are_read_from_a_folder(recipe, arguments, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), "red").save(images / f"{name}.png")
        (images / f"{name}.txt").write_text("a red circle")
    options = ["--refl.pretrain_weight=1", f"--refl.pretrain_images={images}", "--loop.steps=1"]
    folder = run(recipe, arguments, tmp_path / "run", *options)
    assert read_metrics(folder / "metrics.jsonl")[-1]["pretrain"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward=beauty"], "unknown reward 'beauty'. Known: dinalrm, pickscore"),
        (["--reward=dinalrm + oracle"], "oracle has no gradient, and this method needs one"),
        (["--reward=dinalrm + 0*pixel"], "got the weight 0"),
        (["--reward=mps"], "mps=/path/to/MPS_overall_checkpoint.pth"),
        (["--reward=no_such_module:score"], "there is no module 'no_such_module'"),
        (["--model=sd36"], "unknown model 'sd36'"),
        (["--resume=absent"], "nothing to resume: no folder /"),
        (["--prompts=absent.txt"], "no prompt file absent.txt"),
        (["--height=32"], "got (2, 3, 32, 64)"),
        (["--height=40"], "height: got 40 pixels; expected a positive multiple of 16"),
        (["--seed=-1"], "seed: got -1"),
        (["--refl.grad_steps=0"], "refl.grad_steps: got 0"),
        (["--loop.step=3"], "--loop.step"),
        (["--refl.loss=square"], "square"),
    ],
)
def test_bad_arguments_end_with_status_2_and_a_sentence(
    recipe, arguments, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*arguments, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(recipe, arguments, tmp_path, capsys):
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        run(recipe, arguments, tmp_path)
    assert stopped.value.code == 2
    assert f"go on with --resume {tmp_path}" in capsys.readouterr().err


def test_default_folders_are_numbered(arguments, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(2):
        resolved = resolve(ReflRun, "", RECIPE, arguments)
        names.append(resolved.run.output_dir)
        Path(resolved.run.output_dir).mkdir(parents=True)
    stem = f"runs/refl_{world.name}_dinalrm_seed0"
    assert names == [str(tmp_path / stem), str(tmp_path / f"{stem}_2")]


def test_the_users_settings_override_the_papers_for_sd35(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = resolve(ReflRun, "", RECIPE, ["--model=sd35", "--loop.steps=7"])
    settings = resolved.run
    assert (resolved.spec.name, settings.loop.steps, settings.loop.accumulate) == ("sd35", 7, 16)
    assert (settings.policy.rank, settings.policy.alpha, settings.optim.lr) == (32, 64, 1e-4)


def test_a_long_prompts_file_is_trained_on_beyond_prompt_10_001(recipe, arguments, world, tmp_path):
    """12,000 prompts, and a reward that reads another number of T5 tokens than the policy."""
    from tiny_reward import shake, tiny_reward_config

    from dinalrm_align.align import refl
    from dinalrm_align.models.pipeline import load_transformer
    from dinalrm_align.reward.checkpoint import write_reward
    from dinalrm_align.reward.model import build_reward_model

    config = tiny_reward_config(text_length=9, base_model_id=str(world / "pipeline"))
    model = build_reward_model(config, load_transformer(world / "pipeline", dtype=torch.float32), seed=1)
    shake(model, seed=2)
    write_reward(tmp_path / "reward", config, model.tuned_tensors())
    prompts = tmp_path / "many.txt"
    prompts.write_text("".join(f"{number} small red circles on white\n" for number in range(12_000)))
    numbers = set()
    original = refl.Refl.batch_at

    def batch_at(self, micro_step):
        batch = original(self, micro_step)
        numbers.update(int(prompt.split()[0]) for prompt in batch.conditions.prompts)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refl.Refl, "batch_at", batch_at)
        run(
            recipe, arguments, tmp_path / "run", f"--prompts={prompts}", f"--reward={tmp_path / 'reward'}",
            "--refl.batch_size=16", "--refl.num_steps=1", "--loop.steps=2", "--profile_every=0",
        )  # fmt: skip
    assert len(numbers) == 32 and min(numbers) < 2_000 and max(numbers) > 10_001


def test_a_constant_reward_is_no_unit_for_the_kl(recipe, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(recipe, arguments, tmp_path / "run", "--reward=tiny_align:half")
    assert stopped.value.code == 2
    assert "mean score 0.5; expected scores that differ" in capsys.readouterr().err


def test_a_reward_without_a_gradient_warns_and_says_so_at_the_end(recipe, arguments, tmp_path, capsys):
    folder = run(
        recipe, arguments, tmp_path / "run", "--reward=tiny_align:half", "--loop.steps=3", "--refl.kl_unit=raw"
    )
    printed = capsys.readouterr().out
    assert (
        "the last 3 rollouts gave no learning signal (reward tiny_align:half, mean score 0.5): the gradient" in printed
    )
    assert (
        printed.strip().splitlines()[-1].startswith("warning: the policy learned nothing from reward tiny_align:half")
    )
    assert json.loads((folder / "summary.json").read_text())["rollouts_without_signal"] == 3


def test_a_server_that_fails_in_the_middle_ends_with_one_line_and_the_state_before(
    recipe, arguments, tmp_path, capsys, monkeypatch
):
    def down(*_: object, **__: object):
        raise ConnectionError("http://judge/v1: no answer in 5 attempts")

    def broken(*_: object, **__: object):
        raise TypeError("a fault of the program")

    from dinalrm_align.align.evaluation import HeldOut

    folder = run(recipe, arguments, tmp_path / "run", "--loop.steps=1")
    monkeypatch.setattr(HeldOut, "_batch", down)
    with pytest.raises(SystemExit) as stopped:
        recipe.main(["--resume", str(folder), "--loop.steps=2"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 1 and said.startswith("error: run ") and "no answer in 5 attempts" in said
    assert "step_000002 with: python" in said and "--resume" in said
    monkeypatch.setattr(HeldOut, "_batch", broken)
    with pytest.raises(TypeError, match="a fault of the program") as failed:
        recipe.main(["--resume", str(folder), "--loop.steps=2"])
    assert failed.traceback[-1].name == "broken" and "--resume" in failed.value.__notes__[0]
    monkeypatch.undo()
    recipe.main(["--resume", str(folder), "--loop.steps=2"])
    assert (folder / "summary.json").exists() and read_metrics(folder / "metrics.jsonl")[-1]["step"] == 2


def test_a_failure_after_the_last_update_says_how_to_write_the_summary(
    recipe, arguments, tmp_path, capsys, monkeypatch
):
    from dinalrm_align.align import setup

    def full(*_: object, **__: object):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(setup, "summarise", full)
    with pytest.raises(SystemExit) as stopped:
        run(recipe, arguments, tmp_path / "run", "--loop.steps=1")
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 1 and "No space left on device" in said and "step_000001 with: python" in said
    monkeypatch.undo()
    recipe.main(["--resume", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 1
