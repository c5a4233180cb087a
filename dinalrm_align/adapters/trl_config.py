"""Settings of the trainers in `adapters.trl`, as flat dataclasses that TrlParser and HfArgumentParser read.

The names are those of TRL where TRL has one. An option that is left out has the value of the recipe: that of
recipes/align_MODEL.yaml and METHOD_MODEL.yaml, such as refl_sd35.yaml, or else the default in align/METHOD_config.py.
Imports no torch.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import yaml


class Help(str):
    """The help of an option, with the dotted name of the recipe's setting that it sets, if any."""

    setting: str = ""


def option(setting: str, text: str) -> Any:
    """Return a field for an option, by default None, which leaves `setting` as it is in the recipe."""
    help = Help(f"{text} [{setting}]" if setting else text)
    help.setting = setting  # not in the metadata, which the parsers pass to argparse
    return field(default=None, metadata={"help": help})


@dataclass
class DiffusionConfig:
    """Options that all trainers have. `settings` reaches those of a recipe that have no option of their own."""

    METHOD: ClassVar[str]

    output_dir: str | None = option("output_dir", "Folder of the run; by default a new one under runs/.")
    base_model: str | None = option("", "Model whose rewards and defaults a pipeline object gets: sd35 or shapes.")
    seed: int | None = option("seed", "Seed of initialisation, sampling and training.")
    max_steps: int | None = option("loop.steps", "Number of updates.")
    learning_rate: float | None = option("optim.lr", "Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["constant", "cosine"] | None = option("optim.schedule", "Schedule after the warm-up.")
    warmup_steps: int | None = option("optim.warmup_steps", "Updates over which the learning rate rises.")
    weight_decay: float | None = option("optim.weight_decay", "Decoupled weight decay.")
    max_grad_norm: float | None = option("optim.clip", "Largest global gradient norm; 0: no clipping.")
    gradient_accumulation_steps: int | None = option("loop.accumulate", "Micro-batches per update and process.")
    gradient_checkpointing: bool | None = option("gradient_checkpointing", "Recompute activations in backward passes.")
    ema_decay: float | None = option("loop.ema_decay", "Decay of the averaged weights, which are exported; 0: none.")
    save_steps: int | None = option("loop.checkpoint_every", "Updates between checkpoints; 0: only at the end.")
    save_total_limit: int | None = option("loop.keep_last", "Number of checkpoints to keep.")
    eval_steps: int | None = option("evaluation.every", "Updates between evaluations; 0: only before and after.")
    eval_samples: int | None = option("evaluation.samples", "Images per evaluation; by default one per eval row.")
    per_device_eval_batch_size: int | None = option("evaluation.batch_size", "Images sampled at once in evaluations.")
    gold_reward: str | None = option("gold", "Reward that scores held-out images and is not trained on.")
    report_to: Literal["none", "wandb", "tensorboard"] | None = option("tracker", "Logger besides metrics.jsonl.")
    height: int | None = option("height", "Height of the images in pixels; by default the model's own.")
    width: int | None = option("width", "Width of the images in pixels; by default the model's own.")
    num_inference_steps: int | None = option("METHOD.num_steps", "Denoising steps of the training samples.")
    guidance_scale: float | None = option("METHOD.guidance_scale", "Guidance scale of the samples; 1: no guidance.")
    reward_weights: list[float] | None = option("", "One weight for each of reward_funcs; by default 1.")
    hub_model_id: str | None = option("", "Repository OWNER/NAME of push_to_hub.")
    settings: list[str] | None = option("", "Further settings of the recipe, NAME=VALUE, as in refl.kl_unit=raw.")

    def values(self) -> dict[str, Any]:
        """Return the settings of the recipe by dotted name. Raises ValueError for an invalid entry of `settings`."""
        settings = {entry.name: entry.metadata["help"].setting for entry in fields(self)}
        given = {name: value for name, value in vars(self).items() if value is not None and settings[name]}
        found = {settings[name].replace("METHOD", self.METHOD): value for name, value in given.items()}
        for text in self.settings or []:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"settings: got {text!r}; expected NAME=VALUE, as in refl.kl_unit=raw")
            if name == "resume":
                raise ValueError(f"settings: got {text!r}; expected trainer.train(resume_from_checkpoint={value!r})")
            found[name] = _number(yaml.safe_load(value))
        return found


@dataclass
class ReFLConfig(DiffusionConfig):
    """Options of `ReFLTrainer`."""

    METHOD: ClassVar[str] = "refl"

    per_device_train_batch_size: int | None = option("refl.batch_size", "Images per micro-batch and process.")
    variant: Literal["refl", "draft_lv", "drtune", "direct_align"] | None = option("refl.variant", "Gradient steps.")
    grad_steps: int | None = option("refl.grad_steps", "Number of steps with gradient.")
    beta: float | None = option("refl.kl_weight", "Weight of the velocity KL to the base model.")


@dataclass
class FlowGRPOConfig(DiffusionConfig):
    """Options of `FlowGRPOTrainer`."""

    METHOD: ClassVar[str] = "grpo"

    per_device_train_batch_size: int | None = option("grpo.groups", "Prompts per rollout and process.")
    num_generations: int | None = option("grpo.group_size", "Samples per prompt.")
    num_iterations: int | None = option("grpo.epochs", "Passes over the samples of a rollout.")
    noise_level: float | None = option("grpo.noise_level", "Noise scale of the stochastic steps.")
    epsilon: float | None = option("grpo.clip_range", "The loss clips probability ratios to 1 - epsilon, 1 + epsilon.")
    beta: float | None = option("grpo.kl_beta", "Weight of the KL to the base model.")


@dataclass
class DiffusionDPOConfig(DiffusionConfig):
    """Options of `DiffusionDPOTrainer`."""

    METHOD: ClassVar[str] = "dpo"

    per_device_train_batch_size: int | None = option("dpo.batch_size", "Prompts per micro-batch and process.")
    num_generations: int | None = option("dpo.group_size", "Samples per prompt, of which best and worst are a pair.")
    beta: float | None = option("dpo.beta", "Strength of the penalty on leaving the reference.")
    pairs: str | None = option("pairs", "Preference pairs to train on, as in recipes/dpo_sd35.py; by default samples.")

    def values(self) -> dict[str, Any]:
        return super().values() | ({} if self.pairs is None else {"dpo.mode": "offline"})


def _number(value: Any) -> Any:
    """Return the number that a text such as 1e-4 stands for, which YAML takes for text; other values unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
