"""The dry run of tests/gpu/run_all.sh, on a GPU that is not there."""

import json
import subprocess

from paths import RECIPES

ROOT = RECIPES.parent
RUNS = [
    "mine_pairs", "refl", "refl, PickScore", "grpo", "dpo", "dpo, offline", "lpo", "nft", "prepare_pairs",
    "train_reward", "evaluate_reward", "score_images",
]  # fmt: skip


def test_the_dry_run_of_the_gpu_report_has_every_row(tmp_path):
    command = ["tests/gpu/run_all.sh", "--dry_run", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    steps = {name: step["status"].split(":")[0] for name, step in found["steps"].items()}
    hardware = dict.fromkeys(("tests", "quantised", "distributed", "compiled"), "needs a GPU")
    assert steps == hardware | dict.fromkeys(("folders", "measured", "recipes", "profile"), "done")
    failed = {(row["step"], row["name"]): row["status"] for row in found["rows"] if row["status"] != "done"}
    assert failed == {} and [row["name"] for row in found["rows"] if row["step"] == "recipes"] == RUNS
    updates = {row["name"]: set(row["milliseconds"]) for row in found["rows"] if row.get("milliseconds")}
    assert updates["refl"] == {"rollout", "policy", "reward", "backward"}
    assert found["rows"][-1]["kernels"] and "no number is a measurement" in (tmp_path / "gpu.md").read_text()
