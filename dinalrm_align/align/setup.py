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

from dinalrm_align.align.anchor import AnchoredReward, matching_scale
from dinalrm_align.align.config import AlignRun, AnchorConfig
from dinalrm_align.align.economies import (
    check_economies,
    compile_blocks,
    decoder,
    economise_pipeline,
    encode_ahead,
    release_text_encoders,
    slice_decoding,
    use_attention,
)
from dinalrm_align.align.evaluation import HeldOut, Judge, Probe
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.settle import Settled
from dinalrm_align.align.watch import Watch, drift_probe, level_probe
from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.eval.report.figures import plot_run
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import Velocity, rollout, schedule_sigmas, seeded_noise
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.text import Conditions, PromptEncoder
from dinalrm_align.reward.names import check_reward, parse_reward
from dinalrm_align.reward.registry import latent_rewards, load_judge, load_reward, pixel_rewards, text_lengths
from dinalrm_align.reward.sharding import shard_base, sharding_asked
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.device import available_device
from dinalrm_align.train.digest import fingerprint, text_digest
from dinalrm_align.train.distributed import waiting
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.loop import Hook, RunFolder, fit
from dinalrm_align.train.metrics import METRICS, read_metrics
from dinalrm_align.train.state import RunState, Stateful
from dinalrm_align.train.tracking import open_tracker, tracker_options

ANCHOR_SAMPLES, ANCHOR_BATCH = 64, 16
"""Samples of the base model that bring an anchor to the reward's unit."""


class Batch(Protocol):
    """What a method trains on in a micro-step."""

    @property
    def count(self) -> int:
        """Of how many items its loss is the mean."""


class Method(Protocol):
    """An alignment method, as `loop.fit` takes it."""

    def batch_at(self, micro_step: int) -> Batch: ...

    def step(self, batch: Batch) -> tuple[Tensor, Mapping[str, float | Tensor]]: ...


@dataclass
class Stage:
    """The parts that a method is made of; build one with `build`.

    settled: the run. accelerator: with its device, rank and number of processes. pipeline: the frozen base model, its
    text encoders let go. policy: a LoRA on its transformer. reward: frozen, reward(latents (B, C, H, W), prompts=...,
    sigma=..., noise=..., generator=...) -> (B,), and `gold` beside it, which judges pictures and is never trained on.
    conditions: of the training prompts. judged: one per held-out sample. negative: of the empty prompt. encoder: gives
    the embeddings of every prompt that was named when the stage was built, and of no other. identity: digests of what
    a checkpoint must have been trained with to be resumed from. sharded: whether the base weights are spread over the
    processes (`sharding`), which then have to call the policy equally often.
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
    sharded: bool = False

    @classmethod
    def build(
        cls,
        settled: Settled,
        also: Sequence[str] = (),
        anchor: AnchorConfig | None = None,
        in_advantages: bool = False,
    ) -> "Stage":
        """Load everything. also: prompts that the method needs besides those of training and judging. anchor: of a
        method that asks `anchor.terms` what to climb; with one, `reward` is an AnchoredReward. in_advantages: it asks
        per rollout, and normalises the scores of both; else per micro-step, and follows their sum by gradient.

        Raises what the loaders raise: ValueError, TypeError or OSError that names the file or the setting.
        """
        run, spec = settled.run, settled.spec
        if run.device != "auto":
            available_device(run.device)
        tracking = tracker_options(run.tracker, Path(run.output_dir))
        sharded, waits = sharding_asked(), [waiting(run.loop.timeout)]
        accelerator = Accelerator(cpu=run.device == "cpu", mixed_precision="no", kwargs_handlers=waits, **tracking)
        set_seed(run.seed % 2**31, device_specific=True)  # of all that draws globally
        device = accelerator.device
        dtype = run.dtype if run.dtype != "auto" else spec.dtype if device.type == "cuda" else "float32"
        gold = load_judge(run.gold or spec.gold, spec=spec, device=device)
        prompts = read_prompts(Path(run.prompts or spec.train_prompts))
        heldout = read_prompts(Path(run.eval_prompts or spec.heldout_prompts))
        samples = [heldout[index % len(heldout)] for index in range(run.evaluation.samples)]
        size = run.height or spec.height, run.width or spec.width
        gold(torch.zeros(len(samples), 3, *size), samples)  # it may know neither this size nor these prompts
        told = f"reward {run.reward}, {len(prompts)} prompts, {dtype} on {device}"
        accelerator.print(f"run in {run.output_dir}: {told}")
        check_economies(run.memory, device)
        open_tracker(accelerator, run.tracker, Path(run.output_dir), settled.text, settled.checkpoint)

        # The base model, frozen. The reward shares its weights, so it is made before the policy wraps them.
        pipeline = load_pipeline(spec.pipeline, dtype=getattr(torch, dtype))
        encoders: dict[int, PromptEncoder] = {}
        if run.memory.offload:
            named = [run.reward, *([anchor.reward] if anchor and anchor.reward else [])]
            lengths = {spec.text_length}.union(*(text_lengths(name, spec) for name in named))
            encoders = encode_ahead(pipeline, lengths, [*prompts, *samples, *also, ""], device)
        use_attention(run.memory.attention)
        economise_pipeline(pipeline, run.memory, device)
        pipeline.to(device)
        given = dict(spec=spec, pipeline=pipeline, device=device)
        reward = load_reward(run.reward, options=_options(run.reward, run), **given)
        second = None
        if anchor is not None and anchor.reward is not None:
            check_reward(anchor.reward, gradient=not in_advantages)
            second = load_reward(anchor.reward, options=_options(anchor.reward, run), **given)

        identity = {
            "recipe": settled.recipe,
            "seed": str(run.seed),
            "base model": fingerprint(pipeline.transformer),
            "reward": _told_apart(run.reward, reward),
            **({"quantised base": run.memory.base_quant} if run.memory.base_quant != "none" else {}),
            **({"anchor": f"{_told_apart(anchor.reward, second)} {anchor.every} {anchor.weight}"} if second else {}),
            "list of prompts": text_digest("\n".join(prompts)),
        }

        # Every prompt is encoded once, for policy and reward; then the text encoders are let go.
        encoder = encoders.get(spec.text_length) or PromptEncoder(pipeline, text_length=spec.text_length, device=device)
        rewards = [known for known in (reward, second) if known]
        readers = [part for known in rewards for part in latent_rewards(known)]
        for part in readers:
            part.encoder = encoders.get(part.config.text_length, part.encoder)
        latent = [part.encoder for part in readers]
        encoder = next((own for own in latent if own.text_length == spec.text_length), encoder)
        for own in latent:
            if own is not encoder:
                Conditions.encode(own, [*prompts, *samples, *also])  # to fill its cache
        train, judged, negative = (Conditions.encode(encoder, part) for part in (prompts, samples, [""]))
        if also:
            Conditions.encode(encoder, also)
        release_text_encoders(pipeline)

        policy = Policy(pipeline.transformer, run.policy, seed=run.seed)
        if run.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
            for known in rewards:
                known.enable_gradient_checkpointing()
        for known in rewards:
            slice_decoding(known, run.memory.decode_slice)
        if sharded:
            trunks = [part.model.trunk for part in readers]
            shard_base(accelerator, pipeline.transformer.transformer_blocks, trunks)
        if run.memory.compile:
            compile_blocks(pipeline.transformer, rewards)
        if run.memory.offload and not any(pixel_rewards(known) for known in rewards):
            pipeline.vae.to("cpu")
        stage = cls(
            settled, accelerator, pipeline, policy, reward, gold, encoder, train, judged, negative,
            PhaseMeter(device, run.profile_every),
            identity, sharded,
        )  # fmt: skip
        if second:
            unit = (1, 1.0) if in_advantages else (run.loop.accumulate, stage._anchor_scale(reward, second))
            stage.reward = AnchoredReward(reward, second, anchor, *unit)
        return stage

    @property
    def climbed(self) -> Callable[..., Tensor]:
        """The reward without its anchor."""
        return self.reward.reward if isinstance(self.reward, AnchoredReward) else self.reward

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

    def gather(self, values: Tensor) -> Tensor:
        """values (N, ...) of this process -> those of all processes, one after another, on the CPU."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    def align(
        self,
        method: Method,
        *,
        samples: int,
        shown: Sequence[str] = ("reward", "gold", "kl", "grad_norm"),
        data: Mapping[str, str] | None = None,
        state: Stateful | None = None,
    ) -> None:
        """Train the policy by `method`, judge it before, meanwhile and after, and leave everything in the run's folder.

        samples: prompts or pairs that this process takes for an update, of on-policy methods for a rollout.
        shown: metrics for the progress bar. data: digests of what else the run trains on, by name; a checkpoint of
        another is not resumed from. state: what of the method a resumed run needs back.
        """
        run, spec, accelerator = self.settled.run, self.settled.spec, self.accelerator
        folder = Path(run.output_dir)
        held_out = HeldOut(
            velocity_for=self.velocity_for, conditions=self.judged, latent_shape=self.latent_shape,
            guidance_scale=spec.guidance_scale, sigmas=self.sigmas(), reward=self.reward, gold=self.gold,
            decode=decoder(self.pipeline.vae, accelerator.device),
            config=run.evaluation, accelerator=accelerator, output_dir=folder,
            judges=self._judges(), probes=self._probes(), in_step=self.sharded,
        )  # fmt: skip
        watch = self._watch(held_out)

        def export(step: int) -> None:
            if accelerator.is_main_process:
                self.policy.save_lora(folder / "lora")
                plot_run(folder)

        done = fit(
            run.loop, run.optim,
            RunState.initial(
                self.policy.parameters, run.loop, run.optim, method=state, identity={**self.identity, **(data or {})},
                samples=samples * accelerator.num_processes,
            ),
            method, accelerator=accelerator,
            run=RunFolder(
                folder, self.settled.text, self.settled.checkpoint, f"python {sys.argv[0]} --resume {folder}"
            ),
            hooks=[
                Hook(run.evaluation.every, held_out),
                *([Hook(run.evaluation.every, watch)] if watch else []),
                Hook(run.loop.checkpoint_every, export, at_start=False, at_stop=True),
            ],
            meter=self.meter, shown=shown, stop_when=watch.stop_when if watch else None,
        )  # fmt: skip
        accelerator.end_training()
        if accelerator.is_main_process:
            plot_run(folder)
            self._summarise(held_out.summarise(done), done)

    @torch.no_grad()
    def _anchor_scale(self, reward: Callable[..., Tensor], anchor: Callable[..., Tensor]) -> float:
        """What brings the anchor's scores to the reward's unit, on samples of the base model."""
        seed, device, scores = self.settled.run.seed, self.accelerator.device, []
        for start in range(0, ANCHOR_SAMPLES, ANCHOR_BATCH):
            numbers = range(start, start + ANCHOR_BATCH)
            conditions = self.conditions.take([number % len(self.conditions) for number in numbers], device)
            generators = [seeded_generator(seed, number, 0, 2) for number in numbers]
            noise = seeded_noise(self.latent_shape, generators).to(device)
            with self.policy.reference():
                latents = rollout(self.velocity_for(conditions, self.guidance_scale()), noise, self.sigmas())
            asked = dict(prompts=conditions.prompts, generator=generators[0])
            scores.append(torch.stack([reward(latents, **asked), anchor(latents, **asked)]))
        return matching_scale(*torch.cat(scores, dim=1))

    def _watch(self, held_out: HeldOut) -> Watch | None:
        """The hacking watch over these evaluations; None, with a sentence, where all samples are of one caption."""
        run, accelerator = self.settled.run, self.accelerator
        if len(set(self.judged.prompts)) < 2:
            accelerator.print("not watched for reward hacking, which is told over captions: all samples are of one")
            return None
        return Watch(
            history=held_out.history, captions=self.judged.prompts, config=run.watch, output_dir=held_out.output_dir,
            evaluations=-(-run.loop.steps // (run.evaluation.every or run.loop.steps)),
            save_lora=self.policy.save_lora, is_main_process=accelerator.is_main_process, say=accelerator.print,
        )  # fmt: skip

    def _judges(self) -> dict[str, Judge]:
        """Besides gold: in an embedded world its pixel reward, unless that is what is climbed."""
        run, spec = self.settled.run, self.settled.spec
        climbed = {term.name for term in parse_reward(run.reward)}
        if spec.kind != "shapes" or "pixel" in climbed or not Path(spec.pixel).is_dir():
            return {}
        return {"pixel": load_judge("pixel", spec=spec, device=self.accelerator.device)}

    def _probes(self) -> list[Probe]:
        """What is measured of every held-out sample besides its scores, as `watch` is configured."""
        config, probes = self.settled.run.watch, []
        latent = latent_rewards(self.climbed)
        if config.sigmas and latent:
            probes.append(level_probe(latent[0], config.sigmas))
        if config.drift_sigmas:
            probes.append(drift_probe(self.velocity_for, self.policy.reference, config.drift_sigmas))
        return probes

    def _summarise(self, scores: Mapping[str, Mapping[str, float]], updates: int) -> None:
        """Write summary.json and tell what came of the run, of so many updates."""
        run, spec, folder = self.settled.run, self.settled.spec, Path(self.settled.run.output_dir)
        what = {"recipe": self.settled.recipe, "model": spec.name, "reward": run.reward, "seed": run.seed}
        alarms = [int(row["step"]) for row in read_metrics(folder / METRICS) if row.get("hacking")]
        summary = {**what, "updates": updates, "samples": len(self.judged), **scores}
        summary["hacking_alarm"] = alarms[0] if alarms else None
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
        print(f"pictures: {folder / 'before_after.png'}; curves: {folder / 'curves.png'}; LoRA: {folder / 'lora'}")
        for name, score in scores.items():
            gain = f"gain {score['gain']:+.4f}, standard error of the paired difference {score['standard_error']:.4f}"
            print(f"{name} {score['before']:.4f} -> {score['after']:.4f}: {gain}")


def _options(reward: str, run: AlignRun) -> dict[str, dict[str, Any]]:
    """Arguments for loading the parts of a reward, as the settings have them."""
    names = {term.name for term in parse_reward(reward)}
    return {"hpsv3": run.hpsv3.options()} if "hpsv3" in names else {}


def _told_apart(name: str, reward: torch.nn.Module) -> str:
    """A digest of a reward's weights, of its name where it has none."""
    return text_digest(name) if next(reward.parameters(), None) is None else fingerprint(reward)
