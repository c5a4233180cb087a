"""The repository of a run: the LoRA or the reward, a model card whose code loads it, figures, no local folders."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from paths import load_recipe

from dinalrm_align.align.config import LoraConfig
from dinalrm_align.align.lora import read_lora
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.publish import lora_card, public, push_run, write_repository
from dinalrm_align.models.pipeline import load_pipeline

SUMMARY = {
    "recipe": "refl_sd35", "updates": 32, "samples": 192, "hacking_alarm": None,
    "gold": {"before": 2.0, "after": 2.25, "gain": 0.25, "standard_error": 0.01},
    "gold/pixel": {"before": 1.0, "after": 0.5, "gain": -0.5, "standard_error": 0.02},
    "proxy": {"before": 3.0, "after": 4.0, "gain": 1.0, "standard_error": 0.03},
    "gold_parts/faithfulness": {"before": 0.5, "after": 0.75, "gain": 0.25, "standard_error": 0.04},
}  # fmt: skip
SETTINGS = {"model": "sd35", "reward": "dinalrm + 0.2*pickscore", "seed": 3, "policy": {"rank": 32}, "refl": {}}


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
    """The folder of a finished run on the tiny pipeline, with a LoRA that is not zero."""
    folder = tmp_path_factory.mktemp("runs") / "refl_tiny"
    pipeline = load_pipeline(str(tiny_world / "pipeline"), dtype=torch.float32)
    policy = Policy(pipeline.transformer, LoraConfig(rank=2, alpha=4.0), seed=0)
    for number, parameter in enumerate(policy.parameters.values()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    policy.save_lora(folder / "lora")
    settings = SETTINGS | {"model": str(tiny_world / "pipeline"), "reward": "pixel", "output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"resume": None, "push_to_hub": "me/tiny"}))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    for name in ("curves.png", "before_after.png", "metrics.jsonl"):
        (folder / name).write_text("a file")
    return folder


def test_a_card_tells_what_the_run_was():
    text = lora_card(SETTINGS, SUMMARY, "me/lora", "![curves](curves.png)")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert data.base_model == "stabilityai/stable-diffusion-3.5-medium" and data.license == "other"
    for part in (
        "ReFL ([arXiv 2304.05977]", "`dinalrm + 0.2*pickscore`", "licence of pickscore: MIT", "rank 32", "32, seed 3",
        "| gold (not trained on), 192 held-out samples | 2.0000 → 2.2500, gain +0.2500 (standard error over prompts "
        "0.0100) |",
        "| gold/pixel (not trained on), ", "gain -0.5000", "| trained reward, ", "](curves.png)",
        "| part of gold: faithfulness (not trained on), 192 held-out samples | 0.5000 → 0.7500, gain +0.2500 (",
        'pipeline.load_lora_weights("me/lora")', '-3.5-medium", torch_dtype=torch.bfloat16)',
    ):  # fmt: skip
        assert part in text, part


def test_the_card_of_an_unfinished_run_has_no_scores():
    text = lora_card(SETTINGS, {}, "me/lora")
    assert "| updates | not finished, seed 3 |" in text and "gain" not in text


def test_the_repository_has_the_weights_the_figures_and_no_local_folder(run, tmp_path):
    write_repository(run, tmp_path, "me/tiny")
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "pytorch_lora_weights.safetensors", "before_after.png", "curves.png", "config.yaml",
        "summary.json",
    }  # fmt: skip
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert settings["seed"] == 3 and not {"output_dir", "resume", "push_to_hub"} & settings.keys()
    assert str(run) not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("dinalrm=/home/me/reward", "dinalrm=reward"),
        ("/home/me/reward/", "reward"),
        ("0.5*dinalrm='/home/me/a + b' - pickscore=~/pick", "0.5*dinalrm='a + b' - pickscore=pick"),
        ("dinalrm=/home/me + pickscore=/home/me/b", "dinalrm=me + pickscore=b"),
        ("dinalrm + 0.2*http://10.0.0.7:8000#judge", "dinalrm + 0.2*a reward server#judge"),
        ("unifiedreward=https://me:secret@host/v1#MODEL", "unifiedreward=a reward server#MODEL"),
        (["pickscore", {"init_from": "../runs/a/lora"}], ["pickscore", {"init_from": "lora"}]),
        ("dinalrm=owner/name + 0.2*pickscore", "dinalrm=owner/name + 0.2*pickscore"),
        ("owner/name", "owner/name"),
        (1.5, 1.5),
        ("a.b:reward", "a.b:reward"),
    ],
)
def test_paths_and_addresses_become_names(value, shown):
    assert public(value) == shown


def test_nothing_in_the_repository_tells_where_the_run_was(run, tmp_path):
    judge = "http://10.0.0.7:8000#judge"
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {
        "reward": f"dinalrm={run}/reward + 0.2*{judge}", "prompts": f"{run}/prompts.txt", "gold": ["pickscore", judge],
        "eval_prompts": f"{run}/held_out.txt", "hpsv3": {"template": f"{run}/template.jinja"},
    }  # fmt: skip
    summary = SUMMARY | {"model": settings["model"], "reward": settings["reward"]}
    summary["gold/10.0.0.7_8000_judge"] = SUMMARY["proxy"]
    (other := tmp_path / "run").mkdir()
    (other / "lora").symlink_to(run / "lora")
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    (other / "summary.json").write_text(json.dumps(summary))
    (to := tmp_path / "repository").mkdir()
    write_repository(other, to, "me/tiny")
    texts = {name: (to / name).read_text() for name in ("README.md", "config.yaml", "summary.json")}
    for name, text in texts.items():
        assert str(run.parent) not in text and "10.0.0.7" not in text and settings["model"] not in text, name
    assert "`dinalrm=reward + 0.2*a reward server#judge`; licence of dinalrm" in texts["README.md"]
    assert "| gold/a reward server#judge (not trained on), 192 held-out samples |" in texts["README.md"]
    kept = yaml.safe_load(texts["config.yaml"])
    assert (kept["prompts"], kept["eval_prompts"], kept["model"]) == ("prompts.txt", "held_out.txt", "pipeline")
    assert kept["hpsv3"] == {"template": "template.jinja"}


def test_the_code_on_the_card_loads_the_lora(run, tmp_path, tiny_world, tiny_inputs, monkeypatch):
    """The base model of the card is the name of a folder, and the repository is a folder here."""
    monkeypatch.chdir(tiny_world)
    write_repository(run, tmp_path, str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert 'from_pretrained("pipeline", torch_dtype=torch.bfloat16)' in code
    found: dict = {}
    exec(code.replace("bfloat16", "float32"), found)
    bare = load_pipeline(str(tiny_world / "pipeline"), dtype=torch.float32)
    assert not torch.equal(velocity(found["pipeline"], tiny_inputs), velocity(bare, tiny_inputs))


def velocity(pipeline: diffusers.DiffusionPipeline, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.transformer(
            inputs["latents"], inputs["prompt_embeds"], inputs["pooled_prompt_embeds"], torch.tensor([400.0, 400.0])
        ).sample


@pytest.mark.parametrize("kind", ["StableDiffusion3Pipeline", "AutoPipelineForText2Image"])
def test_diffusers_loads_the_exported_lora(run, tiny_world, tiny_inputs, kind):
    """The loaded pipeline computes what the base model computes with B A added to its weights."""
    pipeline = getattr(diffusers, kind).from_pretrained(tiny_world / "pipeline")
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    pipeline.load_lora_weights(run / "lora")
    merged = load_pipeline(str(tiny_world / "pipeline"), dtype=torch.float32)
    with torch.no_grad():
        for name, (a, b) in read_lora(run / "lora").layers.items():
            merged.transformer.get_submodule(name).weight += b @ a
    torch.testing.assert_close(velocity(pipeline, tiny_inputs), velocity(merged, tiny_inputs), rtol=1e-4, atol=1e-5)


def test_a_run_is_pushed(run, monkeypatch, capsys):
    calls = []

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path):
            calls.append({path.name for path in Path(folder_path).iterdir()})
            return "https://hub/me/tiny"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    recipe = load_recipe("push_to_hub")
    recipe.main([str(run), "me/tiny", "--private"])
    assert calls[0] == ("me/tiny", True, True) and "pytorch_lora_weights.safetensors" in calls[1]
    assert "uploaded to https://hub/me/tiny" in capsys.readouterr().out

    monkeypatch.setattr(
        Hub, "create_repo", lambda self, *args, **options: (_ for _ in ()).throw(ConnectionError("lost"))
    )
    with pytest.raises(OSError, match=r"upload to me/tiny: lost; .* again: dinalrm-align push .*refl_tiny me/tiny"):
        push_run(run, "me/tiny")


def test_a_reward_is_pushed_with_its_own_card(tiny_reward_dir, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reward").symlink_to(tiny_reward_dir)
    (tmp_path / "run" / "config.yaml").write_text("model: shapes\n")
    (tmp_path / "run" / "accuracy_vs_sigma.png").write_text("a figure")
    load_recipe("push_to_hub").main([str(tmp_path / "run"), "me/reward", f"--dry_run={tmp_path / 'repository'}"])
    assert {path.name for path in (tmp_path / "repository").iterdir()} == {
        "README.md", "accuracy_vs_sigma.png", "config.json", "config.yaml", "model.safetensors",
    }  # fmt: skip
    text = (tmp_path / "repository" / "README.md").read_text()
    assert 'LatentReward.from_pretrained("me/reward"' in text and "](accuracy_vs_sigma.png)" in text
    assert "| base model | pipeline |" in text
    assert json.loads((tmp_path / "repository" / "config.json").read_text())["base_model_id"] == "pipeline"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}"], "expected the folder of a run, and OWNER/NAME"),
        (["{run}", "tiny"], "push_to_hub: got 'tiny'; expected OWNER/NAME"),
        (["{run}/absent", "me/tiny"], "settings file of a run"),
        (["{run}", "me/tiny", "--lora=lora_best"], "no lora_best/pytorch_lora_weights.safetensors"),
    ],
)
def test_what_cannot_be_pushed_is_refused(run, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_recipe("push_to_hub").main([word.format(run=run) for word in words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
