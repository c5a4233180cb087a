"""Command lines from dataclasses: options, flags, positional words, errors."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.eval.config import CompareRun
from dinalrm_align.reward.config import TrainRewardRun
from dinalrm_align.train.command import parse


@dataclass
class Inner:
    """Settings of a part.

    Args:
        size: how large.
        depth: how deep.
        seed: of the part.
    """

    size: int = 1
    depth: int = 2
    seed: int = 3


@dataclass
class Settings:
    """Settings of a program.

    Args:
        seed: of everything.
        left: one part.
        right: another.
        width: how wide.
    """

    seed: int = 0
    left: Inner = field(default_factory=Inner)
    right: Inner = field(default_factory=Inner)
    width: int = 4


def test_a_flag_needs_no_value():
    for words, stop in (
        (["--watch.stop_on_hacking"], True), (["--watch.stop_on_hacking", "--seed=1"], True), ([], False),
        (["--watch.stop_on_hacking", "false"], False), (["--watch.stop_on_hacking=false"], False),
    ):  # fmt: skip
        assert parse(ReflRun, "", words)[0].watch.stop_on_hacking is stop


def test_help_shows_alternatives_in_words(capsys):
    """It showed Union[bool, Literal['auto']]."""
    with pytest.raises(SystemExit):
        parse(ReflRun, "", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(type: bool or 'auto', default: auto)" in shown and "list[RewardText] or RewardText or null" in shown
    assert "Union" not in shown and "(type: Literal['auto', 'cpu', 'cuda'], default: auto)" in shown


def test_positional_words_go_to_their_setting(capsys):
    for words in (["a", "b", "--shown=2"], ["--shown", "2", "a", "b"]):
        settings, _ = parse(CompareRun, "", words, positional="runs")
        assert (settings.runs, settings.shown) == ([str(Path("a").absolute()), str(Path("b").absolute())], 2)
    with pytest.raises(SystemExit):
        parse(CompareRun, "", ["--shown=2"], positional="runs")
    assert "runs" in capsys.readouterr().err


def test_an_option_needs_its_section(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Settings, "", ["--depth=5"])
    assert stopped.value.code == 2
    assert "unknown option --depth=5; did you mean '--left.depth'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, word, message",
    [
        (ReflRun, "--optim.lr=x", "optim.lr: got 'x'; expected a number"),
        (ReflRun, "--optim.lr=-1", "optim.lr: got -1; expected at least 0"),
        (TrainRewardRun, "--lora_lr=-1", "lora_lr: got -1; expected at least 0"),
        (ReflRun, "--loop.steps=1.5", "loop.steps: got '1.5'; expected an integer"),
        (ReflRun, "--optim.name=foo", "optim.name: got 'foo'; expected one of adamw, adamw8bit"),
        (ReflRun, "--refl.reward_sigma=[0.1,x]", "refl.reward_sigma: got 'x'; expected a list (each a number) or null"),
        (ReflRun, "--refl.reward_sigma=[0.1,7]", "refl.reward_sigma: got 7; expected at least 0 and at most 1"),
        (ReflRun, "--watch.stop_on_hacking=7", "watch.stop_on_hacking: got '7'; expected true or false"),
        (ReflRun, "--loop=5", "loop: got '5'; expected a section"),
        (TrainRewardRun, "--lora_lr=x", "lora_lr: got 'x'; expected a number or null"),
        (TrainRewardRun, "--reward.visual_taps=3", "reward.visual_taps: got '3'; expected a list (each an integer)"),
    ],
)
def test_a_refused_value_is_named_with_what_was_expected(kind, word, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(kind, "", [word])
    assert (stopped.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")


@pytest.mark.parametrize("kind", [ReflRun, TrainRewardRun])
def test_written_settings_are_read_back_with_equal_types(kind, tmp_path):
    config, text = parse(kind, "", [])
    written = tmp_path / "config.yaml"
    written.write_text(text)
    assert repr(parse(kind, "", [], [written])[0]) == repr(config)  # 128 and 128.0 have different digests
