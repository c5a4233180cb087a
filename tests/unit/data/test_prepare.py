"""Preparation of latent shards from published layouts: filters, sizes, resuming, damaged files."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from paths import load_recipe
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from tiny_prepare import (
    _white,
    content,
    encode_images,
    encode_prompts,
    hpdv3,
    pickapic,
    prepare,
    values_of,
    write_image,
)

from dinalrm_align.data.config import FilterConfig
from dinalrm_align.data.formats import find_layout, read_preferences
from dinalrm_align.data.formats.record import Preference
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.data.pairs import PairManifest, WeightSample
from dinalrm_align.data.plan import (
    PUBLISHED,
    Dropped,
    Group,
    bucket_of_pair,
    by_area,
    filter_pairs,
    nearest_bucket,
    parse_buckets,
    plan_shards,
)
from dinalrm_align.data.source import sample_weights
from dinalrm_align.models.images import image_size


def test_pairs_become_shards_that_training_reads(tmp_path):
    work, _ = prepare(hpdv3(tmp_path / "data"), tmp_path / "out")
    pairs = LatentPairs(tmp_path / "out", batch_size=2)
    found = values_of(pairs)
    assert len(found) == 12 and str(work.dropped) == "no pair was left out"
    for number, (prompt, chosen, rejected) in enumerate(found):
        assert prompt == number // 2 and abs(chosen - (4 * number + 100)) <= 1 and abs(rejected - 4 * number) <= 1
    assert pairs.batch_at(0).latents.dtype == torch.bfloat16
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["count"] for shard in index["latents"]] == [6] * 4 and len(index["text"]) == 3
    for shard in index["latents"] + index["text"]:
        assert hashlib.sha256((tmp_path / "out" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_a_prompt_is_encoded_once_however_many_pairs_it_has(tmp_path):
    seen = []
    prepare(hpdv3(tmp_path / "data"), tmp_path / "out", text=lambda some: seen.extend(some) or encode_prompts(some))
    assert sorted(seen) == [f"prompt {number}" for number in range(6)]


@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_stopped_anywhere_it_resumes_to_the_same_bytes(tmp_path, stop_after):
    source = hpdv3(tmp_path / "data")
    _, whole = prepare(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "parts", stop_after=stop_after)
    assert not (tmp_path / "parts" / "index.json").exists()
    (tmp_path / "parts" / ".tmp_latents-00003.safetensors").write_bytes(b"half")
    _, rest = prepare(source, tmp_path / "parts")
    assert content(tmp_path / "whole") == content(tmp_path / "parts")
    assert len(rest) <= len(whole) - stop_after // 2, "whole files are not encoded again"


def test_run_again_it_does_nothing(tmp_path):
    source = hpdv3(tmp_path / "data")
    prepare(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    _, calls = prepare(source, tmp_path / "out", text=None)
    assert calls == [] and {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_ranks_share_the_files_and_write_the_same(tmp_path):
    source = hpdv3(tmp_path / "data")
    prepare(source, tmp_path / "one")
    shares = [prepare(source, tmp_path / "three", rank=rank, world=3)[1] for rank in range(3)]
    _, rest = prepare(source, tmp_path / "three")
    assert rest == [] and all(shares) and sum(map(sum, shares)) == 24, "each image by one rank"
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_images_of_a_prompt_in_one_group_are_stored_once(tmp_path):
    folder = tmp_path / "data"
    for value in (200, 100, 50):
        write_image(folder / f"{value}.png", value)
    lines = [("200.png", "100.png"), ("200.png", "50.png"), ("100.png", "50.png")]
    records = [{"prompt": "prompt 1", "chosen": chosen, "rejected": rejected} for chosen, rejected in lines]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare(folder / "pairs.jsonl", tmp_path / "out", group="prompt")
    batch = LatentPairs(tmp_path / "out", batch_size=1).batch_at(0)
    assert batch.latents.shape == (3, 2, 8, 8) and len(batch.chosen) == 3
    assert values_of(LatentPairs(tmp_path / "out", batch_size=1)) == [(1, 100, 50), (1, 200, 50), (1, 200, 100)]


# ------------------------------------------------------------------------------------------------- what is broken


def test_a_broken_image_is_refused_by_name_or_left_out_and_counted(tmp_path):
    source = hpdv3(tmp_path / "data")
    images = tmp_path / "data" / "images"
    whole = (images / "3_c.png").read_bytes()
    (images / "3_c.png").write_bytes(whole[: len(whole) // 2])  # its head is whole, the pixels are not
    (images / "5_r.png").write_text("no image")
    (images / "7_r.png").unlink()
    with pytest.raises(ValueError, match=r"5_r.png is not an image.*--on_bad skip"):
        prepare(source, tmp_path / "out")
    work, _ = prepare(source, tmp_path / "out", on_bad="skip")
    assert work.dropped.counts == {"unreadable image": 2, "image that cannot be encoded": 1}
    for name in ("3_c.png", "5_r.png", "7_r.png"):
        assert name in str(work.dropped)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (
        summary["pairs"] == 9
        and summary["pairs_read"] == 12
        and summary["dropped"]["image that cannot be encoded"] == 1
    )
    kept = [number for number in range(12) if number not in (3, 5, 7)]
    assert [prompt for prompt, _, _ in values_of(LatentPairs(tmp_path / "out", batch_size=1))] == [n // 2 for n in kept]
    with pytest.raises(ValueError, match="5_r.png"):
        prepare(source, tmp_path / "out")


def test_a_repaired_image_is_used(tmp_path):
    source = hpdv3(tmp_path / "data")
    broken = tmp_path / "data" / "images" / "3_c.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-20])
    prepare(source, tmp_path / "out", on_bad="skip")
    broken.write_bytes(whole)
    prepare(source, tmp_path / "out", on_bad="refuse")
    prepare(source, tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_damaged_file_is_named_by_training_and_written_again(tmp_path):
    source = hpdv3(tmp_path / "data")
    prepare(source, tmp_path / "out")
    before = content(tmp_path / "out")
    shard = tmp_path / "out" / "latents-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 9)
    with pytest.raises(ValueError, match="latents-00001.safetensors"):
        LatentPairs(tmp_path / "out", batch_size=1)
    with pytest.warns(UserWarning, match="1 shards cannot be read; 3 of 12 groups are left out.*latents-00001"):
        pairs = LatentPairs(tmp_path / "out", batch_size=1, on_bad="skip")
    assert len(values_of(pairs)) == 9 == len(pairs)
    _, calls = prepare(source, tmp_path / "out")
    assert sum(calls) == 6 and content(tmp_path / "out") == before
    flipped = bytearray(shard.read_bytes())
    flipped[-1] ^= 1
    shard.write_bytes(flipped)
    assert prepare(source, tmp_path / "out")[1] == [], "of the right size"
    assert sum(prepare(source, tmp_path / "out", verify=True)[1]) == 6 and content(tmp_path / "out") == before


def test_a_shard_cut_short_while_it_is_read_is_an_error_and_no_crash(tmp_path):
    prepare(hpdv3(tmp_path / "data"), tmp_path / "out")
    pairs = LatentPairs(tmp_path / "out", batch_size=6)
    os.truncate(tmp_path / "out" / "latents-00001.safetensors", 200)
    with pytest.raises(OSError, match="latents-00001.safetensors: got .* truncated"):
        [pairs.batch_at(step) for step in range(2)]


def test_a_prompt_without_embeddings_is_refused_or_left_out(tmp_path):
    def encode(prompts):
        embeds, pooled = encode_prompts(prompts)
        return torch.where(embeds == 4, torch.nan, embeds), pooled

    source = hpdv3(tmp_path / "data")
    with pytest.raises(ValueError, match="'prompt 4' has embeddings that are not finite"):
        prepare(source, tmp_path / "out", text=encode)
    work, _ = prepare(source, tmp_path / "out", text=encode, on_bad="skip")
    assert work.dropped.counts == {"prompt without embeddings": 2}
    found = values_of(LatentPairs(tmp_path / "out", batch_size=1))
    assert sorted({prompt for prompt, _, _ in found}) == [0, 1, 2, 3, 5] and len(found) == 10
    text = load_file(tmp_path / "out" / "text-00002.safetensors")
    assert text["prompt_embeds"][:, 0, 0].tolist() == [5]


def test_latents_that_are_not_finite_are_left_out(tmp_path):
    spoil = lambda images: torch.where(encode_images(images) > 0.55, torch.inf, encode_images(images))  # noqa: E731
    work, _ = prepare(hpdv3(tmp_path / "data"), tmp_path / "out", encode=spoil, on_bad="skip")
    assert work.dropped.counts == {"image that cannot be encoded": 1} and "11_c.png has latents" in str(work.dropped)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"buckets": "32x32"}, "buckets"), ({"shard_size": 8}, "shard_size"), ({"filter": {"ties": "keep"}}, "filter")],
)
def test_other_settings_do_not_resume_in_the_same_folder(tmp_path, changes, name):
    source = hpdv3(tmp_path / "data", pairs=2)
    prepare(source, tmp_path / "out")
    with pytest.raises(ValueError, match=f"^{name}.*: got "):
        prepare(source, tmp_path / "out", **changes)
    with pytest.raises(FileExistsError, match="holds other files"):
        prepare(source, tmp_path / "data")
    source.write_text(source.read_text().replace("prompt 0", "prompt 9"))
    with pytest.raises(ValueError, match="^source: got "):
        prepare(source, tmp_path / "out")


# -------------------------------------------------------------------------------------------- filters and buckets


def test_filters_count_what_they_leave_out(tmp_path):
    """Votes are [9, n] of pair n: shares above 0.6 up to n = 5; confidence is 0.9 or none."""
    source = hpdv3(tmp_path / "data")
    read = list(read_preferences(source, "hpdv3", None))

    def left(**config):
        dropped = Dropped("refuse")
        return [int(pair.votes[1]) for pair in filter_pairs(read, FilterConfig(**config), dropped)], dropped.counts

    assert left(min_vote_share=0.6) == ([0, 1, 2, 3, 4, 5], {"share of votes at most 0.6": 6})
    assert left(unanimous=True) == ([0], {"votes for the rejected image": 11})
    assert left(min_confidence=0.95) == ([0, 2, 4, 6, 8, 10], {"confidence below 0.95": 6})
    work, _ = prepare(source, tmp_path / "out", filter={"max_pairs_per_prompt": 1})
    assert work.dropped.counts == {"more than 1 pairs of a prompt": 6}
    assert len({prompt for prompt, _, _ in values_of(LatentPairs(tmp_path / "out", batch_size=1))}) == 6
    with pytest.raises(ValueError, match="no pair is left of 12: 12 pairs: image of less than 65536 pixels"):
        prepare(source, tmp_path / "none", filter={"min_pixels": 65_536})


def test_the_consistent_filter_of_lpo(tmp_path):
    """Kept is what exceeds every gap; a tie, what has a small gap in all."""
    lines = [
        {"scores": {"clip": [2, 1], "vqa": [1, 0]}},
        {"scores": {"clip": [1, 2], "vqa": [1, 0]}},
        {"scores": {"clip": [2, 1]}},
        {"scores": {"clip": [1, 1.01], "vqa": [1, 1]}, "label": 0.5},
        {"scores": {"clip": [1, 2], "vqa": [1, 1]}, "label": 0.5},
    ]
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": "a", "chosen": "c.png", "rejected": "r.png"}
    path.write_text("\n".join(json.dumps(pair | line) for line in lines))
    gaps = dict(min_gaps={"clip": 0.0, "vqa": 0.0}, max_tie_gaps={"clip": 0.03, "vqa": 0.07}, ties="keep")
    dropped = Dropped("refuse")
    kept = filter_pairs(read_preferences(path, "jsonl", dropped.bad), FilterConfig(**gaps), dropped)
    assert [pair.label for pair in kept] == [1.0, 0.5]
    assert dropped.counts == {"gap of clip": 2, "no score vqa": 1}


def test_votes_can_be_labels(tmp_path):
    prepare(hpdv3(tmp_path / "data", pairs=2), tmp_path / "out", label="votes")
    batches = list(LatentPairs(tmp_path / "out", batch_size=2).in_order())
    torch.testing.assert_close(batches[0].label, torch.tensor([1.0, 0.9]))


def test_images_get_the_bucket_of_their_aspect_and_the_nearest_area():
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 13
    assert nearest_bucket((640, 640), PUBLISHED, 0.03) == (512, 512)
    assert nearest_bucket((800, 800), PUBLISHED, 0.03) == (1024, 1024)
    assert nearest_bucket((1250, 830), PUBLISHED, 0.03) == (1248, 832)
    assert nearest_bucket((1000, 500), PUBLISHED, 0.03) is None
    assert bucket_of_pair((512, 512), (512, 512), PUBLISHED, 0.03) == (512, 512)
    assert bucket_of_pair((512, 512), (1024, 1030), PUBLISHED, 0.03) == (512, 512), "that of the smaller image"
    assert bucket_of_pair((1024, 1024), (1248, 832), PUBLISHED, 0.03) is None
    assert bucket_of_pair((1024, 1024), (1000, 500), PUBLISHED, 0.03) is None


def test_buckets_by_rule_fill_their_area():
    sizes = by_area(1024)
    assert (1024, 1024) in sizes and (1152, 896) in sizes and (896, 1152) in sizes
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 and max(h, w) <= 2 * min(h, w) for h, w in sizes)
    assert parse_buckets("area:1024") == sizes and parse_buckets("64x32, 32x64") == ((64, 32), (32, 64))
    for text, message in (("64x40", "multiples of 16"), ("big", "expected published"), ("area:100", "multiple of 64"),
                          ("64x64,64x64", "each size once")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            parse_buckets(text)


def test_images_of_other_sizes_are_resized_to_their_bucket(tmp_path):
    source = hpdv3(tmp_path / "data", pairs=4)
    images = tmp_path / "data" / "images"
    for name in ("0_c", "0_r"):
        write_image(images / f"{name}.png", 80, size=(130, 64))  # width, height: near 2 : 1
    write_image(images / "1_c.png", 80, size=(200, 200))
    write_image(images / "2_c.png", 80, size=(64, 32))
    work, _ = prepare(source, tmp_path / "out")
    assert work.dropped.counts == {"no common bucket for the aspect ratios": 1}
    shapes = [tuple(batch.latents.shape[2:]) for batch in LatentPairs(tmp_path / "out", batch_size=4).in_order()]
    assert shapes == [(4, 8), (8, 8)]


def test_a_turned_photograph_is_measured_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (40, 20)


def test_a_turned_png_goes_into_the_bucket_of_its_upright_size(tmp_path):
    """Stored 128 x 64 with orientation 6 in XMP: shown 64 wide and 128 high, white above black."""
    source = hpdv3(tmp_path / "data", pairs=1)
    upright = Image.new("RGB", (64, 128), "black")
    upright.paste((255, 255, 255), (0, 0, 64, 64))
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    for side in "cr":
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "data" / "images" / f"0_{side}.png", pnginfo=info)

    def top_left(images):
        return images[:, :2, ::8, ::8]

    prepare(source, tmp_path / "out", buckets="128x64,64x128", encode=top_left)
    latents = LatentPairs(tmp_path / "out", batch_size=1).batch_at(0).latents
    assert latents.shape[2:] == (16, 8)
    assert (latents[:, :, :8] == 1).all() and (latents[:, :, 8:] == 0).all()


def test_files_hold_one_size_and_no_more_than_they_should():
    groups = [Group("p", (64, 64) if n % 3 else (32, 64), (2 * n, 2 * n + 1), ((0, 1, 1.0),)) for n in range(10)]
    shards = plan_shards(groups, 5)
    assert [len(shard) for shard in shards] == [2, 2, 2, 2, 2]
    assert all(len({group.size for group in shard}) == 1 for shard in shards)
    assert sorted(p for shard in shards for group in shard for p in group.images) == list(range(20))


# --------------------------------------------------------------------------------------------------- public layouts


def test_hpdv2_labels_the_preferred_image(tmp_path):
    records = [
        {"prompt": "a", "file_path": ["0.jpg", "1.jpg"], "human_preference": [0, 1]},
        {"prompt": "b", "file_path": ["2.jpg", "3.jpg"], "human_preference": [1, 0]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(records))
    assert find_layout(tmp_path / "train.json") == "hpdv2"
    read = list(read_preferences(tmp_path / "train.json", "hpdv2"))
    assert [(pair.chosen, pair.rejected) for pair in map(Preference.preferred_first, read)] == [
        ("1.jpg", "0.jpg"),
        ("2.jpg", "3.jpg"),
    ]


def test_pick_a_pic_is_read_from_its_parquet_files(tmp_path):
    folder = pickapic(tmp_path / "pickapic")
    assert find_layout(folder) == "pickapic"
    work, _ = prepare(folder, tmp_path / "out")
    assert work.dropped.counts == {"tie": 1}
    assert values_of(LatentPairs(tmp_path / "out", batch_size=1)) == [(0, 100, 0), (3, 60, 160)]
    prepare(folder, tmp_path / "ties", filter={"ties": "keep"})
    labels = [float(batch.label[0]) for batch in LatentPairs(tmp_path / "ties", batch_size=1).in_order()]
    assert labels == [1.0, 0.5, 1.0]


def test_an_invalid_record_is_refused_or_counted(tmp_path):
    lines = ['{"prompt": "a", "chosen": "c.png"}', "{", '{"prompt": "", "chosen": "c", "rejected": "r"}', "[]",
             '{"prompt": "a", "chosen": "c", "rejected": "c"}',
             '{"prompt": "a", "chosen": "c", "rejected": "r", "label": 3}',
             '{"prompt": "a", "chosen": "c", "rejected": "r", "votes": [0, 0]}']  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    for number, line in enumerate(lines, start=1):
        path.write_text("\n" * (number - 1) + line)
        with pytest.raises(ValueError, match=f"pairs.jsonl, line {number}: .*--on_bad skip"):
            list(read_preferences(path, "jsonl", Dropped("refuse").bad))
    path.write_text("\n".join([*lines, '{"prompt": "a", "chosen": "c", "rejected": "r"}']))
    dropped = Dropped("skip")
    assert len(list(read_preferences(path, "jsonl", dropped.bad))) == 1
    assert dropped.counts == {"invalid record": len(lines)}


# ---------------------------------------------------------------------------------------------------- the right model


def test_pairs_of_another_vae_are_refused(tiny_world, tmp_path):
    vae = sample_weights(tiny_world / "pipeline", "vae")
    assert vae.tensors > 10 and len(vae.values) == 16
    manifest = PairManifest(1.0, 0.0, 3, {"vae": vae, "text_encoder": vae})
    assert PairManifest.of(
        json.loads(json.dumps({**vars(manifest), "encoded_with": {"vae": vars(vae)}}))
    ).encoded_with == {"vae": vae}
    assert manifest.check_encoders({"vae": vae, "text_encoder": None}.get) == ["text_encoder"]
    rounded = WeightSample("copy", vae.tensors, torch.tensor(vae.values).bfloat16().tolist())
    assert vae.same_weights(rounded), "the same in another precision"
    changed = WeightSample("other", vae.tensors, [*vae.values[:-1], vae.values[-1] + 0.1])
    with pytest.raises(ValueError, match="encoded with the vae of .* other weights"):
        manifest.check_encoders(lambda name: changed)


def test_weights_that_are_not_here_are_not_compared(tmp_path):
    assert sample_weights(tmp_path, "vae") is None
    assert sample_weights("nobody-here/nothing-there", "vae") is None


def test_the_recipe_prepares_what_training_accepts(tiny_world, tmp_path, monkeypatch, capsys):
    source, out = hpdv3(tmp_path / "data", pairs=4), tmp_path / "out"
    words = [f"--source={source}", f"--model={tiny_world}", f"--output_dir={out}", "--buckets=64x64", "--device=cpu",
             "--filter.min_pixels=0", "--workers=0"]  # fmt: skip
    load_recipe("prepare_pairs").main(words)
    assert "no pair was left out" in capsys.readouterr().out
    from dinalrm_align.data.source import Encoders, open_pairs

    encoders = Encoders(tiny_world / "pipeline", text_length=16, device="cpu", dtype=torch.float32)
    pairs = open_pairs(out, encoders.manifest(), encoders, size=(64, 64), batch_size=2)
    assert set(pairs.manifest.encoded_with) == {"vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    batch = pairs.batch_at(0)
    number = int(batch.conditions.prompts[0].split()[-1])
    expected, _ = encoders.encode_prompts([f"prompt {number}"])
    torch.testing.assert_close(batch.conditions.prompt_embeds[0], expected[0].bfloat16())
    chosen = torch.cat([encoders.encode_images(_white(4 * n + 100)) for n in (2 * number, 2 * number + 1)]).bfloat16()
    assert any(torch.allclose(batch.latents[0].float(), one.float(), atol=0.02) for one in chosen)
    other = tmp_path / "other"
    shutil.copytree(tiny_world / "pipeline", other)
    tensors = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    from safetensors.torch import save_file

    save_file({k: v + 0.1 for k, v in tensors.items()}, other / "vae" / "diffusion_pytorch_model.safetensors")
    changed = Encoders(other, text_length=16, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="encoded with the vae of"):
        open_pairs(out, changed.manifest(), changed, size=(64, 64), batch_size=2)
