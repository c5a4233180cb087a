"""Runs on one page: who is who, what may be compared, numbers by hand, a page that parses and needs nothing else."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinalrm_align.eval.report.entries import groups_of, read_entries
from dinalrm_align.eval.report.figures import draw, phases_of, pictures
from dinalrm_align.eval.report.page import write
from dinalrm_align.eval.report.tables import Table, difference_table, run_table, seed_table
from dinalrm_align.models.grids import save_strip

RECIPE = Path(__file__).parents[3] / "recipes" / "compare_runs.py"
PROMPTS = ["a red circle", "a blue <square>", "a red circle", "a blue <square>"]
BASE = {"gold": [1.0, 2.0, 1.0, 2.0], "proxy": [10.0, 30.0, 10.0, 30.0]}  # s.d. 10
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def make_run(
    folder: Path, gain: float, *, recipe: str = "refl_sd35", reward: str = "dinalrm", seed: int = 0, lr: float = 1e-3,
    alarm: int | None = None, extra: dict[str, float] | None = None, judges: tuple[str, ...] = (), **terms: object,
) -> Path:  # fmt: skip
    """Four updates of 2 seconds, judged at 0, 2 and 4: gold gains `gain` and half of it at 2, proxy ten times that."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"model: shapes\nreward: {reward}\nseed: {seed}\noptim:\n  lr: {lr}\nloop:\n  keep_last: {seed + 1}\n"
    )
    terms = {"prompts": PROMPTS, "seed": 1234, "shown": 2, **terms}
    rows = []
    for step in range(5):
        row = {"step": step}
        if step:
            row |= {"elapsed": 2.0 * step, "kl": 0.01 * step, "seconds/rollout": 1.5, "seconds/backward": 0.5}
            row |= {"memory_mib/backward": 50.0 + step}
        if step % 2 == 0:
            moved = np.array([-1, 1, 1, -1]) * 0.1 * (step > 0) + gain * step / 4
            scores = {"gold": list(BASE["gold"] + moved), "proxy": list(BASE["proxy"] + 10 * moved)}
            row |= {name: float(np.mean(values)) for name, values in scores.items()} | (extra or {})
            row |= {"hacking": float(alarm is not None and step >= alarm)} if alarm is not None else {}
            judged = {"step": step, "terms": terms, **scores, **{f"gold/{name}": scores["proxy"] for name in judges}}
            (folder / "evaluations" / f"{step:06d}.json").write_text(json.dumps(judged))
            strip = np.full((terms["shown"], 8, 8, 3), 40 * step + 10 * seed, dtype=np.uint8)
            save_strip(strip, folder / "evaluations" / f"{step:06d}.png")
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "summary.json").write_text(json.dumps({"recipe": recipe, "seed": seed}))
    return folder


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
    """ReFL with two rewards, two seeds of the first; GRPO once, hacked at update 4, with a drift."""
    return [
        make_run(tmp_path / "a0", 0.4), make_run(tmp_path / "a1", 0.6, seed=1),
        make_run(tmp_path / "b0", 0.1, reward="pixel"),
        make_run(tmp_path / "c0", -0.4, recipe="grpo_sd35", alarm=4, extra={"drift": 0.3}),
    ]  # fmt: skip


def test_runs_are_told_by_recipe_reward_and_seed(folders):
    entries, notes = read_entries(folders)
    labels = ["refl dinalrm, seed 0", "refl dinalrm, seed 1", "refl pixel, seed 0", "grpo dinalrm, seed 0"]
    assert [entry.label for entry in entries] == labels and not notes
    assert len({entry.colour for entry in entries}) == 3 and entries[0].colour == entries[1].colour
    assert [group.label for group in groups_of(entries)] == ["refl dinalrm", "refl pixel", "grpo dinalrm"]


def test_settings_tell_runs_of_one_recipe_reward_and_seed_apart(tmp_path):
    runs = [make_run(tmp_path / name, 0.1, lr=lr) for name, lr in (("x", 1e-3), ("y", 3e-4))]
    assert [entry.label for entry in read_entries(runs)[0]] == [
        "refl dinalrm, lr 0.001, seed 0", "refl dinalrm, lr 0.0003, seed 0",
    ]  # fmt: skip
    for name, seed, much in (("many1", 1, True), ("many2", 2, True), ("few", 1, False)):
        run = make_run(tmp_path / name, 0.1, reward="mps", seed=seed)
        with open(run / "config.yaml", "a") as file:
            file.write("policy: {rank: 8, alpha: 8, init: x, dropout: 0.1}\n" * much)
        runs.append(run)
    assert [entry.label for entry in read_entries(runs[2:])[0]] == [  # more than three: a folder's name, seeds together
        "refl mps, many1, seed 1", "refl mps, many1, seed 2", "refl mps, few, seed 1",
    ]  # fmt: skip
    twins = [runs[0], make_run(tmp_path / "z", 0.2, lr=1e-3)]
    assert [entry.label for entry in read_entries(twins)[0]] == [f"refl dinalrm, seed 0 ({run})" for run in twins]
    assert len(groups_of(read_entries(twins)[0])) == 2


def test_of_a_rewards_folder_the_last_part_is_its_name(tmp_path):
    rewards = {"runs/train/reward": "reward", "org/name": "name", "dinalrm + 0.2*pickscore": "dinalrm + 0.2*pickscore",
               "dinalrm=/a/b": "dinalrm=b"}  # fmt: skip
    for number, (reward, name) in enumerate(rewards.items()):
        run = make_run(tmp_path / str(number), 0.1, reward=reward)
        assert read_entries([run])[0][0].group == f"refl {name}"


def test_the_recipe_of_a_run_that_goes_on_is_its_checkpoints(tmp_path):
    run = make_run(tmp_path / "a", 0.1)
    (run / "summary.json").unlink()
    assert read_entries([run])[0][0].label == "run dinalrm, seed 0"
    (run / "checkpoints" / "step_000004").mkdir(parents=True)
    (run / "checkpoints" / "step_000004" / "state.json").write_text('{"identity": {"recipe": "dpo_sd35"}}')
    assert read_entries([run])[0][0].label == "dpo dinalrm, seed 0"


def test_runs_judged_on_other_terms_are_not_compared(folders, tmp_path):
    other = make_run(tmp_path / "other", 5.0, reward="oracle", seed=7, guidance_scale=3.0)
    fewer = make_run(tmp_path / "fewer", 5.0, reward="mps", shown=1)  # fewer pictures kept: still the same terms
    entries, notes = read_entries([*folders, other, fewer])
    assert [bool(entry.apart) for entry in entries] == [False] * 4 + [True, False]
    (note,) = notes
    assert "refl oracle, seed 7: judged on other terms" in note and "differ in guidance_scale)" in note
    row = next(row for row in run_table(entries).rows if "oracle" in row[0])
    assert row[2:5] == ["not comparable"] * 3
    assert "refl oracle" not in [group.label for group in groups_of(entries)]
    assert [title for title, _, _ in pictures(entries, 4)[1]] == [
        "before", *(entry.label for entry in entries if not entry.apart)
    ]  # fmt: skip


def test_what_is_no_run_is_left_out_and_named(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.log").write_text("text")
    early = make_run(tmp_path / "early", 0.1)
    (early / "metrics.jsonl").write_text("")
    entries, notes = read_entries([tmp_path / "empty", tmp_path / "a.log", early, tmp_path / "absent", *folders])
    assert len(entries) == 4
    assert str(tmp_path / "empty") in notes[0] and str(tmp_path / "absent") in notes[0] and "a.log" not in notes[0]
    assert "holds no evaluation of the base model" in notes[1]
    with pytest.raises(ValueError, match="no run to compare"):
        read_entries([tmp_path / "empty"])


def test_final_numbers_by_hand(folders):
    """Captions gain 0.4 -+ 0.1 and +- 0.1, each twice with opposite signs: both captions 0.4, no spread. Four updates
    of 2 seconds; the largest of the peaks is 54.
    """
    entries, _ = read_entries(folders)
    table = run_table(entries)
    row = dict(zip(table.head, table.rows[0]))
    assert row["gold gain, last [95 %]"] == "+0.400 [+0.400, +0.400]"
    assert row["gold gain, best (update)"] == "+0.400 [+0.400, +0.400] (4)"
    assert row["reward gain, s.d."] == "+0.400 [+0.400, +0.400]"  # gains of 4 at an s.d. of 10
    assert (row["updates"], row["s / update"], row["peak MiB"]) == ("4", "2.00", "54")
    assert (row["hacking alarm"], table.rows[3][-1], row["drift"], table.rows[3][5]) == (
        "not watched", "update 4", "", "0.3",
    )  # fmt: skip
    assert "(0)" in table.rows[3][3]  # the best evaluation of a run that only fell is the base model's


def test_seeds_and_differences_by_hand(folders):
    """Seeds 0 and 1 gain 0.4 and 0.6: mean 0.5. Less pixel's 0.1 at seed 0, the only one shared: 0.3."""
    groups = groups_of(read_entries(folders)[0])
    (row,) = seed_table(groups).rows
    assert row[:3] == ["refl dinalrm", "2", "4"] and row[3].startswith("+0.500 [")
    found = {(name, at): mean for name, at, _, mean in difference_table(groups).rows}
    assert found["refl dinalrm less refl pixel", "update 4"].startswith("+0.300 [")
    assert found["refl pixel less grpo dinalrm", "best of each"].startswith("+0.100 [")
    assert seed_table(groups[1:]) is None and difference_table(groups[:1]) is None


def test_tables_are_markdown():
    table = Table("Title", ["run", "gain"], [["a", "1"]])
    assert table.markdown().split("\n") == ["**Title**", "", "| run | gain |", "| --- | ---: |", "| a | 1 |"]


def test_curves_are_drawn_against_updates_and_time(folders, tmp_path):
    entries, _ = read_entries(folders)
    assert phases_of(entries, "seconds") == ["rollout", "backward"]
    drawn = draw(entries, tmp_path / "figures")
    assert list(drawn) == ["gold", "proxy", "kl", "drift", "seconds", "memory_mib"]
    for files in drawn.values():
        assert list(files) == ["updates", "time"]
        for path in files.values():
            with Image.open(path) as picture:
                assert len(set(picture.convert("RGB").getdata())) > 50
    assert entries[0].at("time", [0, 2, 4]) == [0.0, 4.0, 8.0]


def test_another_judge_is_drawn_for_the_runs_that_it_judged(tmp_path):
    """pixel <2> scored as the proxy does: gains of 4 at an s.d. of 10."""
    runs = [make_run(tmp_path / "a", 0.4, judges=("pixel <2>",)), make_run(tmp_path / "b", 0.1, reward="mps")]
    entries, _ = read_entries(runs)
    assert entries[0].gain("gold/pixel <2>", 4).mean == pytest.approx(0.4)
    page, _ = write(runs, tmp_path / "page", shown=1, title="Judges")
    assert (tmp_path / "page" / "gold_pixel_2_time.png").is_file()
    assert "Another judge: pixel <2>" in Page(page.read_text()).words


def test_pictures_are_those_of_the_last_update_beside_the_base_models(folders):
    prompts, columns = pictures(read_entries(folders)[0], 5)
    assert prompts == PROMPTS[:2]  # as many as were kept
    assert [strip[0, 0, 0, 0] for _, strip, _ in columns] == [0, 160, 170, 160, 160]
    assert columns[1][2] == pytest.approx([1.3, 2.5])


def test_the_page_is_whole_and_needs_nothing_beside_it(folders, tmp_path):
    page, notes = write(folders, tmp_path / "page", shown=2, title="Mine & <yours>")
    text = page.read_text()
    found = Page(text)
    images = found.images()
    assert len(images) == 6 * 2 + 2 * 5  # six quantities against two clocks; two prompts, the base model and four runs
    for image in images:
        image.load()
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.found}
    assert not re.search(r"https?://|url\(|@import", text)
    assert all(values.get("alt") for tag, values in found.found if tag == "img")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.found
    words = " ".join(found.words)
    assert "Mine & <yours>" in words and "a blue <square>" in words and "update 4" in words
    left = {path.name for path in page.parent.iterdir()}
    markdown = (page.parent / "compare.md").read_text()
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown))
    assert shown | {"index.html", "compare.md"} == left
    assert "| refl dinalrm, seed 0 | 4 | +0.400" in markdown and not notes


def command(*words: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    root = RECIPE.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    line = [sys.executable, *python, str(RECIPE), *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=root, env=environment)


def test_the_command_takes_folders_and_options(folders, tmp_path):
    output = tmp_path / "out"
    command = [
        sys.executable,
        str(RECIPE),
        *map(str, folders[:2]),
        str(tmp_path / "absent"),
        "--output_dir",
        str(output),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=RECIPE.parents[1])
    assert ended.returncode == 0, ended.stderr
    assert str(tmp_path / "absent") in ended.stdout and str(output / "index.html") in ended.stdout
    assert (output / "index.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["absent"], "no run to compare"),
        (["absent", "--shown=0"], "shown"),
        (["x", "--show=1"], "--show"),
    ],
)
def test_a_command_that_cannot_be_meant_ends_with_a_sentence(words, message):
    ended = subprocess.run([sys.executable, str(RECIPE), *words], capture_output=True, text=True, cwd=RECIPE.parents[1])
    assert ended.returncode == 2
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_help_teaches_and_needs_no_torch():
    ended = command("--help", python=("-X", "importtime"))
    assert ended.returncode == 0
    assert "runs/*" in ended.stdout and "folders of runs" in ended.stdout and "--shown" in ended.stdout
    assert not re.search(r"\|\s+torch$", ended.stderr, re.MULTILINE)
