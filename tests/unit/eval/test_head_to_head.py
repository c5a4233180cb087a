"""Groups of runs: gains worked by hand, pairing by seed and caption, costs, the table, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinalrm_align.eval.report import run as report
from dinalrm_align.eval.report.groups import Run, difference, read_groups, table

PROMPTS = ["a circle", "a square", "a circle", "a square"]
BASE = {"gold": [1.0, 2.0, 1.0, 2.0], "proxy": [10.0, 30.0, 10.0, 30.0]}  # standard deviation 10


def make_run(folder: Path, seed: int, gains: dict[int, list[float]], profiled=(1,), gflops=2.0, **terms) -> Path:
    """Updates of 2 seconds, a profiled one 6, judged at 0 and where `gains` says: of gold per sample, of proxy ten
    times that.
    """
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: {seed}\n")
    terms = {"prompts": PROMPTS, "seed": 1234, **terms}
    rows, elapsed = [], 0.0
    for step in range(max(gains) + 1):
        row = {"step": step}
        if step:
            elapsed += 6.0 if step in profiled else 2.0
            row |= {"elapsed": elapsed, "reward": 0.1 * step}
            row |= (
                {"gflops/rollout": gflops * step, "gflops/backward": 3.0, "memory_mib/backward": 10.0 * (seed + 1)}
                if step in profiled
                else {"seconds/rollout": 1.5, "seconds/backward": 0.5}
            )
        if step in gains or step == 0:
            gain = np.array(gains.get(step, [0.0] * 4))
            scores = {"gold": (BASE["gold"] + gain).tolist(), "proxy": (BASE["proxy"] + 10 * gain).tolist()}
            row |= {"gold": float(np.mean(scores["gold"])), "proxy": float(np.mean(scores["proxy"]))}
            judged = {"step": step, "terms": terms, **scores}
            (folder / "evaluations" / f"{step:06d}.json").write_text(json.dumps(judged))
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def folders(tmp_path):
    """latent: seeds 0 and 1, better by 1 than pixel: seeds 0, 1 and 2, in every sample; one caption gains more."""
    gain = np.array([0.2, 0.4, 0.4, 0.6])
    latent = [make_run(tmp_path / f"latent{s}", s, {2: list(gain + 1.5), 4: list(gain + 1 + 0.1 * s)}) for s in (0, 1)]
    pixel = [make_run(tmp_path / f"pixel{s}", s, {2: list(gain * 0), 4: list(gain + 0.1 * s)}) for s in (1, 0, 2)]
    return {"latent": latent, "pixel": pixel}


def test_a_gain_is_paired_and_averaged_over_the_samples_of_a_caption(folders):
    """Circle: (1.2 + 1.4) / 2 = 1.3, square (1.4 + 1.6) / 2 = 1.5; the proxy gains ten times that, its deviation is
    10.
    """
    run = Run.read(folders["latent"][0])
    np.testing.assert_allclose(run.gain("gold", 4), [1.3, 1.5])
    np.testing.assert_allclose(run.gain("proxy", 4), [1.3, 1.5])


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


def test_only_updates_that_all_runs_of_a_group_were_judged_at_count(tmp_path):
    first = make_run(tmp_path / "first", 0, {2: [0.1] * 4, 4: [0.2] * 4})
    second = make_run(tmp_path / "second", 1, {2: [0.1] * 4, 3: [9.0] * 4})
    assert read_groups({"both": [first, second]})[0].steps == [0, 2]


def test_costs_are_summed_up_over_updates_and_runs(tmp_path):
    """FLOPs: mean of the profiled updates 1 and 3, 2 * (1 + 3) / 2 = 4 and 4 * 2 = 8, mean 6; memory the largest."""
    runs = [make_run(tmp_path / str(s), s, {4: [0.1] * 4}, profiled=(1, 3), gflops=g) for s, g in enumerate((2.0, 4.0))]
    (group,) = read_groups({"one": runs})
    assert group.cost("gflops") == {"rollout": 6.0, "backward": 3.0}
    assert group.cost("memory_mib") == {"backward": 20.0}
    assert group.cost("seconds") == {"rollout": 1.5, "backward": 0.5}
    assert (group.seconds_per_update(), group.seconds_at(4)) == (2.0, 8.0)


def test_the_table_says_what_was_found(folders):
    text = table(read_groups(folders), ["python recipes/one.py"])
    assert "| seeds | 0, 1 | 1, 0, 2 |" in text
    assert "| GFLOPs of an update: all phases | 5 | 5 |" in text
    assert "| peak MiB above the weights: backward | 20 | 30 |" in text
    assert "| latent less pixel, at update 4 | 2 | +1.000 [+1.000, +1.000] |" in text
    assert "(2) |" in text and "4 samples of 2 captions" in text
    assert text.endswith("```bash\npython recipes/one.py\n```\n")


def test_runs_judged_on_other_terms_are_refused(folders, tmp_path):
    for changed in ({"shown": 1}, {"prompts": [*PROMPTS[:3], "a star"]}, {"guidance_scale": 2.0}):
        name = next(iter(changed))
        other = make_run(tmp_path / f"other {name}", 5, {4: [0.0] * 4}, **changed)
        with pytest.raises(ValueError, match=f"other {name} was judged on other terms than .*: they differ in {name}"):
            read_groups({**folders, "other": [other]})


def test_a_seed_counts_once_in_a_group(folders, tmp_path):
    again = make_run(tmp_path / "again", 1, {4: [0.0] * 4})
    with pytest.raises(ValueError, match=r"latent: got seeds \[0, 1, 1\]; expected each once"):
        read_groups({"latent": [*folders["latent"], again]})


def test_a_run_without_an_evaluation_to_show_is_refused(folders, tmp_path):
    begun = make_run(tmp_path / "begun", 7, {0: [0.0] * 4})
    with pytest.raises(ValueError, match="begun: no evaluation after update 0"):
        read_groups({"begun": [begun]})
    (begun / "metrics.jsonl").write_text('{"step": 1, "elapsed": 1.0}\n')
    with pytest.raises(ValueError, match="begun holds no evaluation of the base model"):
        Run.read(begun)


def test_the_command_draws_groups_and_writes_their_table(folders, tmp_path, capsys):
    groups = [argument for name, runs in folders.items() for argument in ("--group", name, *map(str, runs))]
    report.main([*groups, "--output", str(tmp_path / "out" / "both.png"), "--command", "python x.py"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in ("both.png", "both.md")]
    with Image.open(tmp_path / "out" / "both.png") as picture:
        assert picture.size[0] > 1000
    assert "python x.py" in (tmp_path / "out" / "both.md").read_text()


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give the folder of one run, or --group"),
    (["run", "--group", "a", "run"], "give the folder of one run, or --group"),
    (["--group", "a"], "--group a: expected each label once"),
    (["--group", "a", "run", "--group", "a", "run"], "--group a: expected each label once"),
    (["--group", "a", "run", "run"], "got seeds [0, 0]"),
    (["--group", "a", "nowhere"], "not a run folder (no metrics.jsonl): nowhere"),
])  # fmt: skip
def test_mistaken_commands_are_refused_in_a_sentence(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", 0, {4: [0.0] * 4})
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "compare.png").exists()
