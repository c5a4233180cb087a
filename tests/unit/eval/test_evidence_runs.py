"""Lists of runs of examples/evidence: what is skipped, resumed and refused, and captions that nothing was tuned on."""

import json
import sys

import _runs
import pytest
from _runs import Job, Prompts, Runner, arguments, check_disjoint, fresh_captions, parse, progress_line

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.models.specs import MODELS
from dinalrm_align.shapes.scene import draw_scenes, is_held_out, parse_caption

GOLD = {"gold": {"gain": 0.1, "standard_error": 0.01}}


class Recipes:
    """Stands in for subprocess.Popen: a recipe that ends at once, with the status that belongs to the run's name."""

    def __init__(self, out, statuses):
        self.out, self.statuses, self.commands = out, statuses, []

    def __call__(self, command, **_):
        folder = self.out / "runs" / next(word.rpartition("/")[2] for word in command if "/runs/" in word)
        self.commands.append(command)
        self.status = self.statuses.get(folder.name, 0)
        if self.status == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text(json.dumps(GOLD))
        return self

    def wait(self):
        return self.status


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    found = Recipes(tmp_path, {})
    monkeypatch.setattr(_runs.subprocess, "Popen", found)
    return found


def jobs(*names, **options):
    return [
        Job(name, "refl", {"seed": 0, "refl.reward_sigma": [0.2, 0.5], "watch.keep_best": False} | options)
        for name in names
    ]


def test_finished_runs_are_skipped_interrupted_ones_resumed_and_new_ones_started(recipes, tmp_path, capsys):
    (tmp_path / "runs" / "begun" / "checkpoints" / "step_000002").mkdir(parents=True)
    Runner(tmp_path, 3).run(jobs("done"))
    Runner(tmp_path, 3).run(jobs("done", "begun", "new"))
    started = [command[2:] for command in recipes.commands]
    options = ["--seed=0", "--refl.reward_sigma=[0.2, 0.5]", "--watch.keep_best=false"]
    assert started == [
        [*options, f"--output_dir={tmp_path}/runs/done"],
        ["--resume", f"{tmp_path}/runs/begun"],
        [*options, f"--output_dir={tmp_path}/runs/new"],
    ]
    assert {tuple(command[:2]) for command in recipes.commands} == {
        (sys.executable, str(_runs.RECIPES / "refl_sd35.py"))
    }
    printed = capsys.readouterr().out
    assert "run 1 of 3: done" in printed and "run 3 of 3, about 0 min left: new" in printed


def test_a_failed_run_does_not_stop_the_list_and_is_tried_again(recipes, tmp_path):
    recipes.statuses = {"diverged": 1}
    first = Runner(tmp_path, 2)
    first.run(jobs("diverged", "other"))
    assert first.failed == ["diverged"] and (tmp_path / "runs" / "other" / "summary.json").is_file()
    recipes.statuses = {}
    Runner(tmp_path, 2).run(jobs("diverged", "other"))
    assert [command[-1].rpartition("/")[2] for command in recipes.commands] == ["diverged", "other", "diverged"]


def test_refused_settings_stop_the_list(recipes, tmp_path):
    recipes.statuses = {"wrong": 2}
    with pytest.raises(ValueError, match="wrong: its settings were refused"):
        Runner(tmp_path, 2).run(jobs("wrong", "other"))
    assert len(recipes.commands) == 1


def test_a_run_with_other_settings_is_refused(recipes, tmp_path):
    Runner(tmp_path, 1).run(jobs("one"))
    with pytest.raises(ValueError, match=r"other settings \(--seed=0, --seed=1\)"):
        Runner(tmp_path, 1).run(jobs("one", seed=1))
    with pytest.raises(ValueError, match="expected each once"):
        Runner(tmp_path, 2).run(jobs("one", "one"))


def test_a_dry_run_starts_nothing(recipes, tmp_path, capsys):
    Runner(tmp_path, 1, dry_run=True).run(jobs("one"))
    assert not recipes.commands and not (tmp_path / "jobs").exists()
    assert "# one: to run" in (printed := capsys.readouterr().out) and "'--refl.reward_sigma=[0.2, 0.5]'" in printed


def test_the_progress_line_counts_the_present_run():
    """34 runs of 2 minutes are left, two at a time."""
    assert progress_line(7, 40, [100, 140], 2) == "run 7 of 40, about 34 min left"
    assert progress_line(1, 40, [], 1) == "run 1 of 40"


def test_fresh_captions_are_held_out_distinct_and_new():
    used = {scene.caption for scene in draw_scenes(50, _runs.np.random.default_rng(0), held_out=True)}
    found = fresh_captions(40, 0, used)
    assert len({*found}) == 40 and not {*found} & used
    assert all(is_held_out(parse_caption(caption)) for caption in found)
    assert found == fresh_captions(40, 0, used) != fresh_captions(40, 1, used)


def test_too_few_captions_are_refused_with_their_number(monkeypatch):
    few = draw_scenes(5, _runs.np.random.default_rng(0))
    monkeypatch.setattr(_runs, "draw_scenes", lambda *_, **__: few)
    assert len(fresh_captions(5, 0, [])) == 5
    with pytest.raises(ValueError, match="samples: got 5; expected at most 4, the unused held-out captions"):
        fresh_captions(5, 0, [few[0].caption])


def test_captions_of_two_lists_must_differ():
    check_disjoint({"train": ["a", "a"], "fresh": ["b"]})
    with pytest.raises(ValueError, match="got 'a' in both train and fresh"):
        check_disjoint({"train": ["a"], "tuning": ["b"], "fresh": ["c", "a"]})


def test_prompt_files_are_written_once_and_kept_apart(tmp_path):
    options, _ = parse(arguments("", "runs/x", [0]), [str(tmp_path), "--samples", "5"])
    found = Prompts.prepare(options)
    fresh = read_prompts(found.fresh)
    assert len(fresh) == 5 and not {*fresh} & {*read_prompts(MODELS["shapes"].heldout_prompts)}
    on_fresh, on_tuning = (found.options(fresh, options) for fresh in (True, False))
    assert on_fresh["eval_prompts"] == str(found.fresh) and on_tuning["eval_prompts"] == str(found.tuning)
    assert on_fresh["evaluation.seed"] != on_tuning["evaluation.seed"]
    overlapping, _ = parse(
        arguments("", "runs/x", [0]), [str(tmp_path), f"--fresh_prompts={MODELS['shapes'].heldout_prompts}"]
    )
    with pytest.raises(ValueError, match=r"in both tuning \(heldout.txt\) and fresh \(heldout.txt\)"):
        Prompts.prepare(overlapping)


@pytest.mark.parametrize(
    "words", [["extra"], ["--optim.lr", "1"], ["--seeds", "1", "1"], ["--seeds", "100"], ["--reward=pixel"]]
)
def test_a_command_line_that_cannot_be_meant_is_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(arguments("", "runs/x", [0]), ["out", *words])
    assert "expected" in capsys.readouterr().err


def test_further_settings_go_to_the_recipes():
    options, others = parse(arguments("", "runs/x", [0, 1]), ["out", "--optim.lr=1e-4", "--seeds", "3"])
    assert others == {"optim.lr": "1e-4"} and options.seeds == [3]
