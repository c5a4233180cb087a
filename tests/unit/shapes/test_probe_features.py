"""The probe of examples/evidence/probe_features.py, and what the shipped base model's features tell about an image."""

import re
import sys

import pytest
import torch
from paths import load_evidence

from dinalrm_align.shapes.render import Drawing, Mark


@pytest.fixture(scope="module")
def script():
    return load_evidence("probe_features")


def test_a_token_belongs_to_the_object_that_covers_it_most(script):
    marks = (Mark("square", "red", 16.0, 16.0, 9.0), Mark("circle", "blue", 48.0, 48.0, 9.0))
    tokens = script.object_at(Drawing(marks, "white", 1.0, 1.0), 8).reshape(8, 8)
    assert (tokens[1:3, 1:3] == 0).all() and (tokens[5:7, 5:7] == 1).all()
    assert (tokens[:, 4] == -1).all() and tokens[0, 7] == -1


def test_the_probe_finds_what_is_linear_and_nothing_where_there_is_nothing(script):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(800, 16, generator=generator).double()
    known = tokens[:, :4].argmax(1)
    assert script.accuracy(tokens[:600], known[:600], tokens[600:], known[600:]) > 80
    unknown = torch.randint(4, (800,), generator=generator)
    assert 10 < script.accuracy(tokens[:600], unknown[:600], tokens[600:], unknown[600:]) < 40


def test_the_base_model_sees_shape_and_fill_whatever_the_caption_says(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe_features.py", "--images", "256", "--sigmas", "0.2"])
    script.main()
    line = re.search(r"another's caption, block 3: shape (\S+), fill (\S+), colour (\S+)", capsys.readouterr().out)
    shape, fill, colour = map(float, line.groups())
    assert shape > 70 and fill > 85 and colour > 65
