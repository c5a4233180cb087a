"""Comparison of runs: names of entries, comparability, numbers worked by hand, and a self-contained page."""

import base64
import io
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest
from paths import RECIPES
from PIL import Image
from report_runs import PROMPTS, make_four_runs, make_run

from dinalrm_align.eval.config import CompareRun
from dinalrm_align.eval.report.entries import read_entries
from dinalrm_align.eval.report.figures import draw, images_of
from dinalrm_align.eval.report.page import (
    Table,
    cost_table,
    difference_table,
    part_table,
    run_table,
    seed_table,
    tables_of,
    write,
)

RECIPE = RECIPES / "compare_runs.py"
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What a browser would find: elements open and shut in order, and every address that something is fetched from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> shuts something else"

    def handle_data(self, text):
        self.words.append(text)

    def images(self) -> list[Image.Image]:
        sources = [values["src"] for tag, values in self.found if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return make_four_runs(tmp_path)


def labels_of(folders) -> list[str]:
    return [label for entry in read_entries(folders)[0] for label in entry.labels]


def test_runs_are_named_by_recipe_reward_and_seed(folders):
    entries, notes = read_entries(folders)
    labels = ["refl dinalrm, seed 0", "refl dinalrm, seed 1", "refl pixel, seed 0", "grpo dinalrm, seed 0"]
    assert labels_of(folders) == labels and not notes
    assert [entry.name for entry in entries] == ["refl dinalrm", "refl pixel", "grpo dinalrm"]
    assert [entry.legend for entry in entries] == ["refl dinalrm, 2 seeds", *labels[2:]]
    assert len({entry.colour for entry in entries}) == 3


def test_settings_distinguish_runs_of_one_recipe_reward_and_seed(tmp_path):
    runs = [make_run(tmp_path / name, 0.1, lr=lr) for name, lr in (("x", 1e-3), ("y", 3e-4))]
    assert labels_of(runs) == ["refl dinalrm, lr 0.001, seed 0", "refl dinalrm, lr 0.0003, seed 0"]
    for name, seed, much in (("many1", 1, True), ("many2", 2, True), ("few", 1, False)):
        run = make_run(tmp_path / name, 0.1, reward="mps", seed=seed)
        with open(run / "config.yaml", "a") as file:
            file.write("policy: {rank: 8, alpha: 8, init: x, dropout: 0.1}\n" * much)
        runs.append(run)
    assert labels_of(runs[2:]) == [  # more than three settings: a folder's name, seeds together
        "refl mps, many1, seed 1", "refl mps, many1, seed 2", "refl mps, few, seed 1",
    ]  # fmt: skip
    twins = [runs[0], make_run(tmp_path / "z", 0.2, lr=1e-3)]
    assert labels_of(twins) == [f"refl dinalrm, seed 0 ({run})" for run in twins]
    assert len(read_entries(twins)[0]) == 2


def test_a_rewards_folder_is_named_by_its_last_part(tmp_path):
    rewards = {"runs/train/reward": "reward", "org/name": "name", "dinalrm + 0.2*pickscore": "dinalrm + 0.2*pickscore",
               "dinalrm=/a/b": "dinalrm=b"}  # fmt: skip
    for number, (reward, name) in enumerate(rewards.items()):
        run = make_run(tmp_path / str(number), 0.1, reward=reward)
        assert read_entries([run])[0][0].name == f"refl {name}"


def test_the_recipe_of_an_unfinished_run_is_read_from_its_checkpoint(tmp_path):
    run = make_run(tmp_path / "a", 0.1)
    (run / "summary.json").unlink()
    assert labels_of([run]) == ["run dinalrm, seed 0"]
    (run / "checkpoints" / "step_000004").mkdir(parents=True)
    (run / "checkpoints" / "step_000004" / "state.json").write_text('{"identity": {"recipe": "dpo_sd35"}}')
    assert labels_of([run]) == ["dpo dinalrm, seed 0"]


def test_runs_with_other_evaluation_settings_are_not_compared(folders, tmp_path):
    other = make_run(tmp_path / "other", 5.0, reward="oracle", seed=7, guidance_scale=3.0)
    fewer = make_run(tmp_path / "fewer", 5.0, reward="mps", shown=1)  # fewer images stored: still comparable
    entries, notes = read_entries([*folders, other, fewer])
    assert [bool(entry.incomparable) for entry in entries] == [False] * 3 + [True, False]
    (note,) = notes
    assert "refl oracle, seed 7: evaluated with other settings" in note and "differ in guidance_scale)" in note
    row = next(row for row in run_table(entries).rows if "oracle" in row[0])
    assert row[2:5] == ["not comparable"] * 3
    assert not any("oracle" in name for table in tables_of(entries)[1:3] for name, *_ in table.rows)
    compared = [label for entry in entries if not entry.incomparable for label in entry.labels]
    assert [title for title, _, _ in images_of(entries, 4)[1]] == ["before", *compared]


def test_a_seed_that_was_evaluated_otherwise_is_an_entry_of_its_own(tmp_path):
    """Also if all runs have one name otherwise, and whatever is a group must have one evaluation."""
    runs = [
        make_run(tmp_path / f"s{seed}", 0.1, seed=seed, sigmas=[1.0, 0.0 if seed < 2 else 0.5]) for seed in range(3)
    ]
    entries, (note,) = read_entries(runs)
    assert [len(entry.runs) for entry in entries] == [2, 1] and "differ in sigmas" in note
    assert not entries[0].incomparable and entries[1].name == "refl dinalrm, evaluated as s2"
    assert len(images_of(entries, 4)[1]) == 3  # before, and two runs
    with pytest.raises(ValueError, match="group mixed: got a run evaluated with other settings"):
        read_entries([], {"mixed": runs})


def test_gains_of_different_golds_are_not_compared(tmp_path):
    runs = [make_run(tmp_path / name, 0.1, reward=name) for name in ("mps", "pixel", "dinalrm")]
    for run, gold in zip(runs, ("pickscore", "hpsv2.1", "[pickscore, mps]")):
        with open(run / "config.yaml", "a") as file:
            file.write(f"gold: {gold}\n")
    entries, (note,) = read_entries(runs)
    assert [bool(entry.incomparable) for entry in entries] == [False, True, False] and "differ in gold" in note
    default, named = make_run(tmp_path / "null", 0.1), make_run(tmp_path / "named", 0.1, reward="mps")
    (named / "config.yaml").write_text((named / "config.yaml").read_text() + "gold: oracle\n")
    assert not read_entries([default, named])[1]  # oracle is the gold of model shapes


def test_folders_without_a_run_are_skipped_and_named(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.log").write_text("text")
    early = make_run(tmp_path / "early", 0.1)
    (early / "metrics.jsonl").write_text("")
    entries, notes = read_entries([tmp_path / "empty", tmp_path / "a.log", early, tmp_path / "absent", *folders])
    assert len(entries) == 3
    assert str(tmp_path / "empty") in notes[0] and str(tmp_path / "absent") in notes[0] and "a.log" not in notes[0]
    assert "no evaluation of the base model" in notes[1]
    with pytest.raises(ValueError, match="no run to compare"):
        read_entries([tmp_path / "empty"])


def test_final_numbers_by_hand(folders):
    """Captions gain 0.4 -+ 0.1 and +- 0.1, each twice with opposite signs: both captions 0.4, no spread. Four updates
    of 2 seconds; the largest of the peaks is 14.
    """
    entries, _ = read_entries(folders)
    table = run_table(entries)
    row = dict(zip(table.head, table.rows[0]))
    assert row["gold gain, last [95 %]"] == "+0.400 [+0.400, +0.400]"
    assert row["gold gain, best (update)"] == "+0.400 [+0.400, +0.400] (4)"
    assert row["reward gain, s.d."] == "+0.400 [+0.400, +0.400]"  # gains of 4 at an s.d. of 10
    assert (row["updates"], row["s / update"], row["peak MiB"]) == ("4", "2.00", "14")
    assert (row["hacking alarm"], table.rows[3][-1], row["drift"], table.rows[3][5]) == (
        "not watched", "update 4", "", "0.3",
    )  # fmt: skip
    assert "(0)" in table.rows[3][3]  # the best evaluation of a run that only fell is the base model's


def test_seeds_and_differences_by_hand(folders):
    """Seeds 0 and 1 gain 0.4 and 0.6: mean 0.5. Less pixel's 0.1 at seed 0, the only one shared: 0.3."""
    entries = read_entries(folders)[0]
    (row,) = seed_table(entries).rows
    assert row[:3] == ["refl dinalrm", "2", "4"] and row[3].startswith("+0.500 [")
    found = {(name, at): mean for name, at, _, mean in difference_table(entries).rows}
    assert found["refl dinalrm less refl pixel", "update 4"].startswith("+0.300 [")
    assert found["refl pixel less grpo dinalrm", "best of each"].startswith("+0.100 [")
    assert not seed_table(entries[1:]).rows and not difference_table(entries[:1]).rows


def test_costs_by_phase_stand_in_a_table(tmp_path):
    runs = [make_run(tmp_path / name, 0.1, seed=seed, profiled=(1,)) for seed, name in enumerate("ab")]
    table = cost_table(read_entries(runs[:1], {"b": runs[1:]})[0])
    assert table.head == ["", "refl dinalrm", "b"]
    rows = {name: cells for name, *cells in table.rows}
    assert rows["GFLOPs of an update: all phases"] == ["5", "5"]
    assert rows["seconds of an update: rollout"] == ["1.5", "1.5"]
    assert rows["peak MiB above the weights: backward"] == ["14", "24"]


def test_tables_are_markdown():
    table = Table("Title", ["run", "gain"], [["a", "1"]])
    assert table.markdown().split("\n") == ["**Title**", "", "| run | gain |", "| --- | ---: |", "| a | 1 |"]


def test_curves_are_drawn_against_updates_time_and_flops(folders, tmp_path):
    entries, _ = read_entries([*folders, make_run(tmp_path / "p", 0.3, reward="mps", profiled=(1,))])
    drawn = draw(entries, tmp_path / "figures")
    assert list(drawn) == ["gold", "proxy", "kl", "drift", "seconds", "memory_mib", "costs"]
    assert list(drawn["gold"]) == ["updates", "time", "flops"] and list(drawn["kl"]) == ["updates", "time"]
    for path in (path for files in drawn.values() for path in files.values()):
        with Image.open(path) as image:
            assert len(set(image.convert("RGB").getdata())) > 50
    assert entries[0].at("time", [0, 2, 4]) == [0.0, 4.0, 8.0]
    assert entries[-1].at("flops", [4]) == [4 * 5 / 1000]


def test_a_second_evaluator_is_drawn_for_the_runs_that_have_it(tmp_path):
    """pixel <2> scored as the proxy does: gains of 4 at an s.d. of 10."""
    runs = [make_run(tmp_path / "a", 0.4, evaluators=("pixel <2>",)), make_run(tmp_path / "b", 0.1, reward="mps")]
    entries, _ = read_entries(runs)
    assert entries[0].gain("gold/pixel <2>", 4).mean == pytest.approx(0.4)
    page, _ = write(CompareRun([str(run) for run in runs], output_dir=str(tmp_path / "page"), shown=1))
    assert (tmp_path / "page" / "gold_pixel_2_time.png").is_file()
    assert "Second evaluator: pixel <2>" in Page(page.read_text()).words


def test_gains_of_golds_parts_stand_in_a_table(tmp_path):
    """In their own units, half of gold's gain; seeds are averaged; a run without parts has empty cells."""
    names = ("faithfulness", "faithfulness/objects", "aesthetics")
    runs = [make_run(tmp_path / f"a{seed}", 0.4 + 0.2 * seed, seed=seed, parts=names) for seed in (0, 1)]
    old = make_run(tmp_path / "b", 0.1, reward="mps")
    entries, _ = read_entries([*runs, old])
    table = part_table(entries)
    assert table.head == ["", "refl dinalrm, 2 seeds, update 4", "refl mps, seed 0, update 4"]
    assert [row[0] for row in table.rows] == ["gold", "faithfulness", "faithfulness/objects", "aesthetics"]
    assert table.rows[0][1].startswith("+0.500 [") and table.rows[0][2] == "+0.100 [+0.100, +0.100]"
    assert all(row[1].startswith("+0.250 [") and row[2] == "" for row in table.rows[1:])
    assert not part_table(entries[1:]).rows  # no table without parts
    page, _ = write(CompareRun([str(run) for run in (*runs, old)], output_dir=str(tmp_path / "page"), shown=1))
    assert "faithfulness/objects" in Page(page.read_text()).words
    assert "| faithfulness/objects | +0.250 [" in (page.parent / "compare.md").read_text()
    assert not list(page.parent.glob("*faithfulness*"))  # curves of every part would bury the others


def test_a_run_whose_first_evaluation_has_no_parts_is_compared_without_them(tmp_path):
    run = make_run(tmp_path / "a", 0.4, parts=("faithfulness",))
    path = run / "evaluations" / "000000.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "parts" not in k}))
    entries, notes = read_entries([run])
    assert not part_table(entries).rows and not notes and run_table(entries).rows


def test_images_are_those_of_the_last_evaluation_beside_the_base_models(folders):
    prompts, columns = images_of(read_entries(folders)[0], 5)
    assert prompts == PROMPTS[:2]  # as many as were stored
    assert [strip[0, 0, 0, 0] for _, strip, _ in columns] == [0, 160, 170, 160, 160]
    assert columns[1][2] == pytest.approx([1.3, 2.5])


def test_the_page_is_complete_and_self_contained(folders, tmp_path):
    runs = [str(folder) for folder in folders]
    page, notes = write(CompareRun(runs, output_dir=str(tmp_path / "page"), shown=2, title="Mine & <yours>"))
    text = page.read_text()
    found = Page(text)
    images = found.images()
    assert len(images) == 6 * 2 + 1 + 2 * 5  # six quantities, two clocks; bars; two prompts, base model and four runs
    for image in images:
        image.load()
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.found}
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(values.get("alt") for tag, values in found.found if tag == "img")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.found
    words = " ".join(found.words)
    assert "Mine & <yours>" in words and "a blue <square>" in words and "update 4" in words
    assert "4 samples of 2 captions" in words
    left = {path.name for path in page.parent.iterdir()}
    markdown = (page.parent / "compare.md").read_text()
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown))
    assert shown | {"index.html", "compare.md"} == left
    assert "| refl dinalrm, seed 0 | 4 | +0.400" in markdown and not notes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs: got none"),
        (["absent"], "no run to compare"),
        (["absent", "--shown=0"], "shown: got 0"),
        (["x", "--show=1"], "--show"),
        (["--group"], "--group: got ''"),
        (["--group", "a"], "group.a: got no run"),
        (["--group", "a", "x", "--group", "a", "y"], "--group: got 'a'"),
        (["--group", "a", "nowhere"], "/nowhere"),
    ],
)
def test_invalid_commands_exit_with_an_error_message(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPE))["main"](words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
