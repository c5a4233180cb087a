"""Prompts and their embeddings, computed by `StableDiffusion3Pipeline.encode_prompt`.

Along the sequence, prompt_embeds holds the features of both CLIP encoders, zero-padded to T5's width, and then
`text_length` T5 features. There is no attention mask.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from dinalrm_align.models.layout import TEXT_ENCODERS, TEXT_PARTS, check_files, weight_options, without_t5
from dinalrm_align.models.prompt import check_prompt
from dinalrm_align.models.weights import check_source, find_file, loading
from dinalrm_align.train.device import available_device, to_device
from dinalrm_align.train.files import read_json, reading
from dinalrm_align.train.progress import progress

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

CLIP_TOKENS = 77
"""Number of CLIP tokens of SD3 and SD3.5, which come before the T5 tokens in prompt_embeds."""
_ENCODING = threading.RLock()
"""Lock held while text encoders run: pipelines and fast tokenizers keep state between calls and are not thread-safe."""

Embeds = tuple[Tensor, Tensor]
"""prompt_embeds (B, L, D) and pooled_prompt_embeds (B, P)."""


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """Return prompts, a sequence or a NumPy array of strings, as a list.

    Raises TypeError for non-strings, and ValueError for none or an invalid one.
    """
    if isinstance(prompts, np.ndarray) and prompts.ndim == 1:
        prompts = prompts.tolist()
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: got {type(prompts).__name__} {prompts!r:.60}; expected a list of strings")
    if len(prompts) == 0:
        raise ValueError("prompts: got none; expected at least one")
    for index, prompt in enumerate(prompts):
        check_prompt(f"prompts[{index}]", prompt)
    return list(prompts)


@dataclass(frozen=True)
class Conditions:
    """A batch of B prompts and their embeddings, the text input of policies and rewards.

    Args:
        prompts: B strings, for rewards that read text; empty strings if the text is unknown.
        prompt_embeds, pooled_prompt_embeds: (B, L, D) and (B, P), floating-point.
        text_length: number of T5 tokens in `prompt_embeds`; None if unknown.
        other_lengths: embeddings of the same prompts, for rewards trained with another number of T5 tokens:
            {number of T5 tokens: (prompt_embeds, pooled_prompt_embeds)}.
    """

    prompts: Sequence[str]
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    text_length: int | None = None
    other_lengths: Mapping[int, Embeds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for embeds in ((self.prompt_embeds, self.pooled_prompt_embeds), *self.other_lengths.values()):
            for name, tensor, expected in zip(("prompt_embeds", "pooled_prompt_embeds"), embeds, ("B, L, D", "B, P")):
                wrong = not isinstance(tensor, Tensor) or not tensor.is_floating_point()
                if wrong or tensor.dim() != expected.count(",") + 1:
                    tensor_is = isinstance(tensor, Tensor)
                    got = f"{tensor.dtype} {tuple(tensor.shape)}" if tensor_is else type(tensor).__name__
                    raise TypeError(f"{name}: got {got}; expected a floating tensor ({expected})")
            if isinstance(self.prompts, str) or not len(self.prompts) == len(embeds[0]) == len(embeds[1]):
                got = f"{len(embeds[0])} prompt_embeds, {len(embeds[1])} pooled_prompt_embeds"
                raise ValueError(f"one embedding per prompt: got {len(self.prompts)} prompts, {got}")

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def encode(
        cls, encoder: "PromptEncoder", prompts: Sequence[str], other_lengths: Iterable[int] = (), batch_size: int = 32
    ) -> Self:
        """Return `Conditions` on the CPU in the text encoders' dtype. Each distinct prompt is encoded once.

        other_lengths: numbers of T5 tokens to encode with, in addition to the encoder's `text_length`. With SD3.5's
        text encoders, 128 T5 tokens and bfloat16, 1,000 distinct prompts take about 1.7 GB.
        """
        prompts = check_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = [row_of[prompt] for prompt in prompts]
        embeds = {}
        for length in {encoder.text_length, *other_lengths}:
            starts = progress(range(0, len(distinct), batch_size), f"prompts at {length} T5 tokens")
            parts = [encoder.encode(distinct[start : start + batch_size], length) for start in starts]
            whole = tuple(torch.cat(column) for column in zip(*parts, strict=True))
            embeds[length] = tuple(tensor[rows] for tensor in whole) if len(distinct) < len(prompts) else whole
        return cls(prompts, *embeds.pop(encoder.text_length), encoder.text_length, embeds)

    def for_length(self, text_length: int) -> Embeds:
        """Return the embeddings with `text_length` T5 tokens. Raises ValueError if the batch has none of this length.

        If `self.text_length` is None, the length is unknown, and the embeddings are returned without a check.
        """
        if text_length in self.other_lengths:
            return self.other_lengths[text_length]
        if self.text_length not in (None, text_length):
            have = sorted({self.text_length, *self.other_lengths})
            got = f"got embeddings of {', '.join(map(str, have))} T5 tokens; expected {text_length}, this reward's"
            raise ValueError(f"text_length: {got}: encode the prompts with that length as well")
        return self.prompt_embeds, self.pooled_prompt_embeds

    def take(self, indices: Iterable[int], device: torch.device | str | None = None) -> Self:
        """Return the rows `indices`, on `device`; None: where they are."""
        chosen = list(indices)
        if device is None and chosen == list(range(len(self))):
            return self
        rows = torch.tensor(chosen, dtype=torch.long)

        def select(tensor: Tensor) -> Tensor:
            selected = tensor[to_device(rows, tensor.device)]
            return selected if device is None else to_device(selected, device)

        return self._map([self.prompts[index] for index in chosen], select)

    def to(self, device: torch.device | str) -> Self:
        return self._map(self.prompts, lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> Self:
        return self._map(self.prompts, Tensor.pin_memory)

    def _map(self, prompts: Sequence[str], change) -> Self:
        others = {length: tuple(map(change, embeds)) for length, embeds in self.other_lengths.items()}
        embeds = (change(self.prompt_embeds), change(self.pooled_prompt_embeds))
        return type(self)(prompts, *embeds, self.text_length, others)


def prompts_of(text: Conditions | Sequence[str] | str, count: int) -> list[str]:
    """Return the `count` prompts in `text`. Raises ValueError if there are more or fewer, or if the text is unknown."""
    if isinstance(text, Conditions):
        prompts = list(text.prompts)
        if not any(prompts):
            raise ValueError("prompts: got embeddings without text; image rewards and callables read strings")
    else:
        text = text.item() if isinstance(text, np.ndarray) and text.ndim == 0 else text
        prompts = check_prompts([text] if isinstance(text, str) else text)
    if len(prompts) != count:
        got = f"got {len(prompts)} for {count} samples"
        raise ValueError(f"prompts: {got}; expected one per sample (repeat a prompt to score many samples)")
    return prompts


class PromptEncoder:
    """Encodes prompts with a pipeline's text encoders, without gradient and with autocast disabled.

    An instance is thread-safe. A call with prompts keeps the prompts' embeddings in a cache of bounded size.
    `Conditions.encode` and `PromptEncoder.encode` do not use the cache.

    Args:
        source: a StableDiffusion3Pipeline, or a pipeline folder or hub id. From a folder or hub id, the text encoders
            are loaded at the first prompt.
        text_length: T5 tokens per prompt (`max_sequence_length` of the pipeline).
        device: device of the embeddings, and of text encoders loaded from a folder or hub id. Default: the device of a
            given pipeline, otherwise the CPU.
        dtype: dtype of text encoders loaded from a folder or hub id.
        local_files_only: load text encoders without network access.
        max_cached: largest number of prompts in the cache. With SD3.5's text encoders in bfloat16, 1,000 prompts take
            about 2 GB of CPU memory.
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
        self.source, self.text_length, self.max_cached = source, text_length, max_cached
        self.dtype, self.local_files_only = dtype, local_files_only
        self._pipeline: StableDiffusion3Pipeline | None = None if isinstance(source, str | Path) else source
        home = "cpu" if self._pipeline is None else self._pipeline.device
        self.device = available_device(home if device is None else device)
        self._cache: dict[str, Embeds] = {}
        self._latest: tuple[list[str], Embeds | None] = ([], None)  # batch on the device, for the next call

    def __call__(self, prompts: Sequence[str], batch_size: int = 32) -> Embeds:
        """Return prompt_embeds (B, L, D), pooled_prompt_embeds (B, P) on the device. Encodes only uncached prompts."""
        prompts = check_prompts(prompts)
        with _ENCODING:
            unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
            for start in range(0, len(unseen), batch_size):
                part = unseen[start : start + batch_size]
                self._cache.update(zip(part, zip(*self.encode(part), strict=True), strict=True))
            embeds, pooled = zip(*(self._cache[prompt] for prompt in prompts), strict=True)
            for oldest in list(self._cache)[: -self.max_cached]:
                del self._cache[oldest]
            if prompts != self._latest[0]:
                with torch.inference_mode(False):
                    stacked = to_device(torch.stack(embeds), self.device), to_device(torch.stack(pooled), self.device)
                self._latest = prompts, stacked
            return self._latest[1]

    @torch.no_grad()
    def encode(self, prompts: list[str], text_length: int | None = None) -> Embeds:
        """Encode without the cache. Returns prompt_embeds (B, L, D), pooled_prompt_embeds (B, P) on the CPU."""
        with _ENCODING:
            pipeline = self._text_pipeline()
            encoders = text_encoders(pipeline)
            training = [encoder.training for encoder in encoders]
            try:
                for encoder in encoders:
                    encoder.eval()
                options = dict(max_sequence_length=text_length or self.text_length, do_classifier_free_guidance=False)
                device = encoders[0].device  # may differ from pipeline.device, the transformer's
                if device.type == "meta":  # offloaded by accelerate, whose hooks know where the encoders run
                    device = pipeline._execution_device
                with torch.autocast(device.type, enabled=False):
                    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device, **options)
            finally:
                for encoder, mode in zip(encoders, training, strict=True):
                    encoder.train(mode)
            return embeds.cpu(), pooled.cpu()

    @property
    def clip_tokens(self) -> int:
        """Number of CLIP tokens per prompt: the tokenizer's in a given pipeline or a local folder, otherwise 77."""
        if self._pipeline is not None:
            return self._pipeline.tokenizer_max_length
        config = Path(self.source) / "tokenizer" / "tokenizer_config.json"
        return read_json(config)["model_max_length"] if config.is_file() else CLIP_TOKENS

    def to(self, device: torch.device) -> None:
        """Return embeddings on `device` from now on, and move text encoders that this object has loaded to it."""
        with _ENCODING:
            self.device, self._latest = device, ([], None)
            if self._pipeline is not None and isinstance(self.source, str | Path):
                self._pipeline.to(device)

    def release(self) -> None:
        """Free text encoders that were loaded from a folder or hub id. Encoding the next prompt loads them again."""
        self._latest = [], None
        if isinstance(self.source, str | Path):
            self._pipeline = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def empty(self, batch: int) -> Embeds:
        """Return the embeddings of the empty prompt, for classifier-free guidance: (batch, L, D) and (batch, P)."""
        return self([""] * batch)

    def _text_pipeline(self) -> "StableDiffusion3Pipeline":
        if self._pipeline is None:
            self._pipeline = self._load()
        pipeline = self._pipeline
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            need = "prompts need text encoders, and the pipeline has none or has released them"
            raise ValueError(f"{need}: pass one that has them, or prompt_embeds and pooled_prompt_embeds")
        if pipeline.text_encoder_3 is None and pipeline.transformer is None:
            raise ValueError("the base model has no text_encoder_3 (T5): pass pipeline=..., or prompt_embeds")
        return pipeline

    @loading()
    def _load(self) -> "StableDiffusion3Pipeline":
        from diffusers import StableDiffusion3Pipeline
        from diffusers.configuration_utils import FrozenDict

        check_source("base model", self.source)
        folder = Path(self.source)
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            problem = f"{folder} is not a pipeline folder (it has no model_index.json)"
            raise ValueError(f"prompts need text encoders, and {problem}: pass pipeline=..., or prompt_embeds")
        if folder.is_dir():
            check_files(folder, TEXT_PARTS)
        local = folder.is_dir() or self.local_files_only
        hub = dict(local_files_only=local)
        absent = without_t5(find_file(self.source, "model_index.json", **hub))
        options = dict(transformer=None, vae=None, dtype=self.dtype, **weight_options(self.source, *TEXT_ENCODERS))
        with reading("text encoders and tokenizers", self.source):
            pipeline = StableDiffusion3Pipeline.from_pretrained(str(self.source), **options, **absent, **hub)
        if pipeline.text_encoder_3 is None:
            config = read_json(find_file(self.source, "transformer/config.json", **hub))
            pipeline.transformer = TransformerConfig(FrozenDict(config))
        for encoder in text_encoders(pipeline):
            encoder.requires_grad_(False)
        return pipeline.to(self.device)


@dataclass(frozen=True)
class TransformerConfig:
    """Stands in for the transformer of a pipeline that only encodes prompts.

    A pipeline without T5 reads the width of the zeros that take the place of T5's features from `config`.
    """

    config: Mapping[str, Any]


def text_encoders(pipeline: "StableDiffusion3Pipeline") -> list[torch.nn.Module]:
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    return [encoder for encoder in encoders if encoder is not None]
