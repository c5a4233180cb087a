"""Mined pairs: candidates, columns, atomic files, and resuming after an interruption."""

import io
import json
import runpy
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from torch import Tensor

from dinalrm_align.align.mining_config import MineConfig
from dinalrm_align.data.formats.mined import shard_path
from dinalrm_align.data.mined_pairs import MinedPair, MinedPairs, write_manifest, write_shard
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.data.source import Encoders, open_pairs

MANIFEST = PairManifest(vae_scaling_factor=1.0, vae_shift_factor=0.0, text_length=16)
RECIPE = Path(__file__).parents[3] / "recipes" / "mine_pairs.py"
PROMPTS = [
    "a small red circle on white", "a large blue square on gray", "a small green cross on black",
    "two small red circles on gray", "a large green square on white",
]  # fmt: skip


def made_pair(index: int = 0, prompt: str = "a red circle", negative: bool = True) -> MinedPair:
    generator = torch.Generator().manual_seed(index)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return MinedPair(
        prompt=prompt,
        index=index,
        latents=draw(3, 16, 4, 6),
        scores=[0.5, 2.5, -1.0],
        chosen=1,
        rejected=2,
        prompt_embeds=draw(7, 32),
        pooled_prompt_embeds=draw(12),
        negative=(draw(7, 32), draw(12)) if negative else None,
    )


def load(data: bytes) -> Tensor:
    """As verl-omni's reader does it."""
    return torch.load(io.BytesIO(bytes(data)), map_location="cpu", weights_only=True)


def test_a_file_has_the_columns_that_verl_omni_reads(tmp_path):
    pair = made_pair()
    write_shard(tmp_path / "pairs.parquet", [pair, made_pair(1, negative=False)], dtype="float32")
    table = parquet.read_table(tmp_path / "pairs.parquet")
    required = {
        "prompt", "img_win", "img_lose", "img_win_latents", "img_lose_latents", "prompt_embeds", "prompt_embeds_mask",
        "pooled_prompt_embeds",
    }  # fmt: skip
    optional = {
        "negative_prompt", "negative_prompt_embeds", "negative_prompt_embeds_mask", "negative_pooled_prompt_embeds",
        "win_score", "lose_score", "uid", "data_source", "reward_model", "extra_info",
    }  # fmt: skip
    assert set(table.column_names) == required | optional
    row, second = table.to_pylist()
    shapes = {name: tuple(load(row[name]).shape) for name in row if isinstance(row[name], bytes)}
    assert shapes == {
        "img_win_latents": (16, 4, 6), "img_lose_latents": (16, 4, 6), "prompt_embeds": (7, 32),
        "prompt_embeds_mask": (7,), "pooled_prompt_embeds": (12,), "negative_prompt_embeds": (7, 32),
        "negative_prompt_embeds_mask": (7,), "negative_pooled_prompt_embeds": (12,),
    }  # fmt: skip
    assert torch.equal(load(row["img_win_latents"]), pair.latents[1])
    assert torch.equal(load(row["img_lose_latents"]), pair.latents[2])
    assert torch.equal(load(row["prompt_embeds"]), pair.prompt_embeds)
    assert torch.equal(load(row["negative_pooled_prompt_embeds"]), pair.negative[1])
    mask = load(row["prompt_embeds_mask"])
    assert mask.dtype == torch.int32 and bool((mask == 1).all())
    assert len(row["img_win_latents"]) < 16 * 4 * 6 * 4 + 3000, "one candidate is saved, not all of the storage"
    assert (row["win_score"], row["lose_score"]) == (2.5, -1.0)
    assert row["prompt"] == [{"role": "user", "content": "a red circle"}]
    assert row["extra_info"]["raw_prompt"] == "a red circle"
    assert row["extra_info"]["candidate_scores"] == [0.5, 2.5, -1.0]
    assert second["negative_prompt_embeds"] is None and second["uid"] != row["uid"]
    assert isinstance(row["img_win"], str) and isinstance(row["img_lose"], str)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_pairs_come_back_as_they_were_written(tmp_path, dtype):
    write_manifest(tmp_path / "set", MANIFEST, shards=2, mining={"seed": 0})
    made = [made_pair(index, prompt=f"prompt {index}") for index in range(4)]
    for shard in range(2):
        write_shard(shard_path(tmp_path / "set", shard), made[2 * shard : 2 * shard + 2], dtype=dtype)
    pairs = MinedPairs(tmp_path / "set", batch_size=2)
    assert pairs.manifest == MANIFEST and pairs.prompts == [f"prompt {index}" for index in range(4)]
    assert pairs.scores == [(2.5, -1.0)] * 4 and len(pairs) == 2
    kind = getattr(torch, dtype)
    (first, second) = pairs.in_order()
    for batch, rows in ((first, made[:2]), (second, made[2:])):
        assert batch.latents.dtype == kind and batch.group_prompts == tuple(row.prompt for row in rows)
        for place, row in enumerate(rows):
            assert torch.equal(batch.latents[batch.chosen[place]], row.latents[1].to(kind))
            assert torch.equal(batch.latents[batch.rejected[place]], row.latents[2].to(kind))
            for image in (batch.chosen[place], batch.rejected[place]):
                assert torch.equal(batch.conditions.prompt_embeds[image], row.prompt_embeds.to(kind))
                assert torch.equal(batch.conditions.pooled_prompt_embeds[image], row.pooled_prompt_embeds.to(kind))
    seen = {prompt for step in range(2) for prompt in pairs.batch_at(step).group_prompts}
    assert seen == set(pairs.prompts)


def test_held_out_prompts_are_never_trained_on(tmp_path):
    write_shard(tmp_path / "a.parquet", [made_pair(i, prompt=f"prompt {i // 2}") for i in range(8)], dtype="float16")
    pairs = MinedPairs(tmp_path / "a.parquet", batch_size=2, held_out_prompts=1, manifest=MANIFEST)
    held_out = {prompt for batch in pairs.validation() for prompt in batch.group_prompts}
    trained = {prompt for step in range(len(pairs)) for prompt in pairs.batch_at(step).group_prompts}
    assert len(held_out) == 1 and not held_out & trained and held_out | trained == set(pairs.prompts)


def test_a_file_written_by_verl_omni_is_read(tmp_path):
    """Its own writer's columns: one row group, a system message, no uid, tensors in the pipeline's dtype."""

    def saved(*shape: int) -> bytes:
        buffer = io.BytesIO()
        torch.save(torch.randn(shape, dtype=torch.bfloat16), buffer)
        return buffer.getvalue()

    def messages(text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": text}]

    rows = [
        {
            "data_source": "offline_dpo", "prompt": messages(f"prompt {index}"), "negative_prompt": messages(" "),
            "img_win": "images/0.png", "img_lose": "images/1.png", "img_win_latents": saved(16, 4, 4),
            "img_lose_latents": saved(16, 4, 4), "prompt_embeds": saved(5, 8), "prompt_embeds_mask": saved(5),
            "pooled_prompt_embeds": saved(6), "win_score": 1.0, "lose_score": 0.0,
        }
        for index in range(3)
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="does not record how its latents were made"):
        MinedPairs(tmp_path / "train.parquet", batch_size=1)
    pairs = MinedPairs(tmp_path / "train.parquet", batch_size=3, manifest=MANIFEST)
    assert pairs.prompts == ["prompt 0", "prompt 1", "prompt 2"]
    (batch,) = pairs.in_order()
    assert torch.equal(batch.latents[5], load(rows[2]["img_lose_latents"]))


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path):
    pair = made_pair()
    pair.prompt_embeds[0, 0] = 1e6
    with pytest.raises(ValueError, match="prompt_embeds: got NaN, .* torch.float16"):
        write_shard(tmp_path / "a.parquet", [pair], dtype="float16")
    assert not list(tmp_path.iterdir())


def test_reading_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    import sys

    write_shard(tmp_path / "a.parquet", [made_pair()], dtype="float16")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="dinalrm-align\\[data\\]"):
        MinedPairs(tmp_path / "a.parquet", batch_size=1, manifest=MANIFEST)


def test_folders_without_a_complete_set_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        MinedPairs(tmp_path, batch_size=1)
    write_manifest(tmp_path / "set", MANIFEST, shards=2, mining={})
    write_shard(shard_path(tmp_path / "set", 0), [], dtype="float16")
    with pytest.raises(FileNotFoundError, match="lacks 1 of 2 shards, first pairs-00001.parquet"):
        MinedPairs(tmp_path / "set", batch_size=1)
    write_shard(shard_path(tmp_path / "set", 1), [], dtype="float16")
    with pytest.raises(ValueError, match="holds no pairs .*none passed the filter"):
        MinedPairs(tmp_path / "set", batch_size=1)
    (tmp_path / "noise.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match="does not hold a readable parquet file"):
        MinedPairs(tmp_path / "noise.parquet", batch_size=1, manifest=MANIFEST)
    parquet.write_table(pyarrow.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="lacks the columns img_lose_latents"):
        MinedPairs(tmp_path / "other.parquet", batch_size=1, manifest=MANIFEST)


def test_pickled_objects_are_not_loaded(tmp_path):
    import pickle

    write_shard(tmp_path / "a.parquet", [made_pair()], dtype="float16")
    table = parquet.read_table(tmp_path / "a.parquet")
    place = table.column_names.index("img_win_latents")
    evil = pyarrow.array([pickle.dumps(Path("x"))], pyarrow.large_binary())
    parquet.write_table(table.set_column(place, "img_win_latents", evil), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="does not hold a readable parquet file"):
        MinedPairs(tmp_path / "b.parquet", batch_size=1, manifest=MANIFEST).in_order()[0]


def test_a_set_is_resumed_only_with_its_settings(tmp_path):
    write_manifest(tmp_path / "set", MANIFEST, shards=2, mining={"seed": 0, "sigmas": (1.0, 0.0)})
    write_manifest(tmp_path / "set", MANIFEST, shards=2, mining={"seed": 0, "sigmas": (1.0, 0.0)})
    with pytest.raises(ValueError, match="seed: got 1; expected 0, .*resume with the same settings"):
        write_manifest(tmp_path / "set", MANIFEST, shards=2, mining={"seed": 1, "sigmas": (1.0, 0.0)})
    with pytest.raises(ValueError, match="shards: got 3; expected 2"):
        write_manifest(tmp_path / "set", MANIFEST, shards=3, mining={"seed": 0, "sigmas": (1.0, 0.0)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        write_manifest(tmp_path / "other", MANIFEST, shards=2, mining={})


def test_open_pairs_finds_the_layout_and_checks_the_encoders(tmp_path, tiny_world):
    encoders = Encoders(tiny_world / "pipeline", text_length=16, device="cpu", dtype=torch.float32)
    write_manifest(tmp_path / "set", MANIFEST, shards=1, mining={})
    write_shard(shard_path(tmp_path / "set", 0), [made_pair()], dtype="float16")
    for path in (tmp_path / "set", shard_path(tmp_path / "set", 0)):
        pairs = open_pairs(path, encoders.manifest(), encoders, size=(64, 64), batch_size=1)
        assert isinstance(pairs, MinedPairs) and pairs.manifest == MANIFEST
    longer = Encoders(tiny_world / "pipeline", text_length=20, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="text_length 16, expected 20"):
        open_pairs(tmp_path / "set", longer.manifest(), longer, size=(64, 64), batch_size=1)


# ----------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def mine():
    return runpy.run_path(str(RECIPE))["main"]


@pytest.fixture
def arguments(tiny_world, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return [
        f"--model={tiny_world}", f"--prompts={tmp_path / 'prompts.txt'}", "--device=cpu", "--mine.candidates=4",
        "--mine.num_steps=2", "--mine.prompts_per_shard=2", "--mine.batch_size=3", "--mine.dtype=float32",
        "--mine.pairs_per_prompt=2", "--mine.guidance_scale=2",
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_mining_resumes_to_identical_files(mine, arguments, tmp_path, monkeypatch, capsys):
    from dinalrm_align.align import mining

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    mine([*arguments, f"--output_dir={whole}"])
    expected = contents(whole)
    assert sorted(expected) == ["manifest.json", *(f"pairs/pairs-0000{number}.parquet" for number in range(3))]
    with monkeypatch.context() as patch:
        original, calls = mining.write_shard, []

        def stopping(path: Path, *args: object, **options: object) -> None:
            calls.append(path)
            if len(calls) == 2:
                path.with_name(".tmp_" + path.name).write_bytes(b"half of it")
                raise KeyboardInterrupt
            original(path, *args, **options)

        patch.setattr(mining, "write_shard", stopping)
        with pytest.raises(SystemExit) as stopped:
            mine([*arguments, f"--output_dir={cut}"])
    assert stopped.value.code == 130 and "the same command resumes" in capsys.readouterr().err
    made = shard_path(cut, 0).stat().st_mtime_ns
    capsys.readouterr()
    mine([*arguments, f"--output_dir={cut}"])
    assert "5 prompts, 1 files there already" in capsys.readouterr().out
    assert contents(cut) == expected and shard_path(cut, 0).stat().st_mtime_ns == made
    mine([*arguments, f"--output_dir={cut}"])
    assert contents(cut) == expected


def test_other_settings_and_other_seeds(mine, arguments, tmp_path, capsys):
    mine([*arguments, f"--output_dir={tmp_path / 'first'}", "--max_prompts=2"])
    with pytest.raises(SystemExit) as stopped:
        mine([*arguments, f"--output_dir={tmp_path / 'first'}", "--max_prompts=2", "--seed=1"])
    assert stopped.value.code == 2 and "seed: got 1; expected 0" in capsys.readouterr().err
    mine([*arguments, f"--output_dir={tmp_path / 'second'}", "--max_prompts=2", "--seed=1"])
    first, second = (MinedPairs(tmp_path / name, batch_size=4).in_order()[0] for name in ("first", "second"))
    assert first.group_prompts == second.group_prompts and not torch.equal(first.latents, second.latents)


def test_nothing_is_decoded_and_the_pairs_are_the_best_and_the_worst(
    mine, arguments, tiny_world, tmp_path, monkeypatch
):
    """Every candidate's score is in its row; what is stored scores as the row says, by a reward loaded anew."""
    from diffusers import AutoencoderKL

    from dinalrm_align import LatentReward
    from dinalrm_align.flow.noise import seeded_generator
    from dinalrm_align.flow.sampling import seeded_noise

    monkeypatch.setattr(AutoencoderKL, "decode", lambda *_, **__: pytest.fail("an image was decoded"))
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *_, **__: pytest.fail("an image was encoded"))
    mine([*arguments, f"--output_dir={tmp_path / 'set'}"])
    rows = parquet.read_table(tmp_path / "set" / "pairs").to_pylist()
    assert len(rows) == 10
    reward = LatentReward.from_pretrained(tiny_world / "dinalrm")
    for row in rows:
        info = row["extra_info"]
        ranked = sorted(info["candidate_scores"], reverse=True)
        place = ranked.index(row["win_score"])
        assert (row["win_score"], row["lose_score"]) == (ranked[place], ranked[3 - place]) and place in (0, 1)
        assert info["raw_prompt"] == PROMPTS[info["index"]]
        generator = seeded_generator(0, info["index"], 4)
        shape = tuple(load(row["img_win_latents"]).shape)
        noise = seeded_noise(shape, [generator] * 5)[4:]  # after the four candidates', the reward's
        for latents, score in (("img_win_latents", "win_score"), ("img_lose_latents", "lose_score")):
            again = reward(load(row[latents])[None], [info["raw_prompt"]], noise=noise)
            assert again.item() == pytest.approx(row[score], abs=1e-4)


def test_pairs_below_the_gap_are_left_out(mine, arguments, tmp_path, capsys):
    folder = tmp_path / "set"
    mine([*arguments, f"--output_dir={folder}"])
    gaps = sorted(one - other for one, other in MinedPairs(folder, batch_size=1).scores)
    asked = (gaps[4] + gaps[5]) / 2
    mine([*arguments, f"--output_dir={tmp_path / 'filtered'}", f"--mine.min_gap={asked}"])
    kept = MinedPairs(tmp_path / "filtered", batch_size=1).scores
    assert kept and all(one - other >= asked for one, other in kept) and len(kept) <= 5
    with pytest.raises(SystemExit):
        mine([*arguments, f"--output_dir={tmp_path / 'none'}", "--mine.min_gap=1e6"])
    assert "none passed the filter" in capsys.readouterr().err


def test_a_lora_is_sampled_and_recorded(mine, arguments, tmp_path, tiny_world):
    from dinalrm_align.align.policy import Policy
    from dinalrm_align.models.pipeline import load_pipeline
    from dinalrm_align.reward.config import LoraConfig

    policy = Policy(
        load_pipeline(tiny_world / "pipeline", dtype=torch.float32).transformer, LoraConfig(rank=2, alpha=2), seed=0
    )
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(0.1)
    policy.save_lora(tmp_path / "lora")
    options = [*arguments, "--max_prompts=1", "--policy.rank=2", "--policy.alpha=2"]
    mine([*options, f"--output_dir={tmp_path / 'base'}"])
    mine([*options, f"--output_dir={tmp_path / 'tuned'}", f"--lora={tmp_path / 'lora'}"])
    base, tuned = (MinedPairs(tmp_path / name, batch_size=2).in_order()[0] for name in ("base", "tuned"))
    assert not torch.allclose(base.latents, tuned.latents, atol=1e-3)
    assert "lora" in json.loads((tmp_path / "tuned" / "manifest.json").read_text())["mining"]


def test_without_pyarrow_the_extra_is_named(mine, arguments, monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        mine(arguments)
    assert "pip install 'dinalrm-align[data]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"candidates": 1}, "mine.candidates: got 1"),
        ({"candidates": 4, "pairs_per_prompt": 3}, "mine.pairs_per_prompt: got 3"),
        ({"min_gap": -1.0}, "mine.min_gap: got -1.0"),
        ({"prompts_per_shard": 0}, "mine.prompts_per_shard: got 0"),
        ({"dtype": "int8"}, "known: float32, float16, bfloat16"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MineConfig(**values)
