"""Settings and checkpoints with random damage: either what is read back is whole and meant, or a documented error says
what is wrong. Nothing else ever happens: no other exception, none from inside a library, no score that is no number.
"""

import contextlib
import copy
import io
import json
import math
import shutil
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import PACKAGE, World

from dinalrm_align import LatentReward, RewardConfig
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.reward.config import TrainRewardRun
from dinalrm_align.train.command import parse
from dinalrm_align.train.files import read_json, read_yaml

DOCUMENTED = (ValueError, TypeError, OSError)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**400, -1, 0, 1, "lora"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
positions = st.floats(0, 1, exclude_max=True)


def bounded(examples: int):
    """The same examples everywhere, as many as a slow core does in some seconds."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(derandomize=True, max_examples=examples, deadline=None, database=None, suppress_health_check=checks)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


def assert_documented(error: Exception) -> None:
    """The error is a sentence that this package raised."""
    assert len(str(error)) > 15
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    assert Path(frame.f_code.co_filename).is_relative_to(PACKAGE), f"raised in {frame.f_code.co_filename}: {error!r}"


def places(tree: dict, above: tuple = ()) -> list[tuple]:
    """Every key of nested dictionaries, as a path."""
    found = []
    for key, value in tree.items():
        found += [(*above, key), *(places(value, (*above, key)) if isinstance(value, dict) else [])]
    return found


@st.composite
def damaged(draw, tree: dict) -> dict:
    """The tree with one to three values replaced, keys deleted, or keys added."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(places(tree))) if tree else ("",)
        target = tree
        for key in above:
            target = target[key]
        match draw(st.sampled_from(["replace", "replace", "delete", "add"])):
            case "replace":
                target[last] = draw(values)
            case "delete":
                target.pop(last, None)
            case "add":
                target[draw(st.text(max_size=8))] = draw(values)
    return tree


@st.composite
def damaged_bytes(draw, data: bytes) -> bytes:
    """The bytes with some replaced, cut out or put in, most often near the start, where structure is; or truncated."""
    made = bytearray(data)
    if draw(st.integers(0, 3)) == 0:
        return bytes(made[: int(draw(positions) * len(made))])
    for _ in range(draw(st.integers(1, 4))):
        at = int(draw(positions) ** draw(st.sampled_from([1, 4])) * len(made))
        match draw(st.sampled_from(["replace", "replace", "cut", "insert"])):
            case "replace":
                made[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del made[at : at + draw(st.integers(1, 16))]
            case "insert":
                made[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(made)


@bounded(400)
@given(damaged(RewardConfig().to_dict()))
def test_a_reward_config_is_whole_or_refused(tree):
    try:
        config = RewardConfig.from_dict(tree)
    except (ValueError, TypeError) as error:
        assert_documented(error)
    else:
        assert RewardConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@bounded(150)
@given(st.one_of(values, st.binary(max_size=60)))
def test_any_file_is_an_object_or_refused(tmp_path, content):
    """As JSON and as YAML; what both can say they read alike."""
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    read = {}
    for name, reader in (("json", read_json), ("yaml", lambda path: read_yaml(path, "file"))):
        try:
            read[name] = reader(path)
            assert isinstance(read[name], dict)
        except DOCUMENTED as error:
            assert_documented(error)


def parsed(kind: type, path: Path):
    """What a recipe makes of a settings file: the settings and their text, or the refusal."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return parse(kind, "", ["--config", str(path)])
    except SystemExit as stop:
        lines = stderr.getvalue().splitlines()
        assert stop.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 20, lines
        return None


def assert_whole_or_refused(kind: type, path: Path) -> None:
    """Settings that were read, written and read again are the same settings."""
    found = parsed(kind, path)
    if found is not None:
        again = path.with_name("again.yaml")
        again.write_text(found[1], encoding="utf-8")
        assert parsed(kind, again)[0] == found[0]


RECIPES = {kind: yaml.safe_load(parse(kind, "", [])[1]) for kind in (ReflRun, TrainRewardRun)}


@bounded(60)
@given(st.data())
@pytest.mark.parametrize("kind", RECIPES)
def test_settings_of_a_recipe_are_whole_or_refused(tmp_path, kind, data):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(data.draw(damaged(RECIPES[kind]))), encoding="utf-8")
    assert_whole_or_refused(kind, path)


@bounded(60)
@given(damaged_bytes(yaml.safe_dump(RECIPES[ReflRun]).encode()))
def test_a_settings_file_with_damaged_bytes_is_whole_or_refused(tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    assert_whole_or_refused(ReflRun, path)


@bounded(60)
@given(st.data())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_reward_scores_numbers_or_is_refused(world, tmp_path, name, data):
    folder = tmp_path / "reward"
    shutil.copytree(world.reward_dir, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data.draw(damaged_bytes((world.reward_dir / name).read_bytes())))
    inputs = {
        "latents": torch.ones(1, 16, 8, 8), "noise": torch.zeros(1, 16, 8, 8),
        "prompt_embeds": torch.ones(1, 3, 32), "pooled_prompt_embeds": torch.ones(1, 32),
    }  # fmt: skip
    try:
        reward = LatentReward.from_pretrained(folder, pipeline=world.pipeline, local_files_only=True)
        reward._statistics_calls = 0  # these latents are constant, which a warning would say
        score = reward(**inputs)
    except DOCUMENTED as error:
        assert_documented(error)
    else:
        assert math.isfinite(score.item())
