"""The command lines of recipes/prepare_pairs.py and recipes/measure_loading.py."""

import json
import subprocess
import sys

import pytest
from paths import RECIPES
from tiny_prepare import recipe


@pytest.mark.parametrize("name", ["prepare_pairs", "measure_loading"])
def test_help_imports_no_torch(name):
    code = (
        f"import runpy, sys\nsys.argv = ['{name}.py', '--help']\n"
        f"try:\n    runpy.run_path({str(RECIPES / name)!r} + '.py', run_name='__main__')\n"
        "except SystemExit:\n    assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_loaders_are_measured_on_the_same_pairs(tmp_path, capsys):
    words = [f"--output_dir={tmp_path}", "--pairs=12", "--row_group=4", "--height=32", "--width=32", "--text_width=8",
             "--text_tokens=2", "--prompts=3", "--seconds=5"]  # fmt: skip
    recipe("measure_loading").main(words)
    rows = json.loads((tmp_path / "loading.json").read_text())
    assert [row["pairs"] for row in rows.values()] == [12] * 4
    assert rows["released: a row group per pair"]["ratio"] == 1
    assert "| shards, 4 batches ahead | 12 |" in capsys.readouterr().out
