"""Every example runs as it stands, on the shipped weights; those that train or count for minutes are shortened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTS = "--seeds 0 --samples 3 --every 1 --workers 2 --evaluation.shown=2 --evaluation.num_steps=2 --watch.sigmas=[]"
SHORTENED = {
    "frontier": f"{LISTS} --updates 1 --trials 6:3e-4 --refl.batch_size=2",
    "hacking": f"{LISTS} --updates 1 --arms none kl --refl.batch_size=2",
    "methods": f"{LISTS} --methods grpo --rewards dinalrm oracle --sweep false --loop.steps=1 --dry_run",  # as frontier
    "hpdv3_folder": "4",
    "alignment_ceiling": "ceiling --images=8 --updates=1 --samples=4 --batch=2",
    "gains_by_kind": "--help",  # reads finished runs; tests/unit/eval/test_evidence_comparisons.py
    "gpu_model": "--help",  # counts for minutes; tests/unit/align/test_gpu_model.py
    "own_samples": f"--captions=2 --prompts={ROOT}/dinalrm_align/shapes/prompts/test.txt",
    "probe_features": "--images=64 --sigmas 0.2 --checkpoint half",
    "measure_judges": "judges 3 0",
    "measure_precision": "precision 3",
    "sample_grid": "4 --images=16",
    "trl_style": "--max_steps=1 --num_generations=2 --per_device_train_batch_size=1",
    "serve_load": "--samples=8 --rounds=1 --output=serve_load.md",
    "reward_guided_sampling": "4",
    "measure_loading": "--pairs=8 --height=64 --width=64 --text_width=64",
}


def run(example: Path, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, example, *SHORTENED.get(example.stem, "").split()]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended


EXAMPLES = [path for path in sorted((ROOT / "examples").rglob("*.py")) if not path.stem.startswith("_")]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    assert run(example, tmp_path).stdout
    if example.stem == "hacking":
        assert (tmp_path / "runs" / "hacking" / "hacking.png").is_file()
        (tmp_path / "runs" / "hacking" / "runs" / "kl_seed0" / "summary.json").unlink()
        again = run(example, tmp_path).stdout  # what is finished is kept, what was cut short goes on
        assert "run 2 of 2" in again and ": none_seed0" not in again and "| kl | 0 |" in again
    if example.stem == "frontier":
        assert "[95 %]" in (tmp_path / "runs" / example.stem / f"{example.stem}.md").read_text()
