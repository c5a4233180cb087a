"""The training loop `fit`, shared by all training methods, and `Method`, the interface of a training method.

There is no stateful data loader: `Method.batch_at` must be a pure function of the seed, the micro-step and the weights,
so that a resumed run gets the same batches as an uninterrupted one. On-policy methods generate rollouts in `batch_at`.

If an update or a hook raises an error, `fit` saves the state after the last complete update and raises the error
with the command to resume: in the message of an OSError, InputError or FloatingPointError, in a note of any other
error. The resumed run first calls the hooks that failed. With several ranks, `fit` saves this state only if loss or
gradient is not finite, because other errors may have occurred on one rank alone.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from dinalrm_align.train.checkpoints import (
    latest_checkpoint,
    load_checkpoint,
    random_state,
    run_of,
    save_checkpoint,
    set_random_state,
    tidy,
)
from dinalrm_align.train.checks import Readings, deferred
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.device import with_others
from dinalrm_align.train.files import InputError, write_atomically
from dinalrm_align.train.metrics import METRICS, MetricsLog
from dinalrm_align.train.state import RunState, lr_factor

INTERRUPTED = 130  # exit status of a program stopped by Ctrl-C (shell convention)
StepOutput = tuple[Tensor, Mapping[str, float | Tensor]]
Part = tuple[float, Mapping[str, float]]
"""Number of items and metrics of a micro-step."""


class Method(Protocol):
    """Interface of a training method. The loss of a batch must be the mean over `batch.count` items."""

    def batch_at(self, micro_step: int) -> Any:
        """Return the batch of a micro-step. Micro-steps are counted from 0 over the whole run."""

    def step(self, batch: Any) -> StepOutput:
        """Return the scalar loss of a batch, with its autograd graph, and a dict of metrics."""


@dataclass(frozen=True)
class Closures:
    """A `Method` made of functions. `count`: maps a batch to the number of items that the loss is averaged over."""

    make_batch: Callable[[int], Any]
    make_step: Callable[[Any], StepOutput]
    count: Callable[[Any], float] = lambda batch: 1.0

    def batch_at(self, micro_step: int) -> SimpleNamespace:
        batch = self.make_batch(micro_step)
        return SimpleNamespace(batch=batch, count=self.count(batch))

    def step(self, counted: SimpleNamespace) -> StepOutput:
        return self.make_step(counted.batch)


@dataclass(frozen=True)
class Hook:
    """A function, such as an evaluation, that `fit` calls on every rank at regular intervals and after the last update.

    If there is a moving average of the weights that has moved, the model has the averaged weights during the call.

    Args:
        every: number of updates between two calls; 0 disables the regular calls.
        call: the function; gets the number of updates done and returns metrics to log, or None.
        at_start: whether to call the function before the first update too.
        at_stop: whether to call the function also when a run stops early. Metrics returned by this call are not logged.
    """

    every: int
    call: Callable[[int], Mapping[str, float] | None]
    at_start: bool = True
    at_stop: bool = False

    def is_due(self, step: int, last: int) -> bool:
        return self.at_start if step == 0 else step == last or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a training run, which contains config.yaml, metrics.jsonl and checkpoints/.

    Args:
        path: path of the folder.
        settings: text of config.yaml; if empty, config.yaml is not written.
        checkpoint: checkpoint to resume from, which must be in this folder; None starts a new run.
        resume_command: command that resumes the run, printed when the run stops early.
    """

    path: Path
    settings: str = ""
    checkpoint: Path | None = None
    resume_command: str = ""


def fit(
    config: LoopConfig,
    optim: OptimConfig,
    state: RunState,
    method: Method,
    *,
    accelerator: Accelerator,
    run: RunFolder,
    hooks: Sequence[Hook] = (),
    meter: PhaseMeter | None = None,
    shown: Sequence[str] = ("loss",),
    stop_when: Callable[[Mapping[str, float]], str | None] | None = None,
) -> int:
    """Train up to update `config.steps` and save checkpoints; `state` is updated in place.

    An update takes `config.accumulate` micro-steps (forward and backward passes) on every rank. Loss, gradient and
    metrics are means over the items of all micro-steps. `fit` does not use DistributedDataParallel, because
    rollouts and partial forward passes do not call the `forward` method of the wrapped module. Ctrl-C and SIGTERM
    save a checkpoint after the update in progress and exit with status 130; a second signal stops the process at once.

    Args:
        state: state to start from (`RunState.initial`). In a new run, the weights of rank 0 are broadcast to all ranks.
        meter: measures the backward pass. Pass the same meter to `method` to measure phases of `method` too.
        shown: names of the metrics to show in the progress bar.
        stop_when: called after every update with the metrics; returns why to stop, or None, the same on every rank.

    Returns the number of updates done, which is less than `config.steps` only if `stop_when` stopped the run. Raises
    ValueError if the checkpoint does not match the run, or if a new run would overwrite an existing one; raises
    FloatingPointError for loss or gradient that is not finite, and OSError for failing files or ranks (see above).
    """
    meter = meter or PhaseMeter(accelerator.device)
    log, pending = _start(config, state, accelerator, run)
    saved, reason, undo = state.step if run.checkpoint else -1, None, None

    def save() -> int:
        save_checkpoint(run.path, state, log=log, accelerator=accelerator, keep_last=config.keep_last, pending=pending)
        return state.step

    def record(row: dict[str, float]) -> None:
        """Call the hooks that are due, add the returned metrics to `row`, and log `row`."""
        nonlocal pending
        pending = row
        _call([hook for hook in hooks if hook.is_due(state.step, config.steps)], config, state, row)
        if log is not None and row:
            log.append({"step": state.step, **row})
            bar.set_postfix({name: f"{row[name]:.4g}" for name in shown if name in row}, refresh=False)
        accelerator.log(row, step=state.step)
        pending = None

    def rescue(error: Exception) -> None:
        """Save the state after the last complete update, unless it is saved already or cannot be."""
        if state.whole and 0 < state.step != saved and (accelerator.num_processes == 1 or type(error) is _NotFinite):
            with suppress(Exception):  # the disk may be full, or the device lost
                if undo is not None:
                    undo()
                save()

    bar = tqdm(total=config.steps, initial=state.step, disable=log is None, desc="update", dynamic_ncols=True)
    with bar, resume_hint(run, rescue), _stop_requests(accelerator) as stop_requested:
        if pending is not None:
            record(row := pending)
            reason = stop_when(row) if stop_when and state.step else None
        while state.step < config.steps and reason is None and not stop_requested():
            undo = _undo_of(state)
            row = _update(config, optim, state, method, accelerator, meter)
            undo = None
            record(row)
            bar.update()
            is_due = config.checkpoint_every and state.step % config.checkpoint_every == 0
            if is_due or state.step == config.steps:
                saved = save()
            reason = stop_when(row) if stop_when else None
        if state.step < config.steps:
            if saved != state.step:
                save()
            _call([hook for hook in hooks if hook.at_stop], config, state, {})
            accelerator.print(_farewell(run, f"update {state.step} of {config.steps}", reason))
            if reason is None:
                raise SystemExit(INTERRUPTED)
    return state.step


class _NotFinite(FloatingPointError):
    """Loss or gradient is not finite. Every rank raises this error at the same update."""


def _start(
    config: LoopConfig, state: RunState, accelerator: Accelerator, run: RunFolder
) -> tuple[MetricsLog | None, dict[str, float] | None]:
    """Load the checkpoint or broadcast the initial weights.

    Returns the metrics log (None if not on the main rank) and the metrics of the update whose hooks must still be
    called: {} in a new run, None after a regular checkpoint.
    """
    if accelerator.scaler is not None:
        raise ValueError("mixed_precision: got fp16; expected bf16 or no: this loop has no loss scaler")
    if run.checkpoint is None and (newest := latest_checkpoint(run.path)) is not None:
        raise ValueError(f"{run.path} holds a run: resume from {newest}, or choose a new folder")
    if run.checkpoint is not None and run_of(run.checkpoint.resolve()) != run.path.resolve():
        raise ValueError(f"{run.checkpoint} is not a checkpoint of {run.path}: a run is resumed in its own folder")
    if config.ema_decay > 0 and config.weights_at(config.steps) == "last":
        accelerator.print(
            f"loop.ema_every: got {config.ema_every}, more than the {config.steps} updates of this run: the average of "
            "the weights never moves, so the last weights are evaluated and exported"
        )
    kept, pending = 0, {}
    if run.checkpoint is not None:
        facts = load_checkpoint(run.checkpoint, state, steps=config.steps, accelerator=accelerator)
        kept, pending = facts["metrics"]["bytes"], facts.get("pending")
        accelerator.wait_for_everyone()  # `tidy` below deletes files that other ranks may still be reading
    elif accelerator.num_processes > 1:
        for tensor in [tensor for tensors in state.tensors().values() for tensor in tensors.values()]:
            torch.distributed.broadcast(tensor.detach(), src=0)
    if not accelerator.is_main_process:
        return None, pending
    with resume_hint(run):
        tidy(run.path, step=state.step, keep_last=config.keep_last)
        if run.settings:
            write_atomically(run.path / "config.yaml", run.settings)
        return MetricsLog(run.path / METRICS, keep=kept), pending


def _undo_of(state: RunState) -> Callable[[], None]:
    """Return a function that restores the method's state and the global RNG states as they are now."""
    kept, random = {} if state.method is None else state.method.state_tensors(), random_state()

    def undo() -> None:
        set_random_state(random)
        if state.method is not None:
            state.method.load_state_tensors(kept)

    return undo


def _call(hooks: Sequence[Hook], config: LoopConfig, state: RunState, row: dict[str, float]) -> None:
    """Call hooks and add their metrics to `row`. During the calls, the model has the weights that are exported."""
    averaged = hooks and state.average is not None and config.weights_at(state.step) == "average"
    with state.average.in_place() if averaged else nullcontext():
        for hook in hooks:
            row.update(hook.call(state.step) or {})


def _update(
    config: LoopConfig, optim: OptimConfig, state: RunState, method: Method, accelerator: Accelerator, meter: PhaseMeter
) -> dict[str, float]:
    """Run the micro-steps of one optimiser update and apply it; return the metrics of the update."""
    began = time.perf_counter()
    parts: list[tuple[float, Mapping[str, float | Tensor]]] = []
    tensors = list(state.parameters.values())
    state.optimizer.zero_grad(set_to_none=True)
    meter.start_step(profile=meter.profile_every > 0 and state.step % meter.profile_every == 0)
    with deferred() as readings:
        for micro_step in range(state.step * config.accumulate, (state.step + 1) * config.accumulate):
            with accelerator.autocast():
                batch = method.batch_at(micro_step)
                loss, metrics = method.step(batch)
            count = batch.count
            with meter.phase("backward"):
                (loss * count).backward()
            del batch
            values = {"loss": loss, **metrics}.items()
            parts.append((count, {n: v.detach() if isinstance(v, Tensor) else v for n, v in values}))
        row, items = _averaged(_read(parts, readings), tensors, accelerator)
    # Without items, momentum and weight decay must not move the weights.
    factor = lr_factor(state.step + 1, config.steps, optim) if items else 0.0
    row["grad_norm"] = float(nn.utils.clip_grad_norm_(tensors, optim.clip or math.inf))
    row["lr"] = optim.lr * factor
    if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        raise _NotFinite(
            f"update {state.step + 1} is not finite and was not made: {numbers}; a smaller optim.lr or optim.clip, or "
            "float32 weights can help"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    state.whole = False
    state.optimizer.step()
    state.step += 1
    if state.average is not None and state.step % config.ema_every == 0:
        state.average.update(state.step)
    state.whole = True
    state.elapsed += time.perf_counter() - began
    return {**row, **meter.finish_step(), "elapsed": state.elapsed}


def _farewell(run: RunFolder, update: str, reason: str | None) -> str:
    """Return the message of a run that stops early, after `update`, with the command to resume."""
    because = f", because {reason}" if reason else ""
    resume = f"\nresume with: {run.resume_command}" if run.resume_command else ""
    return f"\nstopped after {update}{because}; checkpoint: {latest_checkpoint(run.path)}{resume}"


@contextmanager
def resume_hint(run: RunFolder, rescue: Callable[[Exception], None] | None = None) -> Iterator[None]:
    """Context manager that calls `rescue` after an error, and adds the command to resume the run to the error.

    If `rescue` is given, a note marks the error for `train.command.refusing` as one of a run that had started. A
    resumed run that is complete repeats what follows `fit`, so that a program can use this context there too.
    """
    try:
        yield
    except Exception as error:
        if rescue is not None:
            rescue(error)
        last = latest_checkpoint(run.path)
        hint = f"resume from {last} with: {run.resume_command}" if last else "there is no checkpoint yet, start again"
        for kind in (OSError, InputError, FloatingPointError):
            if isinstance(error, kind):
                stopped = kind(f"run {run.path} stopped ({error}). Once that is fixed: {hint}")
                if rescue is not None:
                    stopped.add_note("the run had started")
                raise stopped from error
        error.add_note(f"run {run.path} stopped; once that is fixed: {hint}")
        raise


@contextmanager
def _stop_requests(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Context manager that yields a function. The function returns whether any rank has received SIGINT or SIGTERM."""
    requested = False

    def request(number: int, frame: Any) -> None:
        nonlocal requested
        requested = True
        restore()
        accelerator.print("\nstopping after the update in progress; repeat to stop at once", flush=True)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def requested_anywhere() -> bool:
        if accelerator.num_processes == 1:
            return requested
        flag = torch.tensor([float(requested)], device=accelerator.device)
        with with_others():
            return bool(accelerator.reduce(flag, reduction="sum").item())

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested_anywhere
    finally:
        restore()


def _read(parts: Sequence[tuple[float, Mapping[str, float | Tensor]]], readings: Readings) -> list[Part]:
    """Return the metrics as floats. Those on a GPU are read in one transfer, with the checks that wait to be judged."""
    floats = iter(readings.read([value for _, metrics in parts for value in metrics.values()]))
    return [(count, {name: next(floats) for name in metrics}) for count, metrics in parts]


def _averaged(
    parts: Sequence[Part], tensors: Sequence[nn.Parameter], accelerator: Accelerator
) -> tuple[dict[str, float], float]:
    """Average metrics and gradients over the micro-steps of all ranks, weighted by the number of items per micro-step.

    `parts`: (number of items, metrics) of every micro-step of this rank. `tensors`: parameters. On entry, their
    gradients are sums over items; on return, means. Returns (metrics, number of items). If there are no items, the
    metrics are unweighted means.
    """
    names = list(parts[0][1])
    sums = [[len(parts), sum(count for count, _ in parts)]]
    sums += [[sum(part[name] for _, part in parts), sum(c * part[name] for c, part in parts)] for name in names]
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
    return dict(zip(names, means.tolist(), strict=True)), total
