"""curves.png of one run."""

import json

from PIL import Image
from report_runs import make_run

from dinalrm_align.eval.report import figures


def test_curves_of_one_run_mark_the_first_alarm(tmp_path, monkeypatch):
    """Raised at updates 2 and 4: lines at 2, on gold and on the reward."""
    run = make_run(tmp_path / "run", 0.4, alarm=2, extra={"drift": 0.1, "gold_gain_standard_error": 0.02})
    drawn, finish = [], figures.finish_figure
    monkeypatch.setattr(figures, "finish_figure", lambda *given: (drawn.append(given[0]), finish(*given)))
    with Image.open(figures.plot_run(run)) as image:
        assert image.size[0] > 1000
    marked = [(axis.get_title()[:6], line.get_xdata()[0]) for axis in drawn[0].axes for line in axis.lines
              if line.get_label().startswith("hacking alarm")]  # fmt: skip
    assert marked == [("gold s", 2), ("reward", 2)]


def test_every_further_gold_reward_has_a_panel(tmp_path, monkeypatch):
    names = ["gold", "gold/a", "gold/b+0.5c"]
    rows = [{"step": step, "proxy": 0.0, **{f"{name}{end}": float(step + i) for i, name in enumerate(names)
             for end in ("", "_gain", "_gain_standard_error", "_standard_error")}} for step in (0, 5)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn, finish = [], figures.finish_figure
    monkeypatch.setattr(figures, "finish_figure", lambda *given: (drawn.append(given[0]), finish(*given)))
    figures.plot_run(tmp_path)
    panels = {axis.get_title(): list(axis.lines[0].get_ydata()) for axis in drawn[0].axes[6:] if axis.axison}
    assert panels == {"gold/a, held out": [1.0, 6.0], "gold/b+0.5c, held out": [2.0, 7.0]}


def test_curves_need_metrics_alone(tmp_path):
    rows = [{"step": 0, "gold": 1.0, "proxy": 1.0, "gold_gain_standard_error": 0.0}, {"step": 1, "reward": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figures.plot_run(tmp_path).is_file()


def test_gains_of_golds_parts_have_panels_of_their_own(tmp_path, monkeypatch):
    """One for each part with components, one for the other parts; the further gold reward's panel comes first."""
    names = ["gold", "gold_parts/a", "gold_parts/a/x", "gold_parts/b", "gold/further"]
    ends = {"": 9.0, "_gain": 0.0, "_gain_standard_error": 0.5}
    rows = [{"step": step, "proxy": 0.0, **{f"{name}{end}": step + i + value for i, name in enumerate(names)
             for end, value in ends.items()}} for step in (0, 5)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn, finish = [], figures.finish_figure
    monkeypatch.setattr(figures, "finish_figure", lambda *given: (drawn.append(given[0]), finish(*given)))
    figures.plot_run(tmp_path)
    panels = {axis.get_title(): axis for axis in drawn[0].axes[6:] if axis.axison}
    assert list(panels) == [
        "gold/further, held out",
        "gold's a: gain ± standard error over prompts",
        "gold's parts: gain ± standard error over prompts",
    ]
    lines = {line.get_label(): list(line.get_ydata()) for axis in list(panels.values())[1:] for line in axis.lines[:-1]}
    assert lines == {"a": [1.0, 6.0], "x": [2.0, 7.0], "b": [3.0, 8.0]}
    assert [len(axis.collections) for axis in list(panels.values())[1:]] == [2, 1]
    band = list(panels.values())[1].collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(0.0, -0.5), (0.0, 2.5), (5.0, -0.5), (5.0, 12.5)}  # errors 1.5, 6.5
