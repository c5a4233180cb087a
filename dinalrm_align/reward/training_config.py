"""Settings of reward training, `recipes/train_reward.py`. Torch-free.

The YAML files beside the recipe, `train_reward_shapes.yaml` and `train_reward_sd35.yaml`, hold what each kind of model
does differently; the one of the model's kind is read beneath the user's own settings when no --config is given.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.loss_config import LossConfig
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import check_fields


@dataclass
class AccuracyConfig:
    """How often the reward agrees with held-out pairs is measured at these levels, always with the same noise.

    Args:
        sigmas: single noise levels; one that is given twice is measured once.
        ensemble: levels of the multi-noise ensemble; none: it is not measured.
        every: updates between two evaluations; there is always one after the last update. 0: that one alone.
        seed: of the noise.
    """

    sigmas: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    ensemble: list[float] = field(default_factory=lambda: [0.2, 0.5, 0.7])
    every: int = 250
    seed: int = 1234

    def __post_init__(self) -> None:
        check_fields(self, "accuracy")
        if not self.sigmas or not all(0 <= sigma <= 1 for sigma in (*self.sigmas, *self.ensemble)):
            raise ValueError(
                f"accuracy: got sigmas {self.sigmas}, ensemble {self.ensemble}; expected at least one level, all in "
                "[0, 1]"
            )
        if self.every < 0 or self.seed < 0:
            raise ValueError(f"accuracy: got every {self.every}, seed {self.seed}; expected at least 0")

    def levels(self) -> list[tuple[float, ...]]:
        """Every level to measure, each once: one sigma each, and the ensemble."""
        ensemble = [tuple(self.ensemble)] if self.ensemble else []
        return list(dict.fromkeys([*((sigma,) for sigma in self.sigmas), *ensemble]))


@dataclass
class TrainRewardRun:
    """Everything `python recipes/train_reward.py` can be told.

    Args:
        model: whose transformer the reward reads with. shapes, sd35, or the folder or hub id of a
            StableDiffusion3Pipeline.
        pairs: preference pairs: a directory of pre-encoded latents, as recipes/prepare_pairs.py writes it, a folder in
            the released layout (`data.released_pairs`), or a jsonl of pictures (`data.image_pairs`); without it the
            embedded world makes its own.
        validation_pairs: pairs of the same two forms that are only evaluated on; without it, see held_out_prompts.
        held_out_prompts: distinct prompts of `pairs` that are kept from training when there are no validation_pairs.
        output_dir: where the run is kept, a folder that holds no run yet; by default a new one under runs/ named after
            model and seed. The finished reward is in output_dir/reward.
        seed: of initial weights, order of the data, noise and noise levels.
        resume: folder of a run (its newest checkpoint is taken) or of a checkpoint. The settings are the run's, in its
            config.yaml; what is typed besides holds this time only.
        device: auto takes a CUDA GPU if there is one.
        dtype: of the frozen base weights; auto takes the model's on a GPU and float32 on a CPU. LoRA and head are
            always float32; on a GPU the arithmetic is bfloat16 by autocast unless this is float32.
        tracker: where metrics and pictures go besides metrics.jsonl; wandb without a server: WANDB_MODE=offline.
        batch_size: groups of pictures per micro-batch and process; for plain pairs, pairs.
        on_bad: what to do about files of latents that cannot be read. refuse: end with their names; skip: leave their
            pairs out, with a warning that names and counts them.
        prefetch: batches of encoded pairs that are read ahead.
        height: of pictures that are encoded on the fly, in pixels; by default the model's.
        width: the same.
        gradient_checkpointing: recompute the backbone's activations in the backward pass.
        reward: the reward that is trained. base_model_id and the VAE's numbers are filled in from the model.
        loss: how a pair of scores becomes a loss.
        train_sigma: the density that the noise level of each group is drawn from.
        optim: AdamW; lr is the head's.
        lora_lr: peak learning rate of the LoRA; none given, that of the head.
        loop: how long, how often saved, averaging.
        accuracy: the held-out judgement.
        shapes_pairs: the pairs that the embedded world makes when none are given.
    """

    model: str = "shapes"
    pairs: str | None = None
    validation_pairs: str | None = None
    held_out_prompts: int = 200
    output_dir: str | None = None
    seed: int = 0
    resume: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    batch_size: int = 4
    on_bad: Literal["refuse", "skip"] = "refuse"
    prefetch: int = 4
    height: int | None = None
    width: int | None = None
    gradient_checkpointing: bool = False
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train_sigma: SigmaConfig = field(default_factory=SigmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora_lr: float | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    accuracy: AccuracyConfig = field(default_factory=AccuracyConfig)
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}; it must not be negative")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size < 16 or size % 16):
                raise ValueError(f"{name}: got {size} pixels; expected a positive multiple of 16")
        if self.batch_size < 1 or self.held_out_prompts < 1:
            raise ValueError(
                f"got batch_size {self.batch_size}, held_out_prompts {self.held_out_prompts}; each must be at least 1"
            )
        if self.prefetch < 0:
            raise ValueError(f"prefetch: got {self.prefetch}; expected at least 0")
        if self.lora_lr is not None and self.lora_lr < 0:
            raise ValueError(f"lora_lr: got {self.lora_lr}; it must not be negative")
        if self.reward.tuning == "full":
            raise ValueError("this recipe trains LoRA and head, or the head alone: reward.tuning must be lora or none")
