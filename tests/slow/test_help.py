"""`--help` of every recipe prints its options with status 0, quickly and without importing torch."""

import json
import os
import subprocess
import sys

import pytest
from paths import RECIPES, ROOT

NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))
OPTIONS = {
    "compare_runs": "--shown",
    "dpo_sd35": "--dpo.refresh_every",
    "mine_pairs": "--mine.min_gap",
    "refl_sd35": "--refl.grad_steps",
    "train_reward": "--reward.lora.rank",
    "prepare_pairs": "--filter.ties",
    "push_to_hub": "--dry_run",
    "score_images": "PROMPT_AND_IMAGES ...",
}
PROBE = """
import contextlib, io, json, runpy, sys, time
found = {}
for name in json.loads(sys.argv[1]):
    sys.argv, stdout, start = [name, "--help"], io.StringIO(), time.process_time()
    try:
        with contextlib.redirect_stdout(stdout):
            runpy.run_path(f"recipes/{name}.py", run_name="__main__")
        status = "none"
    except SystemExit as stop:
        status = stop.code
    found[name] = status, "torch" in sys.modules, time.process_time() - start, stdout.getvalue()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list]:
    """Of each recipe: exit status, whether torch is loaded, CPU seconds, and the help text. One process runs all."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROBE, json.dumps(NAMES)]
    return json.loads(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True).stdout)


def test_help_prints_the_options_without_torch(found):
    assert {name: values[:2] for name, values in found.items()} == {name: [0, False] for name in NAMES}
    assert {name: option for name, option in OPTIONS.items() if option not in found[name][3]} == {}
    assert "DRaFT-K" in found["refl_sd35"][3]
    assert "runs/*" in found["compare_runs"][3] and "folders of runs" in found["compare_runs"][3]


def test_help_is_quick(found):
    """CPU time, which other processes do not change; about 0.4 s for the first recipe, less for the others."""
    assert {name: values[2] for name, values in found.items() if values[2] > 1.5} == {}


@pytest.mark.parametrize("words", [[], ["grpo", "--help"], ["serve", "--help"]])
def test_the_command_helps_quickly_without_torch(words):
    probe = (
        "import runpy, sys, time; start = time.process_time(); runpy.run_module('dinalrm_align', run_name='__main__')"
    )
    probe += "; print('torch' in sys.modules, time.process_time() - start)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, "-c", probe, *words], cwd=ROOT, env=environment, capture_output=True, check=True, text=True
    ).stdout
    loaded, seconds = shown.splitlines()[-1].split()
    assert shown.startswith("usage: dinalrm-align ") and loaded == "False" and float(seconds) < 1.5
