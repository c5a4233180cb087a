"""recipes/compare_runs.py by its command line."""

import os
import subprocess
import sys

from paths import RECIPES, ROOT
from report_runs import make_four_runs


def test_the_command_takes_folders_groups_and_options(tmp_path):
    first, second, pixel, grpo = map(str, make_four_runs(tmp_path))
    output, absent = tmp_path / "out", str(tmp_path / "absent")
    words = [first, second, absent, "--group", "pixel", pixel, "--group", "grpo", grpo, "--output_dir", str(output)]
    command = [sys.executable, str(RECIPES / "compare_runs.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert absent in ended.stdout and str(output / "index.html") in ended.stdout
    markdown = (output / "compare.md").read_text()
    assert "| refl dinalrm less pixel | update 4 | 1 |" in markdown and "| grpo, seed 0 |" in markdown
