"""Upload what a run trained, a LoRA or a latent reward, to the Hugging Face hub, with a model card."""

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from dinalrm_align.align.lora import LORA_FILE
from dinalrm_align.eval.report.parts import PREFIX
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.card import model_card
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.names import REWARDS, gold_rewards, parse_reward
from dinalrm_align.train.files import HUB_ID, read_json, read_yaml, write_atomically
from dinalrm_align.train.hub import card, check_repository, upload
from dinalrm_align.train.run import CONFIG

METHODS = {
    "refl": "ReFL ([arXiv 2304.05977](https://arxiv.org/abs/2304.05977))",
    "dpo": "Diffusion-DPO ([arXiv 2311.12908](https://arxiv.org/abs/2311.12908))",
    "grpo": "Flow-GRPO ([arXiv 2505.05470](https://arxiv.org/abs/2505.05470))",
    "lpo": "LPO ([arXiv 2502.01051](https://arxiv.org/abs/2502.01051))",
    "nft": "DiffusionNFT ([arXiv 2509.16117](https://arxiv.org/abs/2509.16117))",
}
"""Section of the settings that a recipe of this method has -> the method."""
SHAPES = "the embedded world of dinalrm-align, a small test model"
SHAPES_IMPORTS = "from pathlib import Path\n\nimport dinalrm_align\n"
IMAGES = {
    "curves.png": "Held-out gold score, reward and KL over the updates",
    "before_after.png": "Samples of the base model and with the LoRA, same prompts and noise",
    "accuracy_vs_sigma.png": "Accuracy on held-out pairs by noise level",
}
LOCAL = ("output_dir", "resume", "push_to_hub")  # settings that say nothing about the result
LOAD = """## How to load

```python
{imports}from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained({base})
pipeline.load_lora_weights("{repo_id}")
```

`AutoPipelineForText2Image` loads it in the same way. The scale is in the weights: no alpha is needed."""


def public(value: Any) -> Any:
    """Return settings or figures with local paths as their last names, and without the addresses of reward servers."""
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return {name: public(entry) for name, entry in value.items()} if isinstance(value, Mapping) else value
    if re.match(r"~|\.{0,2}/", value) or os.path.exists(value):
        return os.path.basename(os.path.abspath(value))
    with suppress(ValueError):  # other texts than those of rewards
        sources = {term.source for term in parse_reward(value) if term.source not in (None, value)}
        for source in sorted(sources, key=len, reverse=True):
            value = value.replace(source, public(source))
    return re.sub(r"https?://[^\s#'\"]*", "a reward server", value)


def push_run(
    run: Path, repo_id: str, *, lora: str = "lora", settings: Mapping[str, Any] | None = None, **options: Any
) -> str:
    """Upload the LoRA of an alignment run, or the reward of a run of train_reward. Return the address of the commit.

    The repository gets the weights, README.md (the model card), the run's figures, its settings, and summary.json, all
    without local folders and addresses (`public`). An unfinished run has no summary, and its card no scores.

    Args:
        run: folder of the run.
        repo_id: OWNER/NAME.
        lora: folder in `run` with the LoRA: lora, or lora_best, that with the best gold score.
        settings: the settings of the run; by default those in its config.yaml.
        options: `private`, `token`, and arguments of `HfApi.upload_folder`.

    Raises FileNotFoundError without a run or weights, and OSError if the upload fails, with the command to repeat it.
    """
    check_repository(repo_id)
    with tempfile.TemporaryDirectory() as folder:  # before a repository is created
        write_repository(run, Path(folder), repo_id, lora=lora, settings=settings)
        try:
            address = upload(repo_id, lambda to, _: shutil.copytree(folder, to, dirs_exist_ok=True), **options)
        except OSError as error:
            again = shlex.join(["dinalrm-align", "push", str(run), repo_id])
            reason = str(error).strip().partition("\n")[0]
            raise OSError(f"upload to {repo_id}: {reason:.200}; the run is in {run}; again: {again}") from error
    print(f"uploaded to {address}", flush=True)
    return address


def write_repository(
    run: Path, folder: Path, repo_id: str, *, lora: str = "lora", settings: Mapping[str, Any] | None = None
) -> None:
    """Write the files that `push_run` uploads to `folder`."""
    settings = settings or read_yaml(run / CONFIG, "settings file of a run")
    shown = [f"![{what}]({name})\n\n{what}." for name, what in IMAGES.items() if (run / name).is_file()]
    summary = public(read_json(run / "summary.json")) if (run / "summary.json").is_file() else {}
    gold = gold_rewards(settings.get("gold"), "pixel").items()
    names = {name: f"gold/{public(text)}" for name, text in gold if "/" in name and "://" in text}  # addresses
    summary = {names.get(name, name): entry for name, entry in summary.items()}
    if (run / "reward").is_dir():
        shutil.copytree(run / "reward", folder, dirs_exist_ok=True)
        write_atomically(folder / "config.json", json.dumps(public(read_json(folder / "config.json")), indent=2))
        text = model_card(read_checkpoint(folder).config, repo_id, *shown)
    elif (source := run / lora / LORA_FILE).is_file():
        shutil.copy(source, folder)
        text = lora_card(settings, summary, repo_id, *shown)
    else:
        raise FileNotFoundError(f"nothing to upload in {run}: no {lora}/{LORA_FILE} and no reward/; let the run finish")
    write_atomically(folder / "README.md", text)
    kept = {name: public(value) for name, value in settings.items() if name not in LOCAL}
    write_atomically(folder / CONFIG, yaml.safe_dump(kept, sort_keys=False))
    if summary:
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
    for name in IMAGES:
        if (run / name).is_file():
            shutil.copy(run / name, folder)


def lora_card(settings: Mapping[str, Any], summary: Mapping[str, Any], repo_id: str, *sections: str) -> str:
    """Return the model card of a LoRA.

    settings, summary: contents of config.yaml and summary.json of the run; the summary may be empty. sections: further
    Markdown, before the licence.
    """
    model, reward = settings["model"], public(settings["reward"])
    base = MODELS[model].pipeline if model in MODELS else model
    shown = SHAPES if model == "shapes" else base if HUB_ID.fullmatch(base) else f"the pipeline in {Path(base).name}"
    licences = {
        term.name: REWARDS[term.name].licence for term in parse_reward(settings["reward"]) if term.name in REWARDS
    }
    rows = {
        "base model": shown,
        "method": next((what for name, what in METHODS.items() if name in settings), "unknown"),
        "reward": f"`{reward}`" + "".join(f"; licence of {name}: {text}" for name, text in licences.items()),
        "LoRA": f"rank {settings['policy']['rank']}, on the attention projections of the transformer",
        "updates": f"{summary.get('updates', 'not finished')}, seed {settings['seed']}",
    }
    for name, score in (entry for entry in summary.items() if isinstance(entry[1], dict) and "gain" in entry[1]):
        ends = f"{score['before']:.4f} → {score['after']:.4f}"
        named = name.replace(PREFIX, "part of gold: ")
        what = "trained reward" if name == "proxy" else f"{named} (not trained on)"
        rows[f"{what}, {summary['samples']} held-out samples"] = (
            f"{ends}, gain {score['gain']:+.4f} (standard error over prompts {score['standard_error']:.4f})"
        )
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    title = f"# A LoRA on {shown}, aligned to `{reward}`\n\nTrained with dinalrm-align."
    where = json.dumps(base if HUB_ID.fullmatch(base) else Path(base).name)
    place = dict(imports="import torch\n", base=f"{where}, torch_dtype=torch.bfloat16")
    if model == "shapes":
        place = dict(imports=SHAPES_IMPORTS, base='Path(dinalrm_align.__file__).parent / "shapes/weights/pipeline"')
    load = LOAD.format(**place, repo_id=repo_id)
    facts = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["lora", "sd3", "text-to-image"]}
    return card(facts, base, f"{title}\n\n{table}", *sections, load)
