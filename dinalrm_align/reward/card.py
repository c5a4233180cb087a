"""The model card (README.md) of a latent reward."""

from dinalrm_align.reward.config import RewardConfig

TEMPLATE = """---
library_name: dinalrm_align
base_model: {base}
tags: [reward-model, diffusion, preference]
---

# A latent reward on {base}

A DiNa-LRM reward ([arXiv 2602.11146](https://arxiv.org/abs/2602.11146)): it reads the first {layers} transformer blocks
of its base model on noised latents and scores them against a prompt. Default noise level: {sigma}. Text: {tokens} T5
tokens.

```python
from dinalrm_align import LatentReward

reward = LatentReward.from_pretrained("REPOSITORY_OR_FOLDER", pipeline=pipeline)
score = reward(latents, prompts)  # (B,) float32, higher is better
```
"""


def model_card(config: RewardConfig) -> str:
    """Return the text of README.md for a folder or hub repository that holds a reward with this config."""
    sigma = config.sigma if isinstance(config.sigma, float) else ", ".join(map(str, config.sigma))
    return TEMPLATE.format(base=config.base_model_id, layers=config.num_layers, sigma=sigma, tokens=config.text_length)
