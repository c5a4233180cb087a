"""Prompts of pixel rewards: the tokenizer, token ids padded to one length, and a cache of text features."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch
from transformers import AutoTokenizer, BatchEncoding

from dinalrm_align.models.hub import HubOptions, check_source
from dinalrm_align.train.files import reading

Features = TypeVar("Features")


def load_tokenizer(source: str | Path, **hub: Unpack[HubOptions]) -> Any:
    """The tokenizer of a folder or hub id."""
    check_source("tokenizer", source)
    with reading("tokenizer", source):
        return AutoTokenizer.from_pretrained(source, **hub)


def tokenise(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> BatchEncoding:
    """input_ids and attention_mask (B, length): padded or truncated to `length` tokens."""
    options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokenizer(list(texts), **options).to(device)


def cached(
    cache: dict[str, Features], prompts: Sequence[str], encode: Callable[[list[str]], Iterable[Features]], limit: int
) -> list[Features]:
    """The features of each prompt: new prompts are encoded in one batch; the `limit` newest stay in `cache`."""
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
    if new:
        cache.update(zip(new, encode(new), strict=True))
    found = [cache[prompt] for prompt in prompts]
    for oldest in list(cache)[:-limit]:
        del cache[oldest]
    return found
