"""How a reward is written: a table of what is understood and one of what is refused."""

from pathlib import Path

import pytest

from dinalrm_align.reward.names import REWARDS, check_reward, file_name, gold_rewards, parse_reward

README = Path(__file__).parents[3] / "README.md"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dinalrm", {"dinalrm": 1}),
        ("  hpsv2.1 ", {"hpsv2.1": 1}),
        ("dinalrm + 0.2*pickscore", {"dinalrm": 1, "pickscore": 0.2}),
        ("dinalrm+.5 * hpsv2.1 - 1e-3*clipscore", {"dinalrm": 1, "hpsv2.1": 0.5, "clipscore": -1e-3}),
        ("2*pixel", {"pixel": 2}),
        ("-1*pixel + 3.*oracle", {"pixel": -1, "oracle": 3}),
        ("pixel - -2*oracle", {"pixel": 1, "oracle": 2}),
        ("pickscore=/data/a-b+c", {"pickscore=/data/a-b+c": 1}),
        ("0.5*pickscore=/data/a - mps=b.pth", {"pickscore=/data/a": 0.5, "mps=b.pth": -1}),
        ("pickscore='/a + b' + dinalrm", {"pickscore=/a + b": 1, "dinalrm": 1}),
        ('dinalrm="x y"', {"dinalrm=x y": 1}),
        ("dinalrm + dinalrm=owner/other", {"dinalrm": 1, "dinalrm=owner/other": 1}),
        ("unifiedreward=http://localhost:8000/v1", {"unifiedreward=http://localhost:8000/v1": 1}),
        ("owner/name-v1.0", {"dinalrm=owner/name-v1.0": 1}),
        ("runs/not there yet", {"dinalrm=runs/not there yet": 1}),
        ("my.module:some.function + 2*pixel", {"my.module:some.function": 1, "pixel": 2}),
    ],
)
def test_what_is_understood(text, parts):
    assert {term.label: term.weight for term in parse_reward(text)} == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got ''; Known: dinalrm, pickscore"),
        ("pickscor", r"unknown reward 'pickscor'; did you mean 'pickscore'\? Known: dinalrm, pickscore, clipscore"),
        ("image-reward", "unknown reward 'image'; did you mean 'imagereward'"),
        ("PickScore", "unknown reward 'PickScore'; did you mean 'pickscore'"),
        ("nan*pixel", "unknown reward 'nan'"),
        ("pixel*2", r"got '\*2' after 'pixel'; expected \+ or -, as in 'dinalrm \+ 0.2\*pickscore'"),
        ("2 pixel", "got '2 pixel'; expected the name"),
        ("pixel oracle", "got 'oracle' after 'pixel'"),
        ("2", "got '2'; expected the name"),
        ("pixel + ", "got ''; expected the name of a reward"),
        ("+ pixel", r"got '\+ pixel'; expected the name"),
        ("pixel ++ oracle", r"got '\+ oracle'; expected the name"),
        ("(pixel + oracle)", r"got '\(pixel"),
        ("pixel + /data/folder", "got '/data/folder'; expected the name.*NAME=SOURCE"),
        ("pixel, oracle", "got ', oracle' after 'pixel'"),
        ("__import__('os').system('x')", "unknown reward '__import__'"),
        ("0*pixel", "got the weight 0; expected a finite one other than 0"),
        ("1e999*pixel", "got the weight 1e999"),
        ("pixel + pixel", "'pixel' stands twice"),
        ("pixel=", "got nothing after pixel="),
        ("pixel='/a", "got a quote that is not closed after pixel="),
        ("oracle=/a", "oracle has no weights to be had from '/a'"),
        ("a.b:c=/d", "a.b:c has no weights"),
        ("a.b:", "unknown reward 'a.b'"),
        ("pixel\0", "got 'pixel.x00'"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_reward(text)


def test_anything_but_text_is_a_type_error():
    with pytest.raises(TypeError, match="reward: got list"):
        parse_reward(["dinalrm"])


def test_a_folder_beats_no_name(tmp_path, monkeypatch):
    """A folder that is called like a reward is not meant by that name; any other folder is a latent reward's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pixel").mkdir()
    (tmp_path / "mine").mkdir()
    assert [term.label for text in ("pixel", "mine") for term in parse_reward(text)] == ["pixel", "dinalrm=mine"]


def test_gradients_are_known_beforehand():
    assert [term.differentiable for term in parse_reward("dinalrm + oracle + unifiedreward=x + a.b:c")] == [
        True, False, False, True,
    ]  # fmt: skip


def test_a_method_that_needs_gradients_is_refused_at_once():
    assert len(check_reward("dinalrm + 0.1*oracle")) == len(check_reward("dinalrm + 2*a.b:c", gradient=True)) == 2
    with pytest.raises(ValueError, match="oracle, unifiedreward has no gradient, and this method needs one"):
        check_reward("dinalrm + 0.1*oracle + unifiedreward", gradient=True)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("dinalrm", "dinalrm"),
        ("hpsv2.1", "hpsv2.1"),
        ("owner/name", "name"),
        ("dinalrm=/runs/best one", "best_one"),
        ("dinalrm + 0.2*pickscore=/data/x", "dinalrm+0.2pickscore"),
        ("a.b:c", "a.b_c"),
    ],
)
def test_name_of_a_file(text, name):
    assert file_name(text) == name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"gold": print}),
        ("hpsv3", {"gold": "hpsv3"}),
        (["hpsv3"], {"gold": "hpsv3"}),
        (["hpsv3", "a.b:c", "hpsv2 + mps"], {"gold": "hpsv3", "gold/a.b_c": "a.b:c", "gold/hpsv2+mps": "hpsv2 + mps"}),
    ],
)
def test_several_gold_rewards(given, expected):
    assert gold_rewards(given, print) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "gold: got an empty list; expected at least one reward"),
        (["mps=/a/x", "mps=/b/x"], "gold: got two rewards named 'x'"),
        (["hpsv3", "hpsv9"], "unknown reward 'hpsv9'"),
        ("hpsv9", "unknown reward 'hpsv9'"),
    ],
)
def test_what_is_refused_as_gold(given, message):
    with pytest.raises(ValueError, match=message):
        gold_rewards(given, print)


def test_every_entry_says_where_its_weights_are_and_under_what_licence():
    for name, entry in REWARDS.items():
        assert entry.licence and entry.scale, name
        if entry.kind is not None:
            assert entry.source or entry.how, name


def test_the_readme_lists_every_name_with_its_source_and_licence():
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    for name, entry in REWARDS.items():
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        assert row.rstrip("| ").endswith("yes" if entry.differentiable else "no")
        if entry.source and not entry.served:
            assert entry.source in row and entry.licence in row, name
