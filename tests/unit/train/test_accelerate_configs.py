"""recipes/accelerate/*.yaml: accelerate reads them, and the commands in their heads make the updates that they say."""

import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.reward.config import TrainRewardRun
from dinalrm_align.train.command import parse

RECIPES = Path(__file__).parents[3] / "recipes"
FILES = sorted((RECIPES / "accelerate").glob("*.yaml"))
RUNS = {
    "train_reward": TrainRewardRun, "refl_sd35": ReflRun, "dpo_sd35": DpoRun, "grpo_sd35": GrpoRun, "nft_sd35": NftRun,
}  # fmt: skip
UPDATES = {"train_reward": 32, "refl_sd35": 64, "dpo_sd35": 8, "grpo_sd35": 64, "nft_sd35": 48}
"""Pairs, samples or prompts, by the papers or their public code."""


def commands(path: Path) -> list[list[str]]:
    """The arguments of every `accelerate launch` in the head of the file."""
    start = "#   accelerate launch "
    return [shlex.split(line.removeprefix(start)) for line in path.read_text().split("\n") if line.startswith(start)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_make_the_papers_updates(path, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    recipes = set()
    for words in commands(path):
        launch, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert Path(launch.config_file) == path.relative_to(RECIPES.parent) and Path(launch.training_script).is_file()
        assert launch.use_fsdp == ("fsdp" in path.stem) and (not launch.use_fsdp or launch.fsdp_version == 2)
        assert launch.num_processes == launch.num_machines * (1 if path.stem == "gpu1" else 8)
        recipe = Path(launch.training_script).stem
        defaults = RECIPES / f"{recipe}{'_sd35' * (recipe == 'train_reward')}.yaml"
        run, _ = parse(RUNS[recipe], "", launch.training_script_args, [defaults])
        taken = {
            "train_reward": lambda run: run.batch_size * run.loop.accumulate,
            "refl_sd35": lambda run: run.refl.batch_size * run.loop.accumulate,
            "dpo_sd35": lambda run: run.dpo.batch_size * run.loop.accumulate,
            "grpo_sd35": lambda run: run.grpo.groups,
            "nft_sd35": lambda run: run.nft.groups,
        }
        assert launch.num_processes * taken[recipe](run) == UPDATES[recipe], words
        if recipe == "grpo_sd35":
            states = run.grpo.groups * run.grpo.group_size * run.grpo.window_size
            assert states == run.grpo.minibatches * run.loop.accumulate * run.grpo.sample_batch, words
        if recipe == "nft_sd35":
            assert run.nft.groups * run.nft.group_size * run.nft.levels == run.loop.accumulate * run.nft.sample_batch, (
                words
            )
        recipes.add(recipe)
    assert recipes == RUNS.keys()


def test_there_is_a_file_for_every_size():
    assert {path.stem for path in FILES} == {"gpu1", "gpu8", "gpu8_fsdp2", "gpu64", "gpu64_fsdp2"}
