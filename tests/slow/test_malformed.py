"""Every malformed call, file and command line of the tables raises the documented error with a message that names the
setting or file at fault. No case returns a result, and none raises from inside a library.

The tables are malformed_api.py, malformed_files.py and malformed_cli.py; counts: `python tests/malformed_report.py`.
"""

import os
import pickle
import subprocess
import sys
import warnings

import malformed_api
import malformed_cli
import malformed_files
import pytest
from malformed import ROOT, Bomb, Case, World, check, check_command


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """The World of all cases; no case may have run a pickle by the end."""
    world = World(tmp_path_factory.mktemp("malformed"))
    yield world
    assert not (world.root / "unpickled").exists()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def table(module) -> list:
    """The cases of a module as parameters with the id `group: name`."""
    return [pytest.param(case, id=f"{group}: {case.name}") for group, cases in module.GROUPS.items() for case in cases]


@pytest.mark.parametrize("case", table(malformed_api))
def test_calls(world, case):
    assert check(case, world) is None


@pytest.mark.parametrize("case", table(malformed_files))
def test_files(world, case):
    assert check(case, world) is None


@pytest.mark.parametrize("command", table(malformed_cli))
def test_command_lines(world, command):
    assert check_command(command, world) is None


def test_case_names_are_unique():
    names = [param.id for module in (malformed_api, malformed_files, malformed_cli) for param in table(module)]
    assert len(names) >= 800
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})


def test_the_check_is_strict(world):
    """It reports a returned value, another type, a message without the names, and an error from inside a library."""
    good = dict(error=ValueError, names="scaled")
    assert check(Case("scores", lambda w: 1.0, **good), world) == "silent: returned 1.0"
    refused = malformed_api.LATENTS[0]
    assert check(refused, world) is None
    assert "expected <class 'OSError'>" in check(Case("type", refused.do, OSError, refused.names), world)
    assert "expected a message" in check(Case("message", refused.do, ValueError, "no such words"), world)
    assert "not by a check of this package" in check(Case("deep", lambda w: int("scaled"), **good), world)
    command = malformed_cli.Command("runs", malformed_cli.REFL, lambda w: ["--help"], "")
    assert check_command(command, world) == "expected status 2, got 0"


def test_an_unrestricted_load_runs_the_pickle(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "unpickled")))
    assert (tmp_path / "unpickled").exists()


def test_a_wrong_option_ends_a_recipe_before_torch_is_loaded(tmp_path):
    """Three recipes in one process: status 2, one line on stderr each, no torch."""
    recipes = ["refl_sd35", "train_reward", "build_shapes"]
    probe = (
        "import sys, runpy\nsys.argv = ['x', '--loop.step=3']\n"
        f"for recipe in {recipes}:\n"
        f"    try: runpy.run_path(f'{ROOT}/recipes/{{recipe}}.py', run_name='__main__')\n"
        "    except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ended.stdout.split() == ["2", "False"] * len(recipes)
    lines = ended.stderr.splitlines()
    assert len(lines) == len(recipes)
    assert all(line.startswith("error: unknown option --loop.step=3") for line in lines)
