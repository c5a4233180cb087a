"""Paths in settings: absolute, with ~ expanded, wherever a setting holds one."""

import typing
from pathlib import Path

import pytest

from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.mining_config import MineRun
from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.savings.config import SavingsRun
from dinalrm_align.data.config import PrepareRun
from dinalrm_align.eval.config import AblateRun, CompareRun, EvaluateRun
from dinalrm_align.reward.config import TrainRewardRun
from dinalrm_align.reward.names import RewardText, parse_reward
from dinalrm_align.shapes.config import BuildConfig
from dinalrm_align.train.command import parse
from dinalrm_align.train.settings import PathText, types_by_name

KINDS = (
    ReflRun, GrpoRun, DpoRun, LpoRun, NftRun, TrainRewardRun, MineRun, PrepareRun, EvaluateRun, AblateRun, CompareRun,
    BuildConfig, SavingsRun,
)  # fmt: skip
NEEDED = {PrepareRun: ["--source=x"], CompareRun: ["--runs=[x]"]}
NOT_PATHS = {  # settings that hold other text
    "launch", "title", "buckets", "protocol", "filter.min_gaps", "reward.base_model_id", "push_to_hub",
}  # fmt: skip


def path_types(hint: object) -> list[type]:
    """The path types inside a type annotation."""
    if isinstance(hint, type) and issubclass(hint, PathText):
        return [hint]
    return [found for inner in typing.get_args(hint) for found in path_types(inner)]


def container_of(hint: object) -> object:
    """dict, list or None: what holds the paths in values of this type."""
    kinds = [typing.get_origin(part) for part in (hint, *typing.get_args(hint))]
    return next((kind for kind in kinds if kind in (dict, list)), None)


PATHS = [
    (kind, name, container_of(hint)) for kind in KINDS for name, hint in types_by_name(kind).items() if path_types(hint)
]


def value(settings: object, name: str) -> object:
    for part in name.split("."):
        settings = vars(settings)[part]
    return settings


def written(container: object, path: str) -> str:
    """A value of a setting that holds `path`."""
    if container is list:
        return f"[{path}]"
    return f"{{mine: {path}}}" if container is dict else path


def given(kind: type, name: str, container: object, path: str) -> list[str]:
    more = ["--dpo.mode=offline"] if (kind, name) == (DpoRun, "pairs") else NEEDED.get(kind, [])
    if kind is CompareRun and name == "group":
        path = f"[{path}]"
    return [*more, f"--{name}={written(container, path)}"]


@pytest.mark.parametrize("kind, name, container", PATHS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_path_is_made_absolute(kind, name, container, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for text, expected in (("~/x", tmp_path / "home" / "x"), ("./y", tmp_path / "y"), ("../z", tmp_path.parent / "z")):
        words = given(kind, name, container, text)
        for argv in (words, [*words[:-1], *words[-1].split("=", 1)]):
            settings, dumped = parse(kind, "", argv)
            assert str(expected) in str(value(settings, name)) and str(expected) in dumped
            assert "~" not in dumped
        (tmp_path / "settings.yaml").write_text("\n".join(nested(words[-1])))
        assert str(expected) in parse(kind, "", [*words[:-1], "--config=settings.yaml"])[1]


def nested(word: str) -> list[str]:
    """`--section.name=value` as the lines of a YAML file."""
    name, _, text = word.removeprefix("--").partition("=")
    parts = name.split(".")
    return [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts[:-1])] + [
        f"{'  ' * (len(parts) - 1)}{parts[-1]}: {text}"
    ]


def test_text_settings_are_paths_or_listed():
    """A new setting of type str is a path, or stands in the list above."""
    plain = {
        name
        for kind in KINDS
        for name, hint in types_by_name(kind).items()
        if hint is str or str in typing.get_args(hint) and not path_types(hint)
    }
    assert {name for name in plain if name.split(".")[-1] not in {each.split(".")[-1] for each in NOT_PATHS}} <= {
        "arms", "filter.max_tie_gaps", "pairs.emphasis", "shapes_pairs.emphasis",
        "pairs.generators", "pairs.outside", "shapes_pairs.generators", "shapes_pairs.outside",  # mappings of settings
    }  # fmt: skip


def test_paths_inside_a_mapping_of_settings_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, text = parse(TrainRewardRun, "", ["--shapes_pairs.generators", "{a: {lora: runs/a}, b: {render: spoiled}}"])
    lora = str(tmp_path / "runs" / "a")
    assert run.shapes_pairs.generators["a"].lora == lora and f"lora: {lora}" in text


def test_names_and_hub_ids_remain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for text, expected in (
        ("shapes", "shapes"), ("auto", "auto"), ("other/name", "other/name"),
        ("owner/name", str(tmp_path / "owner" / "name")), ("./shapes", str(tmp_path / "shapes")),
    ):  # fmt: skip
        assert parse(ReflRun, "", [f"--model={text}"])[0].model == expected
    (tmp_path / "hub").mkdir()
    sets = parse(EvaluateRun, "", ["--test_sets={a: hub, b: ./hub, c: owner/name, d: x/y}"])[0].test_sets
    assert sets == {"a": "hub", "b": str(tmp_path / "hub"), "c": str(tmp_path / "owner" / "name"), "d": "x/y"}


def test_paths_in_a_sum_of_rewards_become_absolute(tmp_path, monkeypatch):
    folder = tmp_path / "a - b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text, sources in (
        ("dinalrm + 0.2*pickscore", [None, None]),
        ("0.5*dinalrm=./r - 2*pickscore='../it s'", [str(folder / "r"), str(tmp_path / "it s")]),
        ("pickscore=~/p - pixel", [str(tmp_path / "p"), None]),
        ("./r", [str(folder / "r")]),
        ("unifiedreward=http://127.0.0.1:80/v1", ["http://127.0.0.1:80/v1"]),
        ("pickscore=owner/name", ["owner/name"]),
        ("module:function", [None]),
    ):
        terms = parse_reward(RewardText(text))
        assert [term.source for term in terms] == sources
        assert [(term.name, term.weight) for term in terms] == [(t.name, t.weight) for t in parse_reward(text)]
        assert RewardText(RewardText(text)) == RewardText(text)


@pytest.mark.parametrize("option", ["--prompts=", "--output_dir=", "--model=", "--prompts= ", "--resume="])
def test_an_empty_path_is_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(ReflRun, "", [option])
    assert stopped.value.code == 2
    assert f"{option[2:].split('=')[0]}: got '" in capsys.readouterr().err


def test_paths_in_python_are_made_absolute_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").touch()
    run = ReflRun(prompts="mine.txt", model="shapes", gold="./gold")
    assert (run.prompts, run.model, run.gold) == (str(tmp_path / "mine.txt"), "shapes", str(tmp_path / "gold"))
    assert type(run.prompts) is str
    assert CompareRun(group={"a": ["b"]}).group == {"a": [str(tmp_path / "b")]}
    assert Path(SavingsRun().output_dir) == tmp_path / "runs" / "savings"
