"""The shipped reward reproduces examples/results/evaluation: scores, accuracy, calibration.

Tolerances: a score may move by 0.002 of the standard deviation between images (rounding differs between machines);
values computed from the stored scores may move in the last written digit.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.eval.calibration import reliabilities
from dinalrm_align.eval.config import EvaluateRun
from dinalrm_align.eval.scores import NoiseLevels, load_scores, score_pairs, shared_features
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.shapes.pairs import write_pairs

STORED = Path(__file__).parents[3] / "examples" / "results" / "evaluation"
SCORE_TOLERANCE = 0.002
GROUPS, PER_GROUP = 32, 4


@pytest.fixture(scope="module")
def stored():
    path = STORED / "scores_heldout.safetensors"
    with safe_open(path, framework="np") as file:
        terms = json.loads(file.metadata()["terms"])
    return load_scores(path, terms), terms, json.loads((STORED / "evaluation.json").read_text())


def test_accuracy_and_calibration_follow_from_the_stored_scores(stored):
    scores, _, numbers = stored
    for level, accuracy in numbers["accuracy"]["heldout"].items():
        assert np.nanmean(scores.correct(level)) == pytest.approx(accuracy, abs=1e-5)
    config = EvaluateRun()
    levels = reliabilities(
        {"reward": {0: {"heldout": scores}}}, {"reward": config.loss}, "heldout", config.calibrated_at
    )
    for sigma, found in levels["reward"].items():
        expected = numbers["calibration"][f"{sigma:g}"]
        assert found.reliability.error == pytest.approx(expected["error"], abs=2e-5)
        assert found.nll == pytest.approx(expected["nll"], abs=2e-5)
        assert found.scale == pytest.approx(expected["best_scale"], abs=1e-3)


def test_the_shipped_reward_reproduces_the_stored_scores(stored, tmp_path):
    scores, terms, _ = stored
    spec = MODELS["shapes"]
    pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
    lists = PairsConfig(heldout_groups=GROUPS)  # the first of the evaluated lists
    write_pairs("heldout", tmp_path / "pairs", pipeline, lists)
    model = LatentReward.from_pretrained(spec.reward, transformer=pipeline.transformer.requires_grad_(False)).model
    batches = LatentPairs(tmp_path / "pairs", batch_size=terms["batch_size"]).in_order()
    level = NoiseLevels.at(0.4)
    again = score_pairs(shared_features(model), batches, [level], seed=terms["noise_seed"], title="drift")
    expected = scores.score(level.name)[: GROUPS * PER_GROUP]
    assert np.abs(again.score(level.name) - expected).max() < SCORE_TOLERANCE * scores.score(level.name).std()
    pairs = GROUPS * PER_GROUP * (PER_GROUP - 1) // 2
    assert np.array_equal(again.label, scores.label[:pairs]) and np.array_equal(again.chosen, scores.chosen[:pairs])
