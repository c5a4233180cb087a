"""Pair batches, their order, and the sources of latents and of images."""

import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dinalrm_align.data.batches import Prefetched, ShuffledBatches, held_out
from dinalrm_align.data.latent_pairs import LatentPairs, LatentPairsWriter
from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.data.source import ImagePairs, load_image
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import RewardConfig

MANIFEST = PairManifest(vae_scaling_factor=1.5, vae_shift_factor=0.1, text_length=4)


def plain_batch(**changes):
    """Two pairs of two images: chosen 0 and 1, rejected 2 and 3."""
    fields = dict(
        latents=torch.zeros(4, 2, 4, 4),
        conditions=Conditions(["a red circle", "a blue square"] * 2, torch.zeros(4, 3, 5), torch.zeros(4, 6)),
        chosen=torch.tensor([0, 1]),
        rejected=torch.tensor([2, 3]),
        label=torch.ones(2),
        group=torch.tensor([0, 1, 0, 1]),
        concepts=("colour", "shape"),
    )
    return PairBatch(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conditions": Conditions([""] * 3, torch.zeros(3, 3, 5), torch.zeros(3, 6))},
            "conditions: got length 3; expected 4",
        ),
        ({"label": torch.ones(3)}, "label: got length 3; expected 2"),
        ({"concepts": ("colour",)}, "concepts: got length 1; expected 2"),
        ({"rejected": torch.tensor([2, 4])}, "got rows 0 to 4; expected 0 to 3"),
        ({"group": torch.tensor([0, 1, 1, 0])}, "^pair batch: group: "),
        ({"label": torch.tensor([1.0, 1.5])}, r"label: got values in \[1, 1.5\]"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plain_batch(**changes)


def test_a_batch_without_pairs_is_refused():
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="no pairs"):
        plain_batch(chosen=none, rejected=none, label=torch.zeros(0), concepts=None)


def test_moving_a_batch_keeps_every_field():
    batch = plain_batch(latents=torch.arange(128.0).view(4, 2, 4, 4))
    moved = batch.to("cpu")
    assert moved.num_groups == 2
    for field in dataclasses.fields(PairBatch):
        value, expected = getattr(moved, field.name), getattr(batch, field.name)
        if isinstance(expected, Conditions):
            value, expected = value.prompts, expected.prompts
        assert torch.equal(value, expected) if isinstance(expected, torch.Tensor) else value == expected


def test_prompts_of_groups_are_known_or_none():
    assert plain_batch().group_prompts == ("a red circle", "a blue square")
    unknown = Conditions([""] * 4, torch.zeros(4, 3, 5), torch.zeros(4, 6))
    assert plain_batch(conditions=unknown).group_prompts is None


def test_moving_a_batch_moves_every_tensor_and_reads_none():
    """A meta tensor has no values: checking the moved batch again, or counting its groups there, would fail."""
    moved = plain_batch().to("meta")
    assert moved.num_groups == 2
    fields = [*vars(moved).values(), *vars(moved.conditions).values()]
    tensors = [value for value in fields if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(tensor.is_meta for tensor in tensors)


def test_manifest_is_checked_against_the_reward():
    config = RewardConfig(vae_scaling_factor=1.5, vae_shift_factor=0.1, text_length=4)
    MANIFEST.check(config)
    with pytest.raises(ValueError, match="text_length 4, expected 256"):
        MANIFEST.check(RewardConfig(vae_scaling_factor=1.5, vae_shift_factor=0.1, text_length=256))
    with pytest.raises(ValueError, match="vae_scaling_factor 1.5"):
        MANIFEST.check(RewardConfig(vae_shift_factor=0.1, text_length=4))


def test_an_epoch_visits_every_unit_once_and_the_next_in_another_order():
    batches = ShuffledBatches([np.arange(6), np.arange(6, 10)], 2, seed=0)
    epochs = [[batches.at(epoch * 5 + i) for i in range(5)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(10))
        assert all((batch < 6).all() or (batch >= 6).all() for batch in epoch), "buckets were mixed"
    assert np.stack(epochs[0]).tolist() != np.stack(epochs[1]).tolist()


def test_a_batch_depends_on_seed_and_index_alone():
    read_in_order = ShuffledBatches([np.arange(20)], 3, seed=1)
    wanted = [read_in_order.at(i).tolist() for i in range(14)]
    read_backwards = ShuffledBatches([np.arange(20)], 3, seed=1)
    assert [read_backwards.at(i).tolist() for i in reversed(range(14))] == wanted[::-1]
    assert ShuffledBatches([np.arange(20)], 3, seed=2).at(0).tolist() != wanted[0]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size: got 8"):
        ShuffledBatches([np.arange(4), np.arange(7)], 8, seed=0)


def test_no_unit_is_left_out_of_an_epoch_for_any_batch_size():
    """Buckets of 7, 5 and 2 units in batches of 4: after k epochs each unit came k times, or is in the next batch."""
    buckets = [np.arange(7), np.arange(7, 12), np.arange(12, 14)]
    batches = ShuffledBatches(buckets, 4, seed=0)
    seen, index = np.zeros(14, dtype=int), 0
    for epoch in range(1, 9):
        while index < batches._batches_before(epoch):
            batch = batches.at(index)
            assert any(np.isin(batch, bucket).all() for bucket in buckets), "buckets were mixed"
            np.add.at(seen, batch, 1)
            index += 1
        for bucket in buckets:
            assert seen[bucket].sum() == epoch * len(bucket) // 4 * 4
            assert seen[bucket].max() - seen[bucket].min() <= 1 + 4 // len(bucket)
    assert (seen == 8).all(), "8 epochs of 14 units are whole batches of every bucket"
    again = ShuffledBatches(buckets, 4, seed=0)
    assert all((again.at(i) == ShuffledBatches(buckets, 4, seed=0).at(i)).all() for i in (27, 3, 15))


def test_a_shuffle_in_blocks_takes_a_few_blocks_at_a_time(monkeypatch):
    monkeypatch.setattr("dinalrm_align.data.batches.AT_ONCE", 2)
    blocks = np.repeat(np.arange(10), 6)
    batches = ShuffledBatches([np.arange(0, 60, 2), np.arange(1, 60, 2)], 3, seed=1, blocks=blocks)
    order = [batches.at(index) for index in range(20)]
    assert sorted(np.concatenate(order)) == list(range(60))
    for portion in range(5):
        assert len(set(blocks[np.concatenate(order[4 * portion : 4 * portion + 4])])) == 2
    assert blocks[np.concatenate(order)].tolist() != sorted(blocks)


def test_prefetched_batches_are_the_same_in_any_order(tmp_path):
    source = LatentPairs(write_latents(tmp_path / "pairs"), batch_size=2)
    with Prefetched(source.batch_at, ahead=3) as batches:
        for step in (0, 1, 2, 7, 3, 3, 4):
            batch, wanted = batches(step), source.batch_at(step)
            assert torch.equal(batch.latents, wanted.latents) and torch.equal(batch.label, wanted.label)


def test_prefetching_starts_early_and_raises_errors_with_their_batch():
    begun = [threading.Event() for _ in range(4)]

    def read(step):
        begun[step].set()
        if step == 2:
            raise OSError("step 2")
        return step

    with Prefetched(read, ahead=2) as batches:
        assert batches(0) == 0 and begun[2].wait(10)
        assert batches(1) == 1
        with pytest.raises(OSError, match="step 2"):
            batches(2)
    assert Prefetched(read, ahead=0)(3) == 3


def test_held_out_prompts_do_not_depend_on_order_or_repetition():
    prompts = [f"prompt {i}" for i in range(9)]
    assert held_out(prompts, 3) == held_out(prompts[::-1] * 2, 3)
    with pytest.raises(ValueError, match="held_out_prompts: got 9"):
        held_out(prompts, 9)


def write_latents(directory, *, groups=12, shard_size=5):
    """Lists of three images with two pairs each, two sizes in turn, two groups per prompt; values encode the group."""
    with LatentPairsWriter(directory, MANIFEST, shard_size=shard_size) as writer:
        for g in range(groups):
            height = 4 if g % 2 else 6
            prompt = g // 2
            writer.add(
                f"prompt {prompt}",
                g + torch.tensor([0.0, 0.25, 0.5]).view(3, 1, 1, 1).expand(3, 2, height, 4),
                prompt_embeds=torch.full((3, 5), float(prompt)),
                pooled_prompt_embeds=torch.full((6,), float(prompt)),
                chosen=[0, 1],
                rejected=[1, 2],
                label=[1.0, 0.75],
                concepts=["colour", "shape"],
            )
    return directory


def test_latent_pairs_come_back_as_they_were_written(tmp_path):
    source = LatentPairs(write_latents(tmp_path / "pairs"), batch_size=2)
    assert source.manifest == MANIFEST
    seen = set()
    for step in range(len(source)):
        batch = source.batch_at(step)
        assert batch.latents.shape[0] == 6 and batch.num_groups == 2
        numbers = batch.latents[:, 0, 0, 0]
        torch.testing.assert_close(numbers[batch.rejected] - numbers[batch.chosen], torch.full((4,), 0.25))
        torch.testing.assert_close(batch.conditions.prompt_embeds[:, 0, 0], numbers.div(2).floor())
        torch.testing.assert_close(batch.conditions.pooled_prompt_embeds[:, 0], numbers.div(2).floor())
        assert batch.label.tolist() == [1.0, 0.75] * 2 and batch.concepts == ("colour", "shape") * 2
        seen |= set(numbers.floor().tolist())
    assert seen == set(range(12))


def test_processes_read_different_parts_of_one_order(tmp_path):
    source = LatentPairs(write_latents(tmp_path / "pairs"), batch_size=1)
    one = [source.batch_at(step).latents for step in range(4)]
    two = [source.batch_at(step, rank, 2).latents for step in range(2) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_validation_prompts_are_never_trained_on(tmp_path):
    source = LatentPairs(write_latents(tmp_path / "pairs"), batch_size=1, held_out_prompts=2)
    validated = {float(batch.conditions.prompt_embeds[0, 0, 0]) for batch in source.validation()}
    trained = {float(source.batch_at(step).conditions.prompt_embeds[0, 0, 0]) for step in range(len(source))}
    assert len(validated) == 2 and len(source.validation()) == 4
    assert len(trained) == 4 and not trained & validated


def test_an_evaluation_set_is_read_completely_and_in_order(tmp_path):
    source = LatentPairs(write_latents(tmp_path / "pairs"), batch_size=4)
    numbers = [batch.latents[::3, 0, 0, 0].tolist() for batch in source.in_order()]
    assert numbers == [[1, 3, 5, 7], [9, 11], [0, 2, 4, 6], [8, 10]], "height 4 first, then height 6"


def test_an_evaluation_set_may_be_smaller_than_a_batch(tmp_path):
    latents = LatentPairs(write_latents(tmp_path / "pairs", groups=2), batch_size=8)
    assert [batch.num_groups for batch in latents.in_order()] == [1, 1]
    name = write_image(tmp_path, "a.png", 1)
    images = image_pairs(write_jsonl(tmp_path, {"prompt": "a", "chosen": name, "rejected": name}), batch_size=8)
    assert [batch.num_groups for batch in images.in_order()] == [1]
    for source in (latents, images):
        with pytest.raises(ValueError, match="batch_size: got 8"):
            source.batch_at(0)


def test_noise_is_shared_within_a_group():
    noise = plain_batch().draw_noise(torch.Generator().manual_seed(0))
    assert noise.shape == (4, 2, 4, 4)
    assert torch.equal(noise[0], noise[2]) and torch.equal(noise[1], noise[3]) and not torch.equal(noise[0], noise[1])


def test_plain_pairs_need_no_indices(tmp_path):
    with LatentPairsWriter(tmp_path, MANIFEST) as writer:
        text = dict(prompt_embeds=torch.zeros(3, 5), pooled_prompt_embeds=torch.zeros(6))
        writer.add("a", torch.stack([torch.ones(2, 4, 4), torch.zeros(2, 4, 4)]), **text)
    batch = LatentPairs(tmp_path, batch_size=1).batch_at(0)
    assert batch.latents[batch.chosen].mean() == 1 and batch.latents[batch.rejected].mean() == 0
    assert batch.label.tolist() == [1.0] and batch.concepts is None


def test_an_interrupted_writing_is_not_a_data_set(tmp_path):
    with pytest.raises(KeyboardInterrupt), LatentPairsWriter(tmp_path, MANIFEST):
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError, match="interrupted"):
        LatentPairs(tmp_path, batch_size=1)


def test_a_damaged_data_set_names_the_file(tmp_path):
    directory = write_latents(tmp_path / "pairs")
    index = json.loads((directory / "index.json").read_text())
    index["latents"][0]["count"] += 1
    (directory / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"latents-00000.safetensors: latents: got 6 rows; expected 7"):
        LatentPairs(directory, batch_size=1)
    (directory / "latents-00001.safetensors").unlink()
    index["latents"][0]["count"] -= 1
    (directory / "index.json").write_text(json.dumps(index | {"format": "other"}))
    with pytest.raises(ValueError, match="format: got 'other'"):
        LatentPairs(directory, batch_size=1)
    (directory / "index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="latents-00001.safetensors"):
        LatentPairs(directory, batch_size=1)
    with pytest.raises(FileExistsError, match="already holds a data set"):
        LatentPairsWriter(directory, MANIFEST)


def write_jsonl(folder, *lines):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def write_image(folder, name, value, size=(12, 8)):
    Image.new("RGB", size, (value, value, value)).save(folder / name)
    return name


def image_pairs(path, **changes):
    """Encoders that keep images as they are (one channel) and embed a prompt as its length."""
    options = dict(
        encode_images=lambda images: images[:, :1],
        encode_prompts=lambda prompts: (
            torch.tensor([len(p) for p in prompts]).view(-1, 1, 1).float(),
            torch.zeros(len(prompts), 2),
        ),
        manifest=MANIFEST,
        size=(4, 4),
        batch_size=2,
    )
    return ImagePairs(path, **{**options, **changes})


def test_image_pairs_are_encoded_side_by_side(tmp_path):
    light, dark = write_image(tmp_path, "light.png", 255), write_image(tmp_path, "dark.png", 0, size=(5, 9))
    lines = [
        {"prompt": "ab", "chosen": light, "rejected": dark, "label": 0.9, "concept": "contrast"},
        {"prompt": "abc", "chosen": light, "rejected": dark, "concept": "contrast"},
    ]
    batch = image_pairs(write_jsonl(tmp_path, *lines)).batch_at(0)
    assert batch.latents.shape == (4, 1, 4, 4) and batch.num_groups == 2
    assert (batch.latents[batch.chosen] == 1).all() and (batch.latents[batch.rejected] == 0).all()
    assert sorted(batch.conditions.prompt_embeds[batch.chosen].flatten().tolist()) == [2, 3]
    torch.testing.assert_close(batch.label.sort().values, torch.tensor([0.9, 1.0]))
    assert batch.concepts == ("contrast", "contrast")


def test_image_pairs_hold_prompts_out(tmp_path):
    name = write_image(tmp_path, "a.png", 1)
    lines = [{"prompt": "x" * (i + 1), "chosen": name, "rejected": name} for i in range(5)]
    source = image_pairs(write_jsonl(tmp_path, *lines), batch_size=1, held_out_prompts=2)
    trained = {float(source.batch_at(step).conditions.prompt_embeds[0]) for step in range(len(source))}
    validated = {float(batch.conditions.prompt_embeds[0]) for batch in source.validation()}
    assert len(trained) == 3 and len(validated) == 2 and not trained & validated


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{not json", ValueError, "line 2: not valid JSON"),
        ('["a"]', ValueError, "line 2: got a list"),
        ({"prompt": "a", "chosen": "a.png"}, ValueError, "line 2: it lacks the field 'rejected'"),
        (
            {"prompt": "a", "chosen": "a.png", "rejected": "no.png"},
            FileNotFoundError,
            "image .*no.png does not exist",
        ),
        ({"prompt": "a", "chosen": "a.png", "rejected": "a.png", "label": 2}, ValueError, "line 2: label: got 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, error, message):
    write_image(tmp_path, "a.png", 1)
    good = {"prompt": "a", "chosen": "a.png", "rejected": "a.png"}
    with pytest.raises(error, match=message):
        image_pairs(write_jsonl(tmp_path, good, line))


def test_a_file_without_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pairs"):
        image_pairs(write_jsonl(tmp_path, "", ""))


def test_what_is_not_an_image_is_named(tmp_path):
    empty, text, cut = tmp_path / "empty.png", tmp_path / "text.png", tmp_path / "cut.png"
    empty.touch()
    text.write_text("not an image")
    write_image(tmp_path, "whole.png", 7, size=(64, 64))
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    for path, message in ((empty, "0 bytes"), (text, "not an image"), (cut, "cannot be read")):
        with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
            load_image(path, 8, 8)


def test_images_are_scaled_to_cover_and_cropped(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    loaded = load_image(tmp_path / "wide.png", 20, 20)
    assert loaded.shape == (3, 20, 20)
    assert loaded[:, :, 2:-2].min() > 0.95, "the middle third is all that a square crop shows"
