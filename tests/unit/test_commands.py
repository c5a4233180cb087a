"""The command dinalrm-align: every recipe has a command, which runs its script with the words as they are."""

import sys

import pytest
from paths import RECIPES, load_recipe
from PIL import Image

from dinalrm_align import __main__ as command
from dinalrm_align import __version__


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder of recipes with one script, which prints its arguments and names, as the recipes of a wheel."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "refl_sd35.py").write_text(
        "import sys\nfrom pathlib import Path\nprint(__name__, sys.argv[1:], Path(__file__).name)\n"
        "if '--help' in sys.argv:\n    print('usage: refl_sd35.py; python recipes/dpo_sd35.py --x; python -m "
        "dinalrm_align.serve')\n    sys.exit()\n"
    )
    monkeypatch.setattr(command, "PACKAGE", tmp_path)


def test_every_recipe_has_a_command():
    scripts = [script for script, _ in command.COMMANDS.values() if script]
    assert sorted(scripts) == sorted(path.stem for path in RECIPES.glob("*.py"))
    assert command.recipes() == RECIPES


def test_a_command_runs_its_script_with_the_words(fake, capsys):
    before = list(sys.argv)
    command.main(["refl", "--a", "b c"])
    assert capsys.readouterr().out == "__main__ ['--a', 'b c'] refl_sd35.py\n"
    assert sys.argv == before


def test_help_names_commands_in_place_of_scripts(fake, capsys):
    command.main(["refl", "--help"])
    assert capsys.readouterr().out.endswith("usage: dinalrm-align refl; dinalrm-align dpo --x; dinalrm-align serve\n")


def test_serve_is_the_server(capsys):
    command.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: dinalrm-align serve ") and "dinalrm-align serve --model sd35" in shown


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_all_are_listed(words, capsys):
    command.main(words)
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in command.COMMANDS) and str(RECIPES) in shown


def test_an_unknown_command_is_refused_with_the_nearest(capsys):
    for name, hint in (("grop", "did you mean 'grpo'? dinalrm"), ("zzz", "expected one of refl, dpo")):
        with pytest.raises(SystemExit) as stopped:
            command.main([name])
        assert stopped.value.code == 2 and hint in capsys.readouterr().err


def test_a_script_that_stops_with_a_status_stops_with_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["push", "only-one"])
    assert stopped.value.code == 2


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.metadata, "version", {"dinalrm-align": __version__}.get)
    command.main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


def test_score_prints_a_line_for_each_image(tiny_world, tmp_path, capsys):
    """Images of other sizes, each scored alone: the order and the other images change nothing."""
    recipe, paths = load_recipe("score_images"), [str(tmp_path / name) for name in ("a.png", "b.png")]
    Image.new("RGB", (64, 64), "red").save(paths[0])
    Image.new("RGB", (100, 40), "blue").save(paths[1])
    options = [f"--model={tiny_world}", "--device=cpu"]
    recipe.main(["a small red circle on white", *paths, *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == paths
    assert len({float(line.split("\t")[0]) for line in lines}) == 2
    recipe.main([*options, "a small red circle on white", paths[1]])
    assert capsys.readouterr().out.splitlines() == lines[1:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a prompt"], "expected a prompt and image files"),
        (["a prompt", "absent.png"], "absent.png"),
        (["a prompt", "a.png", "--reward=unknown"], "unknown reward 'unknown'"),
    ],
)
def test_what_cannot_be_scored_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    with pytest.raises(SystemExit) as stopped:
        load_recipe("score_images").main([*words, "--model=shapes"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
