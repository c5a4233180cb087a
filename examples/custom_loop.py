"""The reward in a training loop of your own: a LoRA maximises the score of its own one-step estimates.

python examples/custom_loop.py
"""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig

import dinalrm_align
from dinalrm_align import LatentReward

# The embedded world's weights. For SD3.5-M: "stabilityai/stable-diffusion-3.5-medium" and
# "liuhuohuo/DiNa-LRM-SD35M-12layers".
weights = Path(dinalrm_align.__file__).parent / "shapes" / "weights"
pipeline = StableDiffusion3Pipeline.from_pretrained(weights / "pipeline")
transformer = pipeline.transformer.requires_grad_(False)
reward = LatentReward.from_pretrained(weights / "dinalrm", pipeline=pipeline)  # shares the frozen weights
torch.manual_seed(0)  # the LoRA's initialisation
transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-3)

prompts = ["a large yellow triangle on black", "a small cyan square below a large red circle on white"] * 4
with torch.no_grad():
    prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=reward.config.text_length
    )
generator = torch.Generator().manual_seed(0)
for update in range(5):
    noise = torch.randn(len(prompts), 16, 16, 16, generator=generator)
    velocity = transformer(
        hidden_states=noise,
        timestep=torch.full((len(prompts),), 1000.0),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled_prompt_embeds,
        return_dict=False,
    )[0]
    latents = noise - velocity  # x0 = x_sigma - sigma * velocity, at sigma = 1
    score = reward(latents, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, generator=generator)
    optimizer.zero_grad()
    (-score.mean()).backward()
    optimizer.step()
    print(f"update {update}: score {score.mean():.4f}")
