"""Preference pairs as a reward reads them: M pictures, and N pairs of them that a rater compared.

One form serves both kinds of data: plain pairs (M = 2 N, every picture in one pair) and lists (n pictures of one prompt
and all their n (n - 1) / 2 pairs: 6 for 4 pictures, where plain pairs give 2). Pictures of one group share their
prompt, and in training their noise and noise level. Latents are scaled, `(z - shift_factor) * scaling_factor`.
"""

import copy
import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dinalrm_align.config.check import check_fields, check_integer
from dinalrm_align.config.reward import RewardConfig


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """M pictures in G groups and N pairs that index them.

    Args:
        latents: (M, C, H, W), scaled.
        prompt_embeds: (M, L, D), one per picture.
        pooled_prompt_embeds: (M, P).
        chosen: (N,) int64, row of the preferred picture of each pair.
        rejected: (N,) int64, row of the other one; of the same group.
        label: (N,) float32 in [0, 1], the probability that a rater prefers `chosen`; 1 is a hard label.
        group: (M,) int64 in [0, G), which pictures share prompt, noise and sigma.
        concepts: N names of what the pairs differ in, for evaluation; None where nobody knows.
        prompts: G prompts as text, for rewards that do not read the embeddings; None where they are not kept.
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    chosen: Tensor
    rejected: Tensor
    label: Tensor
    group: Tensor
    concepts: tuple[str, ...] | None = None
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._check_tensors()
        pictures, pairs = len(self.latents), len(self.chosen)
        if pairs == 0:
            raise ValueError("pair batch: got no pairs")
        lengths = {
            "prompt_embeds": (len(self.prompt_embeds), pictures),
            "pooled_prompt_embeds": (len(self.pooled_prompt_embeds), pictures),
            "group": (len(self.group), pictures),
            "rejected": (len(self.rejected), pairs),
            "label": (len(self.label), pairs),
            "concepts": (pairs if self.concepts is None else len(self.concepts), pairs),
            "prompts": (self.num_groups if self.prompts is None else len(self.prompts), self.num_groups),
        }
        for name, (got, expected) in lengths.items():
            if got != expected:
                raise ValueError(
                    f"pair batch of {pictures} pictures and {pairs} pairs: {name} has length {got}, expected {expected}"
                )
        rows = torch.cat([self.chosen, self.rejected])
        if rows.min() < 0 or rows.max() >= pictures:
            raise ValueError(f"pairs index pictures 0 to {pictures - 1}: got {int(rows.min())} to {int(rows.max())}")
        if not torch.equal(self.group[self.chosen], self.group[self.rejected]):
            raise ValueError(
                "chosen and rejected must be of one group: they are compared at one prompt, noise and sigma"
            )
        if not bool(((self.label >= 0) & (self.label <= 1)).all()):
            raise ValueError(
                f"labels are probabilities in [0, 1]: got [{self.label.min():.4g}, {self.label.max():.4g}]"
            )

    def _check_tensors(self) -> None:
        """TypeError unless every tensor is of its kind, ValueError unless of its dimensions, and finite."""
        for name, dims in dict(latents=4, prompt_embeds=3, pooled_prompt_embeds=2, label=1).items():
            tensor = vars(self)[name]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
                got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"pair batch: {name}: got {got}; expected a floating tensor")
            if tensor.dim() != dims or tensor.shape[1:].numel() == 0 or not bool(torch.isfinite(tensor).all()):
                what = f"shape {tuple(tensor.shape)}"
                raise ValueError(f"pair batch: {name}: got {what}; expected {dims} dimensions, finite numbers in each")
        for name in ("chosen", "rejected", "group"):
            rows = vars(self)[name]
            if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
                got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
                raise TypeError(f"pair batch: {name}: got {got}; expected an int64 tensor, one number each")

    @functools.cached_property  # read from the device once, and not again on another device
    def num_groups(self) -> int:
        return int(self.group.max()) + 1

    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal noise (M, C, H, W), float32, one draw a group, on the generator's device at first."""
        shape = (self.num_groups, *self.latents.shape[1:])
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(self.latents.device)[self.group]

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch with every tensor on `device`; what was checked once is not checked again."""
        moved = copy.copy(self)
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        vars(moved).update(tensors)
        return moved


@dataclasses.dataclass(frozen=True)
class PairManifest:
    """How the latents and text embeddings of a data set were made; a reward must read what was written.

    Args:
        vae_scaling_factor, vae_shift_factor: scaled latents = (z - vae_shift_factor) * vae_scaling_factor.
        text_length: T5 tokens per prompt (`max_sequence_length` of the pipeline).
    """

    vae_scaling_factor: float
    vae_shift_factor: float
    text_length: int

    def __post_init__(self) -> None:
        check_fields(self, "manifest")

    def check(self, config: "RewardConfig | PairManifest") -> None:
        """Raises ValueError when a reward of this config, or a model that makes such data, would read this wrongly."""
        reader = "the reward's config" if isinstance(config, RewardConfig) else "the model"
        for name, written, expected in (
            ("vae_scaling_factor", self.vae_scaling_factor, config.vae_scaling_factor),
            ("vae_shift_factor", self.vae_shift_factor, config.vae_shift_factor),
            ("text_length", self.text_length, config.text_length),
        ):
            if abs(written - expected) > 1e-6:
                raise ValueError(
                    f"these pairs were written with {name} {written}, {reader} says {expected}: encode them again with "
                    "its VAE and text length, or correct the config"
                )


class PairSource(Protocol):
    """What training reads: a manifest, batches as a pure function of the step, and fixed pairs to validate on."""

    manifest: PairManifest

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """The batch of micro-step `step` on process `rank` of `world`; asked twice, the same batch."""
        ...

    def validation(self) -> Sequence[PairBatch]:
        """The held-out pairs, with concept names where they are known; the same whenever it is asked."""
        ...


class ShuffledBatches:
    """Batches of `batch_size` units out of buckets that must not be mixed, reshuffled every epoch.

    Batch `index` is a pure function of (seed, index): nothing is stepped, so a run resumes by its step alone and
    processes share the work by taking every world-th index. What does not fill a batch waits for another epoch's order;
    a bucket smaller than one batch is never read, which a warning says. ValueError when no bucket fills a batch.
    """

    def __init__(self, buckets: Sequence[np.ndarray], batch_size: int, seed: int) -> None:
        self.buckets = buckets
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = sum(len(bucket) // batch_size for bucket in buckets)
        if self.per_epoch == 0:
            raise ValueError(
                f"batch_size {batch_size} is more than any bucket holds (sizes {[len(b) for b in buckets][:8]}); use a "
                "smaller batch or more pairs"
            )
        unread = sum(len(bucket) for bucket in buckets if len(bucket) < batch_size)
        if unread:
            warnings.warn(
                f"{unread} of {sum(map(len, buckets))} groups are never trained on: fewer than batch_size {batch_size} "
                "share their picture size; use a smaller batch or fewer sizes",
                stacklevel=2,
            )
        self._epoch, self._order = -1, np.empty((0, batch_size), dtype=np.int64)

    def at(self, index: int) -> np.ndarray:
        """(batch_size,) int64: the units of batch `index` >= 0."""
        epoch, position = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            size = self.batch_size
            batches = [rng.permutation(b)[: len(b) // size * size].reshape(-1, size) for b in self.buckets]
            self._epoch, self._order = epoch, rng.permutation(np.concatenate(batches))
        return self._order[position]


class BatchesInOrder(Sequence[PairBatch]):
    """Every unit of some buckets once, in order, `batch_size` at a time; each batch is read when it is indexed."""

    def __init__(self, read: Callable[[np.ndarray], PairBatch], buckets: Sequence[np.ndarray], batch_size: int) -> None:
        self._read = read
        self._units = [
            bucket[start : start + batch_size] for bucket in buckets for start in range(0, len(bucket), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> PairBatch:
        return self._read(self._units[index])


def check_draws(batch_size: int, seed: int, held_out_prompts: int) -> None:
    """TypeError or ValueError unless the numbers that a source of pairs is drawn with can be meant."""
    check_integer("batch_size", batch_size, low=1)
    check_integer("seed", seed)
    check_integer("held_out_prompts", held_out_prompts)


def held_out(prompts: Sequence[str], number: int) -> set[str]:
    """The `number` distinct prompts to validate on: those of the smallest SHA-256, whatever the order of the data."""
    distinct = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if number >= len(distinct):
        raise ValueError(f"{number} prompts to hold out of {len(distinct)} distinct ones leave nothing to train on")
    return set(distinct[:number])
