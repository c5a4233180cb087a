"""Save and load checkpoints, from which a training run resumes bit for bit.

A checkpoint is a folder checkpoints/step_000050/ with

    weights.safetensors, ema.safetensors, optimizer.pt    weights, averaged weights (if kept), optimiser state
    rng_0.pt, method_0.safetensors                        RNG state and method state of rank 0; one pair per rank
    state.json                                            step, identity and settings of the run, size and SHA-256
                                                          of each file

The folder is written atomically. Loading verifies all files first and reads .pt files with `weights_only=True`.

RNG streams are keyed by the global sample index. A run can therefore resume with a different world size if the number
of samples per update, summed over ranks, stays the same. With a different world size, the global RNG states, which
dropout uses, are not restored. Loading raises ValueError for a different world size if method states differ between
ranks, for instance if each rank holds a share of a rollout that is reused for several updates.
"""

import io
import itertools
import random
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import Tensor

from dinalrm_align.train import files
from dinalrm_align.train.device import with_others
from dinalrm_align.train.metrics import METRICS, MetricsLog
from dinalrm_align.train.state import RunState

FOLDER = "checkpoints"
EVALUATIONS = "evaluations"  # folder of files named by the update that they evaluate
STEP = re.compile(r"step_(\d{6,})")
ADDED = ("gold", "evaluation prompts", "autoencoder", "text encoders", "validation pairs", "pretraining images")
"""Entries of the identity that checkpoints of earlier versions lack. These checkpoints have no settings either."""
MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")  # moments of torch's AdamW and of bitsandbytes' AdamW8bit


def save_checkpoint(
    run: Path,
    state: RunState,
    *,
    log: MetricsLog | None,
    accelerator: Accelerator,
    keep_last: int,
    pending: Mapping[str, float] | None = None,
) -> Path:
    """Save `state` as `run`/checkpoints/step_<step>, then delete all but the `keep_last` newest checkpoints.

    `pending`: metrics of the last update, if the run failed before it called the hooks and logged these metrics.

    Must be called on every rank. Every rank writes its RNG state and method state. The main rank writes all other files
    and needs `log`. Returns the checkpoint folder. If writing a file fails, raises OSError and deletes no checkpoint.
    """
    folder = run / FOLDER / f"step_{state.step:06d}"
    main, rank = accelerator.is_main_process, accelerator.process_index
    hidden = folder.with_name(files.TEMPORARY + folder.name)
    with files.atomic_folder(folder) if main else nullcontext(hidden) as temporary:
        _barrier(accelerator)
        files.write_file(temporary / f"rng_{rank}.pt", serialised(random_state()))
        if state.method is not None:
            files.write_file(temporary / f"method_{rank}.safetensors", save(_on_cpu(state.method.state_tensors())))
        if main:
            for name, tensors in state.tensors().items():
                files.write_file(temporary / name, save(_on_cpu(tensors)))
            files.write_file(temporary / "optimizer.pt", serialised(state.optimizer.state_dict()))
        _barrier(accelerator)
        if main:
            facts = {name: getattr(state, name) for name in ("step", "elapsed", "samples")}
            facts |= {"num_processes": accelerator.num_processes, "identity": dict(state.identity)}
            facts["settings"] = dict(state.settings)
            facts |= {"common_state": state.method is None or state.method.is_common(), "metrics": log.mark()}
            facts |= {} if pending is None else {"pending": dict(pending)}
            files.seal(temporary, facts)
    if main:
        tidy(run, step=state.step, keep_last=keep_last)
    _barrier(accelerator)
    return folder


def load_checkpoint(folder: Path, state: RunState, *, steps: int, accelerator: Accelerator) -> dict[str, Any]:
    """Restore `state` and the global RNG states from the checkpoint `folder`; return the content of state.json.

    The optimiser gets the saved moments and keeps its present hyperparameters, such as the learning rate.

    Raises ValueError, before anything is changed, if the checkpoint is damaged, belongs to another run, was saved after
    more than `steps` updates, does not match the tensors of `state`, or cannot resume with the present world size.
    """
    facts = check_checkpoint(folder)
    same_processes = facts["num_processes"] == accelerator.num_processes
    rank = accelerator.process_index if same_processes else 0
    method_file = folder / f"method_{rank}.safetensors"
    _check_run(facts, state, accelerator.num_processes, folder)
    if facts["step"] > steps:
        raise ValueError(f"{folder} is at update {facts['step']}, beyond loop.steps {steps}; raise loop.steps")
    if state.average is not None and not (folder / "ema.safetensors").exists():
        raise ValueError(f"{folder} holds no averaged weights; resume with loop.ema_decay 0, as the run was started")
    if (state.method is not None) != method_file.exists():
        raise ValueError(f"{folder} was written by a method with other settings ({method_file.name}); use its own")
    tensors = [(load_file(folder / name), into) for name, into in state.tensors().items()]
    for saved, into in tensors:
        _check_fit(saved, into, folder)
    moments = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")["state"]
    _check_moments(moments, state.optimizer, folder)
    if state.method is not None:
        state.method.load_state_tensors(load_file(method_file))

    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})
    with torch.no_grad():
        for saved, into in tensors:
            for name, tensor in into.items():
                tensor.copy_(saved[name])
    if same_processes:
        set_random_state(torch.load(folder / f"rng_{rank}.pt", weights_only=True))
    state.step, state.elapsed = facts["step"], facts["elapsed"]
    return facts


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint; return the content of its state.json. Raises ValueError if the checkpoint is damaged."""
    try:
        return _read(folder)
    except ValueError as error:
        raise ValueError(f"{error}; {_alternative(folder)}") from error


def latest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint in the run folder `run`, or None if the folder has no checkpoint."""
    return next(reversed(_checkpoints(run)), None)


def checkpoint_near(run: Path, step: float) -> Path:
    """Return the checkpoint of a run whose update is nearest to `step`. Raises ValueError if the run has none."""
    if not (found := _checkpoints(run)):
        raise ValueError(f"{run}: got no checkpoint; expected at least one")
    return min(found, key=lambda checkpoint: abs(_step_of(checkpoint) - step))


def checkpoint_to_resume(path: Path) -> Path:
    """Return the checkpoint to resume from: `path` itself or, if `path` is a run folder or its
    folder checkpoints/, the run's newest checkpoint.

    Raises ValueError if `path` is not a folder or has no checkpoint, or if the checkpoint is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"nothing to resume: no folder {path}; expected the folder of a run or of a checkpoint")
    path = path.resolve()
    path = path.parent if path.name == FOLDER else path
    checkpoint = path if STEP.fullmatch(path.name) or (path / files.STATE).exists() else latest_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"nothing to resume: {path} holds no checkpoint yet; start the run again without --resume")
    check_checkpoint(checkpoint)
    return checkpoint


def new_run_folder(asked: str | None, name: str) -> Path:
    """Return the folder for a new run, without creating it.

    The folder is `asked` or, if `asked` is None, the first of runs/<name>, runs/<name>_2, ... that does not exist.
    Raises ValueError if `asked` is a file or contains checkpoints.
    """
    if asked is not None:
        if Path(asked).exists() and not Path(asked).is_dir():
            raise ValueError(f"output_dir: {asked} is a file; choose a folder")
        if latest_checkpoint(Path(asked)) is not None:
            again = f"--resume {shlex.quote(asked)}"
            raise ValueError(f"{asked} holds a run: go on with {again}, or choose another --output_dir")
        return Path(asked)
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    return next(folder for folder in map(Path("runs").joinpath, names) if not folder.exists())


def run_of(checkpoint: Path) -> Path:
    """Return the run folder that contains a checkpoint folder."""
    return checkpoint.parent.parent


def tidy(run: Path, *, step: int, keep_last: int) -> None:
    """Keep the newest `keep_last` checkpoints up to update `step`. Delete all others, and temporary folders.

    Also delete evaluations after update `step`, of a process that was killed before it saved the update.
    """
    found = _checkpoints(run)
    kept = [folder for folder in found if _step_of(folder) <= step][-keep_last:]
    for folder in [folder for folder in reversed(found) if folder not in kept]:
        files.discard_folder(folder)
    for leftover in (run / FOLDER).glob(".*"):
        if STEP.fullmatch(leftover.name.removeprefix(files.TEMPORARY).removeprefix(files.DISCARDED)):
            shutil.rmtree(leftover)
    for evaluation in (run / EVALUATIONS).glob("*"):
        if evaluation.stem.isdigit() and int(evaluation.stem) > step:
            evaluation.unlink()


def _checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    entries = (run / FOLDER).glob("step_*")
    return sorted((entry for entry in entries if STEP.fullmatch(entry.name) and entry.is_dir()), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _read(folder: Path) -> dict[str, Any]:
    facts = files.open_sealed(folder)
    files.check_mark(run_of(folder) / METRICS, facts["metrics"], prefix=True)
    return facts


def _alternative(folder: Path) -> str:
    """Return advice for an error message: resume from the newest intact checkpoint before `folder`, or start again."""
    siblings = _checkpoints(run_of(folder)) if STEP.fullmatch(folder.name) else []
    for earlier in [entry for entry in siblings if _step_of(entry) < _step_of(folder)][::-1]:
        with suppress(ValueError):
            _read(earlier)
            return f"resume from an earlier checkpoint: --resume {shlex.quote(str(earlier))}"
    return "no earlier checkpoint is intact: restore the file from a copy, or start the run again in another folder"


def _check_run(facts: Mapping[str, Any], state: RunState, num_processes: int, folder: Path) -> None:
    """Raise ValueError unless a checkpoint belongs to the run of `state` and can resume with `num_processes` ranks."""
    saved, expected = facts["identity"], dict(state.identity)
    if not facts.get("settings"):  # written by a version that did not record these
        expected = {name: value for name, value in expected.items() if name in saved or name not in ADDED}
    _check_identity(saved, expected, {**expected, **saved}, folder)
    if facts["num_processes"] == num_processes:
        if facts["samples"] != state.samples:
            raise ValueError(
                f"samples per update: got {state.samples}; expected {facts['samples']}, as in {folder}: batch_size, "
                "groups and loop.accumulate may change if their product with the number of processes does not"
            )
        return
    before = f"{folder} was written by {facts['num_processes']} processes, this run has {num_processes}"
    if not facts["common_state"]:
        raise ValueError(
            f"{before}, and each holds its share of a rollout in use: start as many, or resume from a checkpoint "
            "between two rollouts (loop.checkpoint_every a multiple of epochs x minibatches)"
        )
    if not state.samples or facts["samples"] != state.samples:
        raise ValueError(
            f"{before}: samples per update: got {state.samples}, expected {facts['samples']}; start as many processes, "
            "or change the samples per process (batch_size, groups) or loop.accumulate"
        )


def check_identity(checkpoint: Path | None, identity: Mapping[str, str]) -> None:
    """Raise ValueError if a checkpoint has other values for names in `identity`. Checks a part before models load."""
    if checkpoint is not None:
        _check_identity(files.open_sealed(checkpoint)["identity"], identity, (), checkpoint)


def _check_identity(
    saved: Mapping[str, str], expected: Mapping[str, str], required: Iterable[str], folder: Path
) -> None:
    """Raise ValueError if a value of `saved` differs from that in `expected`. required: names that both must have."""
    names = (*required, *(name for name in expected if name in saved))
    if (name := next((name for name in names if saved.get(name) != expected.get(name)), None)) is not None:
        raise ValueError(
            f"{folder} belongs to another run: its {name} is {saved.get(name)}, here it is {expected.get(name)}; "
            "resume with the run's model, reward, data and seed, or start a new run in another folder"
        )


def _check_fit(saved: Mapping[str, Tensor], into: Mapping[str, Tensor], where: Path) -> None:
    expected, got = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (into, saved))
    if expected != got:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ValueError(
            f"{where} does not fit this model: {len(differing)} tensors differ, first {differing[0]!r}: saved "
            f"{got.get(differing[0])}, expected {expected.get(differing[0])}; resume with the settings of the run"
        )


def _check_moments(saved: Mapping[int, Mapping[str, Any]], optimizer: torch.optim.Optimizer, where: Path) -> None:
    """Raise ValueError unless every saved moment has the shape of the optimiser's parameter with the same index."""
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    for number, moments in saved.items():
        nested = [value for value in moments.values() if isinstance(value, Mapping)]  # bitsandbytes nests states
        for name, moment in [item for values in (moments, *nested) for item in values.items()]:
            if name in MOMENTS and [tuple(moment.shape)] != shapes[number : number + 1]:
                raise ValueError(
                    f"{where} does not fit this optimiser: {name} of parameter {number} is {tuple(moment.shape)}, "
                    f"expected {shapes[number : number + 1]}; resume with the settings of the run"
                )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def serialised(content: Any) -> bytes:
    """Return what `torch.save` writes for `content`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _barrier(accelerator: Accelerator) -> None:
    with with_others():
        accelerator.wait_for_everyone()


def random_state() -> dict[str, Any]:
    """Return the states of the global RNGs of torch, CUDA, NumPy and Python."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the result of `random_state`."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
