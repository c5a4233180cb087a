"""Folders in the public layouts with random weights, and the tables of the runs on them."""

import json
from dataclasses import fields

import pytest
import torch
from full_size import prediction
from full_size.prediction import Memory, Weights
from full_size.rehearsal import rows_of, table
from gpu import report
from public_folders import DINALRM, PICKSCORE, PIPELINE, SIZES, WITHOUT_T5, build
from safetensors import safe_open

from dinalrm_align import LatentReward, load_reward
from dinalrm_align.align.savings.cost import Cost
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.specs import MODELS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("weights"), "tiny")


def test_the_folders_load_as_the_public_ones(folder):
    pipeline = load_pipeline(folder / PIPELINE, dtype=torch.bfloat16)
    reward = LatentReward.from_pretrained(folder / DINALRM, pipeline=pipeline)
    scores = reward(torch.randn(2, 16, 8, 8), ["a cube", "a ball"])
    assert reward.config.num_layers == 3 and bool(scores.isfinite().all()) and scores[0] != scores[1]
    judge = load_reward(f"pickscore={folder / PICKSCORE}", spec=MODELS["sd35"], vae=pipeline.vae)
    assert bool(judge.score_images(torch.rand(1, 3, 32, 32), ["a cube"]).isfinite())
    assert load_pipeline(folder / WITHOUT_T5, dtype=torch.bfloat16).text_encoder_3 is None
    assert "dinalrm_align" not in json.loads((folder / DINALRM / "config.json").read_text())
    with safe_open(folder / PIPELINE / "text_encoder_3" / "model.safetensors", "pt") as file:
        assert (
            file.get_tensor("shared.weight").dtype == torch.float16 and "encoder.embed_tokens.weight" not in file.keys()
        )
    with pytest.raises(ValueError, match="holds .*tiny.*; expected .*full"):
        build(folder, "full")


def test_the_full_size_is_that_of_the_published_files():
    """GB of the files on the hub: 4.94 transformer, 0.25 + 1.39 + 9.5 text encoders, 3.94 PickScore, 0.67 DiNa-LRM."""
    weights = Weights(SIZES["full"], torch.bfloat16)
    got = [weights.transformer, weights.clips, weights.t5, weights.clip_h, weights.reward]
    assert [size / 1e9 for size in got] == pytest.approx([4.94, 1.64, 9.52, 3.94, 0.67], rel=0.005)


def test_the_predicted_memory_is_that_of_each_phase(folder, monkeypatch):
    """Counted in place of a count: 8 bytes of LoRA, 16 of moments, 32 of activations, 64 in evaluation."""
    scale, row = rows_of(folder, folder / "runs", "tiny")["refl"]
    weights = Weights(SIZES["tiny"], torch.bfloat16)

    def count(case, networks):
        return Cost(weights.transformer + 8, 16, 32 if case.trains else 64, *[0] * (len(fields(Cost)) - 3))

    monkeypatch.setattr(prediction, "count", count)
    phases = prediction.predict(row, scale, "tiny", Memory(100.0, 50.0))
    assert phases["T5"] == Memory(100 + weights.t5, 50 + weights.clip_h + weights.t5)  # T5's file is still mapped
    text = Memory(100 + weights.clips + weights.t5 + weights.vae, 50 + weights.clip_h + weights.largest_clip)
    assert phases["text"] == text
    read, private = weights.transformer + weights.clip_h, weights.vae + weights.reward + 2 * 8 + 16
    assert phases["training"] == Memory(100 + private + 32, 50 + read)
    assert phases["evaluation"] == Memory(100 + private + 64, 50 + read)


def test_a_failed_run_is_a_row_of_the_table():
    done = dict(status=0, seconds=9.6, t5=True, phase="text", resident=2e9, predicted_resident=2.2e9)
    done |= dict(private=1e9, predicted_private=0.9e9)
    found = dict(
        size="full", pixels=256, machine="m", rows={"refl": done, "nft": dict(status=1, seconds=5.0, t5=False)}
    )
    lines = table(found).splitlines()
    assert lines[-2] == "| refl | yes | 10 | 2.00 | 2.20 | +10.0 % | text | 1.00 | 0.90 | -10.0 % |"
    assert lines[-1].startswith("| nft | no | 5 | failed, status 1 |")


def test_the_gpu_report_goes_on_after_a_failure_and_continues(tmp_path, monkeypatch):
    """The first call fails at one step and has no time for the last; the second repeats these two only."""
    asked = []

    def run_step(command, log, seconds):
        asked.append(command[-1] if "gpu" in command else command[1])
        log.write_text("ended")
        (tmp_path / "rows.jsonl").write_text(json.dumps(dict(step="recipes", name="refl", status="done", seconds=1.0)))
        return "failed: status 1" if len(asked) == 2 else report.DONE

    monkeypatch.setattr(report, "run_step", run_step)
    monkeypatch.setattr(report, "card", lambda dry_run: "a card")
    steps = tuple(report.Step(name, 60) for name in ("folders", "recipes", "compiled"))
    monkeypatch.setattr(report, "STEPS", steps[:2])
    report.main(["--output_dir", str(tmp_path)])
    monkeypatch.setattr(report, "STEPS", steps)
    late = report.main(["--output_dir", str(tmp_path), "--minutes", "0"])
    assert late["steps"]["recipes"]["status"].startswith("not run: out of time") and len(asked) == 2
    again = report.main(["--output_dir", str(tmp_path)])
    assert {name: step["status"] for name, step in again["steps"].items()} == dict.fromkeys(again["steps"], "done")
    assert len(asked) == 4 and "| recipes | refl | 1 |" in (tmp_path / "gpu.md").read_text()
    with pytest.raises(SystemExit, match="has a report with dry_run False"):
        report.main(["--output_dir", str(tmp_path), "--dry_run"])
