"""Preference pairs as a reward reads them: M pictures, and N pairs of them that a rater compared.

One form serves both kinds of data: plain pairs (M = 2 N, every picture in one pair) and lists (n pictures of one prompt
and all their n (n - 1) / 2 pairs: 6 for 4 pictures, where plain pairs give 2). Pictures of one group share their
prompt, and in training their noise and noise level. Latents are scaled, `(z - shift_factor) * scaling_factor`.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dinalrm_align.data.weight_sample import WeightSample
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.settings import check_fields

EncodeImages = Callable[[Tensor], Tensor]
"""images (B, 3, H, W) in [0, 1] -> scaled latents (B, C, h, w)"""
EncodePrompts = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""B prompts -> prompt_embeds (B, L, D), pooled_prompt_embeds (B, P)"""


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """M pictures in G groups and N pairs that index them.

    Args:
        latents: (M, C, H, W), scaled.
        conditions: M prompts and their embeddings, one per image; a prompt whose text is not known is "".
        chosen: (N,) int64, row of the preferred picture of each pair.
        rejected: (N,) int64, row of the other one; of the same group.
        label: (N,) float32 in [0, 1], the probability that a rater prefers `chosen`; 1 is a hard label.
        group: (M,) int64 in [0, G), which pictures share prompt, noise and sigma.
        num_groups: G.
        concepts: N names of what the pairs differ in, for evaluation; None where nobody knows.
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
        """N pairs of two images each: chosen, rejected (N, C, H, W), and the N prompts; labels are 1 unless given."""
        pairs, device = len(chosen), chosen.device
        rows = torch.arange(pairs, device=device)
        return cls(
            latents=torch.cat([chosen, rejected]),
            conditions=conditions.take([*range(pairs), *range(pairs)], device),
            chosen=rows,
            rejected=rows + pairs,
            label=torch.ones(pairs, device=device) if label is None else torch.tensor(label, device=device),
            group=rows.repeat(2),
            concepts=concepts,
        )

    def __post_init__(self) -> None:
        self._check_tensors()
        pictures, pairs = len(self.latents), len(self.chosen)
        if pairs == 0:
            raise ValueError("pair batch: got no pairs")
        lengths = {
            "conditions": (len(self.conditions), pictures),
            "group": (len(self.group), pictures),
            "rejected": (len(self.rejected), pairs),
            "label": (len(self.label), pairs),
            "concepts": (pairs if self.concepts is None else len(self.concepts), pairs),
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
        object.__setattr__(self, "num_groups", int(self.group.max()) + 1)  # read from the device once
        if not bool(((self.label >= 0) & (self.label <= 1)).all()):
            raise ValueError(
                f"labels are probabilities in [0, 1]: got [{self.label.min():.4g}, {self.label.max():.4g}]"
            )

    def _check_tensors(self) -> None:
        """TypeError unless every tensor is of its kind, ValueError unless of its dimensions, and finite."""
        for name, dims in dict(latents=4, prompt_embeds=3, pooled_prompt_embeds=2, label=1).items():
            tensor = vars(self.conditions if name.endswith("prompt_embeds") else self)[name]
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

    @property
    def group_prompts(self) -> tuple[str, ...] | None:
        """The G prompts as text; None where none is known."""
        by_group = dict(zip(self.group.tolist(), self.conditions.prompts, strict=True))
        return tuple(by_group[group] for group in range(self.num_groups)) if any(by_group.values()) else None

    def draw_noise(self, generator: torch.Generator) -> Tensor:
        """Standard normal noise (M, C, H, W), float32, one draw a group, on the generator's device at first."""
        shape = (self.num_groups, *self.latents.shape[1:])
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(self.latents.device)[self.group]

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch with every tensor on `device`; what was checked once is not checked again."""
        # Copies to the CPU must block: values could be read before they arrive.
        non_blocking = torch.device(device).type == "cuda" and self.latents.device.type == "cpu"
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pinned(self) -> "PairBatch":
        """The same batch in page-locked memory, which a GPU copies from while it computes."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> "PairBatch":
        changed = copy.copy(self)  # keeps num_groups and skips the checks
        parts = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | Conditions)}
        vars(changed).update({name: change(value) for name, value in parts.items()})
        return changed


@dataclasses.dataclass(frozen=True)
class PairManifest:
    """How the latents and text embeddings of a data set were made; a reward must read what was written.

    Args:
        vae_scaling_factor, vae_shift_factor: scaled latents = (z - vae_shift_factor) * vae_scaling_factor.
        text_length: T5 tokens per prompt (`max_sequence_length` of the pipeline).
        encoded_with: the VAE ("vae") and text encoders ("text_encoder", ...) that made them, by folder of the pipeline;
            empty where nobody noted it.
    """

    vae_scaling_factor: float
    vae_shift_factor: float
    text_length: int
    encoded_with: dict[str, WeightSample] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "manifest")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "PairManifest":
        """What `dataclasses.asdict` made of one. TypeError or ValueError when it cannot be meant."""
        samples = values.get("encoded_with", {})
        if not isinstance(samples, dict) or not all(isinstance(sample, dict) for sample in samples.values()):
            raise ValueError(f"manifest.encoded_with: got {samples!r:.60}; expected a sample of weights by name")
        samples = {name: WeightSample(**sample) for name, sample in samples.items()}
        return cls(**{**values, "encoded_with": samples})

    def check_encoders(self, of_the_model: Callable[[str], WeightSample | None]) -> list[str]:
        """ValueError when the pairs were made by another VAE or text encoder than the model's; the names of those that
        could not be compared. of_the_model: folder of the pipeline -> a sample of its weights, None if not at hand.
        """
        unknown = []
        for name, written in self.encoded_with.items():
            found = of_the_model(name)
            if found is None:
                unknown.append(name)
            elif not written.same_weights(found):
                raise ValueError(
                    f"these pairs were encoded with the {name} of {written.source!r} ({written.tensors} tensors, "
                    f"{written.values[:3]}...); that of {found.source!r} has other weights ({found.tensors} tensors, "
                    f"{found.values[:3]}...): train the model they were encoded for, or encode them again"
                )
        return unknown

    def check(self, expected: "EncodingFormat") -> None:
        """ValueError unless these pairs were encoded as `expected` (a reward's config, a model's manifest) says."""
        for name, written, wanted in (
            ("vae_scaling_factor", self.vae_scaling_factor, expected.vae_scaling_factor),
            ("vae_shift_factor", self.vae_shift_factor, expected.vae_shift_factor),
            ("text_length", self.text_length, expected.text_length),
        ):
            if abs(written - wanted) > 1e-6:
                raise ValueError(
                    f"these pairs were encoded with {name} {written}, expected {wanted}: encode them again with the "
                    "model's VAE and text length, or correct the config"
                )


class EncodingFormat(Protocol):
    """How latents are scaled and how many T5 tokens a prompt has: a PairManifest, or a reward's config."""

    @property
    def vae_scaling_factor(self) -> float: ...

    @property
    def vae_shift_factor(self) -> float: ...

    @property
    def text_length(self) -> int: ...


class PairSource(Protocol):
    """What training reads: a manifest, batches as a pure function of the step, and fixed pairs to validate on.

    reads_files_only: whether any thread may ask for batches, since no encoder runs for them.
    """

    manifest: PairManifest
    reads_files_only: bool

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """The batch of micro-step `step` on process `rank` of `world`; asked twice, the same batch."""
        ...

    def validation(self) -> Sequence[PairBatch]:
        """The held-out pairs, with concept names where they are known; the same whenever it is asked."""
        ...
