"""The model card (README.md) of a latent reward."""

from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.train.hub import card

TEXT = """# A latent reward on {base}

A DiNa-LRM reward ([arXiv 2602.11146](https://arxiv.org/abs/2602.11146)): it reads the first {layers} transformer blocks
of its base model on noised latents and scores them against a prompt.

| | |
|---|---|
| base model | {base} |
| trained weights | head{tuned} |
| default noise level | {sigma} |
| text | {tokens} T5 tokens |

## How to load

With `pip install dinalrm-align`:

```python
from dinalrm_align import LatentReward

reward = LatentReward.from_pretrained("{repo_id}", pipeline=pipeline)  # a StableDiffusion3Pipeline
score = reward(latents, prompts)  # (B,) float32, higher is better
```"""


def model_card(config: RewardConfig, repo_id: str = "REPOSITORY_OR_FOLDER", *sections: str) -> str:
    """Return the text of README.md for a repository with a reward. sections: further Markdown, before the licence."""
    sigma = config.sigma if isinstance(config.sigma, float) else ", ".join(map(str, config.sigma))
    text = TEXT.format(
        base=config.base_model_id, layers=config.num_layers, sigma=sigma, tokens=config.text_length, repo_id=repo_id,
        tuned={"lora": " and a LoRA", "none": "", "full": " and all blocks"}[config.tuning],
    )  # fmt: skip
    facts = {"library_name": "dinalrm_align", "tags": ["reward-model", "diffusion", "preference"]}
    return card(facts, config.base_model_id, text, *sections)
