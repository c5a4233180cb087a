"""Notices about a gold reward that is trained on, and about many passes over few prompts."""

import dataclasses

import pytest

from dinalrm_align.align.notices import gold_notice, passes_notice
from dinalrm_align.models.specs import MODELS

SD35, SHAPES = MODELS["sd35"], MODELS["shapes"]


@pytest.mark.parametrize(
    ("gold", "trained", "spec"),
    [
        ("pixel", ["pickscore"], SD35),  # two names of PickScore
        ("pixel", ["dinalrm + 0.2*pickscore"], SD35),
        ("pixel", ["dinalrm", "pixel"], SD35),  # as the anchor
        ("yuvalkirstain/PickScore_v1", ["pickscore"], SD35),
        ("pickscore=yuvalkirstain/PickScore_v1", ["pickscore"], SD35),
        ("hpsv2 + pickscore", ["hpsv2"], SD35),
        ("dinalrm", [SD35.reward], SD35),
        (SHAPES.gold, ["oracle"], SHAPES),
        (SHAPES.pixel, ["pixel"], SHAPES),
        ("module:function", ["0.5*module:function"], SHAPES),
        (print, ["oracle"], dataclasses.replace(SHAPES, gold=print)),
    ],
)
def test_a_gold_that_is_trained_on_is_named(gold, trained, spec):
    assert "is also trained on" in gold_notice(gold, trained, spec)


@pytest.mark.parametrize(
    ("gold", "trained", "spec"),
    [
        ("pixel", ["dinalrm"], SD35),
        ("hpsv2.1", ["hpsv2"], SD35),  # one repository, two files
        ("pickscore", ["pickscore=/another/copy"], SD35),
        (SHAPES.gold, ["dinalrm", "pixel"], SHAPES),
        (print, ["module:function"], SHAPES),
    ],
)
def test_another_gold_is_not(gold, trained, spec):
    assert gold_notice(gold, trained, spec) is None


def test_folders_are_compared_by_where_they_lead(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    assert gold_notice("pixel=b", [f"pixel={tmp_path / 'a'}"], SHAPES)


def test_ten_passes_are_not_many():
    """150 updates of 64 prompts are 9600: 100 passes over 96 prompts, 10 over 960."""
    assert "150 rollouts of 64 prompts are 100 passes over 96 training prompts" in passes_notice(96, 64, 150)
    assert passes_notice(960, 64, 150) is None
    assert passes_notice(959, 64, 150)
