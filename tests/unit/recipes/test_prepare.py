"""The command lines of recipes/prepare_pairs.py and recipes/measure_loading.py."""

import json

from tiny_prepare import recipe


def test_loaders_are_measured_on_the_same_pairs(tmp_path, capsys):
    words = [f"--output_dir={tmp_path}", "--pairs=12", "--row_group=4", "--height=32", "--width=32", "--text_width=8",
             "--text_tokens=2", "--prompts=3", "--seconds=5"]  # fmt: skip
    recipe("measure_loading").main(words)
    rows = json.loads((tmp_path / "loading.json").read_text())
    assert [row["pairs"] for row in rows.values()] == [12] * 4
    assert rows["released: a row group per pair"]["ratio"] == 1
    assert "| shards, 4 batches ahead | 12 |" in capsys.readouterr().out
