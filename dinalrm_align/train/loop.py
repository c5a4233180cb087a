"""`fit`: the one training loop. Everything particular to a method is a `batch_at` and a `step`.

Data is stateless: `batch_at(micro_step)` is a pure function of the seed, the micro-step and the weights. An on-policy
method does its rollout inside it, so that the loop does not know that it is on-policy, and a resumed run sees exactly
the batches that an uninterrupted one sees.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from dinalrm_align.train.checkpoints import latest_checkpoint, load_checkpoint, run_of, save_checkpoint, tidy
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.distributed import with_others
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.metrics import METRICS, MetricsLog
from dinalrm_align.train.optim import lr_factor

INTERRUPTED = 130  # exit status of a program ended by Ctrl-C, by the shells' convention


@dataclass(frozen=True)
class Hook:
    """`call(step)` on every process after the updates that `every` divides, after the last, and before the first.

    The averaged weights are in place while it runs. What it returns goes into the metrics of that step. With `at_stop`
    it is also called, once more and for its effect alone, when a run is stopped between its steps.
    """

    every: int
    call: Callable[[int], Mapping[str, float] | None]
    at_start: bool = True
    at_stop: bool = False

    def is_due(self, step: int, last: int) -> bool:
        return self.at_start if step == 0 else step == last or (self.every > 0 and step % self.every == 0)


class Stateful(Protocol):
    """A method that keeps something between updates which cannot be drawn again: statistics, a pending rollout."""

    def state_tensors(self) -> dict[str, Tensor]:
        """All of it by name, on any device; as it is after the last update."""

    def is_common(self) -> bool:
        """Whether that is now the same on every process, and good for another number of them."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises ValueError, before it changes anything, when it does not fit."""


class Ema:
    """Exponential moving average of named parameters: mean <- d mean + (1 - d) p, from mean = p at the start.

    After k updates d = min(decay, (1 + k) / (10 + k)), so that a short run is not averaged with its own beginning.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.mean = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update number `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters.items():
            self.mean[name].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the parameters hold the average; after it, bit for bit what they held before."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.mean)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])


def fit(
    config: LoopConfig,
    optim: OptimConfig,
    *,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], Any],
    step: Callable[[Any], tuple[Tensor, Mapping[str, float | Tensor]]],
    count_of: Callable[[Any], float] = lambda batch: 1.0,
    accelerator: Accelerator,
    output_dir: Path,
    hooks: Sequence[Hook] = (),
    meter: PhaseMeter | None = None,
    profile_every: int = 0,
    identity: Mapping[str, str] | None = None,
    samples: int = 0,
    state: Stateful | None = None,
    resume: Path | None = None,
    resume_command: str = "",
    settings: str = "",
    shown: Sequence[str] = ("loss",),
    stop_when: Callable[[Mapping[str, float]], str | None] | None = None,
) -> int:
    """Train `parameters` for `config.steps` updates; afterwards they hold the last weights, checkpointed.

    Returns how many updates were made in all: config.steps, or fewer where `stop_when` ended the run.

    Args:
        parameters: all that is trained, by name; identical on every process once this starts.
        optimizer: over exactly those (`adamw`).
        batch_at: micro-step 0, 1, ... -> a batch; `config.accumulate` of them make an update.
        step: batch -> (loss, metrics): a scalar tensor with a graph, and numbers to record. Both are averaged over the
            micro-steps and processes of an update.
        count_of: batch -> how much it counts in those averages, 0 or more: of how many items its loss is the mean. So
            the update's loss is the mean over the items of all processes, whoever had more of them.
        output_dir: gets metrics.jsonl and checkpoints/.
        hooks: evaluation, pictures, export.
        meter: measures this loop's backward; give it to `batch_at` and `step` for the other phases.
        profile_every: updates between two that count FLOPs and, on the CPU, watch memory; the first is one. 0: none.
        identity: what this run is, by name: seed, digests of frozen weights and data (`digest`). Stored with every
            checkpoint; one of another identity is refused.
        samples: how many prompts or pairs all processes together take for an update, or a rollout. A run may go on with
            another number of processes as long as this stays.
        state: what of the method goes into every checkpoint, each process its own, and comes back on resume.
        resume: checkpoint folder of this run to go on from.
        resume_command: what to type to go on, told when the run is stopped.
        settings: the run's settings, written to output_dir/config.yaml once a checkpoint to resume was found to fit.
        shown: metrics for the progress bar.
        stop_when: asked after every update with its row of metrics, those of hooks included: the reason to end the run
            there, or None. It must come to the same answer on every process. A checkpoint is written and hooks with
            `at_stop` are called, as when a run is stopped from outside; the run may go on from there.

    Gradients are averaged over processes here, in one reduction of the few trained tensors: rollouts and tapped
    forwards do not pass through the `forward` of one wrapped module, where DistributedDataParallel would do it.

    Raises ValueError, before a file or a weight is touched, when `resume` is damaged or does not fit (see
    `resume.load_checkpoint`), and when nothing is to be resumed but output_dir holds a run; FloatingPointError, before
    the weights are touched, when the loss or the gradient is not finite; OSError, with the way to go on, when a file
    cannot be written or another process is lost. Ctrl-C or SIGTERM end the run after the update in progress: a
    checkpoint is written and SystemExit(130) raised; a second signal stops at once.
    """
    _check_start(accelerator, output_dir, resume)
    meter = meter or PhaseMeter(accelerator.device)
    tensors = list(parameters.values())
    ema = Ema(parameters, config.ema_decay) if config.ema_decay > 0 else None
    average = ema.mean if ema else None
    identity = identity or {}
    main = accelerator.is_main_process
    done, elapsed, saved, metrics_kept = 0, 0.0, -1, 0
    if resume is not None:
        facts = load_checkpoint(
            resume, identity=identity, samples=samples, steps=config.steps, parameters=parameters, average=average,
            optimizer=optimizer, state=state, accelerator=accelerator,
        )  # fmt: skip
        done = saved = facts["step"]
        elapsed, metrics_kept = facts["elapsed"], facts["metrics"]["bytes"]
        accelerator.wait_for_everyone()  # nobody may still be checking what is now tidied
    elif accelerator.num_processes > 1:
        for tensor in (*tensors, *(average or {}).values()):
            torch.distributed.broadcast(tensor.detach(), src=0)
    with _way_on(output_dir, resume_command):
        if main:
            tidy(output_dir, step=done, keep_last=config.keep_last)
            if settings:
                write_atomically(output_dir / "config.yaml", settings)
        log = MetricsLog(output_dir / METRICS, keep=metrics_kept) if main else None

    def save(at: int) -> Path:
        return save_checkpoint(
            output_dir, step=at, elapsed=elapsed, identity=identity, samples=samples, log=log, parameters=parameters,
            average=average, optimizer=optimizer, state=state, accelerator=accelerator, keep_last=config.keep_last,
        )  # fmt: skip

    def call(due: Sequence[Hook], at: int, row: dict[str, float]) -> None:
        if due:
            with ema.in_place() if ema else _nothing():
                for hook in due:
                    row.update(hook.call(at) or {})

    def record(at: int, row: dict[str, float]) -> dict[str, float]:
        call([hook for hook in hooks if hook.is_due(at, config.steps)], at, row)
        if main and row:
            log.append({"step": at, **row})
            bar.set_postfix({name: f"{row[name]:.4g}" for name in shown if name in row}, refresh=False)
        accelerator.log(row, step=at)
        return row

    bar = tqdm(total=config.steps, initial=done, disable=not main, desc="update", dynamic_ncols=True)
    with bar, _way_on(output_dir, resume_command), _stop_requests(accelerator) as stop_requested:
        if resume is None:
            record(0, {})
        reason = None
        while done < config.steps and reason is None and not stop_requested():
            began = time.perf_counter()
            parts: list[tuple[float, dict[str, float]]] = []
            optimizer.zero_grad(set_to_none=True)
            meter.start_step(profile=profile_every > 0 and done % profile_every == 0)
            for micro_step in range(done * config.accumulate, (done + 1) * config.accumulate):
                with accelerator.autocast():
                    batch = batch_at(micro_step)
                    loss, metrics = step(batch)
                count = count_of(batch)
                with meter.phase("backward"):
                    (loss * count).backward()
                del batch
                numbers = {
                    name: float(value.detach() if isinstance(value, Tensor) else value)
                    for name, value in {"loss": loss, **metrics}.items()
                }
                parts.append((count, numbers))
            row = _averaged(parts, tensors, accelerator)
            factor = lr_factor(done + 1, config.steps, optim)
            row["grad_norm"] = float(nn.utils.clip_grad_norm_(tensors, optim.clip or math.inf))
            row["lr"] = optim.lr * factor
            _check_finite(row, done + 1)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            done += 1
            if ema and done % config.ema_every == 0:
                ema.update(done)
            elapsed += time.perf_counter() - began
            row = record(done, {**row, **meter.finish_step(), "elapsed": elapsed})
            bar.update()
            if done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0):
                save(done)
                saved = done
            reason = stop_when(row) if stop_when else None
        if done < config.steps:
            folder = save(done) if saved != done else output_dir
            call([hook for hook in hooks if hook.at_stop], done, {})
            because = f", because {reason}" if reason else ""
            accelerator.print(
                f"\nstopped after update {done} of {config.steps}{because}; the state is saved in {folder}"
                + (f"\ngo on with: {resume_command}" if resume_command else "")
            )
            if reason is None:
                raise SystemExit(INTERRUPTED)
    return done


def _check_start(accelerator: Accelerator, output_dir: Path, resume: Path | None) -> None:
    """ValueError for what this loop has not, and for a folder whose run would be overwritten or mixed with another."""
    if accelerator.scaler is not None:
        raise ValueError("float16 autocast needs a loss scaler, which this loop has not: use bfloat16 or float32")
    if resume is None and (newest := latest_checkpoint(output_dir)) is not None:
        raise ValueError(f"{output_dir} holds a run: resume from {newest}, or choose a new folder")
    if resume is not None and run_of(resume.resolve()) != output_dir.resolve():
        raise ValueError(f"{resume} is no checkpoint of {output_dir}: a run goes on in its own folder")


@contextmanager
def _way_on(output_dir: Path, resume_command: str) -> Iterator[None]:
    """Within the block, an OSError also tells how the run goes on once it is mended."""
    try:
        yield
    except OSError as error:
        last = latest_checkpoint(output_dir)
        way = f"{last} is whole, go on with: {resume_command}" if last else "no checkpoint yet, start the run again"
        raise OSError(f"the run in {output_dir} cannot go on ({error}). Once that is mended: {way}") from error


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _stop_requests(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM within the block into a request, told to every process; a second one kills."""
    requested = False

    def request(number: int, frame: Any) -> None:
        nonlocal requested
        requested = True
        restore()
        accelerator.print("\nstopping after the update in progress; once more to stop at once", flush=True)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def anywhere() -> bool:
        if accelerator.num_processes == 1:
            return requested
        flag = torch.tensor([float(requested)], device=accelerator.device)
        with with_others():
            return bool(accelerator.reduce(flag, reduction="sum").item())

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield anywhere
    finally:
        restore()


def _averaged(
    parts: Sequence[tuple[float, Mapping[str, float]]], tensors: Sequence[nn.Parameter], accelerator: Accelerator
) -> dict[str, float]:
    """Metrics averaged over the micro-steps of all processes, each part with its count; and the gradients in place.

    Gradients come in as sums of count times the gradient of a mean. Where nothing counts they are 0, and the metrics
    are plain means. A parameter without gradient counts as zero.
    """
    names = list(parts[0][1])
    sums = [
        [len(parts), sum(count for count, _ in parts)],
        *([sum(part[name] for _, part in parts), sum(count * part[name] for count, part in parts)] for name in names),
    ]
    values = torch.tensor(sums, dtype=torch.float64)
    for p in tensors:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if accelerator.num_processes > 1:
        with with_others():
            values = accelerator.reduce(values.to(accelerator.device)).cpu()
            flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in tensors]))
        for p, part in zip(tensors, flat.split([p.numel() for p in tensors]), strict=True):
            p.grad = part.view_as(p)
    number, total = values[0].tolist()
    for p in tensors:
        p.grad.div_(total or 1.0)
    means = values[1:, 1] / total if total else values[1:, 0] / number
    return dict(zip(names, means.tolist(), strict=True))


def _check_finite(row: Mapping[str, float], step: int) -> None:
    """Stop before a non-finite loss or gradient reaches the weights."""
    if not all(math.isfinite(row[name]) for name in ("loss", "grad_norm")):
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        raise FloatingPointError(
            f"update {step} is not finite and was not made: {numbers}. Resume from the last checkpoint, if there is "
            "one, with a smaller learning rate, a smaller clip, or float32 weights"
        )
