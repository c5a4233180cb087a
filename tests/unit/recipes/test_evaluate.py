"""recipes/evaluate_reward.py on the tiny stack."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from paths import load_recipe
from PIL import Image
from public_sets import WRITERS, put, write_hpdv3
from safetensors.numpy import load_file
from tiny_clip import save_clip
from tiny_recipes import QUICK_PAIRS

from dinalrm_align.eval.config import AblateRun, EvaluateRun
from dinalrm_align.reward.pixel.clip import ClipReward


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("evaluate_reward")


@pytest.fixture
def arguments(tiny_world, tmp_path):
    return [
        f"--model={tiny_world}", f"--output_dir={tmp_path / 'out'}", "--device=cpu", "--sigmas=[0.1,0.4]",
        "--ensembles=[[0.1,0.4]]", "--calibrated_at=[0.4]", "--shapes_pairs.heldout_groups=6",
        "--shapes_pairs.per_concept=1", "--shapes_pairs.per_shifted=1", *QUICK_PAIRS,
    ]  # fmt: skip


def test_it_reports_accuracy_concepts_and_calibration(recipe, arguments, tmp_path, capsys):
    recipe.main(arguments)
    text = (tmp_path / "out" / "evaluation.md").read_text()
    for part in ("36 pairs of 6 captions", "| 0.1+0.4, tokens |", "## By concept, on concepts", "| shape | 1 |",
                 "## Calibration", "| reward | 0.4 | 36 |"):  # fmt: skip
        assert part in text
    assert text in capsys.readouterr().out
    assert re.search(
        r"Accuracy of the gold score on decoded latents: .* on heldout, .* on shifted, .* on concepts\.", text
    )
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 10_000


def test_it_reports_the_set_out_of_family(recipe, arguments, tmp_path, capsys):
    other = "--shapes_pairs.outside={other: {num_steps: [2, 3]}}"
    recipe.main([*arguments, "--shapes_pairs.heldout_groups=2", "--gold=false", other])
    assert len((tmp_path / "out" / "pairs_outside.jsonl").read_text().splitlines()) == 2 * 6
    assert "outside" in (tmp_path / "out" / "evaluation.md").read_text()
    with pytest.raises(SystemExit):
        recipe.main([*arguments, f"--output_dir={tmp_path / 'no'}", other.replace("[2", "[1")])
    assert "pairs.outside.other: got a generator that occurs in training, as 'few'" in capsys.readouterr().err


def test_stored_scores_are_reused_for_equal_weights_only(recipe, arguments, tmp_path, tiny_reward_dir, capsys):
    recipe.main(arguments)
    kept = tmp_path / "out" / "scores_heldout.safetensors"
    before = kept.stat().st_mtime_ns
    recipe.main([*arguments, f"--reward={tiny_reward_dir}"])  # equal weights under another name
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        recipe.main([*arguments, "--noise_seed=5"])
    assert "got scores taken with" in capsys.readouterr().err


def test_scores_of_another_set_of_the_same_name_are_refused(recipe, arguments, tmp_path, capsys):
    for seed in (1, 2):
        recipe.main([*arguments, f"--output_dir={tmp_path / str(seed)}", f"--shapes_pairs.seed={seed}"])
    given = [*arguments, "--gold=false"]
    recipe.main([*given, f"--test_sets={{mine: {tmp_path / '1' / 'pairs' / 'heldout'}}}"])
    with pytest.raises(SystemExit):
        recipe.main([*given, f"--test_sets={{mine: {tmp_path / '2' / 'pairs' / 'heldout'}}}"])
    assert re.search("got scores taken with .*'set': ", capsys.readouterr().err)


def test_a_protocol_for_no_set_is_refused_for_the_default_sets_too():
    with pytest.raises(
        ValueError, match="got one for 'heldot'; expected names in test_sets: heldout, outside, shifted"
    ):
        EvaluateRun(protocol={"heldot": "tau"})
    with pytest.raises(ValueError, match="test_sets: got no sets"):
        AblateRun(test_sets={})


def test_a_reward_is_evaluated_in_the_given_dtype(recipe, arguments, tmp_path, monkeypatch, capsys):
    """Latent and image rewards. Scores of another dtype in the same folder are refused."""
    asked, clip = [], save_clip(tmp_path / "clip")
    monkeypatch.setattr(ClipReward, "from_pretrained", lambda *_, **options: asked.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recipe.main([*arguments, f"--reward=clipscore={clip}", "--dtype=bfloat16"])
    assert asked[0]["dtype"] is torch.bfloat16
    arguments = [*arguments, f"--test_sets={{hpdv3: {write_hpdv3(tmp_path / 'images')}}}", "--bootstrap=100"]
    recipe.main(arguments)
    recipe.main([*arguments, "--dtype=bfloat16", f"--output_dir={tmp_path / 'half'}"])
    full, half = (load_file(tmp_path / folder / "scores_hpdv3.safetensors") for folder in ("out", "half"))
    difference = max(abs(full[name] - half[name]).max() for name in full if name.startswith("score"))
    assert 0 < difference < 0.1
    with pytest.raises(SystemExit):
        recipe.main([*arguments, "--dtype=bfloat16"])
    assert "got scores taken with" in capsys.readouterr().err


def test_each_reward_has_its_own_default_folder(recipe, tiny_world, tiny_reward_dir):
    rewards = [[], ["--reward=pixel"], ["--reward=dinalrm + 0.2*pixel"], [f"--reward={tiny_reward_dir}"]]
    folders = [recipe.resolve([f"--model={tiny_world}", *words])[0].output_dir for words in rewards]
    assert folders[:2] == [f"runs/evaluate_{tiny_world.name}_{name}" for name in ("dinalrm", "pixel")]
    assert len(set(folders)) == 4


@pytest.mark.parametrize("own", [16, 9])
def test_parts_of_a_sum_read_the_text_length_of_their_checkpoint_or_the_given_one(
    recipe, arguments, tmp_path, tiny_reward_dir, own, capsys
):
    """Images, whose prompts are encoded here. Two lengths in one sum are refused before the rewards are loaded."""
    copy = shutil.copytree(tiny_reward_dir, tmp_path / "reward")
    config = json.loads((copy / "config.json").read_text())
    base = str((tiny_reward_dir / config["base_model_id"]).resolve())
    (copy / "config.json").write_text(json.dumps({**config, "text_length": own, "base_model_id": base}))
    arguments = [*arguments, f"--test_sets={{hpdv3: {write_hpdv3(tmp_path / 'images')}}}", "--bootstrap=100"]
    recipe.main([*arguments, f"--reward=2*dinalrm={copy}"])
    recipe.main([*arguments, f"--reward=2*dinalrm={copy}", "--text_length=7", f"--output_dir={tmp_path / 'other'}"])
    found = [load_file(tmp_path / folder / "scores_hpdv3.safetensors") for folder in ("out", "other")]
    assert any((found[0][name] != found[1][name]).any() for name in found[0])
    if own == 9:
        with pytest.raises(SystemExit):
            recipe.main([*arguments, f"--reward=dinalrm + dinalrm={copy}"])
        assert "parts read [9, 16] T5 tokens; expected one number: pass --text_length" in capsys.readouterr().err


@pytest.mark.parametrize(("sigmas", "expected"), [([0.4, 0.5], [0.4]), ([0.3], [0.3])])
def test_calibration_levels_follow_the_sigmas(sigmas, expected):
    """--sigmas alone is enough: the default levels of the calibration report are taken from it."""
    assert EvaluateRun(sigmas=sigmas).calibrated_at == expected


def test_calibration_levels_must_be_among_the_sigmas(recipe, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe.main([*arguments, "--calibrated_at=[0.3]"])
    assert stop.value.code == 2 and "calibrated_at: got [0.3]; expected some of sigmas" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the public test sets


def public(folder):
    """--test_sets with every test set that `public_sets` writes."""
    return "--test_sets=" + json.dumps({name: str(write(folder / name)) for name, (write, _) in WRITERS.items()})


def test_every_public_set_is_scored_under_every_protocol_that_it_has(recipe, tmp_path, capsys):
    recipe.main([public(tmp_path), "--reward=public_rewards:brightness", f"--output_dir={tmp_path / 'out'}",
                 "--protocol={hpdv3: half-ties}", "--device=cpu", "--bootstrap=100"])  # fmt: skip
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for name, (_, expected) in WRITERS.items():
        found = {row["protocol"]: row["value"] for row in report["sets"][name]["protocols"]}
        assert {protocol: found[protocol] for protocol in expected} == pytest.approx(expected, abs=1e-5)
    assert report["sets"]["hpdv3"]["protocol"] == "half-ties"
    text = capsys.readouterr().out
    assert "| noise level | imagereward, pooled | hpdv2, hpsv2 | hpdv3, half-ties | genai_bench, diff |" in text
    assert "| DiNa-LRM, SD3.5-M, ensemble | 61.75 | 84.31 | 74.86 | 68.98 |  |" in text
    assert "| **this reward, score** | 40.00 [" in text and "## Calibration" not in text
    first = json.loads((tmp_path / "out" / "pairs_hpdv3.jsonl").read_text().split("\n")[0])
    assert first.pop("scores") == {"score": pytest.approx([50, 20])}
    assert first == {"prompt": "a cat", "first": "images/cat50.png", "second": "images/cat20.png", "label": 1.0}


def test_a_latent_reward_is_scored_at_every_level_on_a_public_set(recipe, arguments, tmp_path):
    folder = write_hpdv3(tmp_path / "hpdv3")
    recipe.main([*arguments, f"--test_sets={{hpdv3: {folder}}}", "--size=32", "--bootstrap=100"])
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"]["hpdv3"]
    assert [*report["readings"]] == ["0.1", "0.4", "0.1+0.4"] and report["protocol"] == "strict"
    text = (tmp_path / "out" / "evaluation.md").read_text()
    for part in ("| **this reward, 0.4** |", "| **this reward, 0.1+0.4** |", "## Calibration", "0.1+0.4, tokens",
                 "accuracy_vs_sigma.png"):  # fmt: skip
        assert part in text
    assert (tmp_path / "out" / "accuracy_vs_sigma.png").stat().st_size > 10_000


def test_an_image_reward_is_evaluated_on_decoded_latents(recipe, arguments, tmp_path):
    """The accuracy is that of the reward called by hand on decoded latents."""
    import torch

    from dinalrm_align.data.latent_pairs import LatentPairs
    from dinalrm_align.models.pipeline import decode_latents, load_vae

    recipe.main([*arguments, "--reward=public_rewards:brightness", "--gold=false", "--bootstrap=100"])
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"]
    assert [*report] == ["heldout", "shifted", "concepts"]
    (batch,) = LatentPairs(tmp_path / "out" / "pairs" / "heldout", batch_size=100).in_order()
    world = arguments[0].removeprefix("--model=")
    with torch.no_grad():
        bright = decode_latents(load_vae(f"{world}/pipeline", device="cpu"), batch.latents.float()).mean(dim=(1, 2, 3))
    right = (bright[batch.chosen] > bright[batch.rejected])[batch.label != 0.5].float().mean().item()
    assert report["heldout"]["readings"]["score"]["value"] == pytest.approx(right, abs=1e-5)
    assert "## By concept, on concepts" in (tmp_path / "out" / "evaluation.md").read_text()


@pytest.mark.parametrize("own", [True, False], ids=["latents", "images"])
def test_a_stopped_evaluation_continues(recipe, arguments, tmp_path, monkeypatch, own):
    import public_rewards

    score, calls = public_rewards.brightness, []

    def until(limit):
        def brightness(images, prompts):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(len(images))
            return score(images, prompts)

        return brightness

    sets = [] if own else [f"--test_sets={{hpdv3: {write_hpdv3(tmp_path / 'hpdv3')}}}"]
    monkeypatch.setattr("dinalrm_align.eval.evaluator.PIECE", 1)
    words = [*arguments, *sets, "--reward=public_rewards:brightness", "--gold=false", "--batch_size=2",
             "--bootstrap=100"]  # fmt: skip
    monkeypatch.setattr(public_rewards, "brightness", until(2))
    with pytest.raises(SystemExit) as stop:
        recipe.main(words)
    assert stop.value.code == 130
    monkeypatch.setattr(public_rewards, "brightness", until(1000))
    recipe.main(words)
    resumed, whole = len(calls), tmp_path / "whole"
    calls.clear()
    recipe.main([*words, f"--output_dir={whole}"])
    assert resumed == len(calls)
    for name in ("heldout", "shifted") if own else ("hpdv3",):
        one, other = (load_file(folder / f"scores_{name}.safetensors") for folder in (whole, tmp_path / "out"))
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
        assert not (tmp_path / "out" / f"scores_{name}.pieces").exists()


def test_the_report_lists_images_left_out_and_pairs_trained_on(recipe, tmp_path, capsys):
    folder = write_hpdv3(tmp_path / "hpdv3")
    put(folder / "images" / "dog40.png", b"")
    put(tmp_path / "train.json", [{"prompt": "a tree", "path1": "images/cat21.png", "path2": "images/new.png"}])
    words = [f"--test_sets={{hpdv3: {folder}}}", "--reward=public_rewards:brightness", "--bootstrap=100",
             f"--output_dir={tmp_path / 'out'}", f"--trained_on={tmp_path / 'train.json'}"]  # fmt: skip
    with pytest.raises(SystemExit):
        recipe.main(words)
    assert "hpdv3: image images/dog40.png: images/dog40.png is empty" in capsys.readouterr().err
    recipe.main([*words, "--on_bad=skip"])
    text = capsys.readouterr().out
    assert "1 images have no score; their pairs are left out:\n\n- images/dog40.png: images/dog40.png is empty" in text
    assert "Of 4 pairs were trained on: 2 by prompt, 1 by image (compared by path), 3 by either." in text
    assert "| score | 50.00 [50.00, 50.00] | 100.00 (no interval: one prompt) (1 pairs) |" in text
    with pytest.raises(SystemExit):
        recipe.main(words)
    assert "these scores leave out images" in capsys.readouterr().err


def test_a_set_in_which_raters_tie_all_pairs_is_named(recipe, tmp_path, capsys):
    for name in ("a", "b"):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    put(tmp_path / "ties.jsonl", {"prompt": "x", "chosen": "a.png", "rejected": "b.png", "label": 0.5})
    with pytest.raises(SystemExit):
        recipe.main([f"--test_sets={{mine: {tmp_path / 'ties.jsonl'}}}", "--reward=public_rewards:brightness",
                     f"--output_dir={tmp_path / 'out'}", "--device=cpu"])  # fmt: skip
    assert "test set mine: raters tie all 1 pairs; expected a preference" in capsys.readouterr().err
