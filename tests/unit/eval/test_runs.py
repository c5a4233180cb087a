"""Runs and groups of seeds: gains worked by hand, pairing by seed and caption, costs, and invalid input."""

import numpy as np
import pytest
from report_runs import PROMPTS, make_run

from dinalrm_align.eval.report.entries import Run, difference, read_entries


def read_groups(folders):
    return read_entries([], folders)[0]


@pytest.fixture
def folders(tmp_path):
    """latent: seeds 0 and 1, better by 1 than pixel: seeds 0, 1 and 2, in every sample; one caption gains more."""
    gain = np.array([0.2, 0.4, 0.4, 0.6])

    def run(name, seed, gains):
        return make_run(tmp_path / f"{name}{seed}", gains, seed=seed, profiled=(1,))

    latent = [run("latent", s, {2: list(gain + 1.5), 4: list(gain + 1 + 0.1 * s)}) for s in (0, 1)]
    pixel = [run("pixel", s, {2: list(gain * 0), 4: list(gain + 0.1 * s)}) for s in (1, 0, 2)]
    return {"latent": latent, "pixel": pixel}


def test_a_gain_is_paired_and_averaged_over_the_samples_of_a_caption(folders):
    """Square (1.4 + 1.6) / 2 = 1.5, circle: (1.2 + 1.4) / 2 = 1.3; the proxy gains ten times that, its s.d. is 10."""
    run = Run.read(folders["latent"][0])
    np.testing.assert_allclose(run.gain("gold", 4), [1.5, 1.3])
    np.testing.assert_allclose(run.gain("proxy", 4), [1.5, 1.3])


def test_a_profiled_update_counts_as_long_as_the_others(folders):
    np.testing.assert_allclose(Run.read(folders["latent"][0]).seconds(), [2.0, 2.0, 2.0, 2.0])


def test_groups_are_paired_by_seed_whatever_their_order(folders):
    """Seeds 0 and 1 are shared; each differs by 1 in every caption, so that nothing varies."""
    latent, pixel = read_groups(folders)
    found = difference(latent, pixel, (4, 4))
    assert found.seeds == 2
    np.testing.assert_allclose([found.low, found.mean, found.high], 1.0)
    assert (latent.best_step, pixel.best_step, latent.steps) == (2, 4, [0, 2, 4])
    assert difference(latent, pixel, (2, 4)).mean == pytest.approx(1.45)  # 1.5 less the mean of 0 and 0.1
    (alone,) = read_groups({"third": folders["pixel"][2:]})
    assert difference(latent, alone, (4, 4)) is None


def test_an_entry_has_the_updates_at_which_all_its_runs_were_evaluated(tmp_path):
    first = make_run(tmp_path / "first", {2: [0.1] * 4, 4: [0.2] * 4})
    second = make_run(tmp_path / "second", {2: [0.1] * 4, 3: [9.0] * 4}, seed=1)
    assert read_groups({"both": [first, second]})[0].steps == [0, 2]


def test_costs_are_aggregated_over_updates_and_runs(tmp_path):
    """FLOPs: mean of the profiled updates 1 and 3, 2 * (1 + 3) / 2 = 4 and 4 * 2 = 8, mean 6; memory the largest."""
    runs = [
        make_run(tmp_path / str(seed), {4: [0.1] * 4}, seed=seed, profiled=(1, 3), gflops=gflops)
        for seed, gflops in enumerate((2.0, 4.0))
    ]
    (group,) = read_groups({"one": runs})
    assert group.cost("gflops") == {"rollout": 6.0, "backward": 3.0}
    assert group.cost("memory_mib") == {"backward": 24.0}
    assert group.cost("seconds") == {"rollout": 1.5, "backward": 0.5}
    assert group.at("time", [4]) == [8.0] and group.teraflops == pytest.approx(0.009)


def test_a_group_with_other_evaluation_settings_is_not_compared(folders, tmp_path):
    for changed in ({"prompts": [*PROMPTS[:3], "a star"]}, {"guidance_scale": 2.0}):
        name = next(iter(changed))
        other = make_run(tmp_path / f"other {name}", {4: [0.0] * 4}, seed=5, **changed)
        entries, notes = read_entries([], {**folders, "other": [other]})
        assert [bool(entry.incomparable) for entry in entries] == [False, False, True]
        assert f"other, seed 5: evaluated with other settings than {folders['latent'][0]}" in notes[0]
        assert f"differ in {name})" in notes[0]


def test_a_seed_counts_once_in_a_group(folders, tmp_path):
    again = make_run(tmp_path / "again", {4: [0.0] * 4}, seed=1)
    with pytest.raises(ValueError, match=r"group latent: got seeds \[0, 1, 1\]; expected each once"):
        read_groups({"latent": [*folders["latent"], again]})


def test_a_run_without_an_evaluation_of_the_base_model_is_refused(tmp_path):
    run = make_run(tmp_path / "begun", {0: [0.0] * 4})
    (run / "metrics.jsonl").write_text('{"step": 1, "elapsed": 1.0}\n')
    with pytest.raises(ValueError, match="begun: got no evaluation of the base model"):
        Run.read(run)
