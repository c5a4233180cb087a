"""The work of a case as a callable: what a recipe does with these networks, by the recipes' own code."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinalrm_align.align.grpo import Grpo, GrpoBatch
from dinalrm_align.align.grpo_config import GrpoConfig
from dinalrm_align.align.refl import Refl
from dinalrm_align.align.refl_config import ReflConfig
from dinalrm_align.align.rollouts import Place
from dinalrm_align.align.savings.subject import Subject
from dinalrm_align.models.vae import decode_latents, encode_images
from dinalrm_align.train.config import OptimConfig
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.optim import adamw

REWARD_SIGMAS = (0.4, 0.2, 0.5, 0.7, 0.1, 0.3, 0.6, 0.8)


@dataclass(frozen=True)
class Work:
    """run: does the work once. prepare: beforehand, makes what stays between two updates, the optimiser's moments."""

    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None


def work_of(subject: Subject) -> Work:
    """The work of the subject's case."""
    case, reward, policy = subject.case, subject.reward, subject.policy
    sigma = list(REWARD_SIGMAS[: case.levels])

    def asked(latents: Tensor) -> Tensor:
        return reward(latents, subject.prompts, sigma=sigma if case.levels > 1 else sigma[0])

    def gradient_of(inputs: Tensor, score: Callable[[Tensor], Tensor]) -> None:
        inputs.requires_grad_()
        score(inputs).sum().backward()

    works: dict[str, Callable[[], object]] = {
        "score": lambda: torch.no_grad()(asked)(subject.latents()),
        "gradient": lambda: gradient_of(subject.latents(), asked),
        "pixels": lambda: torch.no_grad()(reward.score_pixels)(subject.pictures(), subject.prompts),
        "pixels_gradient": lambda: gradient_of(
            subject.pictures(), lambda images: reward.score_pixels(images, subject.prompts)
        ),
        "policy_forward": lambda: torch.no_grad()(policy.velocity)(subject.latents(), 0.5, subject.conditions()),
        "policy_gradient": lambda: policy.velocity(subject.latents(), 0.5, subject.conditions()).sum().backward(),
        "vae_decode": lambda: torch.no_grad()(decode_latents)(subject.vae, subject.latents()),
        "vae_gradient": lambda: gradient_of(subject.latents(), lambda latents: decode_latents(subject.vae, latents)),
        "vae_encode": lambda: encode_images(subject.vae, subject.pictures()),
    }
    if not case.trains:
        return Work(works[case.work])
    update = refl_loss(subject, sigma) if case.work == "refl" else grpo_loss(subject, sigma)
    return _trained(subject, update)


def refl_loss(subject: Subject, sigma: list[float]) -> Callable[[], Tensor]:
    """ReFL's loss with the step that carries the gradient, and none of the rollout before it."""
    method = Refl(
        policy=subject.policy, reward=subject.reward, sigmas=[1.0, 0.0], conditions=subject.conditions(),
        negative=subject.conditions().take([0]), latent_shape=subject.latent_shape, guidance_scale=1.0,
        config=ReflConfig(batch_size=subject.case.batch, earliest=1.0, reward_sigma=sigma),
        meter=PhaseMeter(subject.device), seed=0,
    )  # fmt: skip
    return lambda: method.step(method.batch_at(0))[0]


def grpo_loss(subject: Subject, sigma: list[float]) -> Callable[[], Tensor]:
    """Flow-GRPO's loss of one trained step, after a rollout of two steps and its scores."""
    batch = subject.case.batch
    config = GrpoConfig(
        groups=1, group_size=max(2, batch), sample_batch=batch, window="all", window_range=None, shared_start=False,
        reward_draws=1, reward_sigma=sigma,
    )  # fmt: skip
    method = Grpo(
        policy=subject.policy, reward=subject.reward, sigmas=[1.0, 0.5, 0.0], conditions=subject.conditions(),
        negative=subject.conditions().take([0]), latent_shape=subject.latent_shape, guidance_scale=1.0, config=config,
        meter=PhaseMeter(subject.device), seed=0,
    )  # fmt: skip

    def loss() -> Tensor:
        samples, conditions, device = list(range(batch)), subject.conditions(), subject.device
        with torch.no_grad():
            final, states, log_probs, _ = method.trajectories(0, samples, conditions, range(1))
            scores = method.scores(0, samples, final, conditions)
        trained = GrpoBatch(
            place=Place(rollout=0, epoch=1, minibatch=0, part=0),
            conditions=conditions, steps=torch.zeros(batch, dtype=torch.int64), latents=states[:, 0].to(device),
            following=states[:, 1].to(device), old_log_prob=log_probs[:, 0].to(device),
            old_mean=torch.zeros(batch, 0, device=device), advantage=scores["reward"][0].to(device),
            count=batch, statistics={},
        )  # fmt: skip
        return method.step(trained)[0]

    return loss


def _trained(subject: Subject, loss: Callable[[], Tensor]) -> Work:
    """One update of the policy's LoRA, as `loop.fit` makes it."""
    tensors = list(subject.policy.parameters.values())
    optimizer = adamw([{"params": tensors}], OptimConfig(name=subject.case.optimizer))

    def prepare() -> None:
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def update() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Work(update, prepare)
