"""Pairwise accuracy on scores computed by hand, merging over ranks, and report files."""

import json
import math

import pytest
import torch

from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.eval.accuracy import OVERALL, Tally, merge, metrics, pairwise_tallies, write_report
from dinalrm_align.models.text import Conditions


def batch(label=(1.0, 1.0, 0.0, 0.5), value=0.0):
    """Four pairs of eight images; an image's latents hold its score by `by_value`.

    chosen 3 2 1 5, rejected 1 2 4 0: right, tie (wrong), right since label 0 prefers `rejected`, left out as undecided.
    """
    values = torch.tensor([3.0, 2, 1, 5, 1, 2, 4, 0]) + value
    return PairBatch(
        latents=values.view(8, 1, 1, 1),
        conditions=Conditions([""] * 8, torch.zeros(8, 1, 1), torch.zeros(8, 1)),
        chosen=torch.arange(4),
        rejected=torch.arange(4, 8),
        label=torch.tensor(label),
        group=torch.arange(4).repeat(2),
        concepts=("colour", "colour", "shape", "shape"),
    )


def by_value(batch, level, noise):
    return batch.latents.flatten()


def test_counts_by_hand():
    (tallies,) = pairwise_tallies(by_value, [batch()], [(0.4,)]).values()
    assert tallies[OVERALL] == Tally(2, 3)
    assert tallies["colour"] == Tally(1, 2)
    assert tallies["shape"] == Tally(1, 1)


def test_without_pairs_there_is_no_accuracy():
    assert Tally(50, 100).accuracy == 0.5 and math.isnan(Tally().accuracy)


def test_parts_of_processes_add_up_to_the_whole():
    batches = [batch(), batch(label=(0.0, 1, 1, 1)), batch(label=(1.0, 1, 1, 1))]
    levels = [(0.2,), (0.2, 0.5)]
    whole = pairwise_tallies(by_value, batches, levels)
    parts = [pairwise_tallies(by_value, batches, levels, rank=rank, world=2) for rank in range(2)]
    assert merge(parts) == whole
    assert whole[(0.2,)][OVERALL].pairs == 11


def test_noise_is_the_same_at_every_level_and_for_every_division_of_the_work():
    seen = {}

    def remember(batch, level, noise):
        seen.setdefault(float(batch.latents[0]), []).append(noise)
        return batch.latents.flatten()

    batches = [batch(), batch(value=10.0)]
    pairwise_tallies(remember, batches, [(0.2,), (0.5,)], seed=3)
    pairwise_tallies(remember, batches, [(0.2,)], seed=3, rank=1, world=2)
    first, second = seen[3.0], seen[13.0]
    assert len(first) == 2 and torch.equal(first[0], first[1])
    assert len(second) == 3 and torch.equal(second[0], second[2])
    assert not torch.equal(first[0], second[0])


def test_a_score_that_is_not_finite_is_an_error():
    """In `merge`, so that the processes that met none raise it too: the first of these two parts is sound."""

    def score(batch, level, noise):
        scores = by_value(batch, level, noise)
        return torch.where(scores == 12, math.nan, scores)

    batches = [batch(), batch(value=10.0)]
    parts = [pairwise_tallies(score, batches, [(0.4,)], rank=rank, world=2) for rank in range(2)]
    merge(parts[:1])
    with pytest.raises(ValueError, match="at sigma 0.4, 1 of 6 validation pairs have a score that is NaN or infinite"):
        merge(parts)


@pytest.mark.gpu
def test_scores_may_come_from_another_device():
    (tallies,) = pairwise_tallies(lambda *arguments: by_value(*arguments).cuda(), [batch()], [(0.4,)]).values()
    assert tallies[OVERALL] == Tally(2, 3)


def test_report_files(tmp_path):
    tallies = pairwise_tallies(by_value, [batch()], [(0.2,), (0.4,), (0.2, 0.4)])
    write_report(tallies, tmp_path, title="update 3")
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert [level["sigma"] for level in report["levels"]] == [[0.2], [0.4], [0.2, 0.4]]
    assert report["levels"][0]["concepts"]["colour"] == {"accuracy": 0.5, "pairs": 2}
    table = (tmp_path / "per_concept.md").read_text().splitlines()
    assert table[0] == "| concept | pairs | sigma 0.2 | sigma 0.4 | sigma 0.2+0.4 |"
    assert table[2] == "| all | 3 | 66.7 | 66.7 | 66.7 |"
    assert (tmp_path / "accuracy_vs_sigma.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy.json",
        "accuracy_vs_sigma.png",
        "per_concept.md",
    ]
    assert metrics(tallies) == {f"accuracy/{name}": 2 / 3 for name in ("0.2", "0.4", "0.2+0.4")}
