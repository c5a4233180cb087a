"""Settings of reward training and of `recipes/train_reward.py`. Torch-free.

The recipe has a file of overrides for each kind of model, `train_reward_shapes.yaml` and `train_reward_sd35.yaml`,
which is used if no --config is given.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.loss_config import LossConfig
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    check_fields,
    check_image_size,
    check_levels,
)


@dataclass
class AccuracyConfig:
    """Evaluation on held-out pairs: the accuracy of the reward at each noise level, always with the same noise.

    Args:
        sigmas: single noise levels.
        ensemble: noise levels of the multi-noise ensemble; empty: not evaluated.
        every: updates between evaluations; the final reward is always evaluated. 0: only that one.
        seed: of the noise.
    """

    sigmas: list[ClosedUnitInterval] = field(default_factory=lambda: [level / 10 for level in range(10)])
    ensemble: list[ClosedUnitInterval] = field(default_factory=lambda: [0.2, 0.5, 0.7])
    every: NonNegativeInt = 250
    seed: NonNegativeInt = 1234

    def __post_init__(self) -> None:
        check_fields(self, "accuracy")
        check_levels("accuracy.sigmas", self.sigmas)

    def levels(self) -> list[tuple[float, ...]]:
        """The distinct levels to evaluate: (sigma,) for each single one, and the ensemble."""
        ensemble = [tuple(self.ensemble)] if self.ensemble else []
        return list(dict.fromkeys([*((sigma,) for sigma in self.sigmas), *ensemble]))


@dataclass
class TrainRewardRun:
    """Settings of `recipes/train_reward.py`.

    Args:
        model: model whose transformer is the backbone of the reward: shapes, sd35, or the folder or hub id of a
            StableDiffusion3Pipeline.
        pairs: preference pairs: a folder of encoded latents written by recipes/prepare_pairs.py, a folder in the
            released layout (`data.released_pairs`), or a jsonl file of images (`data.image_pairs`); by default the
            embedded world makes its own.
        validation_pairs: pairs for evaluation only, in the same formats; by default see held_out_prompts.
        held_out_prompts: number of distinct prompts of `pairs` held out for evaluation if there are no
            validation_pairs.
        output_dir: folder of the run; by default a new one under runs/, named after model and seed. The trained reward
            is saved in output_dir/reward.
        seed: of initial weights, order of the data, noise and noise levels.
        resume: folder of a run (its newest checkpoint is used) or of a checkpoint. Options override its settings.
        device: auto uses a CUDA GPU if there is one.
        dtype: of the frozen base weights; auto: the model's own on a GPU and float32 on a CPU. LoRA and head are
            always float32; on a GPU the forward is bfloat16 by autocast unless this is float32.
        tracker: where to log metrics and images in addition to metrics.jsonl; wandb works offline with
            WANDB_MODE=offline.
        batch_size: prompts per micro-batch and process, each with a group of images (a pair or a ranked list).
        on_bad: what to do with unreadable files of latents. refuse: exit with their names; skip: leave out their
            pairs, with a warning that names and counts them.
        prefetch: batches of encoded pairs to read ahead.
        height: of images that are encoded during training, in pixels; by default the model's own.
        width: of images that are encoded during training, in pixels; by default the model's own.
        gradient_checkpointing: recompute the activations of the backbone in the backward pass.
        reward: the reward that is trained. base_model_id and the scaling of the VAE are set from the model.
        loss: the loss of a pair of scores.
        train_sigma: density of the noise level of a group.
        optim: the optimiser, AdamW; lr is that of the head.
        lora_lr: peak learning rate of the LoRA; by default that of the head.
        loop: length of training, checkpoints and weight averaging.
        accuracy: evaluation on held-out pairs.
        shapes_pairs: the pairs that the embedded world makes if none are given.
    """

    model: str = "shapes"
    pairs: str | None = None
    validation_pairs: str | None = None
    held_out_prompts: PositiveInt = 200
    output_dir: str | None = None
    seed: NonNegativeInt = 0
    resume: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    batch_size: PositiveInt = 4
    on_bad: Literal["refuse", "skip"] = "refuse"
    prefetch: NonNegativeInt = 4
    height: int | None = None
    width: int | None = None
    gradient_checkpointing: bool = False
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train_sigma: SigmaConfig = field(default_factory=SigmaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora_lr: NonNegativeFloat | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    accuracy: AccuracyConfig = field(default_factory=AccuracyConfig)
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_image_size(self.height, self.width)
        if self.reward.tuning == "full":
            raise ValueError("reward.tuning: got full; expected lora or none: this recipe trains LoRA and head")
