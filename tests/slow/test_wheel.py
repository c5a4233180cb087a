"""The wheel has the recipes and their settings, and its command runs without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from paths import RECIPES, ROOT
from tiny_recipes import make_world, recipes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of the sources by the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("dinalrm_align", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_has_every_recipe_and_its_settings(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    scripts = [path.relative_to(RECIPES) for path in RECIPES.rglob("*") if path.suffix in (".py", ".yaml", ".md")]
    package = [path.relative_to(ROOT) for path in (ROOT / "dinalrm_align").rglob("*.py")]
    assert {f"dinalrm_align/recipes/{path}" for path in scripts} | {str(path) for path in package} <= names
    assert len({name.split("/")[0] for name in names}) == 2  # the package and its dist-info, no package named recipes


def test_the_command_of_the_wheel_runs_in_an_empty_folder(wheel, tmp_path):
    make_world(tmp_path / "world")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "dinalrm_align"]
    options = dict(cwd=tmp_path / "empty", env=environment, check=True, capture_output=True, text=True)
    assert str(tmp_path / "site") in subprocess.run([*command, "--help"], **options).stdout
    arguments = [*recipes(tmp_path / "world")[0].arguments, "--loop.steps=1"]
    subprocess.run([*command, "refl", *arguments], **options)
    (run,) = (tmp_path / "empty" / "runs").iterdir()
    assert (run / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert "kl_unit: reward_std" in (run / "config.yaml").read_text()  # from refl_shapes.yaml
