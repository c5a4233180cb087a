"""Batches of preference pairs for a reward: M images, and the N pairs of these images that raters compared.

A batch can hold separate pairs (M = 2 N, each image in one pair) and ranked lists (n images of one prompt, which form
n (n - 1) / 2 pairs). Scaled latents are `(z - shift_factor) * scaling_factor`, where z are the latents of the VAE.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dinalrm_align.models.text import Conditions
from dinalrm_align.train.checks import check
from dinalrm_align.train.device import to_device
from dinalrm_align.train.files import InputError
from dinalrm_align.train.settings import check_fields

EncodeImages = Callable[[Tensor], Tensor]
"""images (B, 3, H, W) in [0, 1] -> scaled latents (B, C, h, w)"""
EncodePrompts = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""B prompts -> prompt_embeds (B, L, D), pooled_prompt_embeds (B, P)"""


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Batch of N preference pairs of M images. The images form G groups; both images of a pair are in the same group.

    The images of a group share the prompt. A reward adds the same noise at the same sigma to all images of a group.

    Args:
        latents: (M, C, H, W), scaled.
        conditions: prompt and text embeddings of each of the M images. An unknown prompt is "".
        chosen: (N,) int64, index in `latents` of each pair's preferred image.
        rejected: (N,) int64, index in `latents` of each pair's rejected image.
        label: (N,) float32 in [0, 1], probability that a rater prefers the chosen image.
        group: (M,) int64 in [0, G), index of each image's group.
        concepts: for each pair, the property in which its images differ; None if unknown for at least one pair.

    Raises TypeError for a wrong dtype, and ValueError for inconsistent shapes or for indices or values out of range.
    """

    latents: Tensor
    conditions: Conditions
    chosen: Tensor
    rejected: Tensor
    label: Tensor
    group: Tensor
    concepts: tuple[str, ...] | None = None
    num_groups: int = dataclasses.field(init=False)

    @classmethod
    def plain(
        cls,
        chosen: Tensor,
        rejected: Tensor,
        conditions: Conditions,
        *,
        label: Sequence[float] | None = None,
        concepts: tuple[str, ...] | None = None,
    ) -> Self:
        """Build a batch of N separate pairs of images. chosen, rejected: latents (N, C, H, W). label: default 1."""
        pairs = len(chosen)
        rows = torch.arange(pairs)
        batch = cls(  # checks indices and labels where the host can read them
            latents=torch.cat([chosen, rejected]),
            conditions=conditions.take([*range(pairs), *range(pairs)]),
            chosen=rows,
            rejected=rows + pairs,
            label=torch.ones(pairs) if label is None else torch.tensor(label),
            group=rows.repeat(2),
            concepts=concepts,
        )
        return batch.to(chosen.device)

    def __post_init__(self) -> None:
        self._check_tensors()
        images, pairs = len(self.latents), len(self.chosen)
        if pairs == 0:
            raise InputError("pair batch: got no pairs")
        lengths = {
            "conditions": (len(self.conditions), images),
            "group": (len(self.group), images),
            "rejected": (len(self.rejected), pairs),
            "label": (len(self.label), pairs),
            "concepts": (pairs if self.concepts is None else len(self.concepts), pairs),
        }
        for name, (got, expected) in lengths.items():
            if got != expected:
                raise InputError(f"pair batch: {name}: got length {got}; expected {expected}")
        rows = torch.cat([self.chosen, self.rejected])
        if rows.min() < 0 or rows.max() >= images:
            got = f"{int(rows.min())} to {int(rows.max())}"
            raise InputError(f"pair batch: chosen, rejected: got rows {got}; expected 0 to {images - 1}")
        if not torch.equal(self.group[self.chosen], self.group[self.rejected]):
            raise InputError("pair batch: group: chosen and rejected differ; expected both images in one group")
        object.__setattr__(self, "num_groups", int(self.group.max()) + 1)  # read from the device once
        if not bool(((self.label >= 0) & (self.label <= 1)).all()):
            got = f"[{self.label.min():.4g}, {self.label.max():.4g}]"
            raise InputError(f"pair batch: label: got values in {got}; expected [0, 1]")

    def _check_tensors(self) -> None:
        for name, dims in dict(latents=4, prompt_embeds=3, pooled_prompt_embeds=2, label=1).items():
            tensor = vars(self.conditions if name.endswith("prompt_embeds") else self)[name]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
                got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"pair batch: {name}: got {got}; expected a floating tensor")
            if tensor.dim() != dims or tensor.shape[1:].numel() == 0:
                raise InputError(f"pair batch: {name}: got shape {tuple(tensor.shape)}; expected {dims} dimensions")
            check((~torch.isfinite(tensor)).sum(), functools.partial(_judge_finite, name))
        for name in ("chosen", "rejected", "group"):
            rows = vars(self)[name]
            if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
                got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
                raise TypeError(f"pair batch: {name}: got {got}; expected a 1-D int64 tensor")

    @property
    def group_prompts(self) -> tuple[str, ...] | None:
        """Prompt of each of the G groups; None if all prompts are unknown."""
        by_group = dict(zip(self.group.tolist(), self.conditions.prompts, strict=True))
        return tuple(by_group[group] for group in range(self.num_groups)) if any(by_group.values()) else None

    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """Return standard normal noise, (M, C, H, W), float32. All images of a group get the same noise."""
        shape = (self.num_groups, *self.latents.shape[1:])
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(self.latents.device)[self.group]

    def to(self, device: torch.device | str) -> Self:
        """Return a copy of the batch on `device`."""
        return self._each(lambda part: to_device(part, device) if isinstance(part, Tensor) else part.to(device))

    def pin_memory(self) -> Self:
        """Return a copy of the batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        changed = copy.copy(self)
        parts = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | Conditions)}
        vars(changed).update({name: change(value) for name, value in parts.items()})
        return changed


def _judge_finite(name: str, bad: list[float]) -> None:
    if bad[0]:
        raise InputError(f"pair batch: {name}: got NaN or infinite values; expected finite ones")


@dataclasses.dataclass(frozen=True)
class WeightSample:
    """A few weights that identify a network. source: folder or hub id of the network's pipeline.

    tensors: number of tensors with two or more dimensions. values: first elements of up to 16 of these tensors.
    """

    source: str
    tensors: int
    values: list[float]

    def __post_init__(self) -> None:
        check_fields(self, "encoded_with")

    def same_weights(self, other: "WeightSample") -> bool:
        """Return whether both samples may come from one network: values must be equal up to rounding to bfloat16."""
        close = (math.isclose(a, b, rel_tol=2.0**-7, abs_tol=1e-6) for a, b in zip(self.values, other.values))
        return (self.tensors, len(self.values)) == (other.tensors, len(other.values)) and all(close)


class EncodingFormat(Protocol):
    """Protocol of objects that hold encoding settings: `PairManifest` and the configs of rewards."""

    vae_scaling_factor: float
    vae_shift_factor: float
    text_length: int


@dataclasses.dataclass(frozen=True)
class PairManifest:
    """Record of how the latents and text embeddings of a data set were encoded.

    Args:
        text_length: T5 tokens per prompt (`max_sequence_length` of the pipeline).
        encoded_with: `WeightSample` of each encoder, keyed by pipeline subfolder, such as "vae"; may be empty.
    """

    vae_scaling_factor: float
    vae_shift_factor: float
    text_length: int
    encoded_with: dict[str, WeightSample] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "manifest")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`: build a manifest. Raises TypeError or ValueError for invalid values."""
        samples = values.get("encoded_with", {})
        if not isinstance(samples, dict) or not all(isinstance(sample, dict) for sample in samples.values()):
            raise InputError(f"manifest.encoded_with: got {samples!r:.60}; expected a sample of weights by name")
        samples = {name: WeightSample(**sample) for name, sample in samples.items()}
        return cls(**{**values, "encoded_with": samples})

    def check_encoders(self, sample_of: Callable[[str], WeightSample | None]) -> list[str]:
        """Raise ValueError if the pairs were encoded with a VAE or text encoder whose weights differ from the model's.

        sample_of: function that takes a subfolder of the model's pipeline, such as "vae", and returns a `WeightSample`,
        or None if the weights are unavailable. `check_encoders` returns the subfolders with unavailable weights.
        """
        unknown = []
        for name, written in self.encoded_with.items():
            found = sample_of(name)
            if found is None:
                unknown.append(name)
            elif not written.same_weights(found):
                raise InputError(
                    f"these pairs were encoded with the {name} of {written.source!r} ({written.tensors} tensors, "
                    f"{written.values[:3]}...); that of {found.source!r} has other weights ({found.tensors} tensors, "
                    f"{found.values[:3]}...): train the model they were encoded for, or encode them again"
                )
        return unknown

    def check(self, expected: EncodingFormat) -> None:
        """Raise ValueError unless the pairs were encoded with the scaling, shift and text length in `expected`."""
        for name in ("vae_scaling_factor", "vae_shift_factor", "text_length"):
            wanted = getattr(expected, name)
            if abs(vars(self)[name] - wanted) > 1e-6:
                raise InputError(
                    f"these pairs were encoded with {name} {vars(self)[name]}, expected {wanted}: encode them again "
                    "with the model's VAE and text length, or correct the config; its text_length is set by "
                    "--text_length, in train_reward.py by --reward.text_length"
                )
