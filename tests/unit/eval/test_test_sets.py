"""The public test sets, read from small files in their published layouts, and scored image by image."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from public_sets import (
    WRITERS,
    grey,
    put,
    write_genai,
    write_hpdv2,
    write_hpdv3,
    write_hpdv3pp,
    write_imagereward,
    write_parquet,
)

from dinalrm_align.data.formats.record import Dropped
from dinalrm_align.eval.evaluator import PIECE, Fit, noise_by_prompt, score_image_set
from dinalrm_align.eval.protocols import accuracy
from dinalrm_align.eval.scores import NO_NOISE, NoiseLevels, Pieces
from dinalrm_align.eval.test_sets import leaked, open_test_set, read_trained, trained_on


def by_grey(images, prompts):
    return {"score": np.array([np.asarray(image)[0, 0, 0] for image in images], np.float32)}


def scored(test_set, tmp_path, score=by_grey, *, batch_size=2, on_bad="refuse"):
    pieces = Pieces(tmp_path / "pieces", {"set": test_set.digest()})
    return score_image_set(score, test_set, [NO_NOISE], batch_size=batch_size, on_bad=on_bad, title="", pieces=pieces)


@pytest.mark.parametrize("name", WRITERS)
def test_every_layout_gives_the_accuracies_worked_out_by_hand(name, tmp_path):
    write, expected = WRITERS[name]
    scores, faults = scored(open_test_set(name, write(tmp_path / "set")), tmp_path)
    assert not faults
    for protocol, value in expected.items():
        assert accuracy(scores, protocol, "score", draws=100).value == pytest.approx(value), protocol


def test_the_two_axes_of_hpdv3pp_lie_in_one_folder(tmp_path):
    """Their lists are in test/, and the image paths are relative to the folder above it."""
    for axis in ("aes", "tf"):
        write_hpdv3pp(tmp_path, axis)
    (tmp_path / "test" / "test_tf.json").write_text(json.dumps(json.loads(_text(tmp_path, "tf"))[:2]))
    assert [len(open_test_set(f"hpdv3pp_{axis}", tmp_path).label) for axis in ("aes", "tf")] == [5, 2]
    for where in (tmp_path, tmp_path / "test", tmp_path / "test" / "test_aes.json"):
        assert not open_test_set("hpdv3pp_aes", where).missing()


def _text(folder, axis):
    return (folder / "test" / f"test_{axis}.json").read_text()


def test_images_of_several_pairs_are_scored_once(tmp_path):
    test_set = open_test_set("hpdv3", write_hpdv3(tmp_path))
    assert len(test_set.label) == 5 and len(test_set.images) == 8


def test_an_exported_folder_reads_as_the_parquet_files(tmp_path):
    parquet, exported = (
        scored(open_test_set("genai_bench", write_genai(tmp_path / kind, kind == "exported")), tmp_path / kind)[0]
        for kind in ("parquet", "exported")
    )
    assert np.array_equal(parquet.gap("score"), exported.gap("score"))
    assert np.array_equal(parquet.label, exported.label) and parquet.prompts == exported.prompts


def test_splits_and_tasks_of_one_folder_are_kept_apart(tmp_path):
    write_genai(tmp_path)
    assert len(open_test_set("genai_bench", tmp_path).label) == 5
    assert len(open_test_set("genai_bench_v1", tmp_path).label) == 1


def test_the_scorer_sees_nothing_of_the_order_of_a_pair(tmp_path):
    """The same images with path1 and path2 exchanged are asked for in the same order."""
    seen = {}
    for swapped in (False, True):
        test_set = open_test_set("hpdv3", write_hpdv3(tmp_path / str(swapped), swapped))

        def spy(images, prompts, swapped=swapped):
            scores = by_grey(images, prompts)
            seen.setdefault(swapped, []).extend(zip(prompts, scores["score"].tolist()))
            return scores

        scored(test_set, tmp_path / f"{swapped}s", spy)
    assert seen[False] == seen[True]


def test_a_list_of_ones_own_is_pairs_of_images(tmp_path):
    for name, value in (("a", 9), ("b", 5)):
        put(tmp_path / f"{name}.png", grey(value))
    lines = [{"prompt": "x", "chosen": "a.png", "rejected": "b.png"},
             {"prompt": "y", "chosen": "a.png", "rejected": "b.png", "label": 0.2}]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores, _ = scored(open_test_set("mine", tmp_path / "mine.jsonl"), tmp_path)
    assert scores.gap("score").tolist() == [4, 4] and scores.correct("score").tolist() == [1, 0]


# --------------------------------------------------------------------------------------------------- faults and stops


def test_a_missing_image_is_named_before_anything_is_scored(tmp_path):
    test_set = open_test_set("hpdv3", write_hpdv3(tmp_path / "set"))
    (tmp_path / "set" / "images" / "dog40.png").unlink()
    with pytest.raises(ValueError, match=r"hpdv3: 1 of 8 images are missing, as \['images/dog40.png'\].*on_bad"):
        scored(test_set, tmp_path, lambda *_: pytest.fail("scored"))


def test_a_broken_image_is_named_or_its_pairs_are_left_out(tmp_path):
    test_set = open_test_set("hpdv3", write_hpdv3(tmp_path / "set"))
    put(tmp_path / "set" / "images" / "cat20.png", grey(20)[:60])
    (tmp_path / "set" / "images" / "dog40.png").unlink()
    with pytest.raises(ValueError, match="1 of 8 images"):
        scored(test_set, tmp_path)
    put(tmp_path / "set" / "images" / "dog40.png", b"")
    with pytest.raises(ValueError, match="hpdv3: image images/.*--on_bad skip"):
        scored(test_set, tmp_path)
    scores, faults = scored(test_set, tmp_path, on_bad="skip")
    assert faults.keys() == {"images/cat20.png", "images/dog40.png"} and "empty" in faults["images/dog40.png"]
    assert scores.gap("score").tolist() == [10, 0]  # the two pairs of the tree are left
    assert accuracy(scores, "strict", "score", draws=100).pairs == 2


def test_a_set_without_a_whole_pair_is_refused(tmp_path):
    test_set = open_test_set("hpdv3", write_hpdv3(tmp_path / "set"))
    for file in (tmp_path / "set" / "images").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="none of 5 pairs has scores of both images"):
        scored(test_set, tmp_path, on_bad="skip")


def test_what_was_scored_before_a_kill_is_not_scored_again(tmp_path):
    entries = [{"prompt": f"p{number % 7}", "path1": f"{number}.png", "path2": f"{number + 1}.png"}
               for number in range(0, 60, 2)]  # fmt: skip
    for number in range(60):
        put(tmp_path / "set" / f"{number}.png", grey(number))
    put(tmp_path / "set" / "test.json", entries)
    test_set = open_test_set("hpdv3", tmp_path / "set")
    whole, _ = scored(test_set, tmp_path / "whole")
    seen = []

    def until(limit):
        def score(images, prompts):
            if len(seen) >= limit:
                raise KeyboardInterrupt
            seen.extend(image.getpixel((0, 0))[0] for image in images)
            return by_grey(images, prompts)

        return score

    with pytest.raises(KeyboardInterrupt):
        scored(test_set, tmp_path, until(40))
    kept = 40 // (2 * PIECE) * 2 * PIECE
    del seen[kept:]  # the piece that was begun is begun again
    resumed, _ = scored(test_set, tmp_path, until(1000))
    assert sorted(seen) == list(range(60))
    assert np.array_equal(resumed.scores["score"], whole.scores["score"])
    with pytest.raises(ValueError, match="pieces: got scores taken with .*; expected .*another"):
        Pieces(tmp_path / "pieces", {"set": "another"})


def test_a_damaged_piece_is_refused(tmp_path):
    pieces = Pieces(tmp_path, {})
    pieces.get(0, lambda: ({"scores": np.zeros(3, np.float32)}, {"a": 1}))
    assert pieces.get(0, lambda: None)[1] == {"a": 1}
    file = tmp_path / "000000.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="000000.safetensors is damaged"):
        pieces.get(0, lambda: None)


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    test_set = open_test_set("hpdv3", write_hpdv3(tmp_path / "set"))
    with pytest.raises(ValueError, match="hpdv3: scores at score are NaN or infinite"):
        scored(test_set, tmp_path, lambda images, _: {"score": np.full(len(images), np.nan)})


# ------------------------------------------------------------------------------------------------ sizes and noise


def test_an_image_keeps_its_aspect_at_the_area_or_is_cropped():
    """1536 x 512 at the area of 1024 x 1024: times 1.155, 1774 x 591, to multiples of 16."""
    wide = Image.new("RGB", (1536, 512))
    assert Fit("area", 1024, 1024)(wide).shape == (3, 592, 1776)
    assert Fit("crop", 1024, 1024)(wide).shape == (3, 1024, 1024)


def test_noise_is_of_the_prompt_and_the_draw_alone():
    together = noise_by_prompt(["a", "b", "a"], (2, 3), seed=1, draw=0)
    assert (together[0] == together[2]).all() and (together[0] != together[1]).any()
    assert (noise_by_prompt(["b"], (2, 3), seed=1, draw=0)[0] == together[1]).all()
    for other in ({"seed": 2, "draw": 0}, {"seed": 1, "draw": 1}):
        assert (noise_by_prompt(["b"], (2, 3), **other)[0] != together[1]).any()


def test_a_latent_reward_scores_the_encoded_image(tmp_path, tiny_world):
    """Every reading, against the reward called by hand with the noise of the prompt."""
    import torch

    from dinalrm_align import LatentReward
    from dinalrm_align.data.source import Encoders
    from dinalrm_align.eval.evaluator import image_scorer
    from dinalrm_align.models.pipeline import encode_images, load_transformer
    from dinalrm_align.reward.registry import load_reward

    transformer = load_transformer(tiny_world / "pipeline", dtype=torch.float32).requires_grad_(False)
    reward = LatentReward.from_pretrained(tiny_world / "dinalrm", transformer=transformer)
    encoders = Encoders(str(tiny_world / "pipeline"), text_length=16, device="cpu", dtype=torch.float32)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((32, 32), (32, 48), (32, 32))]
    prompts, fit = ["red", "blue", "red"], Fit("area", 32, 32)
    readings = [NoiseLevels.at(0.4), NoiseLevels.at(0.2, 0.7)]
    found = image_scorer(reward, encoders, fit, readings, 3)(images, prompts)
    for row, (image, prompt) in enumerate(zip(images, prompts)):
        latents = encode_images(encoders.vae, fit(image)[None])
        noise = noise_by_prompt([prompt], latents.shape[1:], 3, 0)
        for reading in readings:
            expected = reward.raw(latents, [prompt], sigma=list(reading.sigmas), noise=noise)
            assert found[reading.name][row] == pytest.approx(expected.item(), abs=1e-5)

    text = f"dinalrm={tiny_world / 'dinalrm'} + 2*public_rewards:brightness"
    reward_sum = load_reward(text, transformer=transformer)
    both = image_scorer(reward_sum, encoders, fit, [NO_NOISE], 3)(images, prompts)
    own = image_scorer(reward, encoders, fit, [NoiseLevels.at(0.4)], 3)(images, prompts)["0.4"]  # the config's level
    for row, image in enumerate(images):
        bright = np.asarray(image, np.float32).mean()
        assert both["score"][row] == pytest.approx(own[row] * 2 + 0.5 + 2 * bright, rel=1e-5)


def test_a_served_latent_reward_scores_as_in_this_process(tiny_world):
    import torch
    from reward_server import running

    from dinalrm_align import LatentReward
    from dinalrm_align.data.source import Encoders
    from dinalrm_align.eval.evaluator import image_scorer
    from dinalrm_align.reward.combine import RewardSum
    from dinalrm_align.reward.registry import load_reward

    reward = LatentReward.from_pretrained(tiny_world / "dinalrm", pipeline=str(tiny_world / "pipeline"))
    reward.config.image_sigma = 0.2
    encoders = Encoders(str(tiny_world / "pipeline"), text_length=16, device="cpu", dtype=torch.float32)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in ((64, 64), (40, 70), (64, 64))]
    prompts, place = ["red", "blue", "red"], (encoders, Fit("area", 32, 32), [NO_NOISE], 3)
    bright = load_reward("public_rewards:brightness")
    both = RewardSum({"dinalrm": reward, "bright": bright}, {"dinalrm": 1.0, "bright": 2.0})
    with running({"default": reward, "bright": bright, "sum": both}) as address:
        served = load_reward(address), load_reward(f"{address} + 2*remote={address}#bright")
        for local, remote in zip((reward, both), served, strict=True):
            found = [image_scorer(each, *place)(images, prompts)["score"] for each in (local, remote)]
            np.testing.assert_allclose(found[1], found[0], atol=1e-4, rtol=1e-6)
        with pytest.raises(ValueError, match="got 'sum', a sum .* one by one"):
            image_scorer(load_reward(f"{address}#sum"), *place)


# -------------------------------------------------------------------------------------------- what is not as published


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("hpdv3", {}, "expected a list of objects"),
        ("hpdv3", [], "holds no pairs with a verdict"),
        ("hpdv3", [{"prompt": "x", "path1": "a.png"}], "entry 0: it lacks the field 'path2'"),
        ("hpdv3", [{"prompt": 3, "path1": "a", "path2": "b"}], "entry 0: prompt: got int 3"),
        ("hpdv3", [{"prompt": "x", "path1": "../a", "path2": "b"}], "expected one inside the set's folder"),
        ("hpdv2", [{"prompt": "x", "image_path": ["a", "b"], "rank": [1]}], "rank: got .*expected a list of 2 ranks"),
        ("imagereward", [{"prompt": "x", "generations": ["a", "b"], "ranking": [1, None]}], "entry 0: rank: got None"),
        ("genai_bench", [{"prompt": "x", "left_image": "a", "right_image": "b", "vote_type": "left"}],
         "vote_type: got 'left'; known: leftvote, rightvote, tievote, bothbad_vote"),
    ],
)  # fmt: skip
def test_entries_that_are_not_as_published_are_named(name, content, says, tmp_path):
    put(tmp_path / "test.json", content)
    with pytest.raises((ValueError, TypeError), match=says.replace("(", r"\(")):
        open_test_set(name, tmp_path)


def test_a_path_outside_the_set_is_left_out_and_counted(tmp_path):
    put(tmp_path / "test.json", [{"prompt": "x", "path1": one, "path2": "b.png"} for one in ("a.png", "../a.png", "c")])
    images = open_test_set("hpdv3", tmp_path, on_bad="skip")
    assert len(images.label) == 2 and images.dropped.counts == {"invalid record": 1}
    with pytest.raises(ValueError, match="hpdv3, entry 1: image path: got '../a.png'.*--on_bad skip"):
        open_test_set("hpdv3", tmp_path)


def test_a_parquet_file_without_the_columns_is_named(tmp_path):
    write_parquet(tmp_path / "image_generation" / "test-00000-of-00001.parquet", [{"prompt": "x", "vote_type": "y"}])
    with pytest.raises(ValueError, match="test-00000-of-00001.parquet.*lacks the columns left_image, right_image"):
        open_test_set("genai_bench", tmp_path)
    (tmp_path / "image_generation" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="does not hold a readable parquet file"):
        open_test_set("genai_bench", tmp_path)


def test_a_folder_without_the_set_says_what_belongs_there_and_how_to_get_it(tmp_path):
    for name in WRITERS:
        with pytest.raises(FileNotFoundError, match=r"expected .*To get it: "):
            open_test_set(name, tmp_path)
        with pytest.raises(FileNotFoundError, match=r"expected a folder with .*To get it: "):
            open_test_set(name, tmp_path / "absent")


# ----------------------------------------------------------------------------------------------------------- the hub


def test_a_set_from_the_hub_is_unpacked_once(tmp_path, monkeypatch):
    folder, asked = tmp_path / "snapshot", []
    write_hpdv2(folder)
    with tarfile.open(folder / "test.tar.gz", "w:gz") as tar:
        tar.add(folder / "test", arcname="test")
    for file in (folder / "test").iterdir():
        file.unlink()

    def download(repository, *, repo_type, allow_patterns):
        asked.append((repository, repo_type, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for _ in range(2):
        test_set = open_test_set("hpdv2", "hub", unpack_to=tmp_path / "sets")
        assert not test_set.missing() and len(test_set.label) == 6
    open_test_set("hpdv2", "someone/mirror", unpack_to=tmp_path / "sets")
    names = [repository for repository, kind, _ in asked if kind == "dataset"]
    assert names == ["ymhao/HPDv2", "ymhao/HPDv2", "someone/mirror"] and asked[0][2] == ["test.json", "test.tar.gz"]


def test_without_a_network_it_says_what_to_download(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        FileNotFoundError, match=r"genai_bench cannot be downloaded from the hub \(ConnectionError: no route\)"
    ):
        open_test_set("genai_bench", "hub")
    with pytest.raises(ValueError, match="hpdv3 cannot be used from the hub as it is; get it: hf download MizzenAI"):
        open_test_set("hpdv3", "hub")


# ------------------------------------------------------------------------------------------------------------ leakage


def test_pairs_that_were_trained_on_are_found_by_prompt_path_and_content(tmp_path):
    test_set = open_test_set("hpdv3", write_hpdv3(tmp_path / "set"))
    scores, _ = scored(test_set, tmp_path)
    by_prompt = leaked(scores, trained_on([" a cat "]), test_set)
    assert by_prompt.prompt.tolist() == [True, True, False, False, False] and not by_prompt.image.any()
    by_path = leaked(scores, trained_on(["x"], ["./images/dog40.png", "tree90.png"]), test_set)
    assert by_path.image.tolist() == [False, False, True, True, False] and by_path.by == "path"

    put(tmp_path / "train" / "other_name.png", grey(80))
    line = {"prompt": "a bird", "chosen": "other_name.png", "rejected": "other_name.png"}
    put(tmp_path / "train" / "pairs.jsonl", line)
    by_content = leaked(scores, read_trained(tmp_path / "train" / "pairs.jsonl"), test_set)
    assert by_content.image.tolist() == [False, False, False, True, True] and not by_content.prompt.any()
    assert by_content.by == "path and content"


def test_published_training_sets_and_directories_of_latents_are_read(tmp_path, tiny_pipeline):
    import torch

    from dinalrm_align.data.latent_pairs import LatentPairsWriter
    from dinalrm_align.data.pairs import PairManifest

    put(tmp_path / "v3.json", [{"prompt": "p", "path1": "images/a.jpg", "path2": "images/b.jpg"}])
    put(tmp_path / "v2.json", [{"prompt": "p", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1]}])
    assert (
        read_trained(tmp_path / "v3.json")
        == read_trained(tmp_path / "v2.json")
        == trained_on(["p"], ["a.jpg", "b.jpg"])
    )
    with LatentPairsWriter(tmp_path / "pairs", PairManifest(1.0, 0.0, 16)) as writer:
        text = {"prompt_embeds": torch.randn(5, 32), "pooled_prompt_embeds": torch.randn(32)}
        writer.add("p", torch.randn(2, 16, 8, 8), **text)
    assert read_trained(tmp_path / "pairs") == trained_on(["p"])
    put(tmp_path / "wrong.json", [{"text": "p"}])
    with pytest.raises(ValueError, match="wrong.json: got records of .*; expected those of HPDv3"):
        read_trained(tmp_path / "wrong.json")


def test_imagereward_images_may_lie_where_the_entries_say(tmp_path):
    write_imagereward(tmp_path)
    for part in list((tmp_path / "test_images").iterdir()):
        part.rename(tmp_path / part.name)
    assert not open_test_set("imagereward", tmp_path).missing()


def test_a_bad_record_is_named_or_left_out_in_evaluation_and_in_the_overlap(tmp_path):
    """The evaluator stores the messages on records beside those on images, and the report lists them."""
    put(tmp_path / "a.png", grey(80))
    put(tmp_path / "b.png", grey(10))
    good = {"prompt": "a bird", "chosen": "a.png", "rejected": "b.png"}
    records = [good, {**good, "prompt": "\ud800"}, {**good, "votes": [0, 0]}, {**good, "rejected": "absent.png"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    for read in (lambda on_bad: open_test_set("mine", path, on_bad=on_bad), lambda on_bad: trained(path, on_bad)):
        with pytest.raises(ValueError, match="pairs.jsonl, line 2: prompt: got .*--on_bad skip"):
            read("refuse")
    test_set = open_test_set("mine", path, on_bad="skip")
    assert len(test_set.label) == 2 and test_set.dropped.counts == {"invalid record": 2}
    assert test_set.missing() == ["absent.png"]
    found = Dropped("skip")
    assert read_trained(path, found).prompts == trained_on(["a bird"]).prompts
    assert found.counts == {"invalid record": 2, "missing image": 1}


def trained(path, on_bad):
    return read_trained(path, Dropped(on_bad))
