"""Which settings a resumed alignment run may change, and how it finds its files. No model is loaded."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from paths import RECIPES

from dinalrm_align.align.config import AlignRun
from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import Given, Resolved, resolve, resolve_values
from dinalrm_align.align.resolve import resumed as resume
from dinalrm_align.reward.config import TrainRewardRun
from dinalrm_align.train.checkpoints import check_identity, latest_checkpoint, save_checkpoint
from dinalrm_align.train.command import parse
from dinalrm_align.train.identity import check_settings, may_change, settings_by_name
from dinalrm_align.train.metrics import MetricsLog
from dinalrm_align.train.settings import types_by_name
from dinalrm_align.train.state import RunState

KINDS = {"refl_sd35": ReflRun, "grpo_sd35": GrpoRun, "dpo_sd35": DpoRun, "lpo_sd35": LpoRun, "nft_sd35": NftRun}


def started(folder: Path, name: str, *options: str, settings: bool = True) -> Path:
    """The folder of a run of a recipe on the model `shapes`, with a checkpoint of one number."""
    run = resolve(KINDS[name], "", RECIPES / f"{name}.py", ["--model=shapes", f"--output_dir={folder}", *options])
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(run.text)
    parameters = {"number": torch.nn.Parameter(torch.zeros(1))}
    state = RunState(
        parameters, torch.optim.SGD(parameters.values()), step=1, identity={"list of prompts": "a"},
        settings=settings_by_name(run.run) if settings else {},
    )  # fmt: skip
    save_checkpoint(
        folder, state, log=MetricsLog(folder / "metrics.jsonl"), accelerator=Accelerator(cpu=True), keep_last=1
    )
    return folder


def resumed(folder: Path, name: str, *options: str) -> Resolved:
    return resolve(KINDS[name], "", RECIPES / f"{name}.py", [f"--resume={folder}", *options])


def refusal(capsys, folder: Path, name: str, *options: str) -> str:
    capsys.readouterr()
    with pytest.raises((SystemExit, ValueError)) as stopped:
        resumed(folder, name, *options)
    return capsys.readouterr().err if stopped.type is SystemExit else str(stopped.value)


@pytest.mark.parametrize("settings", [True, False], ids=["new checkpoint", "checkpoint of an earlier version"])
@pytest.mark.parametrize(
    "name, option, expected",
    [
        ("refl_sd35", "--policy.alpha=64", "policy.alpha: got 64.0; expected 16.0"),
        ("refl_sd35", "--policy.rank=8", "policy.rank: got 8; expected 16"),
        ("refl_sd35", "--policy.init=kaiming", "policy.init: got 'kaiming'; expected 'gaussian'"),
        ("refl_sd35", "--gold=pixel", "gold: got 'pixel'; expected None"),
        ("refl_sd35", "--gold=[oracle, pixel]", "gold: got ['oracle', 'pixel']; expected None"),
        ("refl_sd35", "--reward=pixel", "reward: got 'pixel'; expected 'dinalrm'"),
        ("refl_sd35", "--seed=1", "seed: got 1; expected 0"),
        ("refl_sd35", "--height=128", "height: got 128; expected None"),
        ("refl_sd35", "--evaluation.seed=5", "evaluation.seed: got 5; expected 1234"),
        ("refl_sd35", "--evaluation.samples=64", "evaluation.samples: got 64; expected 384"),
        ("refl_sd35", "--watch.drift_sigmas=[0.5]", "watch.drift_sigmas: got [0.5]; expected [0.3, 0.8]"),
        ("refl_sd35", "--watch.sigmas=[]", "watch.sigmas: got []; expected [0.1, 0.4, 0.7]"),
        ("refl_sd35", "--refl.reward_sigma=[0.2]", "refl.reward_sigma: got [0.2]; expected None"),
        ("refl_sd35", "--refl.num_steps=5", "refl.num_steps: got 5; expected None"),
        ("refl_sd35", "--refl.guidance_scale=2", "refl.guidance_scale: got 2.0; expected None"),
        ("refl_sd35", "--memory.vae_dtype=bfloat16", "memory.vae_dtype: got 'bfloat16'; expected 'float32'"),
        ("refl_sd35", "--memory.judge_dtype=bfloat16", "memory.judge_dtype: got 'bfloat16'; expected 'auto'"),
        ("refl_sd35", "--memory.allow_tf32", "memory.allow_tf32: got True; expected False"),
        ("refl_sd35", "--memory.base_quant=int8", "memory.base_quant: got 'int8'; expected 'none'"),
        ("refl_sd35", "--optim.name=adamw8bit", "optim.name: got 'adamw8bit'; expected 'adamw'"),
        ("refl_sd35", "--loop.ema_decay=0.5", "loop.ema_decay: got 0.5; expected 0.9"),
        ("refl_sd35", "--anchor.reward=pixel", "anchor.reward: got 'pixel'; expected None"),
        ("grpo_sd35", "--grpo.reward_draws=4", "grpo.reward_draws: got 4; expected 2"),
        ("grpo_sd35", "--grpo.group_size=4", "grpo.group_size: got 4; expected 8"),
        ("dpo_sd35", "--dpo.group_size=4", "dpo.group_size: got 4; expected 6"),
        ("lpo_sd35", "--lpo.candidates=3", "lpo.candidates: got 3; expected 4"),
        ("nft_sd35", "--nft.guidance_scale=2", "nft.guidance_scale: got 2.0; expected 1.0"),
    ],
)
def test_a_fixed_setting_is_refused_by_name(tmp_path, capsys, name, option, expected, settings):
    folder = started(tmp_path / "run", name, settings=settings)
    said = refusal(capsys, folder, name, option)
    assert expected in said and "leave it out, or start a new run" in said


@pytest.mark.parametrize(
    "name, options",
    [
        ("refl_sd35", ["--loop.steps=99", "--optim.lr=0.1", "--evaluation.every=3", "--watch.level=0.01"]),
        ("refl_sd35", ["--refl.kl_weight=1", "--gradient_checkpointing=false", "--loop.keep_last=9"]),
        ("grpo_sd35", ["--grpo.clip_range=0.01", "--grpo.kl_beta=1"]),
        ("dpo_sd35", ["--dpo.beta=5"]),
    ],
)
def test_other_settings_change_and_are_named(tmp_path, capsys, name, options):
    folder = started(tmp_path / "run", name)
    capsys.readouterr()
    text = yaml.safe_load(resumed(folder, name, *options).text)
    printed = capsys.readouterr().out
    for option in options:
        setting, value = option.removeprefix("--").split("=")
        assert setting in printed
        section, _, last = setting.rpartition(".")
        assert (text[section] if section else text)[last] == yaml.safe_load(value)
    assert "settings that changed" not in (resumed(folder, name) and capsys.readouterr().out)


def test_a_run_from_before_a_setting_existed_resumes_with_its_default(tmp_path, capsys):
    folder = started(tmp_path / "run", "refl_sd35", settings=False)
    path = folder / "config.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "judge_dtype" not in line and "allow_tf32" not in line))
    memory = resumed(folder, "refl_sd35").run.memory
    assert (memory.judge_dtype, memory.allow_tf32) == ("auto", False)
    assert "memory.judge_dtype" in refusal(capsys, folder, "refl_sd35", "--memory.judge_dtype=bfloat16")


def test_an_edited_config_is_refused_by_the_checkpoint(tmp_path, capsys):
    folder = started(tmp_path / "run", "refl_sd35")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("alpha: 16.0", "alpha: 64.0"))
    assert "policy.alpha: got 64.0; expected 16.0" in refusal(capsys, folder, "refl_sd35")


def test_a_checkpoint_of_another_run_is_refused(tmp_path, capsys):
    folder, other = started(tmp_path / "run", "refl_sd35"), started(tmp_path / "b", "refl_sd35", "--gold=pixel")
    (folder / "checkpoints").rename(tmp_path / "aside")
    (other / "checkpoints").rename(folder / "checkpoints")
    assert "gold: got None; expected 'pixel'" in refusal(capsys, folder, "refl_sd35")


def test_settings_are_checked_after_they_are_merged(tmp_path, capsys):
    folder = started(tmp_path / "run", "grpo_sd35", "--grpo.window_range=[0,7]")
    run = resumed(folder, "grpo_sd35", "--grpo.window_size=5").run
    assert (run.grpo.window_size, run.grpo.window_range) == (5, (0, 7))
    said = refusal(capsys, folder, "grpo_sd35", "--grpo.window_size=8")
    assert f"grpo.window_range [0, 7] comes from {folder / 'config.yaml'}" in said
    said = refusal(capsys, folder, "grpo_sd35", "--grpo.window_size=8", "--grpo.window_range=[0,6]")
    assert "comes from" not in said


def test_a_new_run_is_checked_against_the_recipes_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "grpo_sd35.py"
    recipe.with_suffix(".yaml").write_text("grpo:\n  window_range: [0, 8]\n  num_steps: 10\n")
    run = resolve(GrpoRun, "", recipe, ["--model=sd35", "--grpo.window_size=6"]).run
    assert (run.grpo.window_size, run.grpo.window_range) == (6, (0, 8))


def test_prompts_are_compared_by_content_before_models_are_loaded(tmp_path):
    folder = started(tmp_path / "run", "refl_sd35")
    (tmp_path / "mine.txt").write_text("a cat\n")
    assert resumed(folder, "refl_sd35", f"--prompts={tmp_path / 'mine.txt'}").run.prompts  # the name may change
    checkpoint = latest_checkpoint(folder)
    check_identity(checkpoint, {"list of prompts": "a", "evaluation prompts": "of a later version"})
    with pytest.raises(ValueError, match="its list of prompts is a, here it is b"):
        check_identity(checkpoint, {"list of prompts": "b"})


def test_a_moved_folder_is_compared_by_content(tmp_path, capsys):
    (tmp_path / "gold").mkdir()
    folder = started(tmp_path / "run", "refl_sd35", f"--gold={tmp_path / 'gold'}")
    (tmp_path / "copy").mkdir()
    assert "gold: got" in refusal(capsys, folder, "refl_sd35", f"--gold={tmp_path / 'copy'}")
    (tmp_path / "gold").rename(tmp_path / "moved")
    assert resumed(folder, "refl_sd35", f"--gold={tmp_path / 'moved'}").run.gold == str(tmp_path / "moved")
    assert "gold: got 'pixel'" in refusal(capsys, folder, "refl_sd35", "--gold=pixel")


def test_a_model_server_may_move_but_not_serve_another_model(tmp_path, capsys):
    """A run that stopped because its server failed goes on with another server."""
    old, new = "0.5*unifiedreward=http://old:8080/v1#M", "0.5*unifiedreward=https://[::1]:9/v1"
    folder = started(tmp_path / "run", "grpo_sd35", f"--reward={old}")
    assert resumed(folder, "grpo_sd35", f"--reward={new}#M").run.reward == f"{new}#M"
    for other in (f"{new}#N", new, f"{new}#M".replace("0.5", "0.4"), "oracle"):
        assert "reward: got" in refusal(capsys, folder, "grpo_sd35", f"--reward={other}")


def test_a_server_of_one_of_several_gold_rewards_may_move(tmp_path, capsys):
    old, new = "unifiedreward=http://old:8080/v1#M", "unifiedreward=http://new:8080/v1#M"
    folder = started(tmp_path / "run", "grpo_sd35", f"--gold=[{old}, oracle]")
    assert resumed(folder, "grpo_sd35", f"--gold=[{new}, oracle]").run.gold == [new, "oracle"]
    for other in (f"[oracle, {new}]", f"[{new}, pixel]", new):
        assert "gold: got" in refusal(capsys, folder, "grpo_sd35", f"--gold={other}")


def test_a_value_of_another_type_is_no_server_that_moved():
    for old, new in ((1, "1"), (None, "None"), ([1, "a"], "[1, 'a']")):
        with pytest.raises(ValueError, match="x: got"):
            check_settings({"x": old}, {"x": new}, (), "config.yaml")


def test_the_folder_of_checkpoints_is_a_run_too(tmp_path):
    folder = started(tmp_path / "run", "refl_sd35")
    assert resumed(folder / "checkpoints", "refl_sd35").checkpoint == folder / "checkpoints" / "step_000001"


def test_a_run_resumes_from_another_directory(tmp_path, monkeypatch):
    """config.yaml holds absolute paths, and the printed command works from anywhere, spaces included."""
    here, there = tmp_path / "my runs", tmp_path / "there"
    for folder in (here, here / "gold", there):
        folder.mkdir()
    (here / "mine.txt").write_text("a cat\n")
    monkeypatch.chdir(here)
    folder = started(Path("first run"), "refl_sd35", "--prompts=mine.txt", "--gold=gold", "--hpsv3.template=t.json")
    monkeypatch.chdir(there)
    found = resumed(here / folder, "refl_sd35")
    run = found.run
    assert (run.prompts, run.gold, run.hpsv3.template, run.output_dir) == tuple(
        str(here / name) for name in ("mine.txt", "gold", "t.json", "first run")
    )
    assert found.resume_command == f"python {RECIPES / 'refl_sd35.py'} --resume '{here / 'first run'}'"
    assert Path(run.output_dir) == found.checkpoint.parent.parent


@pytest.mark.parametrize("kind", [*KINDS.values(), AlignRun, TrainRewardRun])
def test_every_setting_that_may_change_exists(kind):
    names = may_change(kind)
    assert names and set(names) <= types_by_name(kind).keys()
    assert len(set(names)) == len(names)


def test_a_setting_that_nobody_lists_is_fixed():
    @dataclasses.dataclass
    class Later(ReflRun):
        """ReFL.

        Args:
            added: a setting.
        """

        added: int = 0

    assert "added" not in may_change(Later)
    assert set(may_change(ReflRun)) == set(may_change(Later))


def test_settings_are_stored_as_json_and_read_back(tmp_path):
    run, text = parse(ReflRun, "", ["--refl.reward_sigma_range=[0.1,0.3]"])
    assert settings_by_name(run)["refl.reward_sigma_range"] == [0.1, 0.3]
    (tmp_path / "config.yaml").write_text(text)
    assert settings_by_name(parse(ReflRun, "", [], [tmp_path / "config.yaml"])[0]) == settings_by_name(run)
    assert os.sep not in "".join(settings_by_name(run))


@pytest.mark.parametrize("model", ["shapes", "sd35"])
@pytest.mark.parametrize("name", KINDS)
def test_values_make_the_run_of_a_command_line(name, model, tmp_path):
    options = {"optim.lr": 0.5, "evaluation.shown": 3, "policy.rank": 4, "reward": "hpsv3", "output_dir": str(tmp_path)}
    given = Given(prompts=["a"])
    run = resolve_values(KINDS[name], name.removesuffix("_sd35"), {"model": model, **options}, given)
    words = [f"--{option}={value}" for option, value in options.items()]
    expected = resolve(KINDS[name], "", RECIPES / f"{name}.py", [f"--model={model}", *words])
    assert run == dataclasses.replace(expected, text=run.text, given=given)
    assert yaml.safe_load(run.text) == yaml.safe_load(expected.text)


def test_a_run_of_values_gets_a_folder_and_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = resolve_values(ReflRun, "refl", {"model": "shapes"}, Given())
    assert run.run.output_dir == str(tmp_path / "runs" / "refl_shapes_dinalrm_seed0") and run.checkpoint is None
    folder = started(tmp_path / "run", "refl_sd35")
    again = resolve_values(ReflRun, "refl", {"model": "shapes", "output_dir": str(folder), "loop.steps": 9}, Given())
    assert resume(again, folder).checkpoint == latest_checkpoint(folder)
    other = resolve_values(ReflRun, "refl", {"model": "shapes", "output_dir": str(folder), "seed": 1}, Given())
    with pytest.raises(ValueError, match="seed: got 1; expected 0"):
        resume(other, folder)
    with pytest.raises(ValueError, match="no checkpoint yet"):
        resume(again, tmp_path)
    with pytest.raises(FileNotFoundError, match="no method_sd35.py"):
        resolve_values(ReflRun, "method", {}, Given())


@pytest.mark.parametrize(
    "values, message",
    [
        ({"optim.lr": -1}, "optim.lr: got -1"),
        ({"optim": 1}, "unknown setting 'optim'"),
        ({"optim.rl": 1.0}, "did you mean 'optim.lr'"),
        ({"optim.lr.x": 1.0}, "unknown setting 'optim.lr.x'"),
        ({"refl.grad_steps": 9, "refl.num_steps": 4}, "expected at most num_steps, 4"),
        ({"reward": "oracle"}, "has no gradient"),
        ({"height": 65}, "height"),
    ],
)
def test_invalid_values_raise(values, message):
    with pytest.raises(ValueError, match=message):
        resolve_values(ReflRun, "refl", {"model": "shapes", **values}, Given(), gradient=True)
