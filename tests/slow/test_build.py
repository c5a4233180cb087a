"""recipes/build_shapes.py from nothing to a world that another recipe aligns, with tiny networks and budgets."""

import dataclasses
import json
from pathlib import Path

import yaml
from paths import load_recipe

from dinalrm_align.shapes.config import StackConfig
from dinalrm_align.shapes.generators import BLOCK

STEPS = {"vae": 2, "text": 2, "base": 4, "outsider": 2, "clip": 2, "pixel": 2}
OPTIONS = {
    **{f"stack.{name}": value for name, value in dataclasses.asdict(StackConfig.tiny()).items()},
    **{f"{name}.loop.steps": steps for name, steps in STEPS.items()},
    **{f"{name}.batch_size": 8 for name in STEPS},
    "outsider_heads": 1, "cached_images": 32, "scout.groups": BLOCK, "scout.reward_updates": 1, "reward_updates": 1,
    "scout.aligned_updates": 1, "scout.over_aligned_updates": 1, "pairs.groups": 5 * BLOCK, "pairs.heldout_groups": 4,
    "pairs.per_concept": 1, "pairs.per_shifted": 1,
}  # fmt: skip
STAGES = ["vae", "text", "base", "outsider", "scout", "pairs", "dinalrm", "pixel"]
KINDS = {"heldout", "outside", "shifted", "concepts"}


def test_one_command_builds_a_world_that_another_recipe_aligns(tmp_path, monkeypatch, capsys):
    build = load_recipe("build_shapes")
    monkeypatch.setattr(build, "run_process", lambda words: load_recipe(Path(words[1]).stem).main(words[2:]))
    build.main([f"--output_dir={tmp_path}", *(f"--{name}={json.dumps(value)}" for name, value in OPTIONS.items())])
    assert f"--model {tmp_path / 'weights'}" in capsys.readouterr().out.splitlines()[-1]

    weights, report = tmp_path / "weights", json.loads((tmp_path / "report.json").read_text())
    assert sorted(path.name for path in weights.iterdir()) == ["dinalrm", "makers", "pipeline", "pixel"]
    assert {path.name for path in (weights / "makers").iterdir()} == {"half", "outsider", "aligned", "over_aligned"}
    assert list(report) == STAGES
    assert all(set(report[name]["numbers"]) == KINDS for name in ("dinalrm", "pixel"))
    settings = yaml.safe_load((tmp_path / "dinalrm" / "config.yaml").read_text())
    assert settings["init_from"] == str(tmp_path / "scout" / "reward")
    made_with = json.loads((tmp_path / "pairs" / "train" / "made_with.json").read_text())
    assert made_with["own_share"] == 0.6 and "own samples" in made_with["generators"]

    refl = load_recipe("refl_sd35")
    run = tmp_path / "run"
    refl.main([
        f"--model={weights}", "--reward=dinalrm", f"--output_dir={run}", "--device=cpu", "--loop.steps=1",
        "--evaluation.samples=4",
    ])  # fmt: skip
    assert json.loads((run / "summary.json").read_text())["updates"] == 1
