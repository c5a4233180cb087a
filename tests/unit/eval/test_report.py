"""Figures are made from what a run leaves behind; pictures survive their strip bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinalrm_align.eval.report import run as report


def fake_run(folder: Path, scale: float) -> Path:
    """Four updates, evaluated at 0, 2 and 4."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    rows = []
    for step in range(5):
        row = {"step": step}
        if step:
            row |= {"reward": scale * step, "kl": 0.01 * step, "grad_norm": 1.0, "elapsed": 2.0 * step}
            row |= {"seconds/rollout": 1.0, "memory_mib/reward": 20.0}
        if step % 2 == 0:
            scores = {"proxy": [scale, 2 * scale, 3 * scale], "gold": [0.1, 0.2 + step, 0.3]}
            judged = {"terms": {"prompts": ["a", "b", "c"]}, **scores}
            (folder / "evaluations" / f"{step:06d}.json").write_text(json.dumps(judged))
            row |= {"gold": 0.2 + 0.1 * step, "gold_gain_standard_error": 0.02, "proxy": scale * step}
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.size[0] > 100 and len(set(picture.convert("L").getdata())) > 2


def test_a_strip_gives_its_pictures_back(tmp_path):
    images = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    pictures = report.to_bytes(images)
    assert pictures.shape == (3, 8, 6, 3)
    np.testing.assert_array_equal(pictures[1, 2, 3], (images[1, :, 2, 3] * 255).round().to(torch.uint8).numpy())
    report.save_strip(pictures, tmp_path / "strip.png")
    np.testing.assert_array_equal(report.load_strip(tmp_path / "strip.png", 3), pictures)


def test_a_strip_that_cannot_be_read_is_an_error_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="row of 2 pictures cannot be had from .*absent.png"):
        report.load_strip(tmp_path / "absent.png", 2)
    (tmp_path / "torn.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="torn.png"):
        report.load_strip(tmp_path / "torn.png", 2)
    report.save_strip(np.zeros((3, 4, 4, 3), dtype=np.uint8), tmp_path / "three.png")
    with pytest.raises(ValueError, match="three.png"):
        report.load_strip(tmp_path / "three.png", 5)


def test_grids_are_written(tmp_path):
    images = torch.rand(5, 3, 16, 16)
    captions = [
        "a red circle",
        "a prompt so long that it has to be wrapped and in the end cut short " * 3,
        "",
        "$x_$",
        "e",
    ]
    report.save_grid(images, captions, tmp_path / "deep" / "grid.png", columns=4, title="update 0")
    pictures = report.to_bytes(images)
    report.save_before_after(pictures, pictures[::-1], captions, tmp_path / "both.png")
    assert is_picture(tmp_path / "deep" / "grid.png") and is_picture(tmp_path / "both.png")
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "both.png"}
    with pytest.raises(ValueError, match="got 5 pictures, 4 captions"):
        report.save_grid(images, captions[:4], tmp_path / "grid.png")


def test_curves_of_one_run_and_of_several(tmp_path, capsys):
    runs = [fake_run(tmp_path / name, scale) for name, scale in (("latent", 1.0), ("pixel", 30.0))]
    report.main([str(runs[0])])
    assert is_picture(runs[0] / "curves.png")
    groups = ["--group", "latent", str(runs[0]), "--group", "pixel", str(runs[1])]
    report.main([*groups, "--output", str(tmp_path / "compare.png")])
    assert is_picture(tmp_path / "compare.png")
    assert "# latent against pixel" in (tmp_path / "compare.md").read_text()
    assert "compare.png" in capsys.readouterr().out


def test_the_first_alarm_is_marked(tmp_path, monkeypatch):
    """Rung at updates 2 and 4: lines at 2, on gold and on the reward."""
    run = fake_run(tmp_path / "run", 1.0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row | ({"hacking": float(row["step"] > 0), "drift": 0.1} if "gold" in row else {}) for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    report.plot_run(run)
    marked = [(axis.get_title()[:6], line.get_xdata()[0]) for axis in drawn[0].axes for line in axis.lines
              if line.get_label().startswith("hacking alarm")]  # fmt: skip
    assert marked == [("gold s", 2), ("reward", 2)]


def test_a_folder_without_metrics_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "not a run folder" in capsys.readouterr().err
