"""Set up an alignment run: load the base model, the policy and the rewards, and encode the prompts.

A recipe calls `prepare`, builds its method from the returned `Setup`, and calls `Setup.align`. The method provides
`batch_at` and `step` for `train.loop.fit`; everything else is the same for every method and every reward.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline

from dinalrm_align.align import memory
from dinalrm_align.align.anchor import Anchor
from dinalrm_align.align.config import AlignRun
from dinalrm_align.align.evaluation import HeldOut, Probe
from dinalrm_align.align.gold import check_run, load_gold, load_scorer
from dinalrm_align.align.identity import prompts_identity, run_identity
from dinalrm_align.align.lora import read_lora
from dinalrm_align.align.notices import gold_notice, passes_notice
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.publish import push_run
from dinalrm_align.align.resolve import Resolved
from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.align.signal import SignalCheck
from dinalrm_align.align.summary import summarise
from dinalrm_align.align.watch import Watch, drift_probe, level_probe
from dinalrm_align.data.hub_prompts import load_prompts
from dinalrm_align.eval.report.figures import plot_run
from dinalrm_align.flow.sampling import named_sigmas
from dinalrm_align.models.compilation import compile_blocks
from dinalrm_align.models.pipeline import frozen_view, load_pipeline
from dinalrm_align.models.text import Conditions, PromptEncoder, text_encoders
from dinalrm_align.reward.names import check_reward, gold_rewards, reward_sources
from dinalrm_align.reward.protocol import Reward, RewardModule
from dinalrm_align.reward.registry import ImageScorer, load_reward, sharing, text_lengths
from dinalrm_align.reward.sharding import shard_base, sharding_asked
from dinalrm_align.train.checkpoints import check_checkpoint, check_identity
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.device import start_accelerator
from dinalrm_align.train.digest import digest, fingerprint, text_digest
from dinalrm_align.train.hub import check_login
from dinalrm_align.train.identity import settings_by_name
from dinalrm_align.train.loop import Hook, Method, RunFolder, fit, resume_hint
from dinalrm_align.train.metrics import METRICS, open_tracker, track_folder
from dinalrm_align.train.state import RunState, Stateful


@dataclass(frozen=True)
class Text:
    """Encoded prompts of a run. `evaluation` has one row per held-out sample; `negative` is the empty prompt."""

    train: Conditions
    evaluation: Conditions
    negative: Conditions
    extra: Conditions | None


@dataclass
class Setup:
    """The parts of a run, built by `prepare`.

    Args:
        pipeline: the frozen base model without text encoders. `policy` is a LoRA on the transformer.
        gold: rewards that score held-out images and are not trained on, by metric: "gold", "gold/NAME", ...
        copies: the image rewards of the run, of which training and evaluation share one copy (`registry.sharing`).
        trained: names of the rewards that are trained on, reward and anchor.
        identity: digests of model, reward and data, by name. Resuming needs a checkpoint with the same digests.
        sharded: whether the base weights are sharded over the ranks. All ranks must then call the policy equally often.
    """

    resolved: Resolved[Any]
    accelerator: Accelerator
    pipeline: StableDiffusion3Pipeline
    policy: Policy
    reward: Reward
    anchor: Anchor | None
    gold: Mapping[str, ImageScorer]
    copies: dict[Any, RewardModule]
    text: Text
    meter: PhaseMeter
    identity: Mapping[str, str]
    trained: Sequence[str]
    sharded: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images, in pixels."""
        return self.resolved.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        factor = self.pipeline.vae_scale_factor
        return (self.pipeline.transformer.config.in_channels, *(side // factor for side in self.size))

    def sigmas(self, num_steps: int | None = None, schedule: str = "diffusers") -> list[float]:
        """Return the noise levels of a schedule, by name, for `num_steps` steps; None: the model's number of steps."""
        return named_sigmas(schedule, self.pipeline.scheduler, num_steps or self.resolved.spec.num_steps)

    def sampler(
        self,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        conditions: Conditions | None = None,
    ) -> Sampler:
        """Return a `Sampler` of the policy. Defaults: the training prompts, the model's sigmas and guidance scale."""
        spec, accelerator, alone = self.resolved.spec, self.accelerator, self.accelerator.num_processes == 1
        return Sampler(
            policy=self.policy,
            conditions=self.text.train if conditions is None else conditions,
            negative=self.text.negative.to(accelerator.device),
            sigmas=self.sigmas() if sigmas is None else sigmas,
            latent_shape=self.latent_shape,
            guidance_scale=spec.guidance_scale if guidance_scale is None else guidance_scale,
            seed=self.resolved.run.seed,
            meter=self.meter,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            accumulate=self.resolved.run.loop.accumulate,
            gather=lambda values: values if alone else accelerator.gather(values.to(accelerator.device)).cpu(),
        )

    def align(
        self,
        method: Method,
        *,
        samples: int,
        shown: Sequence[str] = ("reward", "gold", "kl", "grad_norm"),
        data: Mapping[str, str] | None = None,
        state: Stateful | None = None,
        no_signal: str = "",
        reuse: int = 1,
        facts: Callable[[], Mapping[str, object]] = dict,
    ) -> None:
        """Train the policy with `method`, evaluate it before, during and after training, and write the run folder.

        Args:
            samples: number of prompts or pairs per rank in an update, or in a rollout if the method reuses rollouts.
            shown: names of the metrics in the progress bar.
            data: digests of training data that the method reads, by name. A resumed run must have the same digests.
            state: object whose `state_tensors` are saved in checkpoints, usually the method; None: nothing to save.
            no_signal: why a rollout of this method gives no learning signal, and what to try, for the warning.
            reuse: updates per rollout.
            facts: a function that returns further entries of summary.json; called after training.
        """
        run, accelerator = self.resolved.run, self.accelerator
        folder, together = Path(run.output_dir), samples * accelerator.num_processes
        if "pairs" not in (data or {}) and (
            notice := passes_notice(len(self.text.train), together, -(-run.loop.steps // reuse))
        ):
            accelerator.print(notice)
        held_out = prepare_evaluation(self)
        watch, asked = prepare_watch(self, held_out), list[str]()
        check = SignalCheck(run.reward, no_signal, folder / METRICS, accelerator.print, accelerator.is_main_process)
        run_folder = RunFolder(folder, self.resolved.text, self.resolved.checkpoint, self.resolved.resume_command)

        start = RunState.initial(
            self.policy.parameters, run.loop, run.optim, method=state, identity={**self.identity, **(data or {})},
            samples=together, settings=settings_by_name(run),
        )  # fmt: skip

        def export(step: int) -> None:
            if accelerator.is_main_process:
                self.policy.save_lora(folder / "lora")

        def draw(step: int) -> None:
            if accelerator.is_main_process and step < run.loop.steps:  # after the last update they are drawn below
                plot_run(folder)

        def observe(row: Mapping[str, float]) -> str | None:
            if "proxy" in row:  # an evaluation
                draw(start.step)
            asked.extend(filter(None, [self.resolved.given.after_update(row)]))
            return asked[0] if asked else None

        done = fit(
            run.loop,
            run.optim,
            start,
            method,
            accelerator=accelerator,
            run=run_folder,
            hooks=[
                Hook(run.evaluation.every, held_out),
                Hook(0, lambda step: held_out(step) if asked else None, at_start=False, at_stop=True),
                *([Hook(run.evaluation.every, watch)] if watch else []),
                Hook(run.loop.checkpoint_every, export, at_start=False, at_stop=True),
                Hook(0, draw, at_start=False, at_stop=True),
            ],
            meter=self.meter,
            shown=shown,
            stop_when=lambda row: check(row) or observe(row) or (watch.stop_when(row) if watch else None),
        )  # fmt: skip
        track_folder(accelerator, folder / "lora", f"{folder.name}-lora")
        accelerator.end_training()
        if accelerator.is_main_process:
            with resume_hint(run_folder, lambda error: None):
                plot_run(folder)
                known = {"updates": done, "samples": len(self.text.evaluation), "weights": run.loop.weights_at(done)}
                summarise(self.resolved, held_out.summarise(done), known | {**facts()}, signal=check)
            if run.push_to_hub is not None:
                push_run(folder, run.push_to_hub)


def prepare(resolved: Resolved[Any], extra_prompts: Sequence[str] = (), in_advantages: bool = False) -> Setup:
    """Load the models, encode the prompts, and build the policy.

    Args:
        extra_prompts: prompts to encode in addition to training and evaluation prompts.
        in_advantages: whether to add the advantages of a second reward (GRPO) instead of its scores (ReFL).
    """
    run, spec, given = resolved.run, resolved.spec, resolved.given
    if run.push_to_hub is not None:
        check_login(run.push_to_hub)
    accelerator, dtype = start_accelerator(run, spec.dtype, minutes=run.loop.timeout, tracker=run.tracker)
    device = accelerator.device
    memory.check_memory_options(run.memory, device)
    memory.use_kernels(run.memory)
    names = reward_names(run, in_advantages)
    check_run(resolved)
    prompts, samples = run_prompts(resolved)
    identity = prompts_identity(prompts, samples)
    check_identity(resolved.checkpoint, identity)
    start, checkpoint = run.policy.init_from, resolved.checkpoint
    if gone := checkpoint is not None and str(start).startswith("/") and not Path(start).exists():
        accelerator.print(f"policy.init_from: {start} is gone; the checkpoint holds the run's weights")
    initial = None if start is None or gone else read_lora(start)
    copies = dict[Any, RewardModule]()
    with sharing(copies):
        gold = load_gold(resolved, samples, device, accelerator.print)
    accelerator.print(f"run in {run.output_dir}: reward {run.reward}, {len(prompts)} prompts, {dtype} on {device}")
    for each in gold_rewards(run.gold, spec.gold).values():
        if notice := gold_notice(each, names, spec):
            accelerator.print(notice)
    open_tracker(accelerator, run.tracker, Path(run.output_dir), resolved.text, resolved.checkpoint)

    dtype = getattr(torch, dtype)
    pipeline = frozen_view(given.pipeline) if given.pipeline else load_pipeline(spec.pipeline, dtype=dtype)
    lengths = given.text_lengths.union(*(text_lengths(name, spec) for name in names))
    identity["text encoders"] = text_digest(" ".join(map(fingerprint, text_encoders(pipeline))))
    text = encode(pipeline, lengths, prompts, samples, extra_prompts, text_length=spec.text_length, device=device)
    memory.shrink_pipeline(pipeline, run.memory, device)
    pipeline.to(device)

    # Rewards share the base weights, so they are loaded before the policy wraps the transformer.
    place = dict(spec=spec, pipeline=pipeline, device=device, functions=given.functions)
    with sharing(copies):
        rewards = [load_reward(name, options=run.reward_options(name), **place) for name in names]
    identity |= {"autoencoder": fingerprint(pipeline.vae), **{name: each.fingerprint for name, each in gold.items()}}
    identity |= run_identity(resolved, pipeline.transformer, rewards)
    policy = Policy(pipeline.transformer, run.policy, seed=run.seed)
    if initial is not None:
        policy.set_lora(initial)
        identity["initial LoRA"] = digest(policy.parameters)[:16]
    elif gone:
        identity["initial LoRA"] = check_checkpoint(checkpoint)["identity"]["initial LoRA"]
    meter = PhaseMeter(device, run.profile_every)
    parts = dict(reward=rewards[0], anchor=None, gold=gold, copies=copies, trained=names)
    setup = Setup(resolved, accelerator, pipeline, policy, text=text, meter=meter, identity=identity, **parts)
    setup.sharded = apply_memory_options(setup, rewards)
    for second in rewards[1:]:
        setup.anchor = Anchor(second, run.anchor.every, run.anchor.weight)
    return setup


def reward_names(run: AlignRun, in_advantages: bool) -> list[str]:
    """Return the names of the training reward and, if there is one, of the anchor. Raise ValueError for a bad name."""
    names = [run.reward, *([run.anchor.reward] if run.anchor and run.anchor.reward else [])]
    for name in names:
        check_reward(name, gradient=run.anchor is not None and name != run.reward and not in_advantages)
    return names


def run_prompts(resolved: Resolved[Any]) -> tuple[list[str], list[str]]:
    """Return the training prompts, and one held-out prompt per evaluation sample."""
    run, spec, given = resolved.run, resolved.spec, resolved.given
    prompts = load_prompts(given.prompts or run.prompts or spec.train_prompts)
    heldout = load_prompts(given.eval_prompts or run.eval_prompts or spec.heldout_prompts)
    return prompts, [heldout[index % len(heldout)] for index in range(run.evaluation.samples)]


def encode(
    pipeline: StableDiffusion3Pipeline,
    lengths: frozenset[int],
    prompts: Sequence[str],
    samples: Sequence[str],
    extra_prompts: Sequence[str],
    *,
    text_length: int,
    device: torch.device,
) -> Text:
    """Encode every prompt of the run with the pipeline's text encoders on `device`, then release the encoders.

    `text_length`: number of T5 tokens that the policy reads. `lengths`: numbers of T5 tokens that the rewards read.
    """
    encoders = memory.text_pipeline(pipeline, device)
    encoder = PromptEncoder(encoders, text_length=text_length, device=device)
    train, evaluation = (Conditions.encode(encoder, each, lengths - {text_length}) for each in (prompts, samples))
    negative = Conditions.encode(encoder, [""])
    extra = Conditions.encode(encoder, extra_prompts) if extra_prompts else None
    memory.release_text_encoders(encoders, pipeline)
    return Text(train, evaluation, negative, extra)


def apply_memory_options(setup: Setup, rewards: Sequence[Reward]) -> bool:
    """Apply the memory options to policy and rewards. Return whether the base weights are sharded over the ranks."""
    run, pipeline = setup.resolved.run, setup.pipeline
    recompute_policy, recompute_rewards = memory.recomputation(
        run.gradient_checkpointing, run.graph_images(setup.resolved.spec.num_steps), pipeline.transformer, rewards,
        setup.accelerator, latent_shape=setup.latent_shape, text_tokens=setup.text.train.prompt_embeds.shape[1],
    )  # fmt: skip
    if recompute_policy:
        setup.policy.transformer.enable_gradient_checkpointing()
    for reward in rewards if recompute_rewards else ():
        reward.enable_gradient_checkpointing()
    for reward in rewards:
        reward.set_decode_slice(run.memory.decode_slice)
    if sharded := sharding_asked():
        shard_base(setup.accelerator, pipeline.transformer.transformer_blocks, rewards)
    if run.memory.compile:
        compile_blocks(pipeline.transformer.transformer_blocks)
        for reward in rewards:
            reward.compile_blocks()
    if run.memory.offload and not any(reward.reads_images for reward in rewards):
        pipeline.vae.to("cpu")
    return sharded


def prepare_evaluation(setup: Setup) -> HeldOut:
    """Return the held-out evaluation of a run, with the rewards and probes that the run's settings ask for."""
    run, spec, accelerator = setup.resolved.run, setup.resolved.spec, setup.accelerator
    scorers = dict(setup.gold)
    trained = frozenset().union(*(reward_sources(name, spec) for name in setup.trained))
    free = "gold/pixel" not in scorers and trained.isdisjoint(reward_sources("pixel", spec))
    if spec.kind == "shapes" and Path(spec.pixel).is_dir() and free:
        with sharing(setup.copies):
            scorers["gold/pixel"] = load_scorer(setup.resolved, "pixel", accelerator.device)
    sigmas, scale = setup.sigmas(run.evaluation.num_steps), run.evaluation.guidance_scale
    sampler, probes = setup.sampler(sigmas, scale, conditions=setup.text.evaluation), list[Probe]()
    if run.watch.sigmas and setup.reward.noise_parts:
        probes.append(level_probe(setup.reward.noise_parts[0], run.watch.sigmas))
    if run.watch.drift_sigmas:
        probes.append(drift_probe(sampler.velocity_for, setup.policy.reference, run.watch.drift_sigmas))
    return HeldOut(
        sampler=sampler,
        reward=setup.reward,
        scorers=scorers,
        decode=memory.decoder(setup.pipeline.vae, accelerator.device),
        config=run.evaluation,
        accelerator=accelerator,
        output_dir=Path(run.output_dir),
        probes=probes,
        equal_calls=setup.sharded,
    )


def prepare_watch(setup: Setup, held_out: HeldOut) -> Watch | None:
    """Return the hook that detects reward hacking, or None if all evaluation prompts are equal."""
    run, accelerator = setup.resolved.run, setup.accelerator
    if len(set(held_out.prompts)) < 2:
        equal = "all evaluation prompts are equal: standard errors are over samples"
        accelerator.print(f"{equal}, and reward hacking is not detected in this run")
        return None
    return Watch(
        history=held_out.history,
        captions=held_out.prompts,
        config=run.watch,
        output_dir=held_out.output_dir,
        evaluations=-(-run.loop.steps // (run.evaluation.every or run.loop.steps)),
        save_lora=setup.policy.save_lora,
        is_main_process=accelerator.is_main_process,
        say=accelerator.print,
    )
