"""Settings of Diffusion-DPO, direct preference optimisation, and of its recipe `recipes/dpo_sd35.py`. Torch-free.

The defaults suit the embedded world on two CPU cores; `recipes/dpo_sd35.yaml` holds what public SD3.5-Medium runs do
differently, and is read beneath the user's own settings whenever the model is one of that kind.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.align.config import AlignRun
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import check_fields


@dataclass
class DpoConfig:
    """One update of Diffusion-DPO: preference pairs, noised, and how much better than the reference each is denoised.

    Args:
        mode: online, pairs are the best and the worst of the policy's own samples, ranked by the reward; offline, they
            come from a data set.
        batch_size: prompts per micro-batch and process, each with one pair (offline with lists of pictures: all pairs
            of a list); an update takes batch_size x loop.accumulate x processes.
        beta: how far the policy may go from the reference for a preference: the loss is -log sigmoid(-beta / 2
            [(e_w - e_w^ref) - (e_l - e_l^ref)]), e the mean square error of a velocity. Larger: it stays nearer.
        sigma: the density that the noise level of a pair is drawn from.
        draws: how many noises and levels each pair is compared at in an update; more of them make the gradient less
            noisy and the update slower, and need no further samples.
        loss_guidance_scale: guidance of the velocities in the loss; 1, the usual choice, compares them on the prompt
            alone.
        group_size: online, samples per prompt.
        num_steps: online, denoising steps of a sample; none given, as many as the model samples with.
        guidance_scale: online, of sampling; none given, the model's own.
        sampler: online, whose samples are compared: those of the policy, or of the reference.
        refresh_every: online, updates after which the reference becomes a copy of the policy, again and again; 0: the
            reference is the base model throughout.
        sample_batch: online, pictures sampled and scored at once; none given, all of a micro-batch.
        reward_sigma: noise level the reward reads at, several for its multi-noise ensemble; none given, the reward's
            own.
    """

    mode: Literal["online", "offline"] = "online"
    batch_size: int = 16
    beta: float = 100.0
    sigma: SigmaConfig = field(default_factory=lambda: SigmaConfig(density="logit_normal"))
    draws: int = 2
    loss_guidance_scale: float = 1.0
    group_size: int = 6
    num_steps: int | None = 8
    guidance_scale: float | None = 1.0
    sampler: Literal["policy", "reference"] = "policy"
    refresh_every: int = 10
    sample_batch: int | None = None
    reward_sigma: list[float] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "dpo")
        if self.batch_size < 1 or self.draws < 1 or self.group_size < 2:
            raise ValueError(
                f"dpo: got batch_size {self.batch_size}, draws {self.draws}, group_size {self.group_size}; expected at "
                "least 1, 1, and 2 samples to choose from"
            )
        if self.beta <= 0:
            raise ValueError(f"dpo.beta: got {self.beta}; expected more than 0 (public runs: 100 to 5000)")
        if self.loss_guidance_scale < 0 or (self.guidance_scale is not None and self.guidance_scale < 0):
            raise ValueError(
                f"dpo: got loss_guidance_scale {self.loss_guidance_scale}, guidance_scale {self.guidance_scale}; "
                "expected at least 0 (1 and less: none)"
            )
        if self.refresh_every < 0:
            raise ValueError(f"dpo.refresh_every: got {self.refresh_every}; expected updates, or 0 for never")
        for name, value in (("num_steps", self.num_steps), ("sample_batch", self.sample_batch)):
            if value is not None and value < 1:
                raise ValueError(f"dpo.{name}: got {value}; expected at least 1")
        if self.reward_sigma is not None and not (self.reward_sigma and all(0 <= s <= 1 for s in self.reward_sigma)):
            raise ValueError(f"dpo.reward_sigma: got {self.reward_sigma}; expected one level or more, all in [0, 1]")


@dataclass
class DpoRun(AlignRun):
    """Everything `python recipes/dpo_sd35.py` can be told.

    Args:
        pairs: offline, where the pairs are: a folder that recipes/mine_pairs.py filled, a parquet file as verl-omni
            writes it, a directory of latent pairs, or a jsonl of {"prompt", "chosen", "rejected"} with paths of
            pictures.
        optim: AdamW.
        loop: how long, how often saved, averaging.
        dpo: one update.
    """

    pairs: str | None = None
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=20))
    dpo: DpoConfig = field(default_factory=DpoConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dpo.mode == "offline" and self.pairs is None:
            raise ValueError(
                "--dpo.mode offline needs --pairs; `python recipes/mine_pairs.py` makes some of the model's own samples"
            )
        if self.dpo.mode == "online" and self.pairs is not None:
            raise ValueError(f"--pairs {self.pairs} is read offline; add --dpo.mode offline, or leave the pairs out")
