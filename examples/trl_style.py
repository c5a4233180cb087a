"""TRL's manner: Flow-GRPO on a latent reward and a function of your own, which reads a column of the data set.

python examples/trl_style.py [--max_steps 20] [--learning_rate 1e-3] [--help]
"""

import torch
from peft import LoraConfig
from transformers import HfArgumentParser

from dinalrm_align.adapters.trl import FlowGRPOConfig, FlowGRPOTrainer


def light_corner(images: torch.Tensor, background: list[str], **columns: object) -> torch.Tensor:
    """Score images (B, 3, H, W) in [0, 1] by the lightness of a corner, where the row asks for white."""
    lightness = images[:, :, :4, :4].mean(dim=(1, 2, 3))
    return lightness * torch.tensor([name == "white" for name in background], device=images.device)


# Rows with a column "prompt"; also a datasets.Dataset, such as load_dataset("owner/name", split="train").
rows = [
    {"prompt": f"a {size} {colour} circle on {background}", "background": background}
    for size in ("small", "large") for colour in ("red", "green", "blue") for background in ("white", "black")
]  # fmt: skip
parser = HfArgumentParser(FlowGRPOConfig)
parser.set_defaults(max_steps=4, eval_samples=4, per_device_train_batch_size=2, num_generations=4)
(config,) = parser.parse_args_into_dataclasses()
config.reward_weights = [1.0, 0.2]
trainer = FlowGRPOTrainer(
    "shapes", reward_funcs=["dinalrm", light_corner], args=config, train_dataset=rows[:8], eval_dataset=rows[8:],
    peft_config=LoraConfig(r=8, lora_alpha=8),
)  # fmt: skip
print(trainer.train().metrics)
print(trainer.evaluate())
trainer.save_model("runs/trl_style_lora")
