"""Prompts and their embeddings.

Text follows `StableDiffusion3Pipeline.encode_prompt`: features of both CLIP towers, zero-padded to T5's width, then
T5's `text_length` tokens, no mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from dinalrm_align.models.hub import check_source
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import reading

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline


MAX_CHARACTERS = 10_000
"""Of a prompt. Text encoders read 77 to 512 tokens and cut off the rest; far longer text is a mistake in the data."""


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. TypeError unless they are a sequence of strings (and no string itself), ValueError when
    there is none, or one is longer than MAX_CHARACTERS.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: got {type(prompts).__name__} {prompts!r:.60}; expected a list of strings")
    if len(prompts) == 0:
        raise ValueError("prompts: got none; expected at least one")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts: got {type(prompt).__name__} {prompt!r:.60}, expected strings (at {index})")
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(f"prompts: got {len(prompt)} characters at {index}; expected at most {MAX_CHARACTERS}")
    return list(prompts)


class PromptEncoder:
    """Prompts to (prompt_embeds (B, L, D), pooled_prompt_embeds (B, P)), without gradient; each prompt is encoded once.

    Text encoders run in their own dtype, whatever autocast is on around them.

    source: a StableDiffusion3Pipeline whose text encoders are borrowed where they are, or a pipeline folder or hub id
    from which text encoders and tokenizers are loaded at the first prompt, in `dtype`. device: where embeddings are
    returned (and loaded encoders run); default: where a given pipeline is, else the CPU. The cache lies on the CPU and
    holds the `max_cached` newest prompts; in SD3.5's sizes and bfloat16, 1000 of them take about 2 GB.
    """

    def __init__(
        self,
        source: "StableDiffusion3Pipeline | str | Path",
        *,
        text_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
        max_cached: int = 10_000,
    ) -> None:
        self.source = source
        self.text_length, self.max_cached = text_length, max_cached
        self.dtype, self.local_files_only = dtype, local_files_only
        self._pipeline: StableDiffusion3Pipeline | None = None if isinstance(source, str | Path) else source
        home = "cpu" if self._pipeline is None else self._pipeline.device
        self.device = available_device(home if device is None else device)
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: Sequence[str], batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, P) on `device`, in the text encoders' dtype. Unseen prompts go through in batches."""
        prompts = check_prompts(prompts)
        unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        for start in range(0, len(unseen), batch_size):
            part = unseen[start : start + batch_size]
            self._cache.update(zip(part, zip(*self._encode(part), strict=True), strict=True))
        embeds, pooled = zip(*(self._cache[prompt] for prompt in prompts), strict=True)
        for oldest in list(self._cache)[: -self.max_cached]:
            del self._cache[oldest]
        return torch.stack(embeds).to(self.device), torch.stack(pooled).to(self.device)

    def release(self) -> None:
        """Let text encoders go that were loaded here; what is cached stays, and a new prompt loads them again."""
        if isinstance(self.source, str | Path):
            self._pipeline = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def empty(self, batch: int) -> tuple[Tensor, Tensor]:
        """The embeddings of the empty prompt, for guidance: (batch, L, D), (batch, P)."""
        return self([""] * batch)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        pipeline = self._text_pipeline()
        encoders = _text_encoders(pipeline)
        training = [encoder.training for encoder in encoders]
        try:
            for encoder in encoders:
                encoder.eval()
            with torch.autocast(pipeline.device.type, enabled=False):
                embeds, _, pooled, _ = pipeline.encode_prompt(
                    prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.text_length
                )
        finally:
            for encoder, mode in zip(encoders, training, strict=True):
                encoder.train(mode)
        return embeds.cpu(), pooled.cpu()

    def _text_pipeline(self) -> "StableDiffusion3Pipeline":
        if self._pipeline is None:
            self._pipeline = self._load()
        pipeline = self._pipeline
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            raise ValueError(
                "prompts need text encoders, and the pipeline was built without them: pass a pipeline that has them, "
                "or prompt_embeds and pooled_prompt_embeds"
            )
        if pipeline.text_encoder_3 is None and pipeline.transformer is None:
            raise ValueError("the base model has no text_encoder_3 (T5): pass pipeline=..., or prompt_embeds")
        return pipeline

    def _load(self) -> "StableDiffusion3Pipeline":
        from diffusers import StableDiffusion3Pipeline

        check_source("base model", self.source)
        folder = Path(self.source)
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"prompts need text encoders, and {folder} is no pipeline folder (it has no model_index.json): pass "
                "pipeline=..., or prompt_embeds and pooled_prompt_embeds"
            )
        with reading("text encoders and tokenizers", self.source):
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                str(self.source),
                transformer=None,
                vae=None,
                dtype=self.dtype,
                local_files_only=folder.is_dir() or self.local_files_only,
                use_safetensors=True,
            )
        for encoder in _text_encoders(pipeline):
            encoder.requires_grad_(False)
        return pipeline.to(self.device)


def _text_encoders(pipeline: "StableDiffusion3Pipeline") -> list[torch.nn.Module]:
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    return [encoder for encoder in encoders if encoder is not None]


@dataclass(frozen=True)
class Conditions:
    """What a batch is conditioned on: B prompts and their embeddings.

    prompts: B strings (a pixel reward and the gold score read these). prompt_embeds (B, L, D), pooled_prompt_embeds
        (B, P).
    """

    prompts: Sequence[str]
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def __post_init__(self) -> None:
        for name, tensor, dims in (
            ("prompt_embeds", self.prompt_embeds, 3),
            ("pooled_prompt_embeds", self.pooled_prompt_embeds, 2),
        ):
            if not isinstance(tensor, Tensor) or tensor.dim() != dims or not tensor.is_floating_point():
                got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                expected = "(B, L, D)" if dims == 3 else "(B, P)"
                raise TypeError(f"{name}: got {got}; expected a floating tensor {expected}")
        sizes = {len(self.prompts), len(self.prompt_embeds), len(self.pooled_prompt_embeds)}
        if isinstance(self.prompts, str) or len(sizes) > 1:
            raise ValueError(
                f"one embedding per prompt: got {len(self.prompts)} prompts, {len(self.prompt_embeds)} prompt_embeds, "
                f"{len(self.pooled_prompt_embeds)} pooled_prompt_embeds"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def encode(cls, encoder: PromptEncoder, prompts: Sequence[str], batch_size: int = 64) -> Self:
        """Encode one prompt or more; the embeddings end up on the CPU, in the text encoders' dtype."""
        prompts = check_prompts(prompts)
        parts = [encoder(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
        embeds, pooled = (torch.cat([part.cpu() for part in column]) for column in zip(*parts, strict=True))
        return cls(list(prompts), embeds, pooled)

    def take(self, indices: Sequence[int], device: torch.device | str | None = None) -> Self:
        """The rows of `indices`, on `device`."""
        chosen = list(indices)
        return type(self)(
            [self.prompts[index] for index in chosen],
            self.prompt_embeds[chosen].to(device),
            self.pooled_prompt_embeds[chosen].to(device),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same prompts with their embeddings on `device`."""
        embeds, pooled = (
            part.to(device, non_blocking=non_blocking) for part in (self.prompt_embeds, self.pooled_prompt_embeds)
        )
        return replace(self, prompt_embeds=embeds, pooled_prompt_embeds=pooled)

    def pin_memory(self) -> Self:
        """The same prompts with their embeddings in page-locked memory."""
        return replace(
            self,
            prompt_embeds=self.prompt_embeds.pin_memory(),
            pooled_prompt_embeds=self.pooled_prompt_embeds.pin_memory(),
        )
