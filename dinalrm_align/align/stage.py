"""What every alignment recipe stands on: the base model, a policy on it, a reward, prompts, and a held-out judge.

A recipe builds a `Stage`, makes its method of the parts, and calls `align`: the method is a `batch_at` and a `step` for
`loop.fit`, and all else is the same for every method and every reward.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from dinalrm_align.align.evaluation import HeldOut, Judge
from dinalrm_align.align.settle import Settled
from dinalrm_align.cost import PhaseMeter
from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.device import available_device
from dinalrm_align.digest import fingerprint, text_digest
from dinalrm_align.durable import write_atomically
from dinalrm_align.encode import PromptEncoder, decode_latents, load_pipeline
from dinalrm_align.loop import Hook, Stateful, adamw, fit
from dinalrm_align.models import load_gold
from dinalrm_align.policy import Conditions, Policy
from dinalrm_align.report import plot_run
from dinalrm_align.rewards import latent_rewards, load_reward
from dinalrm_align.sampling import Velocity, schedule_sigmas


class Method(Protocol):
    """An alignment method, as `loop.fit` takes it."""

    def batch_at(self, micro_step: int) -> Any: ...

    def step(self, batch: Any) -> tuple[Tensor, Mapping[str, float | Tensor]]: ...


@dataclass
class Stage:
    """The parts that a method is made of; build one with `build`.

    settled: the run. accelerator: with its device, rank and number of processes. pipeline: the frozen base model, its
    text encoders let go. policy: a LoRA on its transformer. reward: frozen, reward(latents (B, C, H, W), prompts=...,
    sigma=..., noise=..., generator=...) -> (B,), and `gold` beside it, which judges pictures and is never trained on.
    conditions: of the training prompts. judged: one per held-out sample. negative: of the empty prompt. encoder: gives
    the embeddings of every prompt that was named when the stage was built, and of no other. identity: digests of what
    a checkpoint must have been trained with to be resumed from.
    """

    settled: Settled
    accelerator: Accelerator
    pipeline: StableDiffusion3Pipeline
    policy: Policy
    reward: Callable[..., Tensor]
    gold: Judge
    encoder: PromptEncoder
    conditions: Conditions
    judged: Conditions
    negative: Conditions
    meter: PhaseMeter
    identity: Mapping[str, str]

    @classmethod
    def build(cls, settled: Settled, also: Sequence[str] = ()) -> "Stage":
        """Load everything. also: prompts that the method needs besides those of training and judging.

        Raises what the loaders raise: ValueError, TypeError or OSError that names the file or the setting.
        """
        run, spec = settled.run, settled.spec
        if run.device != "auto":
            available_device(run.device)
        tracker = None if run.tracker == "none" else run.tracker
        accelerator = Accelerator(cpu=run.device == "cpu", mixed_precision="no", log_with=tracker)
        set_seed(run.seed % 2**31, device_specific=True)  # of all that draws globally
        device = accelerator.device
        dtype = run.dtype if run.dtype != "auto" else spec.dtype if device.type == "cuda" else "float32"
        gold = load_gold(spec, device=device)
        prompts = read_prompts(Path(run.prompts or spec.train_prompts))
        heldout = read_prompts(Path(run.eval_prompts or spec.heldout_prompts))
        samples = [heldout[index % len(heldout)] for index in range(run.evaluation.samples)]
        size = run.height or spec.height, run.width or spec.width
        gold(torch.zeros(len(samples), 3, *size), samples)  # it may know neither this size nor these prompts
        told = f"reward {run.reward}, {len(prompts)} prompts, {dtype} on {device}"
        accelerator.print(f"run in {run.output_dir}: {told}")
        accelerator.init_trackers("dinalrm_align")

        # The base model, frozen. The reward shares its weights, so it is made before the policy wraps them.
        pipeline = load_pipeline(spec.pipeline, dtype=getattr(torch, dtype)).to(device)
        reward = load_reward(run.reward, spec=spec, pipeline=pipeline, device=device)
        weightless = next(reward.parameters(), None) is None

        identity = {
            "recipe": settled.recipe,
            "seed": str(run.seed),
            "base model": fingerprint(pipeline.transformer),
            "reward": text_digest(run.reward) if weightless else fingerprint(reward),
            "list of prompts": text_digest("\n".join(prompts)),
        }

        # Every prompt is encoded once, for policy and reward; then the text encoders are let go.
        encoder = PromptEncoder(pipeline, text_length=spec.text_length, device=device)
        latent = [part.encoder for part in latent_rewards(reward)]
        encoder = next((own for own in latent if own.text_length == spec.text_length), encoder)
        for own in latent:
            if own is not encoder:
                Conditions.encode(own, [*prompts, *samples, *also])  # to fill its cache
        train, judged, negative = (Conditions.encode(encoder, part) for part in (prompts, samples, [""]))
        if also:
            Conditions.encode(encoder, also)
        pipeline.text_encoder = pipeline.text_encoder_2 = pipeline.text_encoder_3 = None
        torch.cuda.empty_cache()

        policy = Policy(pipeline.transformer, run.policy, seed=run.seed)
        if run.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
            reward.enable_gradient_checkpointing()
        return cls(
            settled, accelerator, pipeline, policy, reward, gold, encoder, train, judged, negative, PhaseMeter(device),
            identity,
        )  # fmt: skip

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures, in pixels."""
        run, spec = self.settled.run, self.settled.spec
        return run.height or spec.height, run.width or spec.width

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of their latents."""
        factor = self.pipeline.vae_scale_factor
        return (self.pipeline.transformer.config.in_channels, *(side // factor for side in self.size))

    def sigmas(self, num_steps: int | None = None) -> list[float]:
        """The levels of a rollout of `num_steps`, by default as many as the model samples with."""
        return schedule_sigmas(self.pipeline.scheduler, num_steps or self.settled.spec.num_steps)

    def guidance_scale(self, asked: float | None = None) -> float:
        """The one asked for, by default that which the model samples with."""
        return self.settled.spec.guidance_scale if asked is None else asked

    def velocity_for(self, conditions: Conditions, guidance_scale: float) -> Velocity:
        """The policy's velocity under these conditions, as samplers want it."""
        return self.policy.velocity_for(conditions, guidance_scale, self.negative)

    def align(
        self,
        method: Method,
        *,
        shown: Sequence[str] = ("reward", "gold", "kl", "grad_norm"),
        data: Mapping[str, str] | None = None,
        state: Stateful | None = None,
    ) -> None:
        """Train the policy by `method`, judge it before, meanwhile and after, and leave everything in the run's folder.

        shown: metrics for the progress bar. data: digests of what else the run trains on, by name; a checkpoint of
        another is not resumed from. state: what of the method a resumed run needs back.
        """
        run, spec, accelerator = self.settled.run, self.settled.spec, self.accelerator
        folder = Path(run.output_dir)
        held_out = HeldOut(
            velocity_for=self.velocity_for, conditions=self.judged, latent_shape=self.latent_shape,
            guidance_scale=spec.guidance_scale, sigmas=self.sigmas(), reward=self.reward, gold=self.gold,
            decode=lambda latents: torch.cat([decode_latents(self.pipeline.vae, part) for part in latents.split(4)]),
            config=run.evaluation, accelerator=accelerator, output_dir=folder,
        )  # fmt: skip

        def export(step: int) -> None:
            if accelerator.is_main_process:
                self.policy.save_lora(folder / "lora")
                plot_run(folder)

        fit(
            run.loop, run.optim, parameters=self.policy.parameters,
            optimizer=adamw([{"params": list(self.policy.parameters.values())}], run.optim),
            batch_at=method.batch_at, step=method.step, accelerator=accelerator, output_dir=folder,
            hooks=[
                Hook(run.evaluation.every, held_out),
                Hook(run.loop.checkpoint_every, export, at_start=False, at_stop=True),
            ],
            identity={**self.identity, **(data or {})}, state=state, settings=self.settled.text,
            resume=self.settled.checkpoint, resume_command=f"python {sys.argv[0]} --resume {folder}",
            meter=self.meter, profile_every=run.profile_every, shown=shown,
        )  # fmt: skip
        accelerator.end_training()
        if accelerator.is_main_process:
            plot_run(folder)
            self._summarise(held_out.summarise(run.loop.steps), folder)

    def _summarise(self, scores: Mapping[str, Mapping[str, float]], folder: Path) -> None:
        """Write summary.json and tell what came of the run."""
        run, spec = self.settled.run, self.settled.spec
        what = {"recipe": self.settled.recipe, "model": spec.name, "reward": run.reward, "seed": run.seed}
        summary = {**what, "updates": run.loop.steps, "samples": len(self.judged), **scores}
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
        print(f"pictures: {folder / 'before_after.png'}; curves: {folder / 'curves.png'}; LoRA: {folder / 'lora'}")
        for name, score in scores.items():
            gain = f"gain {score['gain']:+.4f}, standard error of the paired difference {score['standard_error']:.4f}"
            print(f"{name} {score['before']:.4f} -> {score['after']:.4f}: {gain}")
