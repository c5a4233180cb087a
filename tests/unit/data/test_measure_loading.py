"""The table and the settings of examples/evidence/measure_loading.py."""

import json
import runpy

import pytest
from paths import ROOT


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(ROOT / "examples" / "evidence" / "measure_loading.py")["main"]


def test_loaders_are_measured_on_the_same_pairs(main, tmp_path, capsys):
    words = [f"--output_dir={tmp_path}", "--pairs=12", "--row_group=4", "--height=32", "--width=32", "--text_width=8",
             "--text_tokens=2", "--prompts=3", "--seconds=5"]  # fmt: skip
    main(words)
    rows = json.loads((tmp_path / "loading.json").read_text())
    assert [row["pairs"] for row in rows.values()] == [12] * 4
    assert rows["released: a row group per pair"]["ratio"] == 1
    assert "| shards, 4 batches ahead | 12 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, found", [(["--pairs=2", "--batch_size=4"], "pairs: got 2"), (["--height=100"], "height: got 100")]
)
def test_invalid_settings_are_refused(main, words, found):
    with pytest.raises(ValueError, match=found):
        main(words)
