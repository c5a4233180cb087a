"""Diffusion trainers with TRL's interface, and rewards for the DDPO and AlignProp trainers, which TRL had until 0.23.

    from dinalrm_align.adapters.trl import FlowGRPOConfig, FlowGRPOTrainer      # no installation of TRL is needed

    def brightness(images, prompts, **columns):           # (B, 3, H, W) in [0, 1] -> B scores
        return images.mean(dim=(1, 2, 3))

    trainer = FlowGRPOTrainer(
        "stabilityai/stable-diffusion-3.5-medium", reward_funcs=["dinalrm", brightness],
        args=FlowGRPOConfig(output_dir="out", reward_weights=[1.0, 0.2]), train_dataset=dataset,
    )
    trainer.train()

A reward function is called with keyword arguments: `prompts`; `images`, or, if its signature has `latents`, `latents`
(B, C, h, w), scaled and clean, `prompt_embeds` and `pooled_prompt_embeds`; and every other column of the data set as a
list. It returns a tensor (B,) or B numbers; for `ReFLTrainer`, a tensor with a gradient. None, NaN and exceptions stop
the run; TRL leaves None out. Columns are looked up by prompt, so rows with the same prompt must be equal. Without an
`eval_dataset`, the held-out prompts are those of the recipe, and so is the evaluation reward, `gold_reward`.

A trainer runs the method and the loop of a recipe and writes its run folder. Only `TrlParser`, which reads the configs,
needs TRL: pip install 'dinalrm-align[trl]'. Tried with trl 1.16.0 and, for `reward_function`, 0.23.1.
"""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from dinalrm_align.adapters.shared import shared_reward
from dinalrm_align.adapters.trl_config import DiffusionConfig, DiffusionDPOConfig, FlowGRPOConfig, ReFLConfig
from dinalrm_align.align.config import AlignRun
from dinalrm_align.align.dpo import OfflineDpo, OnlineDpo
from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.grpo import Grpo
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.policy import PROJECTIONS
from dinalrm_align.align.publish import push_run
from dinalrm_align.align.refl import Refl
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import Given, resolve_values, resumed
from dinalrm_align.align.setup import Setup, prepare, prepare_evaluation
from dinalrm_align.data.hub_prompts import load_prompts
from dinalrm_align.data.source import Encoders, open_pairs
from dinalrm_align.reward.names import parse_reward
from dinalrm_align.reward.protocol import RewardModule
from dinalrm_align.train.files import STATE, read_json

RewardFunc = str | Callable[..., Any]
Rows = Iterable[Mapping[str, Any]]


def reward_function(reward: str | RewardModule, *, latents: bool = False, **place: Any) -> Callable[..., Any]:
    """Return a reward for DDPOTrainer and AlignPropTrainer of trl 0.23.1: (images, prompts, metadata) -> (scores, {}).

    Gradients reach the images, as AlignProp needs. With DDPO, leave `async_reward_computation` off, which fails in
    trl 0.23.1 with any reward.

    Args:
        reward: name of a reward, which is loaded once per process, or a reward.
        latents: whether the `images` of the trainer's pipeline are scaled clean latents, which are not decoded.
        place: arguments of `shared_reward` for a name, such as pipeline and device.
    """
    model = shared_reward(reward, **place) if isinstance(reward, str) else reward

    def score(images: Tensor, prompts: Sequence[str], metadata: Any) -> tuple[Tensor, dict[str, Any]]:
        if latents:
            return model(images, prompts), {}
        return model.score_images(images, prompts, differentiable=model.differentiable), {}

    return score


class DiffusionTrainer(ABC):
    """Base of the trainers. `setup` holds the models, and `state` the step and the log.

    Args:
        model: hub id or folder of a StableDiffusion3Pipeline, or a pipeline, which becomes that of the trained model.
        reward_funcs: a name or weighted sum as in `load_reward`, a function, a reward, or a list of these.
        train_dataset, eval_dataset: `datasets.Dataset`s or other iterables of rows with a text "prompt", or names for
            `load_prompts`; default: the model's prompts. An evaluation samples each row once by default.
        peft_config: r, lora_alpha and init_lora_weights of the LoRA; default: the recipe's.
        callbacks: get on_train_begin, on_step_end, on_log, on_evaluate, on_save and on_train_end.
            `control.should_training_stop` stops the run; other requests in `control` have no effect.
    """

    config_type: ClassVar[type[DiffusionConfig]]
    run_type: ClassVar[type[AlignRun]]
    needs_gradient: ClassVar[bool] = False
    in_advantages: ClassVar[bool] = False  # as of `prepare`

    def __init__(
        self,
        model: str | StableDiffusion3Pipeline,
        reward_funcs: RewardFunc | Sequence[RewardFunc] = "dinalrm",
        args: DiffusionConfig | None = None,
        train_dataset: Rows | str | Path | None = None,
        eval_dataset: Rows | str | Path | None = None,
        peft_config: peft.LoraConfig | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.args = args or self.config_type()
        self.callbacks, self.state, self.control = list(callbacks), TrainerState(), TrainerControl()
        train, held_out = dataset_rows(train_dataset, "train_dataset"), dataset_rows(eval_dataset, "eval_dataset")
        pipeline = None if isinstance(model, str) else model
        name = model if pipeline is None else self.args.base_model or pipeline.config["_name_or_path"]
        reward, functions = combined(reward_funcs, self.args.reward_weights, [*train, *held_out])
        given = Given(
            pipeline=pipeline,
            prompts=[row["prompt"] for row in train],
            eval_prompts=[row["prompt"] for row in held_out],
            functions=functions,
            text_lengths=frozenset().union(
                *(f.text_lengths for f in functions.values() if isinstance(f, RewardModule))
            ),
            after_update=self._after_update,
        )
        values = dict(**self.args.values(), **lora_values(peft_config), model=name, reward=reward)
        if held_out:
            values.setdefault("evaluation.samples", max(2, len(held_out)))
        resolved = resolve_values(self.run_type, self.args.METHOD, values, given, gradient=self.needs_gradient)
        resolved = replace(resolved, resume_command="trainer.train(resume_from_checkpoint=True)")
        self.setup = prepare(resolved, in_advantages=self.in_advantages)
        self.folder = Path(resolved.run.output_dir)
        self.state.max_steps = resolved.run.loop.steps
        self.state.is_world_process_zero = self.setup.accelerator.is_main_process
        self.state.is_local_process_zero = self.setup.accelerator.is_local_main_process

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Train, evaluate before and after, and write the run folder. Afterwards the policy has the exported LoRA.

        resume_from_checkpoint: folder of a checkpoint, or True for the newest one in the run folder.
        """
        if resume_from_checkpoint:
            source = self.folder if resume_from_checkpoint is True else Path(resume_from_checkpoint)
            self.setup.resolved = resumed(self.setup.resolved, source)
            self.state.global_step = read_json(self.setup.resolved.checkpoint / STATE)["step"]
        self.control = TrainerControl()
        self._notify("on_train_begin")
        self._align(self.setup)
        self.setup.accelerator.wait_for_everyone()
        self.setup.policy.load_lora(self.folder / "lora")
        self._notify("on_train_end")
        rows = self.state.log_history
        loss = sum(row["loss"] for row in rows) / max(len(rows), 1)
        return TrainOutput(self.state.global_step, loss, rows[-1] if rows else {})

    def evaluate(self) -> dict[str, float]:
        """Sample the held-out prompts with the policy; return the mean scores, eval_gold, eval_proxy and others."""
        row = prepare_evaluation(self.setup)(self.state.global_step)
        metrics = {f"eval_{name}": value for name, value in row.items()}
        self._notify("on_evaluate", metrics=metrics)
        return metrics

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the LoRA, for `load_lora_weights` of diffusers, to a folder; default: lora/ in the run folder."""
        if self.setup.accelerator.is_main_process:
            self.setup.policy.save_lora(Path(output_dir or self.folder / "lora"))

    def push_to_hub(self, repo_id: str | None = None, **options: Any) -> str:
        """Upload the LoRA with a model card; return the commit's address. options: those of `align.publish.push_run`.

        repo_id: OWNER/NAME; default: args.hub_model_id. In a run of several processes, the main one uploads.
        """
        repo_id = repo_id or self.args.hub_model_id
        if repo_id is None:
            raise ValueError("push_to_hub: got no repository; pass OWNER/NAME, or set hub_model_id in the config")
        self.save_model()
        settings = yaml.safe_load(self.setup.resolved.text)
        main = self.setup.accelerator.is_main_process
        return push_run(self.folder, repo_id, settings=settings, **options) if main else ""

    @abstractmethod
    def _align(self, setup: Setup) -> None:
        """Train with the trainer's method."""

    def _after_update(self, row: Mapping[str, float]) -> str | None:
        """Tell the callbacks what an update did; return the reason to stop, if one asked for it."""
        state, every = self.state, self.setup.resolved.run.loop.checkpoint_every
        state.global_step += 1
        state.log_history.append({**row, "step": state.global_step})
        self._notify("on_step_end")
        self._notify("on_log", logs=dict(row))
        if "proxy" in row:  # the update was evaluated
            self._notify("on_evaluate", metrics={f"eval_{name}": value for name, value in row.items()})
        if state.global_step == state.max_steps or (every and state.global_step % every == 0):
            self._notify("on_save")
        return "a callback set should_training_stop" if self.control.should_training_stop else None

    def _notify(self, event: str, **inputs: Any) -> None:
        for callback in self.callbacks:
            call = getattr(callback, event)
            found = call(self.args, self.state, self.control, model=self.setup.policy.transformer, **inputs)
            self.control = found or self.control


class ReFLTrainer(DiffusionTrainer):
    """Maximises the rewards of one-step estimates by their gradient, as recipes/refl_sd35.py (arXiv 2304.05977)."""

    config_type, run_type, needs_gradient = ReFLConfig, ReflRun, True

    def _align(self, setup: Setup) -> None:
        run, config = setup.resolved.run, setup.resolved.run.refl
        if config.pretrain_weight:
            raise ValueError("refl.pretrain_weight: this trainer has no pretraining loss; use recipes/refl_sd35.py")
        sampler = setup.sampler(setup.sigmas(config.num_steps), config.guidance_scale)
        method = Refl(sampler, setup.reward, config, setup.anchor)
        method.measure(resumed=setup.resolved.checkpoint is not None)
        stored = config.kl_unit == "reward_std"
        setup.align(
            method, samples=config.batch_size * run.loop.accumulate, no_signal=method.no_signal,
            state=method if stored else None,
            facts=lambda: dict(reward_std=method.reward_std, kl_weight=method.kl_weight) if stored else {},
        )  # fmt: skip


class FlowGRPOTrainer(DiffusionTrainer):
    """Flow-GRPO: policy gradients on groups of samples, as recipes/grpo_sd35.py (arXiv 2505.05470)."""

    config_type, run_type, in_advantages = FlowGRPOConfig, GrpoRun, True

    def _align(self, setup: Setup) -> None:
        config = setup.resolved.run.grpo
        sampler = setup.sampler(setup.sigmas(config.num_steps, config.schedule), config.guidance_scale)
        method = Grpo(sampler, setup.reward, config, setup.anchor)
        reuse = config.epochs * config.minibatches
        setup.align(method, samples=config.groups, state=method.buffer, reuse=reuse, no_signal=method.no_signal)


class DiffusionDPOTrainer(DiffusionTrainer):
    """Diffusion-DPO on the best and worst of several samples, or on `pairs`, as recipes/dpo_sd35.py (2311.12908)."""

    config_type, run_type = DiffusionDPOConfig, DpoRun

    def _align(self, setup: Setup) -> None:
        run, config = setup.resolved.run, setup.resolved.run.dpo
        sampler = setup.sampler(setup.sigmas(config.num_steps), config.guidance_scale)
        samples = config.batch_size * run.loop.accumulate
        if config.mode == "online":
            method = OnlineDpo(sampler, setup.reward, config)
            setup.align(method, samples=samples, state=method, no_signal=method.no_signal)
            return
        spec, dtype = setup.resolved.spec, setup.policy.transformer.dtype
        encoders = Encoders(spec.pipeline, text_length=spec.text_length, device=sampler.device, dtype=dtype)
        order = dict(size=setup.size, batch_size=config.batch_size, seed=run.seed, on_bad=run.on_bad)
        pairs = open_pairs(run.pairs, encoders.manifest(), encoders, **order)
        setup.align(OfflineDpo(sampler, pairs, config), samples=samples, data={"pairs": pairs.digest()})


def dataset_rows(dataset: Rows | str | Path | None, name: str) -> list[dict[str, Any]]:
    """Return the rows of a data set as dicts; none for None. Raises ValueError for a row without a text "prompt"."""
    if isinstance(dataset, str | Path):
        dataset = [{"prompt": prompt} for prompt in load_prompts(dataset)]
    rows = [] if dataset is None else list(dataset)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str):
            what = "one split of a data set, as rows with a text in the column prompt"
            raise ValueError(f"{name}[{index}]: got {row!r:.80}; expected {what}")
    if dataset is not None and not rows:
        raise ValueError(f"{name}: got no rows; expected at least one with a column prompt")
    return [dict(row) for row in rows]


def lora_values(config: peft.LoraConfig | None) -> dict[str, Any]:
    """Return the settings of the policy's LoRA. Raises ValueError for one that the policy cannot have."""
    if config is None:
        return {}
    own = dict(r=config.r, lora_alpha=config.lora_alpha, init_lora_weights=config.init_lora_weights)
    plain = peft.LoraConfig(**own, target_modules=config.target_modules, task_type=config.task_type).to_dict()
    other = {name: value for name, value in config.to_dict().items() if value != plain[name]}
    if set(config.target_modules or PROJECTIONS) != set(PROJECTIONS):
        other["target_modules"] = config.target_modules
    init = {"True": "kaiming", "gaussian": "gaussian"}.get(str(config.init_lora_weights))
    if other or init is None:
        raise ValueError(
            f"peft_config: got {other or own}; expected r, lora_alpha, init_lora_weights True or 'gaussian', and no "
            f"target_modules or all of {', '.join(PROJECTIONS)}"
        )
    return {"policy.rank": config.r, "policy.alpha": float(config.lora_alpha), "policy.init": init}


def combined(
    reward_funcs: RewardFunc | Sequence[RewardFunc], weights: Sequence[float] | None, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, dict[str, Callable[..., Any]]]:
    """Return the weighted sum as the text of a setting `reward`, and the functions by the names that it has there."""
    funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    weights = [1.0] * len(funcs) if weights is None else weights
    if len(weights) != len(funcs):
        raise ValueError(f"reward_weights: got {len(weights)} for {len(funcs)} reward_funcs; expected one each")
    functions: dict[str, Callable[..., Any]] = {}
    parts: list[tuple[float, str]] = []
    for func, weight in zip(funcs, weights, strict=True):
        if isinstance(func, str):
            for term in parse_reward(func):
                source = "" if term.source is None else f'="{term.source}"'
                parts.append((weight * term.weight, term.name + source))
        else:
            name = func.__name__ if inspect.isroutine(func) else type(func).__name__
            label = "reward_funcs:" + re.sub(r"\W", "_", name)
            label += f"_{len(functions)}" * (label in functions)
            functions[label] = func if isinstance(func, RewardModule) else with_columns(func, rows)
            parts.append((weight, label))
    return " + ".join(name if weight == 1 else f"{weight!r}*{name}" for weight, name in parts), functions


def with_columns(func: Callable[..., Any], rows: Sequence[Mapping[str, Any]]) -> Callable[..., Any]:
    """Return a reward function as a callable for `load_reward`, which adds the columns of each prompt's row."""
    parameters = inspect.signature(func).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    columns: dict[str, dict[str, Any]] = {}
    for row in rows:
        own = {name: value for name, value in row.items() if name != "prompt"}
        if columns.setdefault(row["prompt"], own) != own:
            raise ValueError(
                f"prompt {row['prompt']!r:.80}: got two rows that differ; expected one row for each prompt, by which "
                "columns are looked up: merge the rows, or make the prompts differ"
            )

    def call(samples: Tensor, **inputs: Any) -> Tensor:
        own = [columns.get(prompt, {}) for prompt in inputs["prompts"]]
        found = {name: [row[name] for row in own] for name in own[0] if all(name in row for row in own)}
        every = dict(**inputs, **found)
        scores = func(**{name: value for name, value in every.items() if takes_all or name in parameters})
        return scores if isinstance(scores, Tensor) else torch.tensor([*map(float, scores)], device=samples.device)

    def on_images(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return call(images, images=images, prompts=list(prompts))

    def on_latents(latents: Tensor, prompts: Any, prompt_embeds: Any, pooled_prompt_embeds: Any) -> Tensor:
        embeds = dict(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)
        return call(latents, latents=latents, prompts=prompts, **embeds)

    return on_latents if "latents" in parameters else on_images
