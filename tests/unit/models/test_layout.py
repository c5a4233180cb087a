"""Pipeline folders as people have them: without T5, as fp16, as .bin, in shards; what is missing is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from dinalrm_align import LatentReward
from dinalrm_align.align.memory import text_pipeline
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.specs import resolve_model
from dinalrm_align.models.text import Conditions, PromptEncoder
from dinalrm_align.reward.needs import check_sources

PROMPTS = ["a small red circle on white", ""]
LENGTH = 16


def as_bin(folder: Path) -> None:
    """transformers writes no .bin any more; older ones did."""
    for part in folder.glob("text_encoder*"):
        for path in part.glob("*.safetensors"):
            torch.save(
                load_file(path), part / path.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            )
            path.unlink()


def save(pipeline, folder: Path, layout: str) -> Path:
    options = {
        "plain": {}, "fp16": dict(variant="fp16"), "bf16": dict(variant="bf16"), "bin": dict(safe_serialization=False),
        "fp16 bin": dict(safe_serialization=False, variant="fp16"), "shards": dict(max_shard_size="20KB"),
        "fp16 shards": dict(max_shard_size="20KB", variant="fp16"),
    }[layout]  # fmt: skip
    pipeline.save_pretrained(folder, **options)
    if "bin" in layout:
        as_bin(folder)
    return folder


def weights(pipeline) -> dict[str, torch.Tensor]:
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in modules.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("layout", ["plain", "fp16", "bf16", "bin", "fp16 bin", "shards", "fp16 shards"])
def test_every_layout_of_the_weights_is_read(tiny_pipeline, tmp_path, layout):
    folder = save(tiny_pipeline, tmp_path / "pipeline", layout)
    assert resolve_model(str(folder))[0].pipeline == str(folder)
    got, expected = weights(load_pipeline(folder, dtype=torch.float32)), weights(tiny_pipeline)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    embeds = PromptEncoder(str(folder), text_length=LENGTH)(PROMPTS)
    assert all(map(torch.equal, embeds, PromptEncoder(tiny_pipeline, text_length=LENGTH)(PROMPTS)))


def test_parts_in_different_layouts_are_read(tiny_pipeline, tmp_path):
    for layout in ("fp16", "bin"):
        save(tiny_pipeline, tmp_path / layout, layout)
    folder = save(tiny_pipeline, tmp_path / "mixed", "plain")
    for part, layout in {"text_encoder": "fp16", "text_encoder_3": "bin", "vae": "bin", "transformer": "fp16"}.items():
        shutil.rmtree(folder / part)
        shutil.copytree(tmp_path / layout / part, folder / part)
    got, expected = weights(load_pipeline(folder, dtype=torch.float32)), weights(tiny_pipeline)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.fixture
def saved(tiny_world, tmp_path) -> Path:
    """A copy of the tiny pipeline's folder."""
    shutil.copytree(tiny_world / "pipeline", tmp_path / "pipeline")
    return tmp_path / "pipeline"


def drop_t5(folder: Path, entry: object) -> Path:
    """The folder without T5; `entry` in model_index.json, where ... is none."""
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
        del index[name]
        index |= {} if entry is ... else {name: entry}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("entry", [[None, None], ...], ids=["null", "absent"])
def test_a_pipeline_without_t5_encodes_as_diffusers_does(saved, entry):
    folder = drop_t5(saved, entry)
    assert resolve_model(str(folder))[0].pipeline == str(folder)
    pipeline = load_pipeline(folder, dtype=torch.float32)
    assert pipeline.text_encoder_3 is None
    options = dict(max_sequence_length=LENGTH, do_classifier_free_guidance=False)
    expected = pipeline.encode_prompt(PROMPTS, None, None, **options)[::2]
    assert expected[0][:, -LENGTH:].abs().max() == 0
    for source in (str(folder), pipeline, text_pipeline(pipeline, torch.device("cpu"))):
        conditions = Conditions.encode(PromptEncoder(source, text_length=LENGTH), PROMPTS)
        assert torch.equal(conditions.prompt_embeds, expected[0])
        assert torch.equal(conditions.pooled_prompt_embeds, expected[1])


def test_a_reward_scores_on_a_pipeline_without_t5(saved, tiny_world):
    folder = drop_t5(saved, [None, None])
    shutil.copytree(tiny_world / "dinalrm", folder.parent / "dinalrm")
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.transformer.requires_grad_(False)
    scores = []
    for options in ({}, {"pipeline": pipeline}):
        reward = LatentReward.from_pretrained(folder.parent / "dinalrm", **options)
        scores.append(reward(latents, PROMPTS, noise=torch.ones_like(latents)))
    embeds, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, max_sequence_length=reward.config.text_length, do_classifier_free_guidance=False
    )
    given = dict(prompt_embeds=embeds, pooled_prompt_embeds=pooled, noise=torch.ones_like(latents))
    scores.append(reward(latents, **given))
    assert all(torch.equal(score, scores[0]) for score in scores)


def test_what_is_missing_is_named_with_what_to_do(saved):
    shutil.rmtree(saved / "text_encoder_3")
    look = lambda: check_sources(resolve_model(str(saved))[0], {})  # noqa: E731
    for load in (look, lambda: load_pipeline(saved, dtype=torch.float32)):
        with pytest.raises((ValueError, FileNotFoundError), match=r"lacks text_encoder_3/config.json.*\[null, null\]"):
            load()
    (saved / "vae" / "diffusion_pytorch_model.safetensors").rename(saved / "vae" / "vae.safetensors")
    with pytest.raises(ValueError, match="vae/diffusion_pytorch_model.safetensors"):
        load_pipeline(saved, dtype=torch.float32)


def test_a_bare_null_is_named(saved):
    folder = drop_t5(saved, None)
    for load in (
        lambda: load_pipeline(folder, dtype=torch.float32),
        lambda: PromptEncoder(str(folder), text_length=LENGTH)(PROMPTS),
    ):
        with pytest.raises(ValueError, match=r"text_encoder_3: got null; expected \[null, null\]"):
            load()


@pytest.mark.parametrize("names", [["text_encoder", "tokenizer"], ["tokenizer_3"]], ids=" ".join)
def test_a_pipeline_without_clip_or_a_tokenizer_is_refused(saved, names):
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps(index | dict.fromkeys(names, [None, None])))
    for load in (
        lambda: load_pipeline(saved, dtype=torch.float32),
        lambda: PromptEncoder(str(saved), text_length=LENGTH)(PROMPTS),
    ):
        with pytest.raises(ValueError, match=f"without {', '.join(names)}; expected all encoders and tokenizers"):
            load()


def test_a_text_encoder_names_the_files_that_it_lacks(saved):
    encoder = PromptEncoder(str(saved), text_length=LENGTH)
    shutil.rmtree(saved / "vae")
    assert encoder(PROMPTS)[0].shape[0] == 2
    encoder.release()
    for path in (saved / "tokenizer").iterdir():
        path.unlink()
    (saved / "text_encoder_2" / "config.json").unlink()
    with pytest.raises(ValueError, match="lacks text_encoder_2/config.json, tokenizer/tokenizer.json; save one with"):
        encoder(["a text that is not cached"])


def test_a_single_file_checkpoint_is_no_pipeline(tmp_path):
    (tmp_path / "sd3.5_medium.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not a complete StableDiffusion3Pipeline folder: it lacks model_index.json"):
        load_pipeline(tmp_path, dtype=torch.float32)
