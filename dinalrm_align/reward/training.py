"""Training of a reward on preference pairs (arXiv 2602.11146, section 4).

All images of one prompt share noise and sigma, so score differences depend only on the images.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dinalrm_align.data.batches import PairSource, Prefetched
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.data.source import Encoders, open_pairs
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.flow.noise import sample_sigma, seeded_generator
from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.models.pipeline import vae_scaling
from dinalrm_align.models.specs import ModelSpec
from dinalrm_align.models.weights import load_tensors
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.config import LossConfig, RewardConfig, TrainRewardRun
from dinalrm_align.reward.losses import preference_loss
from dinalrm_align.reward.model import RewardModel
from dinalrm_align.shapes.pairs import ensure_training_pairs
from dinalrm_align.train.digest import text_digest


@dataclass(frozen=True)
class NoisedPairs:
    """M images with noise (M, C, H, W) and sigma (M,), float32. Images of one prompt share noise and sigma."""

    batch: PairBatch
    noise: Tensor
    sigma: Tensor

    @property
    def count(self) -> int:
        return len(self.batch.chosen)


def draw_levels(batch: PairBatch, density: SigmaConfig, generators: Sequence[torch.Generator]) -> NoisedPairs:
    """Draw noise and sigma once per prompt, and return the batch with both. generators: one generator per prompt."""
    device = batch.latents.device
    noise = seeded_noise(tuple(batch.latents.shape[1:]), generators)
    sigma = torch.cat([sample_sigma(density.density, 1, generator=g, **density.parameters()) for g in generators])
    return NoisedPairs(batch, noise.to(device)[batch.group], sigma.to(device)[batch.group])


def preference_step(model: RewardModel, pairs: NoisedPairs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Score all images in one forward pass. Return the mean loss over pairs and a dict of detached metrics.

    Metrics: `train_accuracy`, the fraction of pairs whose preferred image scores higher; `score_gap`, the mean score
    difference between preferred and rejected image; `score_std`, the standard deviation of raw scores.
    """
    batch, text = pairs.batch, pairs.batch.conditions
    raw = model(batch.latents, text.prompt_embeds, text.pooled_prompt_embeds, pairs.sigma, pairs.noise)
    chosen, rejected = raw[batch.chosen], raw[batch.rejected]
    losses = preference_loss(chosen, rejected, pairs.sigma[batch.chosen], batch.label, config=config)
    gap = (chosen - rejected).detach()
    return losses.mean(), {
        "train_accuracy": (gap * (batch.label - 0.5) > 0).float().mean(),
        "score_gap": (gap * (2 * batch.label - 1)).mean(),
        "score_std": raw.detach().std(),
    }


def score_batch(model: RewardModel, batch: PairBatch, level: tuple[float, ...], noise: Tensor) -> Tensor:
    """Return raw scores (M,) of the batch, on the CPU. level: (sigma,), or several noise levels for an ensemble."""
    device = model.trunk.device
    batch, text = batch.to(device), batch.conditions.to(device)
    return model(batch.latents, text.prompt_embeds, text.pooled_prompt_embeds, level, noise.to(device)).to("cpu")


class RewardTraining:
    """Trains a reward through `train.loop.fit`. A context manager: on exit, the prefetch threads are stopped.

    A group is all images of one prompt. Each group has a generator seeded by (seed, global group index), so noise and
    sigma do not depend on the world size.
    """

    def __init__(self, model: RewardModel, pairs: PairSource, config: TrainRewardRun, accelerator: Accelerator) -> None:
        self.model, self.config, self.accelerator = model, config, accelerator
        device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes

        def read(micro_step: int) -> PairBatch:
            batch = pairs.batch_at(micro_step, rank, world)
            return batch.pin_memory() if device.type == "cuda" and pairs.reads_files_only else batch

        # Prefetch only pairs that are stored encoded: images are encoded on the training device.
        self.batches = Prefetched(read, ahead=config.prefetch if pairs.reads_files_only else 0)

    def __enter__(self) -> "RewardTraining":
        return self

    def __exit__(self, *error: Any) -> None:
        self.batches.__exit__(*error)

    def batch_at(self, micro_step: int) -> NoisedPairs:
        batch = self.batches(micro_step).to(self.accelerator.device)
        number = micro_step * self.accelerator.num_processes + self.accelerator.process_index
        first = number * self.config.batch_size
        generators = [seeded_generator(self.config.seed, first + group) for group in range(batch.num_groups)]
        return draw_levels(batch, self.config.train_sigma, generators)

    def step(self, batch: NoisedPairs) -> tuple[Tensor, dict[str, Tensor]]:
        return preference_step(self.model.train(), batch, self.config.loss)

    @property
    def samples(self) -> int:
        """Number of prompts (groups of images) per update, summed over ranks."""
        return self.config.batch_size * self.config.loop.accumulate * self.accelerator.num_processes


def config_for(config: RewardConfig, pipeline: str, folder: Path) -> RewardConfig:
    """Return `config` for `pipeline`: sets base_model_id and VAE scaling. Local paths become relative to `folder`."""
    scaling, shift = vae_scaling(pipeline)
    base = os.path.relpath(pipeline, folder) if Path(pipeline).is_dir() else pipeline
    return dataclasses.replace(config, base_model_id=base, vae_scaling_factor=scaling, vae_shift_factor=shift)


def open_training_pairs(
    run: TrainRewardRun, spec: ModelSpec, reward: RewardConfig, accelerator: Accelerator, *, dtype: torch.dtype
) -> tuple[PairSource, Sequence[PairBatch], dict[str, str]]:
    """Return a tuple (training pairs, evaluation batches, digests of both by name). dtype: of the text encoders."""
    train, validation = run.pairs, run.validation_pairs
    if train is None:
        folder = Path(run.output_dir) / "pairs"
        if accelerator.is_main_process:
            ensure_training_pairs(folder, spec.pipeline, run.shapes_pairs)
        accelerator.wait_for_everyone()
        train, validation = folder / "train", validation or folder / "concepts"
    encoders = Encoders(spec.pipeline, text_length=reward.text_length, device=accelerator.device, dtype=dtype)
    size = (run.height or spec.reward_size, run.width or spec.reward_size)
    options = dict(size=size, batch_size=run.batch_size, seed=run.seed, on_bad=run.on_bad)
    held_out = 0 if validation else run.held_out_prompts
    pairs = open_pairs(train, reward, encoders, held_out_prompts=held_out, **options)
    digests = {"list of pairs": pairs.digest()}
    if validation:
        held = open_pairs(validation, reward, encoders, **options)
        return pairs, held.in_order(), {**digests, "validation pairs": held.digest()}
    return pairs, pairs.validation(), digests


def start_from(source: str | None, model: RewardModel) -> None:
    """Copy the LoRA and head of the reward `source`, a folder or hub id, to `model`; None: do nothing.

    Raises ValueError if its tensors do not fit the model.
    """
    if source is not None:
        load_tensors(model.tuned_tensors(), read_checkpoint(source).tensors, source)


def config_digest(config: RewardConfig) -> str:
    """Return a digest of all settings of a reward except `base_model_id`, the location of the base model."""
    settings = {name: value for name, value in config.to_dict().items() if name != "base_model_id"}
    return text_digest(json.dumps(settings, sort_keys=True))


def parameter_groups(parameters: Mapping[str, Tensor], lora_lr: float | None) -> list[dict[str, Any]]:
    """Return parameter groups for `train.state.adamw`: one for the head, one for the trained backbone weights, if any.

    lora_lr: learning rate of the LoRA; None: same as the head.
    """
    head = [p for name, p in parameters.items() if name.startswith("head.")]
    lora = [p for name, p in parameters.items() if not name.startswith("head.")]
    rate = {} if lora_lr is None else {"lr": lora_lr}
    return [{"params": head}, *([{"params": lora, **rate}] if lora else [])]
