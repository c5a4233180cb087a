"""Every malformed call, file and command line of the tables is refused: the documented error, and a sentence that says
what was wrong. None is scored, and none ends in a traceback from deep inside a library.

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
from malformed import ROOT, Bomb, Case, World, judge, judge_command


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """The world of all cases; what a pickle would create if it were run must not be there when they are over."""
    world = World(tmp_path_factory.mktemp("malformed"))
    yield world
    assert not (world.root / "unpickled").exists()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def table(module) -> list:
    """The cases of a module, each once, under the name of its group."""
    return [pytest.param(case, id=f"{group}: {case.name}") for group, cases in module.GROUPS.items() for case in cases]


@pytest.mark.parametrize("case", table(malformed_api))
def test_calls(world, case):
    assert judge(case, world) is None


@pytest.mark.parametrize("case", table(malformed_files))
def test_files(world, case):
    assert judge(case, world) is None


@pytest.mark.parametrize("command", table(malformed_cli))
def test_command_lines(world, command):
    assert judge_command(command, world) is None


def test_there_are_enough_of_them_and_none_twice():
    names = [param.id for module in (malformed_api, malformed_files, malformed_cli) for param in table(module)]
    assert len(names) >= 250
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})


def test_the_judge_is_strict(world):
    """What it would pass if it were not: a score, another type, no sentence, an error from inside a library."""
    good = dict(error=ValueError, says="scaled")
    assert judge(Case("scores", lambda w: 1.0, **good), world) == "silent: returned 1.0"
    refused = malformed_api.LATENTS[0]
    assert judge(refused, world) is None
    assert "expected <class 'OSError'>" in judge(Case("type", refused.do, OSError, refused.says), world)
    assert "expected a sentence" in judge(Case("sentence", refused.do, ValueError, "no such words"), world)
    assert "not by a check of this package" in judge(Case("deep", lambda w: int("scaled"), **good), world)
    command = malformed_cli.Command("runs", malformed_cli.REFL, lambda w: ["--help"], "")
    assert judge_command(command, world) == "expected status 2, got 0"


def test_the_pickles_would_run_if_they_were_let(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "unpickled")))
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("recipe", ["refl_sd35", "train_reward", "build_shapes"])
def test_a_wrong_option_ends_a_real_program_before_torch_is_loaded(recipe, tmp_path):
    probe = (
        "import sys, runpy\nsys.argv = ['x', '--loop.step=3']\n"
        f"try: runpy.run_path({str(ROOT / 'recipes' / recipe)!r} + '.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (ended.returncode, ended.stdout.strip()) == (2, "False")
    assert ended.stderr.startswith("error: unknown option --loop.step=3")
    assert len(ended.stderr.splitlines()) == 1
